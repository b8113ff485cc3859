"""Remote modules in graphs of torch.compile. They are operators that ask the service, and give gradients to a session.

A graph holds neither a module nor its client. It gets the module's handle as it gets its ids. So one graph serves all
modules whose rows are alike, and a copy is not compiled again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embedding_service.client.handles import Handled, module_of
from embedding_service.errors import InvalidRequest, NoGradients

# The service is asked while a graph is made, not by the graph.
torch.compiler.assume_constant_result(Handled.learn_width)


@torch.compiler.disable(reason="the service did not say how wide the rows are")
def look_up_between_graphs(module: Handled, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Integer ids [*] -> `dtype` [*, width], as in eager mode. Raises what the module does."""
    rows = module._in_graph(module._ask(ids, context, dtype), module._trained(ids, context))
    module._width()  # known now, so that the next call is compiled
    return rows


@torch.library.custom_op(
    # Caches of compiled graphs know operators by their names. Another backward half needs another name.
    "embedding_service::look_up_trained",
    mutates_args=(),
    schema="(Tensor ids, Tensor? context, Tensor handle, int width, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def look_up(ids: Tensor, context: Tensor | None, handle: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Integer ids [*] -> `dtype` [*, width] on their device, as the module of `handle` looks them up.

    Raises what the module does, and InvalidRequest if its rows have another width by now.
    """
    module = module_of(handle)
    rows = module._ask(ids, context, dtype)
    if rows.shape[-1] != width:
        raise InvalidRequest(
            f"{module} has rows of {rows.shape[-1]} values now, {width} when the model was compiled: call "
            "torch.compiler.reset() to have it compiled again"
        )
    return rows.contiguous()


@look_up.register_fake
def _(ids: Tensor, context: Tensor | None, handle: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, width), dtype=dtype)


@torch.library.custom_op(
    "embedding_service::give_gradients",
    mutates_args=(),
    schema="(Tensor ids, Tensor? context, Tensor handle, Tensor gradients) -> Tensor",
)
def give_gradients(ids: Tensor, context: Tensor | None, handle: Tensor, gradients: Tensor) -> Tensor:
    """Give the gradients of rows to the session that trains them. Raises NoGradients if there is none."""
    module = module_of(handle)
    collect = module._trained(ids, context)
    if collect is None:
        raise module.no_gradients()
    if not _HAS_EFFECTS:
        raise NoGradients(
            f"{module} cannot be trained in a graph of torch.compile by torch {torch.__version__}: take a later torch, "
            "or wrap the module's call in torch.compiler.disable"
        )
    collect(gradients.clone())  # the compiler uses its memory again
    return torch.zeros_like(handle)


# Without it a compiler may make one call of two that are alike, and lose the gradients of one.
_HAS_EFFECTS = hasattr(give_gradients, "register_effect")
if _HAS_EFFECTS:
    give_gradients.register_effect(torch.library.EffectType.ORDERED)


@give_gradients.register_fake
def _(ids: Tensor, context: Tensor | None, handle: Tensor, gradients: Tensor) -> Tensor:
    return torch.empty_like(handle)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, context, handle, *_ = inputs
    ctx.save_for_backward(ids, context, handle)


def _backward(ctx: Any, gradients: Tensor) -> tuple[None, None, Tensor, None, None]:
    """An operator, because a graph's backward half is traced when the graph is made, and must do it when it runs."""
    ids, context, handle = ctx.saved_tensors
    return None, None, give_gradients(ids, context, handle, gradients), None, None


look_up.register_autograd(_backward, setup_context=_save)
