"""The row ids that vLLM computes are those of our hashers, over chunks, requests and look-back."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import interpreted
import pytest
import torch
from engines import needs_vllm

from embedding_service.formats import get_format
from embedding_service.ngram import NgramHasher
from model_worker.vllm.tables import swapped

pytestmark = needs_vllm
EOS = 2
# What a step has of three requests: lengths that chunks and decode steps have, and requests that are not in it.
STEPS = [(3, 5, 0), (1, 0, 9), (1, 16, 1), (0, 1, 1), (1, 1, 1), (7, 2, 3)]
REQUESTS = 3

LONGCAT = [
    dict(vocab_size=500, ngram_vocab_size_ratio=3.25, emb_neighbor_num=4, emb_split_num=2, hidden_size=96),
    # LongCat-Flash-Lite's
    dict(vocab_size=131072, ngram_vocab_size_ratio=78, emb_neighbor_num=4, emb_split_num=4, hidden_size=3072),
]
QWEN = [
    dict(vocab_size=300, ngram_size=2, heads_per_ngram=2, ngram_vocab_size_base=50, ple_layer_ids=[1]),
    dict(vocab_size=1000, ngram_size=4, heads_per_ngram=3, ngram_vocab_size_base=500, ple_layer_ids=[2, 5]),
    # Qwen3.8-Flash-Next's
    dict(vocab_size=248320, ngram_size=3, heads_per_ngram=8, ngram_vocab_size_base=20_000_000, ple_layer_ids=[1, 9]),
]


@pytest.fixture(scope="module", autouse=True)
def _on_a_cpu() -> None:
    if not torch.cuda.is_available():
        interpreted.prepare()


def token_ids(vocab_size: int) -> torch.Tensor:
    """int64 [REQUESTS, length] with segments of all lengths."""
    length = max(sum(step[request] for step in STEPS) for request in range(REQUESTS))
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, vocab_size, (REQUESTS, length), generator=generator)
    ends = torch.rand(tokens.shape, generator=generator) < 0.2
    return tokens.masked_fill(ends, EOS)


def steps(tokens: torch.Tensor) -> Iterator[tuple[list[int], list[int], torch.Tensor, torch.Tensor]]:
    """For each step: its requests, how much each had before, where each begins [n + 1], and all their tokens."""
    done = [0] * REQUESTS
    for lengths in STEPS:
        here = [request for request in range(REQUESTS) if lengths[request]]
        starts = torch.tensor([0, *(lengths[request] for request in here)]).cumsum(0)
        flat = torch.cat([tokens[request, done[request] : done[request] + lengths[request]] for request in here])
        yield here, [done[request] for request in here], starts, flat
        for request in here:
            done[request] += lengths[request]


def expected(ids: torch.Tensor, here: list[int], done: list[int], starts: torch.Tensor) -> torch.Tensor:
    """The step's part of [REQUESTS, length, heads] ids."""
    lengths = (starts[1:] - starts[:-1]).tolist()
    return torch.cat([ids[r, at : at + length] for r, at, length in zip(here, done, lengths, strict=True)])


class NoTable(torch.nn.Module):
    """Where a table would be allocated."""

    supports_prefetch = False
    weight = torch.empty(0)

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__()


def test_longcats_look_back_holds_what_was_kept() -> None:
    """A step's rejected drafts are in vLLM's own look-back, and the tokens after them get other rows than ours."""
    from vllm.model_executor.models import longcat_flash_ngram as published

    from model_worker.vllm.longcat import KeptLookBack

    texts = torch.tensor([[5, 6, 7, EOS, 9, 10], [11, 12, 13, 14, 15, 16]])
    states = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=texts), num_computed_tokens=SimpleNamespace(gpu=torch.tensor([5, 2]))
    )
    state: Any = object.__new__(KeptLookBack)
    vars(state).update(ctx_len=3, eos_id=EOS)
    # What drafts left there.
    state.token_context = torch.full((2, 3), 99, dtype=torch.int32)
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        keep = lambda self, batch, requests: seen.append(self.token_context.clone())  # noqa: E731
        patch.setattr(published.LongcatNgramModelState, "prepare_inputs", keep)
        state.prepare_inputs(SimpleNamespace(num_reqs=2, idx_mapping=torch.tensor([1, 0, 7])), states)
    assert torch.equal(seen[0], torch.tensor([[7, -EOS, 9], [-1, 11, 12]], dtype=torch.int32))


@pytest.mark.parametrize("sizes", LONGCAT)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_longcat(sizes: dict[str, Any], device: str) -> None:
    from vllm.model_executor.models import longcat_flash_ngram as published

    config = SimpleNamespace(**sizes, pad_token_id=None, eos_token_id=EOS, dtype="float32")
    with swapped(published, VocabParallelEmbedding=NoTable):
        ngram = published.NgramEmbedding(config, torch.nn.Module()).to(device)
    state = object.__new__(published.LongcatNgramModelState)
    vars(state).update(ngram=ngram, n=ngram.n, ctx_len=ngram.n - 1, eos_id=EOS)
    state.token_context = torch.full((REQUESTS, ngram.n - 1), -1, dtype=torch.int32, device=device)

    tokens = token_ids(sizes["vocab_size"])
    hasher = NgramHasher.from_config({**sizes, "model_type": "longcat_flash_ngram", "eos_token_id": EOS})
    ours = hasher.row_ids(tokens)[:, :, 0]
    first_rows = torch.tensor(ngram._offsets[:-1])
    for here, done, starts, flat in steps(tokens):
        batch = SimpleNamespace(
            num_tokens=len(flat),
            num_reqs=len(here),
            idx_mapping=torch.tensor(here, device=device),
            query_start_loc=starts.to(device),
            input_ids=flat.to(device),
        )
        theirs = state._compute_oe_ids(batch).cpu()
        is_eos = flat == EOS
        assert torch.equal(theirs[~is_eos], expected(ours, here, done, starts)[~is_eos])
        # The published code hashes an EOS with what came before it, as we do; vLLM 0.32 gives it each head's row 0.
        assert (theirs[is_eos] == first_rows).all()


@pytest.mark.parametrize("sizes", QWEN)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_qwen4_exp(sizes: dict[str, Any], device: str) -> None:
    from vllm.models.qwen4_exp.nvidia import ngram_embedding as published

    config = SimpleNamespace(**sizes, eos_token_id=EOS, seed=1234, make_ngram_vocab_size_divisible_by=128)
    tokens = token_ids(sizes["vocab_size"])
    hasher = NgramHasher.from_config({**vars(config), "model_type": "qwen4_exp"})
    ours = hasher.row_ids(tokens)
    no_config = SimpleNamespace(engram_config=None)
    for layer in range(len(hasher.tables)):
        with swapped(published, Qwen4ExpPLEDeviceEmbedding=NoTable, get_current_vllm_config=lambda: no_config):
            dim = hasher.num_heads
            module = published.Qwen4ExpNGramEmbedding(config, dim, layer, 64, data_parallel_rank=0, prefix="p")
        for here, done, starts, flat in steps(tokens):
            look_back = torch.full((len(here), sizes["ngram_size"] - 1), EOS, dtype=torch.int32)
            for row, (request, at) in enumerate(zip(here, done, strict=True)):
                before = tokens[request, :at][-look_back.shape[1] :]
                look_back[row, look_back.shape[1] - len(before) :] = before
            arguments = (each.to(device) for each in (flat, starts, look_back))
            theirs = module.to(device).compute_ngram_ids(*arguments).cpu()
            assert torch.equal(theirs, expected(ours[:, :, layer], here, done, starts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_in_fp8_are_decoded_as_vllm_does(dtype: torch.dtype) -> None:
    """So a table in fp8 with one scale, which the service keeps as it is, gives the rows of a local one."""
    from vllm.models.qwen4_exp.common.ngram_embedding import Qwen4ExpPLEFp8EmbeddingMethod

    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(5, 1)  # no NaN
    for scale in (torch.tensor([0.0123]), torch.tensor([1.7e-3])):
        stored = torch.cat([codes, scale.view(torch.uint8).repeat(5, 1)], 1)
        ours = get_format("fp8_rowwise").decode(stored, codes.shape[1], dtype=dtype)
        layer: Any = SimpleNamespace(weight_scale=scale)
        values = codes.view(torch.float8_e4m3fn)
        method = object.__new__(Qwen4ExpPLEFp8EmbeddingMethod)
        theirs = method.dequantize(layer, values, dtype)
        assert torch.equal(ours, theirs)
