"""How rows change by gradients. Each kind says what state a row has, and does one step.

A row after a step depends on that row, its state, its gradient, the learning rate and the number of the step. It does
not depend on which other rows are there. So any spread over shards gives the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from embedding_service.errors import InvalidRequest
from embedding_service.training import operators
from embedding_service.wire import training_pb2 as wire

_OPERATORS = ("sgd", "adagrad", "rowwise_adagrad")
# Rows that row-wise Adam changes at a time: they stay in a core's cache.
_BLOCK_ROWS = 2048


class Optimizer(ABC):
    """One kind, with its numbers."""

    def __init__(self, about: wire.Optimizer) -> None:
        self._about = about
        if about.kind in _OPERATORS:
            operators.operator(about.kind)  # raises now if it is not here, and not in the middle of a step

    @abstractmethod
    def state_shapes(self, rows: int, dim: int) -> dict[str, tuple[int, ...]]:
        """The float32 tensors that go with a table, zeros at first. Their first dimension is rows."""

    @abstractmethod
    def step(
        self, rows: Tensor, state: Mapping[str, Tensor], ids: Tensor, gradients: Tensor, lr: float, number: int
    ) -> None:
        """Do step `number`, from 1 on, in place.

        rows: float32 [n, dim]. ids: int64 [k], ascending, each once, within n. gradients: float32 [k, dim].
        """


class Sgd(Optimizer):
    """row -= lr * g."""

    def state_shapes(self, rows: int, dim: int) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def step(
        self, rows: Tensor, state: Mapping[str, Tensor], ids: Tensor, gradients: Tensor, lr: float, number: int
    ) -> None:
        """See `Optimizer`."""
        operators.apply("sgd", rows, ids, gradients, lr, None)


class RowwiseAdagrad(Optimizer):
    """s += mean(g * g) for the row, row -= lr * g / (sqrt(s) + eps)."""

    def state_shapes(self, rows: int, dim: int) -> dict[str, tuple[int, ...]]:
        """One number a row."""
        return {"sum": (rows,)}

    def step(
        self, rows: Tensor, state: Mapping[str, Tensor], ids: Tensor, gradients: Tensor, lr: float, number: int
    ) -> None:
        """See `Optimizer`."""
        operators.apply("rowwise_adagrad", rows, ids, gradients, lr, state["sum"], eps=self._about.eps)


class Adagrad(Optimizer):
    """s += g * g, row -= lr * g / (sqrt(s) + eps)."""

    def state_shapes(self, rows: int, dim: int) -> dict[str, tuple[int, ...]]:
        """One number a value."""
        return {"sum": (rows, dim)}

    def step(
        self, rows: Tensor, state: Mapping[str, Tensor], ids: Tensor, gradients: Tensor, lr: float, number: int
    ) -> None:
        """See `Optimizer`."""
        operators.apply("adagrad", rows, ids, gradients, lr, state["sum"], eps=self._about.eps)


class RowwiseAdam(Optimizer):
    """Adam whose second moment is one number a row. Rows without a gradient stay, and so does their state."""

    def state_shapes(self, rows: int, dim: int) -> dict[str, tuple[int, ...]]:
        """The first moment of each value, the second of each row."""
        return {"first": (rows, dim), "second": (rows,)}

    def step(
        self, rows: Tensor, state: Mapping[str, Tensor], ids: Tensor, gradients: Tensor, lr: float, number: int
    ) -> None:
        """See `Optimizer`."""
        about = self._about
        beta1, beta2 = about.beta1, about.beta2
        rate, second_share = lr / (1 - beta1**number), 1 - beta2**number
        for begin in range(0, len(ids), _BLOCK_ROWS):
            some, g = ids[begin : begin + _BLOCK_ROWS], gradients[begin : begin + _BLOCK_ROWS]
            first = state["first"][some].mul_(beta1).add_(g, alpha=1 - beta1)
            second = state["second"][some].mul_(beta2).add_(g.square().mean(1), alpha=1 - beta2)
            state["first"][some] = first
            state["second"][some] = second
            scale = (second / second_share).sqrt_().add_(about.eps).unsqueeze_(1)
            rows[some] = rows[some].sub_(first.mul_(rate).div_(scale))


_KINDS: dict[str, type[Optimizer]] = {
    "sgd": Sgd,
    "rowwise_adagrad": RowwiseAdagrad,
    "adagrad": Adagrad,
    "rowwise_adam": RowwiseAdam,
}


def optimizer_of(about: wire.Optimizer) -> Optimizer:
    """The optimizer that a message names. Raises InvalidRequest for one that is not known, or numbers out of range."""
    if about.kind not in _KINDS:
        raise InvalidRequest(f"unknown optimizer {about.kind!r}; known: {', '.join(_KINDS)}")
    if not (0 <= about.eps < 1 and 0 <= about.beta1 < 1 and 0 <= about.beta2 < 1):
        raise InvalidRequest(
            f"optimizer {about.kind}: eps, beta1 and beta2 must be at least 0 and less than 1, got {about.eps:g}, "
            f"{about.beta1:g}, {about.beta2:g}"
        )
    return _KINDS[about.kind](about)
