"""A shard's near side alone: its socket and its rows, on an event loop of its own, in this process."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from embedding_service.machine import boot_id
from embedding_service.near.reader import NearReader, NearTable, Place, Rows
from embedding_service.placement.parts import PartKey
from embedding_service.rows import TIERS
from embedding_service.rows.base import TableRows
from embedding_service.shard.near import NearServer, Rights, all_parts
from embedding_service.store.manifest import Manifest
from embedding_service.store.store import Store
from support.cluster import until

T = TypeVar("T")


class NearShard:
    """Holds parts of one model and hands them out.

    Attributes:
        age: Of its routing.
        accesses: Rows that clients said they read, by part.
    """

    def __init__(
        self,
        path: Path,
        store: Path,
        model: str,
        tier: str = "ram",
        incarnation: int = 1,
        rights_of: Callable[[str], Rights] = all_parts,
    ) -> None:
        self.age = (1, 1)
        self.accesses: Counter[int] = Counter()
        self.place = Place(f"shard-{incarnation}", str(path), boot_id(), incarnation)
        self._store = Store(store)
        self.manifest: Manifest = self._store.manifest(model)
        self.table = self.manifest.tables[0]
        self.rows: TableRows = TIERS[tier](self.table, shared=True)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.on_loop(lambda: NearServer(str(path), incarnation, lambda: self.age, self._count, rights_of))

    @property
    def key(self) -> tuple[str, str]:
        """Of its table, as a reader has it."""
        return f"{self.manifest.model}@{self.manifest.version}", self.table.name

    def part(self, index: int) -> PartKey:
        """Of its table, by number."""
        return PartKey(self.manifest.model, self.manifest.version, self.table.name, index)

    def hold(self, *parts: int) -> None:
        """Load parts and hand them out; all where none is named."""
        for index in parts or range(len(self.table.parts)):
            part, path = self.table.parts[index], self._store.part_path(self.manifest, self.table.parts[index])
            self.rows.load(part, path)
            self.server.hold(self.part(index), self.table, self.rows.location(part, path))
        self.on_loop(lambda: None)

    def drop(self, *parts: int) -> None:
        """Hold these no longer."""
        for index in parts:
            self.on_loop(lambda index=index: self.server.drop(self.part(index)))  # type: ignore[misc]
            self.rows.drop(self.table.parts[index])

    def flip(self, term: int, epoch: int) -> None:
        """A newer routing came."""
        self.age = (term, epoch)
        self.on_loop(self.server.tell_age)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Its loop does nothing until the end."""
        goes_on = threading.Event()
        self._loop.call_soon_threadsafe(goes_on.wait)
        try:
            yield
        finally:
            goes_on.set()

    def on_loop(self, function: Callable[[], T]) -> T:
        """What it returns on the shard's loop."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def stop(self) -> None:
        """As a shard that ends."""
        self.on_loop(self.server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.rows.close()

    def _count(self, table: tuple[str, str, str], accesses: np.ndarray) -> None:
        self.accesses.update({int(part): int(accesses[part]) for part in np.flatnonzero(accesses)})


@contextmanager
def near_shard(
    path: Path,
    store: Path,
    model: str,
    tier: str = "ram",
    incarnation: int = 1,
    rights_of: Callable[[str], Rights] = all_parts,
) -> Iterator[NearShard]:
    """A shard that holds nothing yet; ended afterwards."""
    shard = NearShard(path, store, model, tier, incarnation, rights_of)
    try:
        yield shard
    finally:
        if not shard._loop.is_closed():
            shard.stop()


@contextmanager
def near_reader(*shards: NearShard) -> Iterator[NearReader]:
    """A client's reader that follows shards."""
    reader = NearReader()
    try:
        reader.follow([shard.place for shard in shards])
        yield reader
    finally:
        reader.close()


def read(reader: NearReader, key: tuple[str, str], ids: np.ndarray) -> np.ndarray | None:
    """The stored rows, uint8 [n, row_bytes], where all of them are near."""
    view = reader.view()
    table = view.tables.get(key) if view else None
    if view is None or table is None:
        return None
    rows = reader.read(view, table, ids)
    return rows.stored if isinstance(rows, Rows) else None


def read_near(reader: NearReader, key: tuple[str, str], ids: np.ndarray) -> np.ndarray:
    """The same, once they are. On a busy machine a shard may miss its beat, and is not near for a moment."""

    def rows() -> tuple[np.ndarray] | None:
        found = read(reader, key, ids)
        return None if found is None else (found,)

    return until(rows, f"rows of {key}; {reader.states()}")[0]


def wait_for(reader: NearReader, key: tuple[str, str], whole: bool = True) -> NearTable:
    """The table, once all of it is near, or a part of it."""

    def there() -> NearTable | None:
        view = reader.view()
        table = view.tables.get(key) if view else None
        return table if table and (table.complete or not whole) else None

    return until(there, f"{key} to be near; {reader.states()}")


def stored_rows(store: Path, model: str) -> np.ndarray:
    """What was imported: uint8 [rows, row_bytes]."""
    from embedding_service.formats import get_format
    from support.checkpoints import longcat_table

    return get_format(model).encode(longcat_table()).view(torch.uint8).numpy()
