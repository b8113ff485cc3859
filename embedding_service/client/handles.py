"""What graphs of torch.compile know of a remote module: a handle, which is a number to them, and what it stands for."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from embedding_service.errors import InvalidRequest, NoGradients

# Bits of a handle. All of it fits a float64.
_HANDLE_BITS = 53


# Takes gradients of rows.
Collect = Callable[[Tensor], object]


class Handled(nn.Module):
    """A module that looks rows up, and has no gradients. Graphs find it by its handle."""

    def __init__(self) -> None:
        super().__init__()
        self._handle = _handle(self, requires_grad=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": self._handle.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = _handle(self, requires_grad=state["_handle"])

    def learn_width(self) -> None:
        """Ask for what `_width` tells, because a graph is made for that. A graph does not do it again."""
        self._learn_width()

    def _learn_width(self) -> None:
        """What there is to ask for. Nothing, where the width is known."""

    def _width(self) -> int | None:
        """The width of what `_ask` returns, if it is known."""
        raise NotImplementedError

    def _ask(self, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Ask the service: integer ids [*] -> `dtype` [*, width] on their device."""
        raise NotImplementedError

    def _trained(self, ids: Tensor, context: Tensor | None) -> Collect | None:
        """What takes the gradients of these rows, if a session trains them."""
        return None

    def _in_graph(self, rows: Tensor, collect: Collect | None = None) -> Tensor:
        """`rows` [*, dim] as this module's weights would have given them to autograd."""
        if not (self._handle.requires_grad and torch.is_grad_enabled()):
            return rows
        return _FromService.apply(rows, self._handle, self, collect)  # type: ignore[no-any-return,no-untyped-call]

    def no_gradients(self) -> NoGradients:
        """What `backward` raises."""
        return NoGradients(
            f"{self} was asked for gradients, which it does not have: its rows lie in the service and stay as they "
            "are. Call requires_grad_(False) on this module to train the rest of the model, or torch.no_grad() where "
            "nothing is trained. Rows of a branch can be trained: client.train"
        )


# By the values of their handles.
_modules: WeakValueDictionary[float, Handled] = WeakValueDictionary()


def _handle(module: Handled, *, requires_grad: bool) -> Tensor:
    """A tensor [1] that stands for the module in graphs.

    Autograd records only what depends on something that requires gradients. A graph of torch.compile serves all
    modules, because they are data to it. Another process's graph, read from a file, finds no module by chance. The
    shape is not []: the compiler takes that for a number and analyses every graph twice.
    """
    number = float(secrets.randbits(_HANDLE_BITS))
    _modules[number] = module
    with torch.inference_mode(False):
        return torch.tensor([number], dtype=torch.float64, device="cpu", requires_grad=requires_grad)


def module_of(handle: Tensor) -> Handled:
    """The module of a handle. Raises InvalidRequest if there is none."""
    module = _modules.get(handle.item())
    if module is None:
        raise InvalidRequest(
            "this compiled graph looks up rows for a module of another process, or one that is gone: compile the model "
            "in the process that uses it"
        )
    return module


def all_modules() -> list[Handled]:
    """Those of this process."""
    return list(_modules.values())


class _FromService(torch.autograd.Function):
    """The edge of the graph. Rows pass it, gradients only to a session that trains them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Tensor, module: Handled, collect: Collect | None) -> Tensor:
        ctx.module, ctx.collect = module, collect
        ctx.mark_dirty(rows)  # the same tensor, not a view of it: later code may change it in place
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.collect is None:
            raise ctx.module.no_gradients()
        ctx.collect(gradients[0])
        return None, None, None, None
