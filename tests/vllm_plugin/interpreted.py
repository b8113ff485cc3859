"""vLLM's model runner on a CPU, before vllm is imported: its Triton kernels are interpreted.

vLLM's n-gram models need its second model runner, whose kernels are Triton's. No registry has Triton's CPU backend, but
Triton can interpret kernels. Two kernels of LongCat's that vLLM has for CUDA only stand here in torch.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

_IDS = (
    "ngram_compute_n_gram_ids(int ne_n, int ne_k, Tensor ne_weights, Tensor ne_mods, Tensor exclusive_sizes, "
    "Tensor exclusive_lengths, Tensor token_table, Tensor row_indices, Tensor column_starts, Tensor(a!) ids) -> ()"
)
_TOPK = (
    "topk_softmax(Tensor(a!) weights, Tensor(b!) experts, Tensor(c!) places, Tensor logits, bool renormalize, "
    "Tensor? bias, Tensor? is_padding) -> ()"
)
_libraries = {name: torch.library.Library(name, "FRAGMENT") for name in ("_C", "_moe_C")}


def prepare() -> None:
    """Call once, before vllm is imported."""
    os.environ.update(TRITON_INTERPRET="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")
    from triton import backends

    class Driver:
        """What vLLM asks of it."""

        @staticmethod
        def is_active() -> bool:
            return True

    backends.backends["cpu"] = backends.Backend(compiler=None, driver=Driver)
    for library, schema, kernel in (("_C", _IDS, longcat_ids), ("_moe_C", _TOPK, topk_softmax)):
        _libraries[library].define(schema)
        _libraries[library].impl(schema.partition("(")[0], kernel, "CPU")


def longcat_ids(
    longest: int,
    splits: int,
    powers: Tensor,
    rows: Tensor,
    offsets: Tensor,
    starts: Tensor,
    tokens: Tensor,
    request_rows: Tensor,
    columns: Tensor,
    ids: Tensor,
) -> None:
    """What vLLM 0.32's kernel writes into int32 `ids` [all tokens, heads].

    A head's id is the sum of token * power over the token and those before it, newest first, up to the first negative
    entry or the head's n-gram length, modulo the head's rows. An EOS is a negative entry, so an EOS sums up nothing.

    longest: N, of the n-grams; splits: K heads of each length 2..N.
    powers: [N - 1, K, N]; rows: [N - 1, K]; offsets: of each head in the table.
    starts: [requests + 1], where each request's tokens begin in `ids`.
    tokens: [*, width], a line a request: its look-back, then its tokens from column `columns[request]` on.
    request_rows: the line of each request.
    """
    for request in range(len(starts) - 1):
        line = tokens[request_rows[request]].tolist()
        for place in range(int(starts[request]), int(starts[request + 1])):
            last = int(columns[request]) + place - int(starts[request])
            for head in range((longest - 1) * splits):
                order, split = divmod(head, splits)
                total = 0
                for back in range(min(order + 2, last + 1)):
                    if line[last - back] < 0:
                        break
                    total += line[last - back] * int(powers[order, split, back])
                ids[place, head] = total % int(rows[order, split]) + int(offsets[head])


def topk_softmax(
    weights: Tensor,
    experts: Tensor,
    places: Tensor,
    logits: Tensor,
    renormalize: bool,
    bias: Tensor | None,
    is_padding: Tensor | None,
) -> None:
    """Each token's experts [tokens, k], chosen by softmax plus bias, and what softmax gave them. `places` is not read."""
    assert not renormalize
    scores = logits.softmax(-1)
    experts.copy_((scores if bias is None else scores + bias).topk(experts.shape[1]).indices)
    weights.copy_(scores.gather(-1, experts.long()))
