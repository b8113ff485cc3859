"""Near rows, the shard's side: clients of this machine are handed the files of parts, and told of each change."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from embedding_service.address_space import sealed
from embedding_service.errors import EmbeddingServiceError, InvalidRequest
from embedding_service.foreign import shown
from embedding_service.machine import boot_id
from embedding_service.near.board import BEAT_SECONDS, VERSION, Board
from embedding_service.placement.parts import PartKey
from embedding_service.rows.base import Ids, Location
from embedding_service.store.manifest import Table
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import near_pb2 as near

log = logging.getLogger(__name__)

# Clients at a time; each has a connection. What is over that reads over the wire.
MOST_CLIENTS = 256
# Of a packet: descriptors, of which the kernel takes 253, and what else is said in one.
MOST_FILES, MOST_DROPPED, PACKET_BYTES = 64, 1_000, 64 << 10
# A connection that has not said what it wants by then is closed.
HELLO_SECONDS = 2.0
# Of one client's count of rows that it read, which says how much a part is asked for and nothing else.
MOST_READS = 1 << 32
# Parts that were dropped since a client asked last: one that does not ask is let go.
MOST_UNTOLD = 100_000
# Of the files that this process may open, those for parts.
SHARE_OF_FILES = 4
MOST_PATH_BYTES = 107  # sockaddr_un's, with a zero behind it

_PEER = struct.Struct("3i")  # process, user, group

# Model, version, table.
TableKey = tuple[str, str, str]
# Says of a part whether a client may read it.
Rights = Callable[[PartKey], bool]


def all_parts(authorization: str) -> Rights:
    """The rights of everybody who is let in, where nobody says otherwise."""
    return lambda key: True


@dataclass(eq=False)
class _Client:
    """A connection. `rights` are those of its hello, None before it; `seen` is the newest generation it was told of."""

    connection: socket.socket
    since: float
    rights: Rights | None = None
    authorization: str = ""
    waits: bool = False
    seen: int = 0
    dropped: list[int] = field(default_factory=list)


@dataclass
class _Held:
    """A part and its file, open for reading."""

    key: PartKey
    message: near.NearPart
    fd: int


class NearServer:
    """Listens on a Unix socket. Used from one event loop, but for `hold`, which any thread may call.

    Only processes of this user and of root are let in. What a client maps is sealed, or a file that it may as well open
    by itself, so it cannot change a row. Nobody waits for a client: it has at most one answer that it did not take.

    Args:
        path: Where the socket is to be, in a folder that exists.
        incarnation: This shard's; clients name the one that they mean.
        age: The (term, epoch) of the routing it serves by.
        add_accesses: Told what clients read: int64 [parts] of a table.
        rights_of: What a client may read, by what its hello has as `authorization`. It is asked once for each
            connection. What it raises, an EmbeddingServiceError, is why the client is refused.

    Attributes:
        rows: Rows that clients read so far, by what they reported.

    Raises InvalidRequest where that cannot be.
    """

    def __init__(
        self,
        path: str,
        incarnation: int,
        age: Callable[[], tuple[int, int]],
        add_accesses: Callable[[TableKey, Ids], None],
        rights_of: Callable[[str], Rights] = all_parts,
    ) -> None:
        self._path = os.path.realpath(path)
        self.rows = 0
        self._incarnation = incarnation
        self._age = age
        self._add_accesses = add_accesses
        self._rights_of = rights_of
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._generations = itertools.count(time.time_ns())
        self._held: dict[int, _Held] = {}  # by generation, the newest last
        self._generation_of: dict[PartKey, int] = {}
        self._clients: set[_Client] = set()
        self._most_held = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE_OF_FILES
        self._board = Board()
        try:
            self._socket = _listen(path)
        except BaseException:
            self._board.close()
            raise
        self._loop.add_reader(self._socket, self._accept)
        self._beating = self._loop.create_task(self._beat())

    @property
    def place(self) -> wire.NearPlace:
        """Where it is, as the routing tells clients."""
        return wire.NearPlace(path=self._path, boot_id=boot_id(), incarnation=self._incarnation)

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._clients)

    def hold(self, key: PartKey, table: Table, location: Location) -> None:
        """Hand a part out from now on: see `shard.holdings.Sharing`."""
        try:
            fd = os.open(location.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            log.warning("%s is not near: %s", key, error.strerror)
            return
        in_memory = sealed(fd)
        if in_memory is False:
            log.warning("%s is not near: its memory cannot be sealed", key)
            os.close(fd)
            return
        part = near.NearPart(model=key.model, version=key.version, part=key.part, table=_info(table))
        part.offset, part.memory = location.offset, bool(in_memory)
        held = _Held(key, part, fd)
        if threading.get_ident() == self._thread:
            self._hold(held)  # at once: a drop may be the loop's next work
            return
        with suppress(RuntimeError):  # the loop has ended, and this shard with it
            self._loop.call_soon_threadsafe(self._hold, held)

    def drop(self, key: PartKey) -> None:
        """No client uses the part's rows any more once this returned; nobody is waited for."""
        generation = self._generation_of.pop(key, None)
        if generation is None:
            return
        held = self._held.pop(generation)
        self._board.drop(held.message.slot)
        os.close(held.fd)
        for client in list(self._clients):
            if generation <= client.seen and client.rights and client.rights(key):
                client.dropped.append(generation)
                self._tell(client)
                if len(client.dropped) > MOST_UNTOLD:
                    self._leave(client)

    def tell_age(self) -> None:
        """There is a newer routing."""
        self._board.tell_age(*self._age())

    def look_again(self) -> None:
        """Leave clients whose rights are others by now. They may come again, and read what they may."""
        for client in [each for each in self._clients if each.rights is not None]:
            try:
                now = self._rights_of(client.authorization)
            except EmbeddingServiceError:
                self._leave(client)
            else:
                if now != client.rights:
                    self._leave(client)

    def close(self) -> None:
        """Let all clients go on without this shard."""
        self._beating.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        with suppress(OSError):
            Path(self._path).unlink()
        for key in list(self._generation_of):
            self.drop(key)
        for client in list(self._clients):
            self._leave(client)
        self._board.close()

    def _hold(self, held: _Held) -> None:
        if len(self._held) >= self._most_held:
            log.warning("%s is not near: %d parts have taken this process's share of files", held.key, len(self._held))
            os.close(held.fd)
            return
        self.drop(held.key)
        generation = next(self._generations)
        held.message.slot, held.message.generation = self._board.hold(generation), generation
        self._held[generation] = held
        self._generation_of[held.key] = generation
        for client in list(self._clients):
            self._tell(client)

    async def _beat(self) -> None:
        """On the loop that learns of routings: where it hangs, clients are not to trust what they read."""
        while True:
            self.tell_age()
            self._board.beat()
            late = time.monotonic() - HELLO_SECONDS
            for client in [each for each in self._clients if each.rights is None and each.since < late]:
                self._leave(client)
            await asyncio.sleep(BEAT_SECONDS)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:  # it is gone already, or there is no file left for it
            return
        connection.setblocking(False)
        if len(self._clients) >= MOST_CLIENTS:
            connection.close()
            return
        client = _Client(connection, time.monotonic())
        self._clients.add(client)
        self._loop.add_reader(connection, self._hear, client)

    def _hear(self, client: _Client) -> None:
        try:
            packet = client.connection.recv(PACKET_BYTES)
            request = near.NearRequest.FromString(packet)
        except BlockingIOError:
            return
        except (OSError, DecodeError):
            self._leave(client)
            return
        if not packet:
            self._leave(client)
        elif client.rights is None:
            self._let_in(client, request)
        else:
            self._count(request)
            client.waits |= request.next
            self._tell(client)

    def _let_in(self, client: _Client, request: near.NearRequest) -> None:
        user = _user_of(client.connection)
        if user not in (0, os.geteuid()):
            self._refuse(client, f"user {user} is neither this shard's nor root")
        elif request.version != VERSION:
            self._refuse(client, f"this shard speaks version {VERSION}, the client {request.version}")
        elif request.incarnation != self._incarnation:
            self._refuse(client, "this is another shard than the routing names")
        else:
            try:
                client.authorization = request.authorization
                client.rights = self._rights_of(request.authorization)
            except EmbeddingServiceError as error:
                self._refuse(client, str(error))
            else:
                self._answer(client, near.NearAnswer(board=True), [self._board.fd])

    def _tell(self, client: _Client) -> None:
        """What the client does not know yet, if it asked for it and there is something."""
        if not client.waits or client.rights is None:
            return
        news = [each for each in _newer(self._held, client.seen) if client.rights(each.key)][:MOST_FILES]
        dropped = client.dropped[:MOST_DROPPED]
        if not news and not dropped:
            return
        client.waits = False
        del client.dropped[: len(dropped)]
        if news:
            client.seen = news[-1].message.generation
        answer = near.NearAnswer(held=[each.message for each in news], dropped=dropped)
        self._answer(client, answer, [each.fd for each in news])

    def _answer(self, client: _Client, answer: near.NearAnswer, files: list[int]) -> None:
        try:
            socket.send_fds(client.connection, [answer.SerializeToString()], files)
        except OSError as error:  # it does not take what it asked for, or has gone
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                log.warning("a near client is let go: %s", error.strerror)
            self._leave(client)

    def _refuse(self, client: _Client, why: str) -> None:
        log.info("not handed to a near client: %s", why)
        self._answer(client, near.NearAnswer(refusal=why), [])
        self._leave(client)

    def _leave(self, client: _Client) -> None:
        self._clients.discard(client)
        if client.connection.fileno() >= 0:
            self._loop.remove_reader(client.connection)
            client.connection.close()

    def _count(self, request: near.NearRequest) -> None:
        """It is told of heat, so what a client says can do no more than move a part."""
        for each in request.reads:
            held = self._held.get(each.generation)
            if held:
                rows = min(each.rows, MOST_READS)
                self.rows += rows
                accesses = np.zeros(_parts(held.message.table), np.int64)
                accesses[held.key.part] = rows
                self._add_accesses(held.key[:3], accesses)


def _user_of(connection: socket.socket) -> int:
    """Whose process is at the other end, as the kernel says."""
    _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(user)


def _newer(held: dict[int, _Held], seen: int) -> list[_Held]:
    """Of a newer generation than `seen`, the oldest first."""
    return list(itertools.takewhile(lambda each: each.message.generation > seen, reversed(held.values())))[::-1]


def _parts(info: wire.TableInfo) -> int:
    return -(-info.rows // max(info.rows_per_part, 1))


def _info(table: Table) -> wire.TableInfo:
    return wire.TableInfo(
        name=table.name,
        rows=table.rows,
        dim=table.dim,
        dtype=table.dtype,
        row_bytes=table.row_bytes,
        rows_per_part=table.rows_per_part,
    )


def check_path(path: str) -> None:
    """Raise InvalidRequest for what no socket can be at."""
    if not 0 < len(os.fsencode(path)) <= MOST_PATH_BYTES or "\0" in path:
        raise InvalidRequest(f"--near must be a path of at most {MOST_PATH_BYTES} bytes, got {shown(path)}")


def _listen(path: str) -> socket.socket:
    """A socket that only this user may connect to. One that nobody listens at any more gives way."""
    check_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # of the file that `bind` makes
        if _is_abandoned(path):
            Path(path).unlink()
        listener.bind(path)
        listener.listen(MOST_CLIENTS)
    except OSError as error:
        listener.close()
        remedy = "somebody listens there" if error.errno == errno.EADDRINUSE else str(error.strerror)
        raise InvalidRequest(f"cannot listen on --near {shown(path)}: {remedy}; give another path") from error
    return listener


def _is_abandoned(path: str) -> bool:
    """Whether a socket lies there at which nobody listens."""
    if not Path(path).is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False
