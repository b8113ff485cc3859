"""FBGEMM's optimizers for CPUs, on memory of ours: the one file that knows how they are called.

They are the operators behind the backward passes of its training modules, without those. Each row is a bag of its own
under sums: that gives the same bits as no pooling and takes a sixth of the time. What a row becomes depends on that row
and its gradient alone, in whatever company they come.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from embedding_service.errors import InvalidRequest
from embedding_service.formats.fbgemm import fbgemm_operator

_LIBRARY = "fbgemm_gpu_tbe_training_backward.so"
_HOST, _SUM = 0, 0  # where weights lie, and its PoolingMode


@cache
def operator(kind: str) -> Any:
    """FBGEMM's operator "sgd", "adagrad" or "rowwise_adagrad". Raises InvalidRequest if it is not here."""
    try:
        return fbgemm_operator(f"split_embedding_backward_codegen_{kind}_cpu", _LIBRARY)
    except (ModuleNotFoundError, AttributeError) as error:
        raise InvalidRequest(
            f"the optimizer {kind} needs FBGEMM for CPUs, and it is not here: install fbgemm-gpu-cpu, or train with "
            "rowwise_adam"
        ) from error


@cache
def _constants() -> tuple[Tensor, Tensor]:
    """The offset of the first table, and where its weights lie."""
    return torch.zeros(1, dtype=torch.int64), torch.tensor([_HOST], dtype=torch.int32)


def apply(
    kind: str, rows: Tensor, ids: Tensor, gradients: Tensor, lr: float, state: Tensor | None, **more: Any
) -> None:
    """Change rows in place.

    Args:
        kind: "sgd", "adagrad" or "rowwise_adagrad".
        rows: float32 [n, dim], contiguous.
        ids: int64 [k], different rows. An id that is no row ends the process, so check first.
        gradients: float32 [k, dim].
        lr: The learning rate.
        state: float32 [n, dim], or [n] for the row-wise one. None for SGD.
        more: What the operator takes besides.
    """
    count, dim = gradients.shape
    if not count:
        return
    nothing, where = _constants()
    momentum = (
        {}
        if state is None
        else {"momentum1_host": state.view(-1), "momentum1_placements": where, "momentum1_offsets": nothing}
    )
    operator(kind)(
        grad_output=gradients,
        host_weights=rows.view(-1),
        weights_placements=where,
        weights_offsets=nothing,
        D_offsets=torch.tensor([0, dim], dtype=torch.int32),
        max_D=dim,
        hash_size_cumsum=torch.tensor([0, len(rows)]),
        total_hash_size_bits=len(rows).bit_length(),
        indices=ids,
        offsets=torch.arange(count + 1),
        pooling_mode=_SUM,
        indice_weights=torch.empty(0),
        stochastic_rounding=False,
        learning_rate_tensor=torch.tensor(lr, dtype=torch.float32),
        **momentum,
        **more,
    )
