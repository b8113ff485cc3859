"""vLLM's n-gram models on a CPU: their Triton kernels are interpreted.

They need vLLM's second model runner, whose kernels are Triton's. PyPI has no CPU backend of Triton, but Triton can
interpret kernels. Two kernels of LongCat's that vLLM has for CUDA only stand here in torch.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from itertools import takewhile
from types import ModuleType
from typing import Any

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


@cache
def prepare() -> None:
    """Call in a process before vllm is imported. A second call does nothing."""
    os.environ.update(TRITON_INTERPRET="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")
    from triton import backends

    class Driver:
        """What vLLM asks of it."""

        @staticmethod
        def is_active() -> bool:
            return True

    # vLLM uses Triton where it has a backend for the device.
    backends.backends["cpu"] = backends.Backend(compiler=None, driver=Driver)
    for library, schema, kernel in (("_C", _IDS, longcat_ids), ("_moe_C", _TOPK, topk_softmax)):
        _libraries[library].define(schema)
        _libraries[library].impl(schema.partition("(")[0], kernel, "CPU")
    _mend_interpreter()


def _mend_interpreter() -> None:
    """Triton 3.9's interpreter reckons with the bits of bfloat16 as integers, and takes no masks made of integers."""
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    binary, load, store = (
        getattr(InterpreterBuilder, name) for name in ("binary_op", "create_masked_load", "create_masked_store")
    )

    def binary_op(self: Any, left: Any, right: Any, operator: Any) -> Any:
        if left.dtype.scalar != language.bfloat16:
            return binary(self, left, right, operator)
        wide = [self.cast_impl(each, language.float32) for each in (left, right)]
        result = binary(self, *wide, operator)
        if result.data.dtype == bool:
            return result
        return self.cast_impl(TensorHandle(result.data, language.float32), language.bfloat16)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, TensorHandle(mask.data.astype(bool), language.int1), *rest)

    def create_masked_store(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, values, TensorHandle(mask.data.astype(bool), language.int1), *rest)

    for method in (binary_op, create_masked_load, create_masked_store):
        setattr(InterpreterBuilder, method.__name__, method)


def without_torchvision() -> None:
    """Qwen4-Exp's module imports that of its vision, which names torchvision. PyPI has that for CUDA only."""
    import transformers.image_processing_utils  # noqa: F401  looks whether torchvision is there

    parent = None
    for name in ("torchvision", "transforms", "v2", "functional"):
        full_name = f"{parent.__name__}.{name}" if parent else name
        module = ModuleType(full_name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(full_name, None, is_package=True)
        sys.modules[full_name] = module
        if parent:
            setattr(parent, name, module)
        parent = module


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
    lines, begin, place = tokens[request_rows].tolist(), columns.tolist(), starts.tolist()
    factors, sizes, first_rows = powers.tolist(), rows.tolist(), offsets.tolist()
    for request, line in enumerate(lines):
        for index in range(place[request], place[request + 1]):
            last = begin[request] + index - place[request]
            known = takewhile(lambda token: token >= 0, reversed(line[max(0, last - longest + 1) : last + 1]))
            newest_first = list(known)
            for head in range((longest - 1) * splits):
                order, split = divmod(head, splits)
                seen = newest_first[: order + 2]
                total = sum(token * factors[order][split][back] for back, token in enumerate(seen))
                ids[index, head] = total % sizes[order][split] + first_rows[head]


def topk_softmax(
    weights: Tensor,
    experts: Tensor,
    places: Tensor,
    logits: Tensor,
    renormalize: bool,
    bias: Tensor | None,
    is_padding: Tensor | None,
) -> None:
    """Each token's experts [tokens, k], the best by softmax plus bias, and their softmax. `places` is not read."""
    assert not renormalize
    scores = logits.softmax(-1)
    experts.copy_((scores if bias is None else scores + bias).topk(experts.shape[1]).indices)
    weights.copy_(scores.gather(-1, experts.long()))
