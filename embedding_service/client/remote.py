"""`RemoteEmbedding`, a module that stands in place of an nn.Embedding, and what all remote modules share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from embedding_service.client.client import EmbeddingClient
from embedding_service.client.handles import Collect, Handled, all_modules
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, NoGradients
from embedding_service.formats.plain import plain_dtypes

_SENT = frozenset(plain_dtypes().values())


class RemoteModule(Handled):
    """A module whose weights lie in the service. It has no parameters, and raises NoGradients if asked for gradients.

    A module of a branch that its client trains gives its gradients to the session in `backward`.

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `half`, `cuda` and their kin do to parameters."""
        self._stand_in = fn(self._stand_in)
        return super()._apply(fn, recurse)

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
        return self._in_graph(self._ask(ids, context, dtype), self._trained(ids, context))


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to ask for, to get `dtype`. It is float32 if the service does not send `dtype`."""
    return dtype if dtype in _SENT else torch.float32


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

    def _trained(self, ids: Tensor, context: Tensor | None) -> Collect | None:
        session = self._client.session_of(self.table)
        return partial(session.add_gradients, self.table.partition("/")[2], ids.clone()) if session else None

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.table!r}, dtype={self.dtype}"

    def _learn_width(self) -> None:
        """Ask how wide the table is, and for other modules' tables too.

        If the service did not answer, the width stays unknown. A lookup will raise why.
        """
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        for each in (self, *all_modules()):
            if isinstance(each, RemoteEmbedding) and each._client is self._client and each._dim is None:
                with suppress(EmbeddingServiceError):
                    each._dim = each._client.lookup(each.table, none).shape[1]

    def _width(self) -> int | None:
        self.learn_width()
        return self._dim

    def _ask(self, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows = self._client.lookup(self.table, ids, dtype=wire_dtype(dtype))
        return rows if rows.dtype == dtype else rows.to(dtype)  # `to` takes microseconds to do nothing
