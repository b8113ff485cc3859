"""The parts that a shard holds, and making them what it was told to hold."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from embedding_service.errors import CorruptPart, EmbeddingServiceError, PlacementError
from embedding_service.placement.parts import PartKey
from embedding_service.rows import TIERS, TableRows
from embedding_service.store.manifest import Manifest, Part
from embedding_service.store.store import Store

log = logging.getLogger(__name__)

# A part that could not be loaded (corrupt, store away) is tried again: it may have been repaired.
RETRY_SECONDS = 5.0


class Holdings:
    """Loads and drops parts until what is held is what `assign` last said. Used from one event loop.

    Attributes:
        memory_limit: Bytes it may hold.
        held: The parts that are verified and answer lookups.
        failures: Why a part that shall be held is not.
        changed: Set whenever `held` or `failures` changed.
    """

    def __init__(self, store: Store, tier: str, memory_limit: int, cache: Path, loaders: int = 2) -> None:
        self.held: set[PartKey] = set()
        self.failures: dict[PartKey, str] = {}
        self.changed = asyncio.Event()
        self._store = store
        self._tier = TIERS[tier]
        self.memory_limit = memory_limit
        self._cache = cache
        self._loaders = asyncio.Semaphore(loaders)
        self._wanted: set[PartKey] = set()
        self._loading: dict[PartKey, asyncio.Task[None]] = {}
        self._tables: dict[tuple[str, str, str], TableRows] = {}
        self._tables_lock = threading.Lock()
        self._manifests: dict[tuple[str, str], Manifest] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows that are held."""
        return sum(self._part(key).bytes for key in self.held)

    def table(self, model: str, version: str, table: str) -> TableRows | None:
        """The rows of a table, if any part of it is held."""
        return self._tables.get((model, version, table))

    def assign(self, wanted: Iterable[PartKey]) -> None:
        """Hold exactly these from now on."""
        self._wanted = set(wanted)
        for key in list(self.held - self._wanted):
            self._drop(key)
        for key in [key for key in self.failures if key not in self._wanted]:
            del self.failures[key]
        for key in sorted(self._wanted - self.held - self._loading.keys()):
            self._loading[key] = asyncio.create_task(self._load(key))

    async def close(self) -> None:
        """Stop loading and give all memory back."""
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for rows in self._tables.values():
            rows.close()
        self._tables.clear()
        self.held.clear()

    async def _load(self, key: PartKey) -> None:
        try:
            while key in self._wanted:
                if await self._try_load(key):
                    return
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            del self._loading[key]

    async def _try_load(self, key: PartKey) -> bool:
        async with self._loaders:
            if key not in self._wanted:
                return True
            began = time.monotonic()
            try:
                rows, part = await asyncio.to_thread(self._load_blocking, key)
            except (EmbeddingServiceError, OSError, MemoryError) as error:
                if self.failures.get(key) != str(error):
                    log.error("part %s not loaded: %s", key, error)
                self.failures[key] = str(error)
                self.changed.set()
                return False
        self.failures.pop(key, None)
        if key not in self._wanted:
            rows.drop(part)
            return True
        self.held.add(key)
        self.changed.set()
        log.info("holds %s: %s bytes in %.2f s", key, f"{part.bytes:,}", time.monotonic() - began)
        return True

    def _load_blocking(self, key: PartKey) -> tuple[TableRows, Part]:
        part = self._part(key)
        # Whatever else is wanted will be here too, so that is what must fit, in whichever order it comes.
        needed = sum(self._part(other).bytes for other in self._wanted | self.held)
        if needed > self.memory_limit:
            raise PlacementError(
                f"this shard was given {needed:,} bytes of parts and its memory limit is {self.memory_limit:,}: "
                "raise --memory"
            )
        path = self._store.fetch_part(self._manifest(key), part, self._cache)
        rows = self._rows(key)
        try:
            rows.load(part, path)
        except CorruptPart:
            if not self._store.is_local:
                path.unlink(missing_ok=True)  # a bad copy: the next try fetches another
            raise
        return rows, part

    def _rows(self, key: PartKey) -> TableRows:
        with self._tables_lock:
            if key[:3] not in self._tables:
                self._tables[key[:3]] = self._tier(self._manifest(key).table(key.table))
            return self._tables[key[:3]]

    def _drop(self, key: PartKey) -> None:
        self.held.discard(key)
        self.changed.set()
        self._tables[key[:3]].drop(self._part(key))
        log.info("dropped %s", key)
        if not any(other[:3] == key[:3] for other in self.held | self._loading.keys()):
            self._tables.pop(key[:3]).close()

    def _manifest(self, key: PartKey) -> Manifest:
        name = (key.model, key.version)
        if name not in self._manifests:
            self._manifests[name] = self._store.manifest(*name)
        return self._manifests[name]

    def _part(self, key: PartKey) -> Part:
        return self._manifest(key).table(key.table).parts[key.part]
