"""What a process asks of its machine: a free address, an end with its parent, files, a Ray of this machine alone."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import re
import resource
import secrets
import signal
import socket
import stat
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

from embedding_service.errors import InvalidRequest
from embedding_service.foreign import printable, shown

# No config or index comes near it.
MOST_TEXT_BYTES = 64 << 20
MOST_PORT = 65535
_PR_SET_PDEATHSIG = 1
# Files that a process may need besides its connections: parts that are loaded, other shards, the store.
_OWN_FILES = 256
_TCP = (socket.AF_INET, socket.AF_INET6)
_PORTS = (f"ports go up to {MOST_PORT:,}", f"ports go up to {MOST_PORT:,} and begin at 1")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[A-Za-z0-9_*][A-Za-z0-9_.-]*):([0-9]+)")
# The fault of a bad address, by the first pattern that matches.
_HINTS = (
    (r"^\s*$", "it is empty; one is localhost:7070"),
    (r"^unix", "the service listens on ports, not on socket files"),
    (r"^\w+://", "leave out the scheme, and what follows the port"),
    (r"/", "leave out what follows the port"),
    (r"^\s|\s$", "leave out the blanks around it"),
    (r",", "give several addresses as a list"),
    (r"^[^\[]*:[^\[]*:", "an IPv6 host goes in brackets, as [::1]:7070"),
    (r"^(\[.*\]|[^:]*):?$", "the port is missing, as in localhost:7070"),
)
_libc = ctypes.CDLL(None)  # loaded here, because a child that was just forked must load nothing


def split_address(address: str, *, least: int = 0) -> tuple[str, int]:
    """Host, an IPv6 one in brackets, and port of an address. The port is at least `least`. 0 is for listening.

    Raises InvalidRequest, which says the remedy in one line.
    """
    form = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if form is None:
        raise InvalidRequest(f"an address must be HOST:PORT, got {shown(address)}{_hint(address)}")
    if len(form[2]) > 20 or not least <= int(form[2]) <= MOST_PORT:
        raise InvalidRequest(f"{_PORTS[least]}, got {shown(address)}")
    return form[1], int(form[2])


def _hint(address: object) -> str:
    found = (hint for pattern, hint in _HINTS if isinstance(address, str) and re.search(pattern, address))
    return "".join(f": {hint}" for hint in list(found)[:1])


def join_address(host: str, port: int) -> str:
    """host:port, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def complete_address(address: str, port: int) -> str:
    """HOST:PORT as it is, HOST (an IPv6 one with or without brackets) with this port. Raises InvalidRequest."""
    after = address.rpartition("]")[2]
    if after.count(":") != 1:  # a host alone
        address = join_address(address, port)
    split_address(address)
    return address


def check_free(address: str, option: str = "port") -> None:
    """Raise InvalidRequest if somebody listens there, naming `option`, or if this machine has no such address.

    It is for ports that several processes share. Without this look they would share another service's, unnoticed.
    """
    host, port = split_address(address)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except (ValueError, TypeError):  # no name: empty between its dots, too long, or with a NUL
            raise InvalidRequest(f"cannot listen on {shown(address)}: that is no name of a host") from None
        except OSError as error:
            wrong_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            remedy = "the host must be an address of this machine" if wrong_host else f"give another {option}"
            raise InvalidRequest(f"cannot listen on {printable(address)} ({error.strerror}): {remedy}") from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port of an address of this machine that nobody listens on at the moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host.strip("[]"), 0))
        return int(probe.getsockname()[1])


def end_with_parent(how: signal.Signals) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, how)


def prepare_local_ray() -> None:
    """Set the environment of a Ray that starts here, before ray is imported.

    It stays off the network: its node has the loopback address. Ray does that by itself on macOS and Windows only. Its
    processes reach each other directly. They speak gRPC and HTTP, and both would ask the proxies of http_proxy and
    others.
    """
    import psutil

    os.environ.update({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"})
    # Other users of this machine reach its ports too. Its processes alone know the token.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    own = {each.address for addresses in psutil.net_if_addrs().values() for each in addresses if each.family in _TCP}
    for variable in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):  # gRPC looks at the last one first
        given = os.environ.get(variable, "")
        if given or variable != "no_grpc_proxy":
            os.environ[variable] = ",".join(filter(None, (given, "localhost", *sorted(own))))


@cache
def boot_id() -> str:
    """The id of this machine's start. Containers of one machine share it. Empty if it is not known."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def spare_collections() -> None:
    """Have Python look for no garbage in what is in memory by now, which is mostly what was imported.

    A full collection walks through all of that and holds everything up, 90 ms in a shard. What a few clients send can
    bring one about.
    """
    gc.freeze()


def give_freed_memory_back() -> None:
    """Have malloc give all unused pages to the kernel. If the C library is not glibc, nothing changes."""
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(0)


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may. A connection is one, and usual limits are 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def room_for_connections() -> int:
    """Connections that may come to one of two ports of this process. It keeps files for its own work.

    At the limit of open files it could neither answer nor look at its store.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    return max((limit - opened - min(_OWN_FILES, limit // 2)) // 2, 1)


def open_file(path: Path) -> FileIO:
    """Open a regular file for reading, unbuffered. Raises OSError, also for a FIFO or a device, which could wait."""
    file = FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def read_file(path: Path, most: int = MOST_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that somebody else wrote. Raises OSError, or ValueError that says "is not ..."."""
    try:
        content = json.loads(read_file(path).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    return content


def write_durably(path: Path, data: bytes, own: str = "") -> None:
    """Write a file. At any moment either the old or the new content is on disk.

    own: What sets the new content's file apart, if several processes may write at a time.
    """
    new = path.with_name(f"{path.name}{own}.new")
    write_synced(new, data)
    new.replace(path)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file. It is on disk afterwards, its name perhaps not yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
