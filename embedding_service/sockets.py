"""This process's TCP sockets: what came on them, and how to end those at its own ports from outside of gRPC."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import termios
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from embedding_service.machine import split_address

_TCP = (socket.AF_INET, socket.AF_INET6)
# Of the kernel's struct tcp_info: where the number of received bytes lies, and that of sent ones, and where that ends.
_RECEIVED, _SENT, _INFO_BYTES = 128, 200, 208
# The kernel's states of a TCP connection on which more may come, though the other side may have said that it was all.
_OPEN, _LISTENING = (1, 8), 10
# The kernel's names of classic BPF, whose socket filters it has as options of sockets. `_NET` is where a packet begins.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_LOAD_BYTE, _LOAD_WORD, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x20, 0x54, 0x15, 0x06
_NET, _DROP, _PASS = 0xFFF00000, 0, 0xFFFFFFFF
# An instruction names others at most 255 further on.
MOST_HOSTS = 100


@dataclass(frozen=True)
class Connection:
    """One of this process, at one moment.

    Attributes:
        file: This process's descriptor.
        incoming: Whether it came to one of the ports that were asked for. The others are mostly to other servers.
        peer: Its other side, as gRPC names it. Nothing where one of the two has ended it, though gRPC may read on.
        read: Bytes that this process took from it so far.
        unread: Bytes that came and that it did not take.
        sent: Bytes that went out so far.
    """

    file: int
    incoming: bool
    peer: str
    read: int
    unread: int
    sent: int

    @property
    def host(self) -> str:
        """The peer without its port."""
        return self.peer.rpartition(":")[0]


def address_of(host: str) -> str:
    """The address of a host that gRPC names."""
    return host.partition(":")[2].removeprefix("%5B").removesuffix("%5D")


def connections(ports: Collection[int]) -> list[Connection]:
    """Those that are open, and which came to these ports; none where the kernel does not tell what came on them."""
    found = []
    for file, each in _sockets():
        with contextlib.suppress(OSError, struct.error):
            info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
            if info[0] != _LISTENING:
                (received,), (sent,) = (struct.unpack_from("Q", info, at) for at in (_RECEIVED, _SENT))
                (unread,) = struct.unpack("i", fcntl.ioctl(each, termios.FIONREAD, bytes(4)))
                incoming = each.getsockname()[1] in ports
                found.append(Connection(file, incoming, _peer(each, info[0]), received - unread, unread, sent))
    return found


def cut(connection: Connection) -> None:
    """Hang up, and drop what came and was not read. Does nothing where another one has its descriptor by now."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.file)) as each:
        if _peer(each, each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]) != connection.peer:
            return
        with contextlib.suppress(OSError):  # ended by the other side
            # Tells the other side, however much it has to send, as soon as gRPC closes it.
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.shutdown(socket.SHUT_RDWR)
        # gRPC would read that still. With this flag the kernel copies nothing.
        while each.recv(1 << 20, socket.MSG_TRUNC | socket.MSG_DONTWAIT):
            pass


def keep_out(ports: Collection[int], hosts: Collection[str]) -> None:
    """Have the kernel drop what asks for a new connection to these ports and comes from one of at most MOST_HOSTS.

    To those hosts it looks like a lost packet: they ask again after a second, and after longer ones. Connections that
    are open stay. An IPv6 host is known by its network (/64). Replaces what was said before. Does nothing where the
    kernel has no such filters.
    """
    program = _filter(map(address_of, hosts))
    code = ctypes.create_string_buffer(program, len(program))
    option = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
    for _, each in _sockets_at(ports):
        with contextlib.suppress(OSError):
            if not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            if hosts:
                each.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)
            else:
                each.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def hang_up(address: str) -> None:
    """Close what this process has open at a port of its own: the listening socket, and the connections that came there.

    What was sent arrives, and nothing more is sent. Does nothing for an address that is no HOST:PORT.
    """
    if address.startswith("unix"):
        return
    with contextlib.ExitStack() as copies:
        there = [(file, copies.enter_context(each.dup())) for file, each in _sockets_at({split_address(address)[1]})]
        listening = [each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for _, each in there]
        # Those first, for clients come again at once. In their place comes a socket that nobody reaches: to gRPC, which
        # has the number, an end of listening would be a failure.
        for (file, each), listens in zip(there, listening, strict=True):
            if listens:
                with socket.socket() as unreachable:
                    os.dup2(unreachable.fileno(), file)
                each.close()
        for (_, each), listens in zip(there, listening, strict=True):
            if not listens:
                with contextlib.suppress(OSError):  # closed by the other side
                    each.shutdown(socket.SHUT_RDWR)


def _sockets_at(ports: Collection[int]) -> Iterator[tuple[int, socket.socket]]:
    """Those at these ports, as `_sockets` has them."""
    for file, each in _sockets():
        with contextlib.suppress(OSError):  # closed since
            if each.getsockname()[1] in ports:
                yield file, each


def _sockets() -> Iterator[tuple[int, socket.socket]]:
    """This process's descriptor, and the socket under a further one, which is closed afterwards."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (a tenth of iterdir's time)
        with contextlib.suppress(OSError):  # closed since
            copy = os.dup(int(name))
            try:
                each = socket.socket(fileno=copy)
            except OSError:  # no socket
                os.close(copy)
                continue
            with each:
                if each.family in _TCP:
                    yield int(name), each


def _peer(connection: socket.socket, state: int) -> str:
    """How gRPC names the other side; nothing where one of the two has ended the connection."""
    if state not in _OPEN:
        return ""
    address, port = connection.getpeername()[:2]
    address = address.removeprefix("::ffff:") if "." in address else address
    return f"ipv6:%5B{address}%5D:{port}" if ":" in address else f"ipv4:{address}:{port}"


def _filter(addresses: Iterable[str]) -> bytes:
    """Classic BPF that drops packets from these and passes all others."""
    hosts = [ipaddress.ip_address(address.partition("%")[0]) for address in addresses]
    of_4 = [int(host) for host in hosts if host.version == 4]
    networks = [int(host) >> 64 for host in hosts if host.version == 6]
    checked_4 = [
        (_LOAD_WORD, 0, 0, _NET + 12),
        *((_JUMP_IF_EQUAL, len(of_4) - number, 0, host) for number, host in enumerate(of_4)),
        (_RETURN, 0, 0, _PASS),
        (_RETURN, 0, 0, _DROP),
    ]
    checked_6 = [
        step
        for network in networks
        for step in (
            (_LOAD_WORD, 0, 0, _NET + 8),
            (_JUMP_IF_EQUAL, 0, 3, network >> 32),
            (_LOAD_WORD, 0, 0, _NET + 12),
            (_JUMP_IF_EQUAL, 0, 1, network & 0xFFFFFFFF),
            (_RETURN, 0, 0, _DROP),
        )
    ]
    version = [(_LOAD_BYTE, 0, 0, _NET), (_AND, 0, 0, 0xF0), (_JUMP_IF_EQUAL, 0, len(checked_4), 0x40)]
    steps = [*version, *checked_4, *checked_6, (_RETURN, 0, 0, _PASS)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
