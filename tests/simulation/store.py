"""The store: versions that are published and removed, and accidents. Rows name themselves.

A version "7b3" is the seventh one, and its base is "3": it has the base's rows but for about a third.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from embedding_service.controller.decisions import shared_part
from embedding_service.errors import NotFound
from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import ID_BYTES, Base, Manifest, Overlay, Part, Table, overlay_file, part_file
from embedding_service.store.store import Catalogue

ROW_BYTES = 8
ROWS_PER_PART = 8
# Of each model its tables, and of how many parts they are.
MODELS = {"m": {"t": 4, "u": 2}, "n": {"t": 2}}


def root_of(version: str) -> str:
    """The version whose parts it uses: its base, or itself."""
    return version.partition("b")[2] or version


def number_of(version: str) -> int:
    """Which one it is, of all that were published."""
    return int(version.partition("b")[0])


@lru_cache(256)
def manifest(model: str, version: str) -> Manifest:
    """A version as the store has it."""
    tables, root = tuple(_table(name, parts) for name, parts in MODELS[model].items()), root_of(version)
    if root == version:
        return Manifest(model=model, version=version, family="", hash_params={}, tables=tables)
    overlays = {table.name: tuple(_overlays(version, table)) for table in tables}
    base = Base(model=model, version=root, overlays=overlays)
    return Manifest(format_version=2, model=model, version=version, family="", hash_params={}, tables=tables, base=base)


def _overlays(version: str, table: Table) -> Iterator[Overlay]:
    for index, count in enumerate(_replaced(version, table.rows).reshape(-1, ROWS_PER_PART).sum(1).tolist()):
        yield Overlay(
            part=index,
            rows=count,
            file=overlay_file(table.name, index),
            bytes=count * (ID_BYTES + ROW_BYTES),
            checksum="xxh3-128:" + "0" * 32,
        )


def _replaced(version: str, rows: int) -> npt.NDArray[np.bool_]:
    """Which rows are not the base's: some of each part, others in each version."""
    return (np.arange(rows) + number_of(version)) % 3 == 0


def _table(name: str, parts: int) -> Table:
    part_bytes = ROWS_PER_PART * ROW_BYTES
    return Table(
        name=name,
        rows=parts * ROWS_PER_PART,
        dim=2,
        dtype="fp32",
        row_bytes=ROW_BYTES,
        rows_per_part=ROWS_PER_PART,
        parts=tuple(
            Part(
                index=index,
                first_row=index * ROWS_PER_PART,
                rows=ROWS_PER_PART,
                file=part_file(name, index),
                bytes=part_bytes,
                checksum="xxh3-128:" + "0" * 32,
            )
            for index in range(parts)
        ),
    )


@lru_cache(256)
def rows_of(model: str, version: str, table: str) -> npt.NDArray[np.uint32]:
    """uint32 [rows, 2]: which model, version and table it is, and which row. What is the base's, names the base."""
    count = MODELS[model][table] * ROWS_PER_PART
    tag = sorted(MODELS).index(model) << 24 | number_of(version) << 8 | sorted(MODELS[model]).index(table)
    rows = np.stack([np.full(count, tag, np.uint32), np.arange(count, dtype=np.uint32)], 1)
    if root_of(version) != version:
        rows = np.where(_replaced(version, count)[:, None], rows, rows_of(model, root_of(version), table))
    return rows


@dataclass
class Store:
    """What is in it, and what of that can be had.

    Attributes:
        versions: Of each model the published ones.
        is_away: Nothing can be read. `is_bare`: it is empty, as a folder is that nothing is mounted on.
        takes_notes: It can be written to. `noted`: the term in it.
        torn: Versions whose manifest cannot be read.
        corrupt: Parts whose file is not what it should be.
    """

    versions: dict[str, list[str]] = field(default_factory=lambda: {"m": ["1"]})
    is_away: bool = False
    is_bare: bool = False
    takes_notes: bool = True
    noted: int = 0
    torn: set[tuple[str, str]] = field(default_factory=set)
    corrupt: set[PartKey] = field(default_factory=set)

    def mend(self) -> None:
        """All that is there can be had."""
        self.is_away = self.is_bare = False
        self.takes_notes = True
        self.torn.clear()
        self.corrupt.clear()

    def catalogue(self) -> Catalogue | None:
        """What a look finds; None while it is away."""
        if self.is_away:
            return None
        if self.is_bare:
            return Catalogue(is_empty=True)
        found = Catalogue(is_empty=not self.versions)
        for model, versions in sorted(self.versions.items()):
            readable = [manifest(model, each) for each in versions if (model, each) not in self.torn]
            if readable:
                found.manifests[model] = readable
            found.problems.update({(model, each): "torn" for each in versions if (model, each) in self.torn})
        return found

    def read_term(self) -> int:
        """The term that is noted; 0 where it cannot be read."""
        return 0 if self.is_away or self.is_bare else self.noted

    def can_load(self, key: PartKey) -> bool:
        """Whether a part's files can be read and are what they should be."""
        there = key.version in self.versions.get(key.model, ()) and key[:2] not in self.torn
        return there and not self.is_away and not self.is_bare and self.corrupt.isdisjoint({key, shared(key)})

    def is_needed(self, model: str, version: str) -> bool:
        """Whether another version has this one for its base."""
        return any(root_of(each) == version != each for each in self.versions[model])


def shared(key: PartKey) -> PartKey:
    """The part that a version's part has its rows from."""
    return shared_part(key, manifest(*key[:2]))


class Rows:
    """The parts of a table that a shard holds: what `rows.TableRows` is to requests."""

    def __init__(self, model: str, version: str, table: str) -> None:
        self.table = manifest(model, version).table(table)
        self.parts: set[int] = set()
        self._rows = rows_of(model, version, table)

    def holds(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each id's part is held."""
        return np.array([part in self.parts for part in (ids // ROWS_PER_PART).tolist()], np.bool_)

    def gather(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """uint8 [n, row bytes]. Raises NotFound where a part is not held."""
        if not all(part in self.parts for part in (ids // ROWS_PER_PART).tolist()):
            raise NotFound("not held")
        return self._rows[ids].view(np.uint8)
