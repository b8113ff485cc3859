"""The model fed by real shards over gRPC is the model with its tables in the process, bit for bit."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import VOCAB, write_checkpoint
from support.cluster import serving
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import LongcatFlashForCausalLM

from embedding_service import EmbeddingClient
from embedding_service.errors import NoGradients, NotFound, Unavailable
from embedding_service.store.importing import import_checkpoint
from model_worker import attach
from model_worker.longcat import LocalTables, load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def remote_model(model_folder: Path, remote: EmbeddingClient) -> LongcatFlashForCausalLM:
    loaded = load_model(model_folder)
    attach(loaded, remote, "small")
    return loaded


def test_logits_are_identical(model: LongcatFlashForCausalLM, remote_model: LongcatFlashForCausalLM) -> None:
    ids = torch.randint(0, VOCAB, (4, 50), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :20] = mask[2, :1] = 0
    here = model(ids, attention_mask=mask).logits
    there = remote_model(ids, attention_mask=mask).logits
    assert torch.equal(here, there)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])},
        {"num_beams": 3},
        {"prefill_chunk_size": 4},
        {"do_sample": True},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_generation_is_identical(
    model: LongcatFlashForCausalLM, remote_model: LongcatFlashForCausalLM, options: dict[str, Any]
) -> None:
    ids = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(4))
    same(model, remote_model, ids, options)


@pytest.mark.parametrize("assistant", ["the prompt", "a model"])
def test_assisted_generation_is_identical(
    model: LongcatFlashForCausalLM, remote_model: LongcatFlashForCausalLM, assistant: str
) -> None:
    """Guesses are taken back: the look-back must be, too."""
    ids = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(4))
    ids[0, 6:] = ids[0, :6]
    options: dict[str, Any] = (
        {"prompt_lookup_num_tokens": 3} if assistant == "the prompt" else {"assistant_model": remote_model}
    )
    same(model, remote_model, ids, options)
    plain = model.generate(ids, **OPTIONS)  # type: ignore[misc]
    assert torch.equal(remote_model.generate(ids, **OPTIONS, **options), plain)  # type: ignore[arg-type, misc]


@pytest.mark.service
def test_half_precision_is_identical(tmp_path: Path) -> None:
    """Tables and weights as the checkpoints have them, through the service unchanged."""
    folders = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        (tmp_path / name).mkdir()
        folders[name] = write_checkpoint(tmp_path / name, dtype)
        import_checkpoint(folders[name], str(tmp_path / "store"), name, dtype="keep", part_bytes=16 << 10)
    with (
        serving(tmp_path, tmp_path / "store", 2, memory=64 << 20) as tables,
        EmbeddingClient(tables.address, timeout=60) as client,
    ):
        for name, folder in folders.items():
            here, there = load_model(folder), load_model(folder)
            attach(here, LocalTables(folder), "local")
            attach(there, client, name)
            assert there.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
            ids = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(4))
            assert torch.equal(here(ids).logits, there(ids).logits)
            same(here, there, ids, {})


OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def same(
    here: LongcatFlashForCausalLM, there: LongcatFlashForCausalLM, ids: torch.Tensor, options: dict[str, Any]
) -> None:
    """Both generate the same tokens from the same logits."""
    options = OPTIONS | {"output_logits": True, "return_dict_in_generate": True} | options
    given = []
    for model in (here, there):
        torch.manual_seed(1)
        given.append(model.generate(ids, **options))  # type: ignore[misc]
    assert torch.equal(given[0].sequences, given[1].sequences)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(given[0].logits, given[1].logits, strict=True))  # type: ignore[arg-type, union-attr]


def test_training_fails_until_the_rows_are_frozen(model_folder: Path, remote: EmbeddingClient) -> None:
    loaded = load_model(model_folder)
    attach(loaded, remote, "small")
    loaded.requires_grad_(True)  # LongCat's projections are loaded as they are in the file, without
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))
    with torch.enable_grad(), pytest.raises(NoGradients, match=r"NgramRows\('small'\).*requires_grad_\(False\)"):
        loaded(ids, labels=ids).loss.backward()
    loaded.model.ngram_embeddings.rows.requires_grad_(False)
    loaded.zero_grad()
    with torch.enable_grad():
        loaded(ids, labels=ids).loss.backward()
    assert loaded.model.ngram_embeddings.projection.weight.grad.count_nonzero()
    assert loaded.model.embed_tokens.weight.grad.count_nonzero()


def test_attach_says_what_is_wrong_with_the_service(model_folder: Path, remote: EmbeddingClient) -> None:
    with pytest.raises(NotFound, match="small@1"):
        attach(load_model(model_folder), remote, "large")
    with EmbeddingClient("127.0.0.1:1", timeout=1) as nobody, pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        attach(load_model(model_folder), nobody, "small")


def test_a_compiled_model_gives_the_same_logits(
    model: LongcatFlashForCausalLM, remote_model: LongcatFlashForCausalLM
) -> None:
    """The graphs are those of the model's own code, which breaks them where it asks which experts were hit."""
    torch.compiler.reset()
    counters.clear()
    counted = CompileCounterWithBackend("eager")
    compiled, graphs = torch.compile(remote_model, backend=counted), []
    for length in (6, 9, 13):
        ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        graphs.append(counted.frame_count)
    assert graphs[-1] == graphs[1]  # of the first length, of any length
    breaks = counters["graph_break"]
    assert all("nonzero" in reason or "item()" in reason for reason in breaks), list(breaks)
    torch.compiler.reset()


def test_a_compiled_models_rows_are_in_one_graph(
    remote_model: LongcatFlashForCausalLM, remote: EmbeddingClient
) -> None:
    torch.compiler.reset()
    counted = CompileCounterWithBackend("inductor")
    embedding = remote_model.model.ngram_embeddings
    compiled = torch.compile(embedding, backend=counted, fullgraph=True)
    for length, context in ((5, None), (7, None), (1, 3), (4, 3)):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(3, VOCAB, (2, length), generator=generator)
        before = None if context is None else torch.randint(3, VOCAB, (2, context), generator=generator)
        words = remote_model.model.embed_tokens(ids)
        torch.testing.assert_close(compiled(words, ids, before), embedding(words, ids, before))
    assert counted.frame_count <= 5
    torch.compiler.reset()


def test_copies_and_conversions_of_an_attached_model(
    remote_model: LongcatFlashForCausalLM, remote: EmbeddingClient
) -> None:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))
    expected = remote_model(ids).logits
    twin = copy.deepcopy(remote_model)
    assert twin.model.ngram_embeddings.rows.tables.source is remote
    assert torch.equal(twin(ids).logits, expected)
    saved = io.BytesIO()
    torch.save(remote_model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    with loaded.model.ngram_embeddings.rows.tables.source as again:
        assert again is not remote
        assert torch.equal(loaded(ids).logits, expected)
    assert twin.bfloat16()(ids).logits.dtype == torch.bfloat16
    assert twin.double()(ids).logits.dtype == torch.float64
