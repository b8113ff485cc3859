"""`up`: controller and shards on one machine, as child processes that end with this one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from embedding_service.client.status import get_status
from embedding_service.commands.console import wide_console
from embedding_service.commands.query import status_tables
from embedding_service.commands.waiting import Waiting
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, NotFound, PlacementError, Unavailable
from embedding_service.foreign import printable
from embedding_service.machine import check_free, end_with_parent, free_port, join_address
from embedding_service.private_folder import PrivateFolder
from embedding_service.rows import TIERS
from embedding_service.rows.base import LiesIn
from embedding_service.security.access import Access, access_of
from embedding_service.wire import control_pb2 as control

# Seconds from SIGTERM on. A process that has not ended by then is killed.
STOP_SECONDS = 4.5
POLL_SECONDS = 0.1
# Between two lines of what is waited for, where there is no terminal.
LINE_SECONDS = 2.0
# Shards or models that a line names.
NAMED = 4
# If nothing gets ready for this long, something is wrong that nobody reports.
STALL_SECONDS = 120.0
# Pauses before an ended process is started again. One that ran for longer than the second did not fail at once.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


@dataclass(frozen=True)
class UpOptions:
    """What `up` starts. `memory` is bytes of a shard, None for an equal share of what is available.

    `processes` are those of one shard. `secure`: the folder with certificates. None: plain text, which `insecure`
    allows beyond loopback. `audit`: a file that all of them write to. `http_port`: of the cluster's page on
    `http_host`, 0 for none, None for a free one. `metrics_port`: of the controller; each shard has the next one.
    """

    store: str
    shards: int
    replicas: int
    host: str
    port: int
    tier: str
    memory: int | None
    cache: Path | None
    processes: int
    secure: Path | None = None
    insecure: bool = False
    audit: Path | None = None
    http_port: int | None = None
    http_host: str = "127.0.0.1"
    metrics_port: int = 0

    def with_page(self) -> UpOptions:
        """With the page's port. Raises InvalidRequest if it is taken."""
        if self.http_port is None:
            return replace(self, http_port=free_port(self.http_host))
        if self.http_port:
            check_free(join_address(self.http_host, self.http_port), "--http-port")
        return self

    @property
    def page(self) -> str:
        """The page's address for a browser. Empty where there is none."""
        scheme = "https" if self.secure else "http"
        return f"{scheme}://{join_address(self.http_host, self.http_port)}" if self.http_port else ""


def run(options: UpOptions) -> None:
    """Start everything, say when it serves, and keep it running until SIGINT or SIGTERM.

    Raises:
        NotFound: the store has no model.
        InvalidRequest: the port is taken.
        PlacementError: the models do not fit the shards.
    """
    console = wide_console(stderr=True)
    address = join_address(options.host, options.port)
    console.print(f"looking for models in {options.store}")
    check_store(options.store)
    check_free(address, "--port")
    options = options.with_page()
    TIERS[options.tier].check_machine()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too, because a shell starts background jobs with it ignored
        signal.signal(number, interrupt)
    members: list[_Member] = []
    sockets = PrivateFolder()
    try:
        controller, control = two_addresses(options.host)
        names = [shard_name(index) for index in range(options.shards)]
        access = prepare(options.secure, options.host, names) if options.secure else None
        members.append(_Member("controller", controller_command(options, controller, control)))
        for name in names:
            command = shard_command(options, control if options.secure else controller, name, str(sockets.path))
            members.append(_Member(name, command))
        status = wait_until_serving(controller, lambda: _check_alive(members), options.shards, console, access)
        for table in status_tables(status):
            console.print(table)
        if options.secure:
            console.print(Text(f'clients: EmbeddingClient("{address}", tls="{options.secure / "client"}")'))
        if options.page:
            console.print(Text(f"page: {options.page}"))
        print(f"ready: {options.shards} shards at {address}, controller {controller}", flush=True)
        _keep_running(members, console)
    except KeyboardInterrupt:
        console.print("ending")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop_processes([member.popen for member in members])
        sockets.close()


def check_store(url: str) -> None:
    """Raise NotFound if there is no model in it."""
    from embedding_service.store.store import Store  # with torch, which Ray's actors do without

    store = Store(url)
    if store.is_private:
        raise InvalidRequest(f"{url} is in each process's own memory: give a folder, or a URL that all can read")
    if not store.models():
        absent = "" if "://" in url or Path(url).is_dir() else ", which is no folder"
        raise NotFound(f"no model in store {url}{absent}: `embedding-service import` puts one there")


def two_addresses(host: str) -> tuple[str, str]:
    """The controller's, for clients and for shards."""
    first, second = free_port(host), free_port(host)
    while second == first:
        second = free_port(host)
    return join_address(host, first), join_address(host, second)


def prepare(folder: Path, host: str, shards: Sequence[str], more: Sequence[str] = ()) -> Access:
    """Make what secures a service in a folder. Returns what its admin shows. `more`: hosts besides this machine."""
    from embedding_service.security.authority import prepare_folder

    here = ["localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()]
    hosts = list(dict.fromkeys([*here, *([] if host in ("0.0.0.0", "::") else [host]), *more]))
    prepare_folder(folder, hosts, ["controller", *shards])
    access = access_of(folder / "client", None)
    assert access
    return access


def _secured(options: UpOptions, name: str) -> list[str]:
    """The arguments that secure a member, or that let it speak plain text."""
    if options.secure is None:
        return ["--insecure"] if options.insecure else []
    audit = [f"--audit={options.audit}"] if options.audit else []
    return [*secured_by(options.secure, name), *audit]


def secured_by(folder: Path, name: str) -> list[str]:
    """The arguments that secure a member by what `prepare` made for it."""
    own = folder.absolute() / name
    files = [f"--tls-cert={own / 'tls.crt'}", f"--tls-key={own / 'tls.key'}", f"--tls-ca={own / 'ca.crt'}"]
    return [*files, f"--policy={folder.absolute() / 'policy.toml'}"]


def controller_command(options: UpOptions, controller: str, control: str = "") -> list[str]:
    """The arguments of a controller at host:port `controller`; `control` is for shards, where they have TLS."""
    return [
        "controller",
        f"--store={options.store}",
        f"--listen={controller}",
        f"--replicas={options.replicas}",
        f"--expect-shards={options.shards}",
        *_secured(options, "controller"),
        *([f"--control-listen={control}"] if options.secure else []),
        *([f"--metrics-port={options.metrics_port}"] if options.metrics_port else []),
        *([f"--http-port={options.http_port}", f"--http-host={options.http_host}"] if options.http_port else []),
    ]


def shard_command(options: UpOptions, controller: str, name: str, folder: str) -> list[str]:
    """The arguments of one shard; its socket for clients of this machine is in a folder of this user's alone."""
    command = [
        "shard",
        f"--store={options.store}",
        f"--controller={controller}",
        f"--listen={join_address(options.host, 0)}",
        f"--shared-listen={join_address(options.host, options.port)}",
        f"--id={name}",
        f"--tier={options.tier}",
        f"--processes={options.processes}",
        "--drain-seconds=0",  # all of them end together
        *_secured(options, name),
    ]
    if options.metrics_port:
        command.append(f"--metrics-port={options.metrics_port + 1 + shard_number(name)}")
    memory, tier = options.memory, TIERS[options.tier]
    if tier.shareable:
        command.append(f"--near={folder}/{name}")
    if memory is None and tier.lies_in is not LiesIn.FILES:  # which all shards of a machine have together
        memory = tier.default_limit(options.store, Path()) // options.shards
    if memory is not None:
        command.append(f"--memory={memory}")
    if options.cache:
        command.append(f"--cache={options.cache}")
    return command


def shard_name(index: int) -> str:
    """Of the shard that `up` starts as this one, from 0 on."""
    return f"shard-{index}"


def shard_number(name: str) -> int:
    """The index of `shard_name`."""
    return int(name.rpartition("-")[2])


def start_process(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command of `embedding-service` that ends with the calling thread."""
    return subprocess.Popen(
        [sys.executable, "-m", "embedding_service", *arguments],
        stdin=subprocess.DEVNULL,
        # Ctrl-C is for us, and we end them in order. If we die, the kernel tells them to end.
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),
    )


class _Member:
    """A process that is started again when it ends, after a pause that grows unless it ran for a while."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = command
        self._pause = FIRST_PAUSE
        self._start_at = 0.0
        self._start()

    def _start(self) -> None:
        self.popen = start_process(self._command)
        self._started = time.monotonic()

    def look(self) -> str:
        """Start it if it is time to. Returns a message when it has ended."""
        now = time.monotonic()
        if self.popen.poll() is None or now < self._start_at:
            return ""
        if self._start_at > self._started:
            self._start()
            return ""
        self._pause = FIRST_PAUSE if now - self._started > LONGEST_PAUSE else min(2 * self._pause, LONGEST_PAUSE)
        self._start_at = now + self._pause
        return f"{self.name} ended with exit code {self.popen.returncode}: it starts again in {self._pause:g} s"


def _check_alive(members: list[_Member]) -> None:
    for member in members:
        if member.popen.poll() is not None:
            raise Unavailable(f"{member.name} ended with exit code {member.popen.returncode}; its last words are above")


def wait_until_serving(
    controller: str,
    check_alive: Callable[[], None],
    shards: int,
    console: Console,
    access: Access | None = None,
) -> control.Status:
    """Wait until every model is served. The console says what it waits for.

    Args:
        controller: Its address.
        check_alive: Called all along. Raises when one of the processes ended.
        shards: How many are to register.
        console: Where to say it.
        access: What to show the controller. None: plain text.

    Raises:
        PlacementError: the models do not fit the shards, or the store cannot be read.
        Unavailable: nothing got ready for STALL_SECONDS, or what shards report fails for 5 s.
    """
    ready, last_progress = -1, time.monotonic()
    status = control.Status()
    with Waiting(console, least_seconds=LINE_SECONDS) as waiting:
        while True:
            check_alive()
            waiting.say(awaited(status, shards))
            with suppress(EmbeddingServiceError):
                status = get_status(controller, timeout=2.0, tls=access or False)
            if status.models and all(model.serving for model in status.models):
                for problem in status.problems:  # such as fewer shards than copies, or a folder that is no model's
                    console.print(Text(printable(f"note: {problem.message}")))
                return status
            for problem in status.problems:
                if problem.kind in (control.Problem.KIND_STORE, control.Problem.KIND_PLACEMENT):
                    raise PlacementError(problem.message)
            now_ready = len(status.shards) + sum(model.parts_ready for model in status.models)
            if now_ready > ready:
                ready, last_progress = now_ready, time.monotonic()
            failing = [problem.message for problem in status.problems if problem.kind == control.Problem.KIND_SHARD]
            if time.monotonic() - last_progress > (5.0 if failing else STALL_SECONDS):
                raise Unavailable("; ".join(failing) or f"nothing got ready for {STALL_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)


def awaited(status: control.Status, shards: int) -> str:
    """A line that says what is not there yet."""
    if not status.shards:
        return f"waiting for the controller and {shards} shards to start"
    here = {shard.shard_id for shard in status.shards}
    missing = [name for name in map(shard_name, range(shards)) if name not in here]
    line = f"waiting: {len(here)} of {shards} shards registered"
    if missing:
        return f"{line}, not yet {', '.join(missing[:NAMED])}{' and others' if len(missing) > NAMED else ''}"
    loading = [model for model in status.models if not model.serving]
    models = ", ".join(f"{model.model.name}@{model.model.version}" for model in loading[:NAMED])
    done, parts = (sum(getattr(model, key) for model in status.models) for key in ("parts_ready", "parts"))
    return f"{line}, {done:,} of {parts:,} parts loaded; not served yet: {models or 'the routing is being made'}"


def _keep_running(members: list[_Member], console: Console) -> NoReturn:
    """Start ended members again: this is their platform. Until then the controller places a dead shard's parts."""
    while True:
        for member in members:
            if said := member.look():
                console.print(said, style="red")
        time.sleep(POLL_SECONDS)


def stop_processes(children: Collection[subprocess.Popen[bytes]]) -> None:
    """End them. Returns when they did, within STOP_SECONDS."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handle SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt
