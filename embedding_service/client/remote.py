"""`RemoteEmbedding`, a module that stands in place of an nn.Embedding, and what all remote modules share."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from embedding_service.client.client import EmbeddingClient
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, NoGradients
from embedding_service.formats.plain import plain_dtypes

# Bits of a handle. All of it fits a float64.
_HANDLE_BITS = 53
_SENT = frozenset(plain_dtypes().values())


class RemoteModule(nn.Module):
    """A module whose weights lie in the service. It has no parameters, and raises NoGradients if asked for gradients.

    Its results require gradients while autograd records, as with the module that it stands for. So training that would
    have changed the weights fails in `backward`. Otherwise it would silently leave them as they were. Freeze this
    module with `requires_grad_(False)` to train the rest of a model. A model's own `requires_grad_` reaches parameters
    only.

    Copies in this process share the client. A pickled module connects when it is first used. `state_dict` holds nothing
    of it.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        super().__init__()
        # It has the device and dtype that weights would have, and conversions of the model convert it. It is no buffer,
        # because DDP and the like would send it about.
        self._stand_in = torch.empty(0, dtype=dtype, device=device or "cpu")
        self._handle = _handle(self, requires_grad=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `half`, `cuda` and their kin do to parameters."""
        self._stand_in = fn(self._stand_in)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": self._handle.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = _handle(self, requires_grad=state["_handle"])

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze it with False. Raises NoGradients with True."""
        if requires_grad:
            raise NoGradients(f"{self} cannot be trained: the service's tables only change by an import")
        self._handle.requires_grad_(False)
        return self

    def _look_up(self, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`_ask`, in eager mode and in graphs of torch.compile."""
        if torch.compiler.is_compiling():
            from embedding_service.client import graphs  # needs torch's compiler, which takes seconds to load

            width = self._width()
            if width is None:
                return graphs.look_up_between_graphs(self, ids, context, dtype)
            return graphs.look_up(ids, context, self._handle, width, dtype)
        return self._in_graph(self._ask(ids, context, dtype))

    def _ask(self, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Ask the service: integer ids [*] -> `dtype` [*, width] on their device."""
        raise NotImplementedError

    def _width(self) -> int | None:
        """The width of what `_ask` returns, if it is known."""
        raise NotImplementedError

    def _in_graph(self, rows: Tensor) -> Tensor:
        """`rows` [*, dim] as this module's weights would have given them to autograd."""
        if not (self._handle.requires_grad and torch.is_grad_enabled()):
            return rows
        return _FromService.apply(rows, self._handle, self)  # type: ignore[no-any-return,no-untyped-call]

    def no_gradients(self) -> NoGradients:
        """What `backward` raises."""
        return NoGradients(
            f"{self} was asked for gradients, which it does not have: its rows lie in the service and stay as they "
            "are. Call requires_grad_(False) on this module to train the rest of the model, or torch.no_grad() where "
            "nothing is trained"
        )


# By the values of their handles.
_modules: WeakValueDictionary[float, RemoteModule] = WeakValueDictionary()


def _handle(module: RemoteModule, *, requires_grad: bool) -> Tensor:
    """A tensor [1] that stands for the module in graphs.

    Autograd records only what depends on something that requires gradients. A graph of torch.compile serves all
    modules, because they are data to it. Another process's graph, read from a file, finds no module by chance. The
    shape is not []: the compiler takes that for a number and analyses every graph twice.
    """
    number = float(secrets.randbits(_HANDLE_BITS))
    _modules[number] = module
    with torch.inference_mode(False):
        return torch.tensor([number], dtype=torch.float64, device="cpu", requires_grad=requires_grad)


def module_of(handle: Tensor) -> RemoteModule:
    """The module of a handle. Raises InvalidRequest if there is none."""
    module = _modules.get(handle.item())
    if module is None:
        raise InvalidRequest(
            "this compiled graph looks up rows for a module of another process, or one that is gone: compile the model "
            "in the process that uses it"
        )
    return module


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to ask for, to get `dtype`. It is float32 if the service does not send `dtype`."""
    return dtype if dtype in _SENT else torch.float32


class _FromService(torch.autograd.Function):
    """The edge of the graph. Rows pass it, gradients do not."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.mark_dirty(rows)  # the same tensor, not a view of it: later code may change it in place
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ctx.module.no_gradients()


class RemoteEmbedding(RemoteModule):
    """Stands in place of an `nn.Embedding`. Its weight lies in the service.

    Rows are of `dtype` until the module or its model is converted (`half()`, `to(torch.bfloat16)`, ...), as with an
    nn.Embedding. A dtype that the service does not send is converted from float32 here. Rows lie where the ids do.

    It has no gradients, as `RemoteModule` says. `backward` through its results raises NoGradients unless it is frozen.

    Args:
        client: Shared, not owned: close it yourself.
        table: `model/table` or `model@version/table`.
        dtype: A floating point one. None takes torch's default, which is float32 unless it was set.

    Raises:
        InvalidRequest: `dtype` is not floating point.
    """

    def __init__(self, client: EmbeddingClient, table: str, dtype: torch.dtype | None = None) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise InvalidRequest(f"dtype must be one of floating point, such as torch.bfloat16, got {dtype}")
        super().__init__(dtype)
        self._client = client
        self.table = table
        self._dim: int | None = None  # if a graph wanted to know

    @property
    def dtype(self) -> torch.dtype:
        """The rows' dtype."""
        return self._stand_in.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Integer Tensor[*] -> Tensor[*, dim]. Raises what `EmbeddingClient.lookup` raises."""
        return self._look_up(ids, None, self.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.table!r}, dtype={self.dtype}"

    def learn_dim(self) -> None:
        """Ask how wide the table is, because a graph is made for that. Ask for other modules' tables too.

        If the service did not answer, the width stays unknown. A lookup will raise why.
        """
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        for each in (self, *list(_modules.values())):
            if isinstance(each, RemoteEmbedding) and each._client is self._client and each._dim is None:
                with suppress(EmbeddingServiceError):
                    each._dim = each._client.lookup(each.table, none).shape[1]

    def _width(self) -> int | None:
        self.learn_dim()
        return self._dim

    def _ask(self, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows = self._client.lookup(self.table, ids, dtype=wire_dtype(dtype))
        return rows if rows.dtype == dtype else rows.to(dtype)  # `to` takes microseconds to do nothing
