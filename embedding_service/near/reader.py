"""A client's side of near rows: parts of shards of this machine, mapped and read in place.

A thread keeps connections to the shards that the routing names on this machine, maps what they hand out and shows it as
a `View`. Lookups take the view of the moment and never wait for the thread. They look at the board's generations before
and after they copy rows, and at whether the view is still the same: rows are used only where nothing changed.
"""

from __future__ import annotations

import itertools
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from embedding_service.address_space import PAGE, AddressSpace, most_maps, sealed, take_rows
from embedding_service.errors import EmbeddingServiceError, NoRoom
from embedding_service.machine import boot_id
from embedding_service.near import through_kernel
from embedding_service.near.board import (
    BEAT,
    BOARD_BYTES,
    BOARD_WORDS,
    EPOCH,
    FIRST_SLOT,
    LONGEST_SILENCE,
    NOTHING,
    TERM,
    VERSION,
    VERSION_WORD,
    fence,
)
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import near_pb2 as near

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# Shards of one machine whose rows are near; those of others come over the wire.
MOST_SHARDS = 64
# Between two looks at the boards' beats, and between two reports of what was read.
LOOK_SECONDS, REPORT_SECONDS = 0.2, 1.0
# A shard that answers nothing for so long, and the pauses before it is tried again.
PATIENCE, FIRST_PAUSE, LONGEST_PAUSE = 2.0, 0.5, 8.0
PACKET_BYTES, MOST_FILES, MOST_REPORTED = 256 << 10, 64, 1_000
# Of the mappings that a process may have, those for parts: each takes one. Others need some too.
SHARE_OF_MAPS = 4
# Of a table: no more than a process has addresses for.
MOST_BYTES = 1 << 46
# Up to this many rows are counted one by one. Of more rows, a sample stands for all.
_COUNTED = 64
_turn = itertools.count()
_NO_PART = -1
# Up to so many parts it takes less time to look at all of a table's than to find out which are asked for.
_FEW_PARTS = 256

# `model@version` and table.
TableKey = tuple[str, str]


class Place(NamedTuple):
    """Where a shard's socket is: in the file system of the machine whose boot has this id."""

    shard: str
    path: str
    boot_id: str
    incarnation: int


class NearTable:
    """A table's parts that are near, as of one view; parts of all shards side by side in one range of addresses.

    Attributes:
        complete: All its parts are near.
        reads: int64 [parts], rows read of each since it was last taken; shared by all views.
    """

    def __init__(self, mapped: _Mapped, boards: AddressSpace, live: Mapping[int, _Mapping]) -> None:
        parts = -(-mapped.info.rows // mapped.info.rows_per_part)
        info = self.info = mapped.info
        self.reads = mapped.reads
        self.row_bytes, self.rows_per_part = info.row_bytes, info.rows_per_part
        self._shape = (info.rows, info.row_bytes, info.dtype, info.rows_per_part)
        self._space = mapped.space
        self._rows: Bytes = mapped.space.tensor.numpy().reshape(info.rows, info.row_bytes)
        self._in_files = any(not each.memory for each in live.values())
        self._boards = boards  # for as long as somebody looks at their words
        self._words = _words(boards)
        self._slots = np.full(parts, NOTHING, np.int64)
        self._generations = np.full(parts, _NO_PART, np.int64)
        for index, each in live.items():
            self._slots[index], self._generations[index] = each.word, each.generation
        self._expected = np.where(self._generations == _NO_PART, 0, self._generations).tobytes()
        self.complete = len(live) == parts

    def matches(self, rows: int, row_bytes: int, dtype: str, rows_per_part: int) -> bool:
        """Whether the routing says the same of this table."""
        return self._shape == (rows, row_bytes, dtype, rows_per_part)

    def held(self, parts: Ids) -> npt.NDArray[np.bool_]:
        """Whether the shards hold these parts at this moment as they did when this was made."""
        return self._words.take(self._slots[parts]) == self._generations[parts]

    def is_unchanged(self) -> bool:
        """`held`, of all parts that were near."""
        return self._words.take(self._slots).tobytes() == self._expected

    def copy(self, ids: Ids) -> Bytes | None:
        """The stored rows of `ids`, uint8 [n, row_bytes], read after what was looked at before and before what comes.

        None where they cannot be read without waiting for a disk.
        """
        fence()
        stored = through_kernel.copy(self._space, ids, self.row_bytes) if self._in_files else take_rows(self._rows, ids)
        fence()
        return stored

    def count(self, ids: Ids) -> None:
        """These rows were read; threads that count at the same time may lose some."""
        step = 1 + len(ids) // _COUNTED
        if step > 1:
            # Another first one each time: the rows of a head may lie at even distances.
            ids = ids[next(_turn) % step :: step]
        np.add.at(self.reads, ids // self.rows_per_part, step)


class View(NamedTuple):
    """What is near: tables, and where the boards of the shards begin among the words. It never changes."""

    tables: Mapping[TableKey, NearTable]
    boards: Sequence[tuple[int, str]]


class Rows(NamedTuple):
    """Stored rows, uint8 [n, row_bytes], of all ids."""

    stored: Bytes


@dataclass(eq=False)
class SomeRows:
    """Stored rows, uint8 [m, row_bytes], of the ids at these m positions, once they are read."""

    positions: Ids
    _copy: Callable[[], Bytes | None]
    stored: Bytes | None = None

    def read(self) -> bool:
        """Read them, if they were not read yet. False: one of them is not near any more."""
        if self.stored is None:
            self.stored = self._copy()
        return self.stored is not None


@dataclass
class _Mapping:
    """A part that is mapped, of one link; `word`: where its generation is among the words of all boards."""

    link: _Link
    word: int
    generation: int
    memory: bool


@dataclass
class _Mapped:
    """A table's range of addresses, and what is mapped there; `shown`: as it is in the view, None once that changed."""

    info: wire.TableInfo
    space: AddressSpace
    reads: npt.NDArray[np.int64]
    parts: dict[int, _Mapping] = field(default_factory=dict)
    shown: NearTable | None = None

    @property
    def part_bytes(self) -> int:
        """Of all parts but the last."""
        return self.info.rows_per_part * self.info.row_bytes


@dataclass(eq=False)
class _Link:
    """A connection to a shard; `board` is the number of its board, once it came.

    `asked`: when it was asked last. `parts`: what it hands out, by generation. `left`: what of that is not mapped here,
    for want of room.
    """

    place: Place
    connection: socket.socket
    asked: float
    board: int | None = None
    silent: bool = False
    parts: dict[int, tuple[TableKey, int]] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)


@dataclass
class _Failed:
    why: str
    pause: float
    until: float


class NearReader:
    """Reads rows of shards of this machine. `follow`, `view` and `read` may be called from any thread.

    Args:
        authorization: Gives what says to a shard what this reader may read; see near.proto. Asked at each connection.
    """

    def __init__(self, authorization: Callable[[Place], str] = lambda place: "") -> None:
        self._authorization = authorization
        self._view = View({}, ())
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}
        self._states: dict[str, str] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        self._wake: socket.socket | None = None
        self._woken: socket.socket | None = None
        # Of the thread alone.
        self._links: dict[str, _Link] = {}
        self._failed: dict[str, _Failed] = {}
        self._tables: dict[TableKey, _Mapped] = {}
        self._mapped, self._most_parts = 0, most_maps() // SHARE_OF_MAPS
        self._peek = np.zeros(0, np.int64).data

    def follow(self, places: Sequence[Place]) -> None:
        """Be near to these shards from now on: those of a new routing. Does not wait for them."""
        mine = {place.shard: place for place in places if place.path and place.boot_id == boot_id() != ""}
        with self._lock:
            self._places = dict(list(mine.items())[:MOST_SHARDS])
            self._states = {place.shard: self._states.get(place.shard, "connecting") for place in mine.values()}
            if self._closed or (not mine and self._thread is None):
                return
            if self._thread is None:
                try:
                    self._start()
                except (MemoryError, OSError, RuntimeError) as error:
                    self._states = dict.fromkeys(self._states, f"this process has no room: {error}")
        self._poke()

    def states(self) -> dict[str, str]:
        """Of each shard of this machine: "near", or why it, or some of it, is not."""
        with self._lock:
            return dict(self._states)

    def newer_than(self, term: int, epoch: int) -> str | None:
        """A shard that knows a newer routing than this one; None where no near shard does."""
        for base, shard in self._view.boards:
            known = self._peek[base + TERM]
            if known > term or (known == term and self._peek[base + EPOCH] > epoch):
                return shard
        return None

    def view(self) -> View | None:
        """What is near now; None where nothing is, or a shard did not beat of late."""
        view = self._view
        for base, _ in view.boards:
            if _is_silent(self._peek[base + BEAT]):
                self._poke()
                return None
        return view if view.tables else None

    def read(self, view: View, table: NearTable, ids: Ids) -> Rows | SomeRows | None:
        """The rows of `ids` int64 [n], each in [0, rows), that are near; None where none is.

        All are read at once. Some are left to be read while the others come over the wire.
        """
        if not len(ids):
            return Rows(np.empty((0, table.row_bytes), np.uint8))
        if not (table.complete and len(table.reads) <= max(_FEW_PARTS, len(ids)) and table.is_unchanged()):
            return self._read_some(view, table, ids)
        stored = table.copy(ids)
        if stored is None or not table.is_unchanged() or self._view is not view:
            return None
        table.count(ids)
        return Rows(stored)

    def _read_some(self, view: View, table: NearTable, ids: Ids) -> Rows | SomeRows | None:
        """`read`, where parts are looked at one by one."""
        parts = ids // table.rows_per_part
        held = table.held(parts)
        if held.all():
            stored = self._read_held(view, table, ids, parts)
            return None if stored is None else Rows(stored)
        positions = np.flatnonzero(held)
        if not len(positions):
            return None
        return SomeRows(positions, partial(self._read_held, view, table, ids[positions], parts[positions]))

    def _read_held(self, view: View, table: NearTable, ids: Ids, parts: Ids) -> Bytes | None:
        """All these rows, uint8 [n, row_bytes]; None where a part of them is not near any more."""
        stored = table.copy(ids) if table.held(parts).all() else None
        if stored is None or not table.held(parts).all() or self._view is not view:
            return None
        table.count(ids)
        return stored

    def close(self) -> None:
        """Leave all shards; what is mapped goes when nobody reads it any more."""
        with self._lock:
            self._closed = True
        self._view = View({}, ())
        self._poke()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._wake is not None:
            self._wake.close()

    def abandon(self) -> None:
        """In a child of a fork, whose parent goes on with this: close its connections here, and unmap what it mapped.

        No thread of the child reads it: the one that forked did not read then.
        """
        self._view = View({}, ())
        for each in (self._wake, self._woken, *(link.connection for link in self._links.values())):
            if each is not None:
                each.close()
        self._tables.clear()
        if self._thread is not None:
            self._boards.unmap(0, MOST_SHARDS * BOARD_BYTES)

    def _start(self) -> None:
        """Raises MemoryError, OSError or RuntimeError where there are no more addresses, files or threads for it."""
        self._boards = AddressSpace(MOST_SHARDS * BOARD_BYTES)
        self._peek = _words(self._boards).data
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        thread = threading.Thread(target=self._run, args=(self._woken,), name="embedding-near", daemon=True)
        thread.start()
        self._thread = thread

    def _poke(self) -> None:
        if self._wake is not None:
            with suppress(OSError):  # full: it is awake; or closed
                self._wake.send(b".")

    # From here on: the thread's.

    def _run(self, woken: socket.socket) -> None:
        reported = time.monotonic()
        try:
            while not self._closed:
                try:
                    self._connect()
                    self._wait(woken)
                    self._look()
                    if time.monotonic() - reported >= REPORT_SECONDS:
                        reported = time.monotonic()
                        self._report()
                except Exception as error:
                    log.exception("near rows come over the wire until their shards are asked again")
                    self._start_over(f"{type(error).__name__}: {error}")
                    time.sleep(FIRST_PAUSE)  # should it go on at once
        finally:
            self._start_over("closed")
            woken.close()

    def _start_over(self, why: str) -> None:
        """Leave all shards, whatever state they are in. What is mapped goes when nobody reads it any more."""
        self._view = View({}, ())
        for link in self._links.values():
            link.connection.close()
        self._links.clear()
        self._tables.clear()
        self._mapped = 0
        with self._lock:
            places = list(self._places)
        for shard in places:
            self._fail(shard, why)

    def _wait(self, woken: socket.socket) -> None:
        """Until somebody says something, or it is time to look at the beats."""
        with selectors.PollSelector() as selector:
            selector.register(woken, selectors.EVENT_READ)
            for link in self._links.values():
                selector.register(link.connection, selectors.EVENT_READ, link)
            ready = [key.data for key, _ in selector.select(LOOK_SECONDS)]
        for link in ready:
            if link is None:
                with suppress(OSError):
                    woken.recv(4096)
            elif self._links.get(link.place.shard) is link:
                self._hear(link)

    def _connect(self) -> None:
        with self._lock:
            places = dict(self._places)
        for link in list(self._links.values()):
            if places.get(link.place.shard) != link.place:
                self._leave(link, "connecting", again=True)
        for shard in self._failed.keys() - places.keys():
            del self._failed[shard]
        now = time.monotonic()
        for shard, place in places.items():
            failed = self._failed.get(shard)
            if shard not in self._links and (failed is None or failed.until <= now):
                self._greet(place)

    def _greet(self, place: Place) -> None:
        try:
            authorization = self._authorization(place)
        except (EmbeddingServiceError, ValueError) as error:
            return self._fail(place.shard, str(error))
        hello = near.NearRequest(version=VERSION, incarnation=place.incarnation, authorization=authorization)
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        except OSError as error:
            return self._fail(place.shard, f"no socket: {error.strerror}")
        try:
            connection.connect(place.path)
            connection.send(hello.SerializeToString())
        except OSError as error:
            connection.close()
            self._fail(place.shard, f"{place.path}: {error.strerror}")
        else:
            self._links[place.shard] = _Link(place, connection, time.monotonic())
        return None

    def _hear(self, link: _Link) -> None:
        files: list[int] = []
        try:
            packet, files, _, _ = _receive(link.connection)
            answer = near.NearAnswer.FromString(packet)
            if not packet or answer.refusal:
                self._leave(link, answer.refusal or "the shard ended the connection")
            else:
                self._obey(link, answer, files)
        except BlockingIOError:
            pass
        except (OSError, DecodeError, ValueError, MemoryError) as error:
            self._leave(link, str(error))
        finally:
            for file in files:
                os.close(file)

    def _obey(self, link: _Link, answer: near.NearAnswer, files: Sequence[int]) -> None:
        """Do what a shard says. Raises ValueError for what does not fit together."""
        if answer.board:
            self._take_board(link, files)
        elif link.board is None or len(files) != len(answer.held):
            raise ValueError("the shard's answer has other files than it names")
        else:
            if answer.dropped:
                self._drop(link, answer.dropped)
            for part, file in zip(answer.held, files, strict=True):
                self._take(link, part, file)
        link.asked = time.monotonic()
        self._show()
        link.connection.send(near.NearRequest(next=True).SerializeToString())

    def _take_board(self, link: _Link, files: Sequence[int]) -> None:
        taken = {each.board for each in self._links.values()}
        number = next(each for each in range(MOST_SHARDS) if each not in taken)
        if (
            link.board is not None
            or len(files) != 1
            or not sealed(files[0])
            or os.fstat(files[0]).st_size < BOARD_BYTES
        ):
            raise ValueError("the shard's board is no sealed memory of its size")
        self._boards.map_file(number * BOARD_BYTES, BOARD_BYTES, files[0], 0)
        link.board = number
        if self._peek[number * BOARD_WORDS + VERSION_WORD] != VERSION:
            raise ValueError("the shard's board is of another version")

    def _take(self, link: _Link, part: near.NearPart, file: int) -> None:
        """Map a part, if there is room for it. Raises ValueError for one that cannot be, MemoryError."""
        assert link.board is not None
        key = (f"{part.model}@{part.version}", part.table.name)
        link.parts[part.generation] = key, part.part
        table = self._tables.get(key)
        if self._mapped >= self._most_parts and not (table and part.part in table.parts):
            link.left.add(part.generation)
            return
        table = table or self._open(key, part.table)
        if table.info != part.table:
            raise ValueError(f"the shards do not agree on table {'/'.join(key)}")
        if part.part in table.parts:  # from another shard; should it go, this one is asked again
            return
        nbytes = _check_part(table, part, file)
        try:
            table.space.map_file(part.part * table.part_bytes, nbytes, file, part.offset)
        except NoRoom:  # others have most of the mappings: they get some back, and less is taken from now on
            self._most_parts = max(self._mapped // 2, MOST_FILES)
            raise
        self._mapped += 1
        word = link.board * BOARD_WORDS + part.slot
        table.parts[part.part], table.shown = _Mapping(link, word, part.generation, part.memory), None

    def _open(self, key: TableKey, info: wire.TableInfo) -> _Mapped:
        if not 0 < info.rows * info.row_bytes <= MOST_BYTES or info.rows_per_part < 1:
            raise ValueError(
                f"no table has {info.rows} rows of {info.row_bytes} bytes in parts of {info.rows_per_part}"
            )
        parts = -(-info.rows // info.rows_per_part)
        table = _Mapped(info, AddressSpace(info.rows * info.row_bytes), np.zeros(parts, np.int64))
        self._tables[key] = table
        return table

    def _drop(self, link: _Link, generations: Sequence[int]) -> None:
        """Parts that a link's shard holds no more. What others hand out of them is asked for again."""
        gone: dict[tuple[TableKey, int], _Mapped] = {}
        for generation in generations:
            place = link.parts.pop(generation, None)
            link.left.discard(generation)
            table = self._tables.get(place[0]) if place else None
            if place and table:
                mapping = table.parts.get(place[1])
                if mapping and mapping.link is link and mapping.generation == generation:
                    del table.parts[place[1]]
                    gone[place], table.shown = table, None
                    self._mapped -= 1
        self._show()  # before that: a reader of zeros must find another view
        for (_, index), table in gone.items():
            with suppress(NoRoom):  # where a process has all mappings it may have; then it goes with its table
                table.space.unmap(index * table.part_bytes, _rows_of(table.info, index) * table.info.row_bytes)
        for key in [key for key, table in self._tables.items() if not table.parts]:
            del self._tables[key]
        for other in list(self._links.values()):
            if other is not link and not gone.keys().isdisjoint(other.parts.values()):
                self._leave(other, "connecting", again=True)

    def _leave(self, link: _Link, why: str, *, again: bool = False) -> None:
        """End a connection, and what is mapped of it."""
        if self._links.get(link.place.shard) is not link:
            return
        del self._links[link.place.shard]
        link.connection.close()
        self._drop(link, list(link.parts))
        if link.board is not None:
            with suppress(NoRoom):  # the next board of this number takes its place
                self._boards.unmap(link.board * BOARD_BYTES, BOARD_BYTES)
        if again:
            self._failed.pop(link.place.shard, None)
        else:
            self._fail(link.place.shard, why)

    def _fail(self, shard: str, why: str) -> None:
        known = self._failed.get(shard)
        pause = min(2 * known.pause, LONGEST_PAUSE) if known else FIRST_PAUSE
        self._failed[shard] = _Failed(why, pause, time.monotonic() + pause)
        self._state(shard, why)

    def _state(self, shard: str, state: str) -> None:
        with self._lock:
            if shard in self._states:
                self._states[shard] = state

    def _look(self) -> None:
        """At the beats: what a silent shard handed out is not shown until it beats again.

        A shard is asked again for what was left, once there is room for that and the shard has been quiet for a while.
        """
        now, changed = time.monotonic(), False
        for link in list(self._links.values()):
            if link.board is None:
                if now - link.asked > PATIENCE:
                    self._leave(link, "it does not answer")
                continue
            quiet = now - link.asked > LONGEST_PAUSE
            if link.left and quiet and self._mapped + len(link.left) <= self._most_parts:
                self._leave(link, "connecting", again=True)
                continue
            silent = _is_silent(self._peek[link.board * BOARD_WORDS + BEAT])
            changed |= silent != link.silent
            link.silent = silent
        if changed:
            for table in self._tables.values():
                table.shown = None
            self._show()

    def _show(self) -> None:
        """Make a view of what is mapped of shards that beat."""
        tables = {}
        for key, table in self._tables.items():
            if table.shown is None:
                live = {index: each for index, each in table.parts.items() if not each.link.silent}
                table.shown = NearTable(table, self._boards, live) if live else None
            if table.shown is not None:
                tables[key] = table.shown
        links = [link for link in self._links.values() if link.board is not None and not link.silent]
        for link in self._links.values():
            if link.board is not None:
                self._state(link.place.shard, "it does not beat" if link.silent else self._near(link))
                if not link.silent:
                    self._failed.pop(link.place.shard, None)
        self._view = View(tables, [((link.board or 0) * BOARD_WORDS, link.place.shard) for link in links])

    def _near(self, link: _Link) -> str:
        if not link.left:
            return "near"
        return (
            f"near but for {len(link.left):,} parts: this process maps no more than {self._most_parts:,}; "
            "raise the sysctl vm.max_map_count"
        )

    def _report(self) -> None:
        """Tell each shard what was read of its parts."""
        reads: dict[_Link, list[near.NearReads]] = {}
        for table in self._tables.values():
            for index in np.flatnonzero(table.reads).tolist():
                rows, table.reads[index] = int(table.reads[index]), 0
                mapping = table.parts.get(index)
                if mapping:
                    counted = near.NearReads(generation=mapping.generation, rows=rows)
                    reads.setdefault(mapping.link, []).append(counted)
        for link, counts in reads.items():
            for begin in range(0, len(counts), MOST_REPORTED):
                request = near.NearRequest(reads=counts[begin : begin + MOST_REPORTED])
                with suppress(OSError):  # its next word, or its silence, will say why
                    link.connection.send(request.SerializeToString())


def _receive(connection: socket.socket) -> tuple[bytes, list[int], int, object]:
    try:
        return socket.recv_fds(connection, PACKET_BYTES, MOST_FILES)
    except ConnectionResetError:  # it hung up on what it did not read; what it said before comes now
        return socket.recv_fds(connection, PACKET_BYTES, MOST_FILES)


def _check_part(table: _Mapped, part: near.NearPart, file: int) -> int:
    """The bytes of a part that fits its table and its file. Raises ValueError."""
    info = table.info
    rows = _rows_of(info, part.part)
    nbytes = rows * info.row_bytes
    if rows < 1 or not FIRST_SLOT <= part.slot < BOARD_WORDS or part.offset % PAGE:
        raise ValueError(f"no part {part.part} of table {info.name} in slot {part.slot}")
    if part.memory and not sealed(file):
        raise ValueError("the shard's memory is not sealed")
    if os.fstat(file).st_size < part.offset + nbytes:
        raise ValueError(f"the file of part {part.part} of table {info.name} is too short")
    return nbytes


def _rows_of(info: wire.TableInfo, part: int) -> int:
    return min(info.rows_per_part, info.rows - part * info.rows_per_part)


def _words(boards: AddressSpace) -> npt.NDArray[np.int64]:
    return boards.tensor.numpy().view(np.int64)


def _is_silent(beat: int) -> bool:
    """Whether a shard has not beaten of late, by a clock that all processes share. One that is ahead tells nothing."""
    return abs(time.monotonic_ns() - beat) > LONGEST_SILENCE * 1e9
