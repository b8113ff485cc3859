"""The rows of a branch's tables that one shard has, with their optimizer state, in this process's memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding_service.address_space import AddressSpace
from embedding_service.errors import OutOfRange, Overloaded, Redirect
from embedding_service.memory import available_memory
from embedding_service.training.branch import BranchTable
from embedding_service.training.optimizers import Optimizer

Ids = npt.NDArray[np.int64]


def trained_bytes(table: BranchTable, parts: list[int], optimizer: Optimizer) -> int:
    """What some parts of a table take in memory: their rows, when each changed, and the optimizer's state."""
    rows = sum(map(table.part_rows, parts))
    shapes = optimizer.state_shapes(rows, table.dim).values()
    return 4 * (rows * (table.dim + 1) + sum(int(np.prod(shape)) for shape in shapes))


class TrainedTable:
    """Some parts of a table, side by side in ascending order.

    Attributes:
        parts: Their numbers.
        rows: float32 [rows of these parts, dim]. Nobody keeps it longer than this object.
        state: The optimizer's tensors, whose first dimension is the same.
    """

    def __init__(self, table: BranchTable, parts: list[int], optimizer: Optimizer) -> None:
        self.table, self.parts = table, parts
        self._optimizer = optimizer
        self._first = np.full(table.parts, -1, np.int64)  # where each part begins in `rows`, -1: it is not here
        count = 0
        for part in parts:
            self._first[part] = count
            count += table.part_rows(part)
        self._is_whole = len(parts) == table.parts  # then a row's place is its id
        shapes = optimizer.state_shapes(count, table.dim)
        if (needed := trained_bytes(table, parts, optimizer)) > (left := available_memory()):
            raise Overloaded(
                f"table {table.name}: training its {len(parts)} parts here needs {needed:,} bytes, {left:,} are free: "
                "give the branch more shards, or an optimizer with less state (rowwise_adagrad has 4 bytes a row)"
            )
        self._spaces: list[AddressSpace] = []
        self.rows = self._zeros((count, table.dim))
        self.state = {name: self._zeros(shape) for name, shape in shapes.items()}
        self._changed = torch.zeros(count, dtype=torch.int32)  # the step that changed each row last

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Memory in huge pages: rows are changed at random, and that takes a fifth less time there."""
        space = AddressSpace(4 * math.prod(shape))
        self._spaces.append(space)
        return space.map_memory(0, space.nbytes).view(torch.float32).view(shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds: "rows", and the state by its names."""
        return {"rows": self.rows, **self.state}

    def local(self, ids: Ids) -> Tensor:
        """Where rows lie in `rows`: int64 [n], perhaps `ids` themselves.

        Raises OutOfRange, and Redirect for rows that another shard has.
        """
        if not len(ids):
            return torch.empty(0, dtype=torch.int64)
        if ids.min() < 0 or ids.max() >= self.table.rows:
            outside = np.flatnonzero((ids < 0) | (ids >= self.table.rows))
            raise OutOfRange(
                f"id {ids[outside[0]]} at position {outside[0]} is outside table {self.table.name}: ids must be from 0 "
                f"to {self.table.rows - 1}"
            )
        if self._is_whole:
            return torch.from_numpy(ids)
        part, offset = np.divmod(ids, self.table.rows_per_part)
        first = self._first[part]
        absent = np.flatnonzero(first < 0)
        if len(absent):
            raise Redirect(
                f"id {ids[absent[0]]} of table {self.table.name} is of part {part[absent[0]]}, which another shard has"
            )
        return torch.from_numpy(first + offset)

    def rows_of(self, part: int) -> Tensor:
        """The rows of a part: float32 [rows, dim], not a copy."""
        first = int(self._first[part])
        return self.rows[first : first + self.table.part_rows(part)]

    def step(self, local: Tensor, gradients: Tensor, lr: float, number: int) -> None:
        """Do a step: see `Optimizer.step`."""
        self._optimizer.step(self.rows, self.state, local, gradients, lr, number)
        self._changed.index_fill_(0, local, number)

    def changed_since(self, step: int) -> Tensor:
        """The rows that steps after `step` changed, which was loaded or came later: int64 [n], ascending."""
        return (self._changed > step).nonzero().flatten()

    def loaded(self) -> None:
        """Rows and state are those of a checkpoint. What changes from here on counts as changed."""
        self._changed.zero_()

    def clear(self) -> None:
        """Forget the state."""
        for each in self.state.values():
            each.zero_()


def all_tensors(tables: Mapping[str, TrainedTable]) -> Iterator[tuple[str, str, Tensor]]:
    """(table, name, tensor) of all that a checkpoint holds."""
    for name, table in tables.items():
        for kind, tensor in table.tensors.items():
            yield name, kind, tensor
