"""Checkpoints of one share: its rows and their state at one step, as files in the branch's folder.

checkpoint-STEP/SHARE/ has a file for each tensor, and SHARE.json beside it is written last. A checkpoint of the branch
is whole when those of all shares are there. A share's primary writes them. Steps are done while one is written: rows
that a step is about to change are put aside first, if they were not written yet.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding_service.errors import CorruptPart, StoreError
from embedding_service.store.parts import RowsWriter, read_hashed
from embedding_service.tensorfile import byte_view, header_bytes, read_spans
from embedding_service.training.branch import Branch, replace
from embedding_service.training.tables import TrainedTable, all_tensors

_CHUNK_BYTES = 4 << 20
_NAME = re.compile(r"checkpoint-(\d+)")
KEPT = 2


class _Item:
    """A tensor under way into its file."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._next = 0  # the first row that was not copied yet
        self._seen: Tensor | None = None
        self._aside: list[tuple[Tensor, Tensor]] = []

    def put_aside(self, ids: Tensor) -> None:
        """Rows that are about to change. ids: int64 [n], ascending."""
        if self._next >= len(self.tensor):
            return
        if self._seen is None:
            self._seen = torch.zeros(len(self.tensor), dtype=torch.bool)
        ids = ids[(ids >= self._next) & ~self._seen[ids]]
        self._seen[ids] = True
        self._aside.append((ids, self.tensor[ids]))

    def copy_next(self, rows: int) -> Tensor:
        """The next rows as they were when it began."""
        first, end = self._next, min(self._next + rows, len(self.tensor))
        chunk = self.tensor[first:end].clone()
        for ids, values in self._aside:
            begin, stop = torch.searchsorted(ids, torch.tensor([first, end])).tolist()
            chunk[ids[begin:stop] - first] = values[begin:stop]
        self._next = end
        if end == len(self.tensor):
            self._aside, self._seen = [], None
        return chunk

    @property
    def rows_left(self) -> int:
        """How many were not copied yet."""
        return len(self.tensor) - self._next


class Snapshot:
    """The tables of a share as they are when it is made."""

    def __init__(self, tables: Mapping[str, TrainedTable]) -> None:
        self.items = {(table, name): _Item(tensor) for table, name, tensor in all_tensors(tables)}

    def put_aside(self, table: str, ids: Tensor) -> None:
        """To be called before rows change, with the share's lock."""
        for (name, _), item in self.items.items():
            if name == table:
                item.put_aside(ids)


class Saved(NamedTuple):
    """What SHARE.json says. `files`: by table and tensor, the file's checksum."""

    step: int
    parts: dict[str, list[int]]
    files: dict[str, dict[str, str]]


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
    for (table, name), item in snapshot.items.items():
        path = _file(folder, share, table, name)
        row_bytes = max(1, item.tensor[:1].numel() * 4)
        with RowsWriter(path, header_bytes({name: ("F32", tuple(item.tensor.shape))})) as writer:
            while item.rows_left:
                with lock:
                    chunk = item.copy_next(max(1, _CHUNK_BYTES // row_bytes))
                writer.write(chunk)
            files.setdefault(table, {})[name] = writer.close()
    parts = {name: table.parts for name, table in tables.items()}
    with leading:
        replace(folder / f"{share}.json", json.dumps(Saved(step, parts, files)._asdict()).encode())


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
    folder = checkpoint_folder(branch_folder, step)
    saved = read_saved(folder, share)
    for table, name, tensor in all_tensors(tables):
        path = _file(folder, share, table, name)
        [span] = read_spans(path).values()
        view = byte_view(tensor)
        if span.bytes != len(view):
            raise CorruptPart(f"{path}: expected {len(view):,} bytes, got {span.bytes:,}")

        def place(begin: int, end: int, view: memoryview = view) -> memoryview:
            return view[begin:end]

        got = read_hashed(path, span.offset, span.bytes, place, lambda _: None)
        if got != saved.files[table][name]:
            raise CorruptPart(f"{path} is corrupt: expected {saved.files[table][name]}, got {got}")


def read_saved(folder: Path, share: str) -> Saved:
    """What a share's part of a checkpoint is. Raises StoreError."""
    try:
        return Saved(**json.loads((folder / f"{share}.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{folder / share}.json cannot be read: {error}") from error


def saved_rows(folder: Path, share: str, table: str) -> npt.NDArray[np.float32]:
    """The rows that a share's checkpoint has of a table, float32 [rows, dim], read when they are looked at."""
    path = _file(folder, share, table, "rows")
    [span] = read_spans(path).values()
    return np.memmap(path, np.float32, "r", span.offset, span.shape)


def forget_checkpoints(branch_folder: Path, branch: Branch, share: str, *, after: int | None = None) -> int:
    """Remove a share's part of old checkpoints, or of those after a step.

    The last whole one is kept, and what is newer. Returns the step of the oldest one that is kept, or 0.
    """
    mine = saved_steps(branch_folder, share)
    if after is None:
        whole = whole_steps(branch_folder, branch)
        oldest = min(whole[-1:] + mine[-KEPT:], default=0)
        gone = [step for step in mine if step < oldest]
    else:
        gone = [step for step in mine if step > after]
    for step in gone:
        folder = checkpoint_folder(branch_folder, step)
        (folder / f"{share}.json").unlink(missing_ok=True)  # first: without it nothing of it counts
        shutil.rmtree(folder / share, ignore_errors=True)
        try:
            folder.rmdir()
        except OSError:  # other shares have theirs there
            continue
    return min((step for step in mine if step not in gone), default=0)


def _file(folder: Path, share: str, table: str, name: str) -> Path:
    return folder / share / table / f"{name}.safetensors"
