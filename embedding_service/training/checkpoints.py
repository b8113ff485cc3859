"""Checkpoints of one share: its rows and their state at one step, as files in the branch's folder.

checkpoint-STEP/SHARE/ has a file for each tensor, and SHARE.json beside it is written last. A checkpoint of the branch
is whole when those of all shares are there. A share's primary writes them. Steps are done while one is written: rows
that a step is about to change are put aside first, if they were not written yet.

A checkpoint is full, or it has the rows alone that changed since the one before, over which it lies. A full one and
those over it are a chain. What a chain needs is kept.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding_service.errors import CorruptPart, StoreError
from embedding_service.store.parts import CHUNK_BYTES, RowsWriter, read_hashed
from embedding_service.tensorfile import byte_view, header_bytes, read_spans
from embedding_service.training.branch import Branch, replace
from embedding_service.training.tables import TrainedTable, all_tensors

_CHUNK_BYTES = 4 << 20
_NAME = re.compile(r"checkpoint-(\d+)")
KEPT = 2
# A chain begins again with a full checkpoint when it has so many over that, or when they hold half as many rows.
MOST_OVER = 15
_IDS = "ids"
Number = TypeVar("Number", bound=np.generic)


class _Item:
    """A tensor under way into its file, or some rows of it, a chunk at a time.

    ids: int64 [n], ascending; None: all rows.
    """

    def __init__(self, tensor: Tensor, ids: Tensor | None = None) -> None:
        self.tensor, self.ids = tensor, ids
        self.count = len(tensor) if ids is None else len(ids)
        self._rows = _rows_at_once(tensor)  # of a chunk
        self._next = 0  # the place of the first row that was not copied yet
        self._seen: Tensor | None = None
        self._aside: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by the chunk's number

    def put_aside(self, ids: Tensor) -> None:
        """Rows that are about to change. ids: int64 [n], ascending."""
        if self._next >= self.count:
            return
        places = ids
        if self.ids is not None:
            places = torch.searchsorted(self.ids, ids).clamp_(max=self.count - 1)
            places = places[self.ids[places] == ids]
        if self._seen is None:
            self._seen = torch.zeros(self.count, dtype=torch.bool)
        places = places[(places >= self._next) & ~self._seen[places]]
        self._seen[places] = True
        values = self.tensor[places if self.ids is None else self.ids[places]]
        numbers, counts = torch.unique_consecutive(places // self._rows, return_counts=True)
        cuts = counts.tolist()
        for number, where, rows in zip(numbers.tolist(), places.split(cuts), values.split(cuts), strict=True):
            self._aside.setdefault(number, []).append((where, rows))

    def copy_next(self) -> Tensor:
        """The next rows as they were when it began."""
        first, end = self._next, min(self._next + self._rows, self.count)
        chunk = self.tensor[first:end].clone() if self.ids is None else self.tensor[self.ids[first:end]]
        if aside := self._aside.pop(first // self._rows, None):
            places, values = map(torch.cat, zip(*aside, strict=True))
            chunk[places - first] = values
        self._next = end
        if end == self.count:
            self._seen = None
        return chunk

    @property
    def rows_left(self) -> int:
        """How many were not copied yet."""
        return self.count - self._next


class Snapshot:
    """The tables of a share as they are when it is made.

    changed: Of each table the rows to be written, int64 [n], ascending. None: all.
    over: The step of the checkpoint that has the others.
    """

    def __init__(
        self,
        tables: Mapping[str, TrainedTable],
        changed: Mapping[str, Tensor] | None = None,
        over: int | None = None,
    ) -> None:
        self.changed, self.over = changed, over
        self.items = {
            (table, name): _Item(tensor, changed[table] if changed else None)
            for table, name, tensor in all_tensors(tables)
        }

    def put_aside(self, table: str, ids: Tensor) -> None:
        """To be called before rows change, with the share's lock."""
        for (name, _), item in self.items.items():
            if name == table:
                item.put_aside(ids)


class Saved(NamedTuple):
    """What SHARE.json says.

    Attributes:
        files: By table and tensor, the file's checksum.
        over: The step of the checkpoint that has the rows which this one has not. None: it is full.
        rows: How many it has, of all tables.
    """

    step: int
    parts: dict[str, list[int]]
    files: dict[str, dict[str, str]]
    over: int | None = None
    rows: int = 0


def checkpoint_folder(branch_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return branch_folder / f"checkpoint-{step:015}"


def write_checkpoint(
    branch_folder: Path,
    share: str,
    step: int,
    tables: Mapping[str, TrainedTable],
    snapshot: Snapshot,
    lock: AbstractContextManager[Any],
    leading: AbstractContextManager[Any],
) -> None:
    """Write a share's checkpoint. It holds the lock for one chunk at a time. Raises OSError.

    leading: Entered when it is to count. Raises if somebody else is the share's primary by then.
    """
    folder = checkpoint_folder(branch_folder, step)
    files: dict[str, dict[str, str]] = {}
    for table, ids in (snapshot.changed or {}).items():
        files[table] = {_IDS: _write_file(_file(folder, share, table, _IDS), _IDS, "I64", tuple(ids.shape), [ids])}
    for (table, name), item in snapshot.items.items():
        chunks = _chunks(item, lock)
        shape = (item.count, *item.tensor.shape[1:])
        files.setdefault(table, {})[name] = _write_file(_file(folder, share, table, name), name, "F32", shape, chunks)
    parts = {name: table.parts for name, table in tables.items()}
    rows = sum(item.count for (_, name), item in snapshot.items.items() if name == "rows")
    with leading:
        saved = Saved(step, parts, files, snapshot.over, rows)
        replace(folder / f"{share}.json", json.dumps(saved._asdict()).encode())


def _chunks(item: _Item, lock: AbstractContextManager[Any]) -> Iterator[Tensor]:
    while item.rows_left:
        with lock:
            chunk = item.copy_next()
        yield chunk


def _rows_at_once(tensor: Tensor) -> int:
    return max(1, _CHUNK_BYTES // max(1, tensor[:1].numel() * 4))


def _write_file(path: Path, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[Tensor]) -> str:
    """Write a tensor. Returns its checksum."""
    with RowsWriter(path, header_bytes({name: (dtype, shape)})) as writer:
        for chunk in chunks:
            writer.write(chunk)
        return writer.close()


def saved_steps(branch_folder: Path, share: str) -> list[int]:
    """The steps of which a share's part of a checkpoint is there, oldest first."""
    found = [(_NAME.fullmatch(path.parent.name), path) for path in branch_folder.glob(f"checkpoint-*/{share}.json")]
    return sorted(int(match[1]) for match, _ in found if match)


def whole_steps(branch_folder: Path, branch: Branch) -> list[int]:
    """The steps of which the checkpoint is whole, oldest first."""
    each = [set(saved_steps(branch_folder, share)) for share in branch.shares]
    return sorted(set.intersection(*each))


def load_checkpoint(branch_folder: Path, share: str, step: int, tables: Mapping[str, TrainedTable]) -> None:
    """Fill the tables from a share's checkpoint. Raises CorruptPart."""
    for saved in chain(branch_folder, share, step):
        folder = checkpoint_folder(branch_folder, saved.step)
        for table, name, tensor in all_tensors(tables):
            path, checksum = _file(folder, share, table, name), saved.files[table][name]
            if saved.over is None:
                _check(path, checksum, byte_view(tensor))
                continue
            ids_path = _file(folder, share, table, _IDS)
            _check(ids_path, saved.files[table][_IDS])
            _check(path, checksum)
            _put_over(tensor, _mapped(ids_path, np.int64), _mapped(path, np.float32))


def _put_over(tensor: Tensor, ids: npt.NDArray[np.int64], rows: npt.NDArray[np.float32]) -> None:
    some = _rows_at_once(tensor)
    for begin in range(0, len(ids), some):
        places = torch.from_numpy(np.array(ids[begin : begin + some]))
        tensor[places] = torch.from_numpy(np.array(rows[begin : begin + some]))


def _check(path: Path, checksum: str, into: memoryview | None = None) -> None:
    """Read a tensor, into memory of its size if that is given. Raises CorruptPart."""
    [span] = read_spans(path).values()
    if into is not None and span.bytes != len(into):
        raise CorruptPart(f"{path}: expected {len(into):,} bytes, got {span.bytes:,}")
    scratch = memoryview(bytearray(0 if into is not None else min(span.bytes, CHUNK_BYTES)))

    def place(begin: int, end: int) -> memoryview:
        return scratch[: end - begin] if into is None else into[begin:end]

    got = read_hashed(path, span.offset, span.bytes, place, lambda _: None)
    if got != checksum:
        raise CorruptPart(f"{path} is corrupt: expected {checksum}, got {got}")


def _mapped(path: Path, dtype: type[Number]) -> npt.NDArray[Number]:
    """A tensor, read when it is looked at."""
    [span] = read_spans(path).values()
    if not span.bytes:
        return np.empty(span.shape, dtype)
    return np.memmap(path, dtype, "r", span.offset, span.shape)


def read_saved(folder: Path, share: str) -> Saved:
    """What a share's part of a checkpoint is. Raises StoreError."""
    try:
        return Saved(**json.loads((folder / f"{share}.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{folder / share}.json cannot be read: {error}") from error


def chain(branch_folder: Path, share: str, step: int) -> list[Saved]:
    """A full checkpoint, and those over it up to a step. Raises StoreError."""
    found = [read_saved(checkpoint_folder(branch_folder, step), share)]
    while (over := found[-1].over) is not None:
        if over >= found[-1].step:
            raise StoreError(
                f"the checkpoint of step {found[-1].step} lies over that of step {over}, which is not before"
            )
        found.append(read_saved(checkpoint_folder(branch_folder, over), share))
    return found[::-1]


class SavedRows:
    """The rows that a share's checkpoint has of a table, read when they are asked for."""

    def __init__(self, branch_folder: Path, share: str, saved: list[Saved], table: str) -> None:
        folders = [checkpoint_folder(branch_folder, each.step) for each in saved]
        self._rows, *over = (_mapped(_file(folder, share, table, "rows"), np.float32) for folder in folders)
        ids = (_mapped(_file(folder, share, table, _IDS), np.int64) for folder in folders[1:])
        self._over = list(zip(ids, over, strict=True))

    def read(self, first: int, end: int) -> npt.NDArray[np.float32]:
        """Rows `first` to `end` - 1, float32 [n, dim]."""
        rows = np.array(self._rows[first:end])
        for ids, values in self._over:
            begin, stop = np.searchsorted(ids, (first, end))
            rows[ids[begin:stop] - first] = values[begin:stop]
        return rows


def kept_steps(branch_folder: Path, branch: Branch, share: str, held: Iterable[int] = ()) -> list[int]:
    """The steps of a share's checkpoints that stay, oldest first, but for those that they lie over.

    What the branch began from is one, too: that of step 0, which nobody has to write.

    held: Steps of checkpoints that are needed besides.
    """
    mine, whole = [0, *saved_steps(branch_folder, share)], whole_steps(branch_folder, branch)
    oldest = min([*whole[-1:], *mine[-KEPT:], *held])
    return [step for step in mine if step >= oldest]


def forget_checkpoints(branch_folder: Path, share: str, gone: Iterable[int]) -> None:
    """Remove a share's part of some checkpoints, and what is left of parts that were not finished before those."""
    for step in sorted(gone, reverse=True):  # no checkpoint is without the one that it lies over
        folder = checkpoint_folder(branch_folder, step)
        (folder / f"{share}.json").unlink(missing_ok=True)  # first: without it nothing of it counts
        shutil.rmtree(folder / share, ignore_errors=True)
        try:
            folder.rmdir()
        except OSError:  # other shares have theirs there
            continue


def old_steps(branch_folder: Path, share: str, kept: Iterable[int]) -> list[int]:
    """Steps whose checkpoints may go if these stay, also of checkpoints that were never finished."""
    needed = {saved.step for step in kept if step for saved in chain(branch_folder, share, step)}
    begun = (_NAME.fullmatch(path.parent.name) for path in branch_folder.glob(f"checkpoint-*/{share}"))
    newest = max(needed, default=0)
    return [step for match in begun if match and (step := int(match[1])) < newest and step not in needed]


def _file(folder: Path, share: str, table: str, name: str) -> Path:
    return folder / share / table / f"{name}.safetensors"
