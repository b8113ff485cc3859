"""`RemoteEmbedding`: a module that stands where an nn.Embedding stood; and what all remote modules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from embedding_service.client.client import EmbeddingClient
from embedding_service.errors import NoGradients

# What the service sends; other dtypes are made of float32 here.
_SENT = (torch.float32, torch.float16, torch.bfloat16)


def not_compiled(forward: Any) -> Any:
    """A method that torch.compile leaves as it is: the graph ends before it, and the next one begins after it.

    As torch.compiler.disable, which would load the whole compiler for those who do not compile.
    """
    return _disable_dynamo(forward)


class RemoteModule(nn.Module):
    """A module whose weights lie in the service: it has no parameters, and says so when it is asked for gradients.

    As with the module it stands for, what it returns requires gradients where autograd records, so that training
    which would have changed the weights fails in `backward` instead of leaving them as they were without a word. Freeze
    it with `requires_grad_(False)` to train the rest of a model. That must be said to this module: a model's own
    `requires_grad_` speaks to parameters only.

    Attributes:
        dtype: Of the rows; follows `to`, `half`, `bfloat16` and the like, as a weight would.
    """

    frozen = False
    dtype = torch.float32

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Where nn.Module converts weights: what becomes of one that is not here."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    @property
    def _sent(self) -> torch.dtype:
        """What to ask the service for."""
        return self.dtype if self.dtype in _SENT else torch.float32

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze it with False; raises NoGradients with True."""
        if requires_grad:
            raise NoGradients(f"{self} cannot be trained: the service's tables only change by an import")
        self.frozen = True
        return self

    def _in_graph(self, rows: Tensor) -> Tensor:
        """`rows` [*, dim] as this module's weights would have given them to autograd."""
        if self.frozen or not torch.is_grad_enabled():
            return rows
        # Autograd records only what hangs on something that requires gradients.
        handle = torch.empty(0, dtype=rows.dtype, device=rows.device, requires_grad=True)
        return _FromService.apply(rows, handle, self)  # type: ignore[no-any-return,no-untyped-call]


class _FromService(torch.autograd.Function):
    """The edge of the graph: rows pass, gradients do not."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.mark_dirty(rows)  # the same tensor, not a view of it: what follows may change it in place
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NoGradients(
            f"{ctx.module} was asked for gradients, which it does not have: its rows lie in the service and stay as "
            "they are. Call requires_grad_(False) on this module to train the rest of the model, or torch.no_grad() "
            "where nothing is trained"
        )


class RemoteEmbedding(RemoteModule):
    """In place of an `nn.Embedding` whose weight lies in the service.

    Gradients: as `RemoteModule` says, none; `backward` through what it returns raises NoGradients unless it is frozen.

    Args:
        client: Shared, not owned: close it yourself.
        table: `model/table` or `model@version/table`.
        dtype: float32, float16 or bfloat16, until the module is converted to another.
    """

    def __init__(self, client: EmbeddingClient, table: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._client = client
        self.table = table
        self.dtype = dtype

    @not_compiled
    def forward(self, ids: Tensor) -> Tensor:
        """Integer Tensor[*] -> Tensor[*, dim]; raises what `EmbeddingClient.lookup` raises."""
        return self._in_graph(self._client.lookup(self.table, ids, dtype=self._sent).to(self.dtype))

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.table!r}, dtype={self.dtype}"
