"""How a branch learns, as a trainer says it."""

from __future__ import annotations

from dataclasses import dataclass

from embedding_service.wire import training_pb2 as wire


@dataclass(frozen=True)
class SGD:
    """row -= lr * gradient."""

    lr: float

    def message(self) -> wire.Optimizer:
        """As the service takes it."""
        return wire.Optimizer(kind="sgd")


@dataclass(frozen=True)
class RowwiseAdagrad:
    """Adagrad with one number a row, 4 bytes of state: what large tables are trained with."""

    lr: float
    eps: float = 1e-8

    def message(self) -> wire.Optimizer:
        """As the service takes it."""
        return wire.Optimizer(kind="rowwise_adagrad", eps=self.eps)


@dataclass(frozen=True)
class Adagrad:
    """Adagrad, with as much state as there are rows."""

    lr: float
    eps: float = 1e-8

    def message(self) -> wire.Optimizer:
        """As the service takes it."""
        return wire.Optimizer(kind="adagrad", eps=self.eps)


@dataclass(frozen=True)
class RowwiseAdam:
    """Adam of rows that have a gradient. The second moment is one number a row, the first as large as the row."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def message(self) -> wire.Optimizer:
        """As the service takes it."""
        return wire.Optimizer(kind="rowwise_adam", eps=self.eps, beta1=self.betas[0], beta2=self.betas[1])


Optimizer = SGD | RowwiseAdagrad | Adagrad | RowwiseAdam
