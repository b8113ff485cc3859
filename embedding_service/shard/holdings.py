"""The parts that a shard holds. It loads and drops parts until it holds what it was told to hold."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from embedding_service.errors import CorruptPart, EmbeddingServiceError, Overloaded
from embedding_service.placement.parts import PartKey
from embedding_service.rows.base import Ids, LiesIn, Location, TableRows
from embedding_service.rows.overlaid import OverlaidTable
from embedding_service.store.manifest import Manifest, Part, Table
from embedding_service.store.overlays import Replaced, read_overlay, rows_offset
from embedding_service.store.store import Store
from embedding_service.threads import apart

log = logging.getLogger(__name__)

# A part that could not be loaded (corrupt, store away) is tried again. It may have been repaired.
RETRY_SECONDS = 5.0
# A store on this machine is said to be away after this many seconds without an answer.
STALL_SECONDS = 30.0
T = TypeVar("T")
# Model, version, table.
TableKey = tuple[str, str, str]


class Sharing(Protocol):
    """Told of every part that is held, also from loading threads, and before it is dropped."""

    def hold(self, key: PartKey, table: Table, location: Location) -> None:
        """The part is held, there."""

    def drop(self, key: PartKey) -> None:
        """Returns when nobody else uses the part any more."""


@dataclass
class _Users:
    """Who uses a part of the ground: parts of versions that are held, or about to be. One of them loads it.

    `base`: once rows of a version were folded in, what the base has in their place. `changing`: held by who loads the
    part, or folds rows in. `folds`: how many do the latter, and so use it as well.
    """

    keys: set[PartKey] = field(default_factory=set)
    changing: threading.Lock = field(default_factory=threading.Lock)
    base: Replaced | None = None
    folds: int = 0


@dataclass
class _Ground:
    """Rows that versions share: those of a base. `users` by part."""

    rows: TableRows
    users: dict[int, _Users] = field(default_factory=dict)

    def holds(self, part: Part) -> bool:
        """Whether the part's rows are there."""
        return part.index in self.rows.held_parts()


class Holdings:
    """Loads and drops parts until what is held is what `assign` last said. Used from one event loop.

    Args:
        memory_limit: Bytes it may hold. A part for which there is no room waits until another one was dropped.
        cache: Folder for parts of a remote store.
        load_rate: Bytes a second that are read in all, once everything was loaded the first time. Lookups must not feel
            that parts move. 0: no limit.
        loaders: Parts that are loaded at a time.

    Attributes:
        held: The parts that are verified and answer lookups.
        failures: Why an assigned part is not held.
        reserved: Bytes of the limit that something else than parts has.
        changed: Set whenever `held` or `failures` changed.
        sharing: Who else reads what is held; set before anything is.
    """

    def __init__(
        self, store: Store, tier: type[TableRows], memory_limit: int, cache: Path, load_rate: int = 0, loaders: int = 2
    ) -> None:
        self.memory_limit = memory_limit
        self.held: set[PartKey] = set()
        self.failures: dict[PartKey, str] = {}
        self.reserved = 0
        self.changed = asyncio.Event()
        self.sharing: list[Sharing] = []
        self._store = store
        self._tier = tier
        self._cache = cache
        self._pacer = Pacer(load_rate)
        self._loaders = asyncio.Semaphore(loaders)
        self._wanted: set[PartKey] = set()
        self._tasks: dict[PartKey, asyncio.Task[None]] = {}
        self._taken = 0  # bytes of what is held and of what is being read
        self._room = asyncio.Event()
        self._tables: dict[TableKey, OverlaidTable] = {}
        self._grounds: dict[TableKey, _Ground] = {}
        self._shared: set[PartKey] = set()
        self._folding: set[asyncio.Task[None]] = set()
        self._tables_lock = threading.Lock()
        self._reading = 0  # threads that read the store
        self._chunk_read = 0.0
        self._manifests: dict[tuple[str, str], Manifest] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows that are held. Rows that versions share count once."""
        grounds = {(*self._manifest(key).root, key.table, key.part): self._part(key).bytes for key in self.held}
        return sum(grounds.values()) + sum(self._overlay_bytes(key) for key in self.held)

    def table(self, model: str, version: str, table: str) -> TableRows | None:
        """The rows of a table, if any part of it is held."""
        return self._tables.get((model, version, table))

    def accesses(self, key: PartKey) -> int:
        """Rows gathered from a held part since its table was opened here."""
        return self._tables[key[:3]].accesses(key.part)

    def add_accesses(self, table: TableKey, accesses: Ids) -> None:
        """Count what other processes gathered from a table's parts: int64 [parts]."""
        rows = self._tables.get(table)
        if rows:
            rows.add_accesses(accesses)

    def assign(self, wanted: Iterable[PartKey]) -> None:
        """Hold exactly these from now on."""
        self._wanted = set(wanted)
        for key in list(self.held - self._wanted):
            self._drop(key)
        for key in [key for key in self.failures if key not in self._wanted]:
            del self.failures[key]
        for key in sorted(self._wanted - self.held - self._tasks.keys()):
            self._tasks[key] = asyncio.create_task(self._load(key))

    async def close(self) -> None:
        """Stop loading and give all memory back."""
        tasks = [*self._tasks.values(), *self._folding]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._reading:  # into memory that must stay where it is, and ends with the process
            return
        for rows in self._tables.values():
            rows.close()
        for ground in self._grounds.values():
            ground.rows.close()
        self._tables.clear()
        self._grounds.clear()
        self.held.clear()

    async def _load(self, key: PartKey) -> None:
        """Load until the part is held, or not wanted any more."""
        try:
            while key in self._wanted and not await self._try_load(key):
                self._room.clear()
                try:
                    async with asyncio.timeout(RETRY_SECONDS):
                        await self._room.wait()
                except TimeoutError:
                    continue
        finally:
            del self._tasks[key]
            if not self._tasks:
                self._pacer.active = True
                for root, ground in list(self._grounds.items()):
                    for part in list(ground.users):
                        self._fold(root, part)

    async def _try_load(self, key: PartKey) -> bool:
        async with self._loaders:
            if key not in self._wanted:
                return True
            began, needed, taken = time.monotonic(), 0, False
            try:
                await self._read(key, self._open, key)
                needed = self._needed(key)
                if self._taken + needed > self.memory_limit:
                    self._fail(
                        key,
                        f"waits for room: {self._taken:,} of this shard's {self.memory_limit:,} bytes are taken and it "
                        f"needs {needed:,}; if it waits for long, add shards or raise --memory",
                    )
                    return False
                taken = self._take(key)
                await self._read(key, self._load_blocking, key)
            except (EmbeddingServiceError, OSError, MemoryError) as error:
                if taken:
                    self._tables[key[:3]].drop(self._part(key))  # it may have come as far as that
                    self._give_back(key)
                self._fail(key, str(error))
                return False
        self.failures.pop(key, None)
        self.held.add(key)
        self.changed.set()
        log.info("holds %s: %s bytes in %.2f s", key, f"{needed:,}", time.monotonic() - began)
        if key not in self._wanted:
            self._drop(key)
        return True

    async def _read(self, key: PartKey, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that reads the store. If the store stalls, say so. The call goes on when the store does."""
        self._chunk_read = max(self._chunk_read, time.monotonic())
        reading = apart(self._counted, function, *arguments)
        while not (await asyncio.wait([reading], timeout=STALL_SECONDS))[0]:
            if self._store.is_local and time.monotonic() - self._chunk_read >= STALL_SECONDS:
                self._fail(key, f"the store has not answered for {STALL_SECONDS:g} s: is it away?")
        return reading.result()

    def _counted(self, function: Callable[..., T], *arguments: object) -> T:
        with self._tables_lock:
            self._reading += 1
        try:
            return function(*arguments)
        finally:
            with self._tables_lock:
                self._reading -= 1

    def _pace(self, chunk_bytes: int) -> None:
        self._chunk_read = time.monotonic()
        self._pacer.wait(chunk_bytes)

    def _fail(self, key: PartKey, message: str) -> None:
        if self.failures.get(key) != message:
            log.error("part %s not loaded: %s", key, message)
            self.failures[key] = message
            self.changed.set()

    def _open(self, key: PartKey) -> None:
        """Make the tables that a part is to be held in, if they are not there."""
        manifest = self._manifest(key)
        table, root = manifest.table(key.table), (*manifest.root, key.table)
        with self._tables_lock:
            if root not in self._grounds:
                self._grounds[root] = _Ground(self._tier(table, shared=bool(self.sharing)))
            if key[:3] not in self._tables:
                replaced = sum(overlay.rows for overlay in manifest.overlays(key.table).values())
                self._tables[key[:3]] = OverlaidTable(table, self._grounds[root].rows, replaced)

    def _load_blocking(self, key: PartKey) -> None:
        manifest, part, rows, ground = self._manifest(key), self._part(key), self._tables[key[:3]], self._ground(key)
        overlay, replaced, place = (
            manifest.overlays(key.table).get(part.index),
            Replaced.none(rows.table.row_bytes),
            None,
        )
        if overlay:
            path = self._store.fetch_overlay(manifest, rows.table, overlay, self._cache)
            with self._removing(path):
                replaced = read_overlay(path, rows.table, overlay, self._pace)
            if self._tier.lies_in is LiesIn.FILES:
                place = Location(str(path), rows_offset(path, overlay))
        path, users = self._store.fetch_part(manifest, part, self._cache), ground.users[part.index]
        with users.changing:
            if not ground.holds(part):
                with self._removing(path):
                    ground.rows.load(part, path, self._pace)
            if users.base is not None:  # the ground has rows of another version, which this one has not
                replaced, place = replaced.over(users.base), None
            rows.hold(part, replaced, place)
        self._share(key, path)

    def _share(self, key: PartKey, path: Path) -> None:
        """Tell others of a part, unless it lies in two places. Such a one is read by this process alone."""
        rows, part = self._tables[key[:3]], self._part(key)
        if self.sharing and not rows.replaces(part):
            location = rows.location(part, path)  # opens the file: it may fail, and then nobody was told
            for each in self.sharing:
                each.hold(key, rows.table, location)
            self._shared.add(key)

    @contextmanager
    def _removing(self, path: Path) -> Iterator[None]:
        """Remove a copy of a remote file that turns out to be bad. The next try fetches another."""
        try:
            yield
        except CorruptPart:
            if not self._store.is_local:
                path.unlink(missing_ok=True)
            raise

    def _drop(self, key: PartKey) -> None:
        self.held.discard(key)
        self.changed.set()
        if key in self._shared:
            self._shared.discard(key)
            for each in self.sharing:
                each.drop(key)
        self._tables[key[:3]].drop(self._part(key))
        self._give_back(key)
        self._room.set()
        log.info("dropped %s", key)
        self._fold(self._root(key), key.part)
        if not any(other[:3] == key[:3] for other in self.held | self._tasks.keys()):
            self._tables.pop(key[:3]).close()
            self._close_unused(self._root(key))
        self._forget_manifests()

    def _forget_manifests(self) -> None:
        """Of versions that nothing here is of any more. A fold may still need its version's."""
        if not self._folding:
            used = {key[:2] for key in (*self.held, *self._tasks, *self._wanted, *self._tables)}
            for name in self._manifests.keys() - used:
                del self._manifests[name]

    # Folding in: where a version is alone with a part of the ground, its rows are put there

    def _fold(self, root: TableKey, index: int) -> None:
        """Begin to, if there is one that has rows of its own."""
        users = self._grounds[root].users.get(index)
        if users is None or len(users.keys) != 1 or users.folds or not self._tier.foldable:
            return
        [key] = users.keys
        alone = key in self.held and key in self._wanted
        if alone and self._tables[key[:3]].replaces(self._part(key)):
            users.folds += 1
            task = asyncio.create_task(self._fold_apart(key, users))
            self._folding.add(task)
            task.add_done_callback(self._folded)

    def _folded(self, task: asyncio.Task[None]) -> None:
        self._folding.discard(task)
        self._forget_manifests()

    async def _fold_apart(self, key: PartKey, users: _Users) -> None:
        try:
            async with self._loaders:
                await apart(self._counted, self._fold_blocking, key, users)
        finally:
            users.folds -= 1
            self._drop_unused(key)
        if key in self.held and key not in self._shared:
            self._share(key, Path())

    def _fold_blocking(self, key: PartKey, users: _Users) -> None:
        ground, rows = self._ground(key).rows, self._tables.get(key[:3])
        with users.changing:
            if users.keys != {key} or rows is None:  # another version came, or this one goes
                return
            base = rows.fold(self._part(key))
            base = users.base.over(base) if users.base else base
            differ = (base.rows != ground.read(base.ids)).any(1)
            users.base = Replaced(base.ids[differ], base.rows[differ])
        log.info("folded %s in: %d rows", key, len(base.ids))

    # Memory: rows that versions share are taken once

    def reserve(self, nbytes: int, what: str) -> None:
        """Take memory for something else than parts. Raises Overloaded if it does not fit."""
        if (left := self.memory_limit - self._taken) < nbytes:
            raise Overloaded(
                f"{what} takes {nbytes:,} bytes here, and {max(left, 0):,} of this shard's {self.memory_limit:,} are "
                "free: raise --memory, or make the branch with more shards or an optimizer of less state"
            )
        self._taken += nbytes
        self.reserved += nbytes

    def release(self, nbytes: int) -> None:
        """Give what was reserved back."""
        self._taken -= nbytes
        self.reserved -= nbytes
        self._room.set()

    def _needed(self, key: PartKey) -> int:
        """Bytes that holding a part takes, besides what is held already."""
        ground = 0 if key.part in self._ground(key).users else self._part(key).bytes
        return ground + self._overlay_bytes(key)

    def _take(self, key: PartKey) -> bool:
        self._taken += self._needed(key)
        self._ground(key).users.setdefault(key.part, _Users()).keys.add(key)
        return True

    def _give_back(self, key: PartKey) -> None:
        """A part is not held here any more. Rows of the ground go once no version uses them."""
        ground, part = self._ground(key), self._part(key)
        ground.users[part.index].keys.discard(key)
        self._taken -= self._overlay_bytes(key)
        self._drop_unused(key)

    def _drop_unused(self, key: PartKey) -> None:
        """Give a part of the ground back if nobody uses it."""
        ground, part = self._ground(key), self._part(key)
        users = ground.users[part.index]
        if not users.keys and not users.folds:
            del ground.users[part.index]
            self._taken -= part.bytes
            self._room.set()
            if ground.holds(part):
                ground.rows.drop(part)
            self._close_unused(self._root(key))

    def _close_unused(self, root: TableKey) -> None:
        """Give a ground back if no version is on it."""
        with self._tables_lock:
            used = self._grounds[root].users or any(self._root(PartKey(*each, 0)) == root for each in self._tables)
            if not used:
                self._grounds.pop(root).rows.close()

    def _ground(self, key: PartKey) -> _Ground:
        return self._grounds[self._root(key)]

    def _root(self, key: PartKey) -> TableKey:
        return (*self._manifest(key).root, key.table)

    def _overlay_bytes(self, key: PartKey) -> int:
        overlay = self._manifest(key).overlays(key.table).get(key.part)
        return overlay.bytes if overlay else 0

    def _manifest(self, key: PartKey) -> Manifest:
        name = (key.model, key.version)
        if name not in self._manifests:
            self._manifests[name] = self._store.manifest(*name)
        return self._manifests[name]

    def _part(self, key: PartKey) -> Part:
        return self._manifest(key).table(key.table).parts[key.part]


class Pacer:
    """Keeps all loads together at `rate` bytes a second, by letting their threads wait. 0: no limit.

    Args:
        clock: Seconds now.
        sleep: Waits a number of seconds.
    """

    def __init__(
        self, rate: int, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.active = False
        self._rate = rate
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, chunk_bytes: int) -> None:
        """Wait, after a chunk was read, until the rate allows the bytes read so far."""
        if not self.active or not self._rate:
            return
        with self._lock:
            now = self._clock()
            self._next = max(self._next, now) + chunk_bytes / self._rate
            pause = self._next - now
        self._sleep(pause)
