"""Gemma 3n and Gemma 4: with their per-layer table in the service, they are the published models bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_model import VOCAB, write_tokenizer
from support.cluster import Up, serving
from test_engine import Job, greedy
from transformers import (
    AutoModelForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedTokenizerFast,
)

from embedding_service import EmbeddingClient
from embedding_service.errors import ImportRefused, InvalidRequest
from embedding_service.ngram import NO_TOKEN, NgramHasher
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.split import split_checkpoint
from model_worker import attach, families, load_model
from model_worker.engine import Engine, Request
from model_worker.gemma import RemotePerLayer

pytestmark = pytest.mark.slow

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB - 20,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 6,  # whose square root is no number of few bits
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "num_kv_shared_layers": 1,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
GEMMA_3N: dict[str, Any] = {"altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}
MODELS = {"gemma3n": torch.float32, "gemma4": torch.bfloat16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each, as transformers writes it."""
    torch.manual_seed(3)
    made: dict[str, Any] = {
        "gemma3n": Gemma3nForCausalLM(Gemma3nTextConfig(**TEXT, **GEMMA_3N)),
        # Its code looks every token up, so its table has them all.
        "gemma4": Gemma4ForCausalLM(
            Gemma4TextConfig(**TEXT | {"vocab_size_per_layer_input": VOCAB, "global_head_dim": 16})
        ),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.to(MODELS[name]).save_pretrained(folders[name])
        write_tokenizer(folders[name])
    return folders


@pytest.fixture(scope="module")
def service(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = tmp_path_factory.mktemp("gemma-store")
    for name, folder in folders.items():
        import_checkpoint(folder, home / "store", name, dtype="keep", part_bytes=16 << 10)
    with serving(home, home / "store", 2, memory=64 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Up) -> Iterator[EmbeddingClient]:
    with EmbeddingClient(service.address, timeout=60) as client:
        yield client


@pytest.mark.service
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_generated_tokens_are_those_of_the_published_model(
    folders: dict[str, Path], client: EmbeddingClient, name: str
) -> None:
    published: Any = AutoModelForCausalLM.from_pretrained(folders[name])
    ours: Any = load_model(folders[name])
    assert families.table_bytes(ours) == 0 < families.table_bytes(published)
    attach(ours, client, name)
    tokens = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    for padded in (None, mask):
        expected = published(input_ids=tokens, attention_mask=padded).logits
        assert torch.equal(ours(input_ids=tokens, attention_mask=padded).logits, expected)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    assert torch.equal(ours.generate(tokens, **options), published.generate(tokens, **options))


@pytest.mark.service
@pytest.mark.parametrize("name", MODELS)
def test_the_workers_engine_generates_what_the_published_model_does(
    folders: dict[str, Path], client: EmbeddingClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ours: Any = load_model(folders[name])
    lookups = families.attach(ours, client, name)
    published: Any = AutoModelForCausalLM.from_pretrained(folders[name])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders[name])
    asked = [list(range(5, 45)), list(range(8, 14)), list(range(30, 60))]  # the sliding window is 16
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10, "eos_token_id": None}
    expected = [published.generate(torch.tensor([each]), **options)[0, len(each) :].tolist() for each in asked]

    def draft(request: Request, most: int) -> list[int]:
        """The first sequence's are right, of the second's every other one, and none of the third's."""
        number, begin = asked.index(request.prompt), len(request.completion)
        wanted = expected[number][begin : min(begin + most, 9)]
        return [token if (begin + place) % (number + 1) == number else 5 for place, token in enumerate(wanted)]

    monkeypatch.setattr(Request, "draft", draft)
    for speculate in ("off", "prompt"):
        engine = Engine(ours, tokenizer, max_batch=4, max_queue=10, speculate=speculate)
        try:
            jobs = [Job(engine, prompt, greedy(10, ignore_eos=True)) for prompt in asked]
            assert [job.tokens() for job in jobs] == expected
        finally:
            engine.close()
    assert engine.accepted
    assert lookups.tokens >= sum(map(len, asked))


def test_the_dense_half_is_all_that_a_worker_reads(folders: dict[str, Path], tmp_path: Path) -> None:
    split_checkpoint(folders["gemma3n"], tmp_path / "split")
    assert list(load_file(tmp_path / "split" / "tables" / "model.safetensors")) == [
        "model.embed_tokens_per_layer.weight"
    ]
    assert not any("per_layer.weight" in name for name in load_file(tmp_path / "split" / "dense" / "model.safetensors"))
    alone: Any = load_model(tmp_path / "split" / "dense")
    with pytest.raises(InvalidRequest, match="loaded without its per-layer table"):
        alone(input_ids=torch.tensor([[1, 2]]))
    manifest = import_checkpoint(tmp_path / "split" / "tables", tmp_path / "store", "half", dtype="keep")
    [table] = manifest.tables
    assert (table.name, table.rows, table.dim) == ("per_layer", VOCAB - 20, 4 * 6)


@pytest.mark.service
def test_what_does_not_fit_is_refused(folders: dict[str, Path], client: EmbeddingClient) -> None:
    model: Any = load_model(folders["gemma3n"])
    with pytest.raises(InvalidRequest, match="it is another model"):
        attach(model, client, "gemma4")
    attach(model, client, "gemma3n")
    assert isinstance(model.model.embed_tokens_per_layer, RemotePerLayer)
    with pytest.raises(InvalidRequest, match="attached already"):
        attach(model, client, "gemma3n")


def test_tokens_without_a_row_read_row_0(folders: dict[str, Path]) -> None:
    hasher = NgramHasher.from_config(folders["gemma3n"])
    ids = torch.tensor([[0, NO_TOKEN, VOCAB - 21, VOCAB - 20, VOCAB - 1]])
    assert hasher.row_ids(ids)[:, :, 0, 0].tolist() == [[0, 0, VOCAB - 21, 0, 0]]
    assert hasher.next_context(ids, ids).shape == (1, 0)
    assert NgramHasher.from_params("gemma", hasher.params()).params() == hasher.params()
    with pytest.raises(InvalidRequest, match="no per-layer embeddings: hidden_size_per_layer_input is 0"):
        NgramHasher.from_config({"model_type": "gemma4_text", "hidden_size_per_layer_input": 0})
    assert NgramHasher.from_config({"model_type": "gemma3n"}).vocab_size == 262_400


def test_a_gemma_checkpoint_that_is_not_whole_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    split_checkpoint(folders["gemma4"], tmp_path / "split")
    with pytest.raises(ImportRefused, match=r"lacks embed_tokens_per_layer\.weight"):
        import_checkpoint(tmp_path / "split" / "dense", tmp_path / "store", "none")
