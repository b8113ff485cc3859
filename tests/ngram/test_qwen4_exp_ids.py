"""Row ids of family qwen4_exp against transformers' own module, and a reference in plain Python integers."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen4ExpConfig, Qwen4ExpTextConfig
from transformers.models.qwen4_exp import modeling_qwen4_exp as theirs

from embedding_service.errors import InvalidRequest
from embedding_service.ngram import NO_TOKEN, NgramHasher

EOS = 5


def config(**keys: Any) -> Qwen4ExpTextConfig:
    """A text config of transformers' own; by default of Qwen3.8-Flash-Next's hashing geometry."""
    geometry = {"ple_layer_ids": [2], "eos_token_id": EOS, "num_hidden_layers": 8, "ple_embed_dim": 2560}
    return Qwen4ExpTextConfig(**{**geometry, **keys})


GEOMETRIES = {
    "flash-next": config(),
    "three layers": config(ple_layer_ids=[7, 1, 5], ngram_vocab_size_base=1_000_003, ple_embed_dim=32, vocab_size=1000),
    "4-grams": config(ngram_size=4, heads_per_ngram=3, ngram_vocab_size_base=100, vocab_size=77, ple_embed_dim=36),
    "bigrams": config(ngram_size=2, heads_per_ngram=1, ngram_vocab_size_base=2, ple_layer_ids=[1, 2], seed=-9),
}


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def reference(config: Qwen4ExpTextConfig, sequence: list[int]) -> Any:
    """[S][L][H] ids of one sequence that starts at its first token, one token, layer and head at a time."""
    heads = config.heads_per_ngram * (config.ngram_size - 1)
    half = (2**63 - 1) // config.vocab_size // 2
    assert config.ple_layer_ids
    primes: list[int] = []
    ids: list[list[list[int]]] = [[] for _ in sequence]
    candidate = config.ngram_vocab_size_base
    while len(primes) < heads * len(config.ple_layer_ids):
        if is_prime(candidate):
            primes.append(candidate)
        candidate += 1
    for layer in range(len(config.ple_layer_ids)):
        state = config.seed + 10007 * layer
        m = [2 * (splitmix64(state + 0x9E3779B97F4A7C15 * (d + 1)) % half) + 1 for d in range(config.ngram_size)]
        for t, token in enumerate(sequence):
            row, offset = [], 0
            for head in range(heads):
                mixed = (EOS if token == NO_TOKEN else token) * m[0]
                ended = False
                for d in range(1, 2 + head // config.heads_per_ngram):
                    ended = ended or t - d < 0 or sequence[t - d] in (EOS, NO_TOKEN)
                    mixed ^= (EOS if ended else sequence[t - d]) * m[d]
                prime = primes[layer * heads + head]
                row.append(offset + mixed % prime)
                offset += prime
            ids[t].append(row)
    return ids


def modules(config: Qwen4ExpTextConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The n-gram embedding of each PLE layer, transformers' own; instead of rows it gives the ids it would read."""

    class Ids(torch.nn.Module):
        def __init__(self, rows: int, dim: int) -> None:
            super().__init__()
            self.rows, self.weight = rows, torch.empty(1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids.unsqueeze(-1)

    with monkeypatch.context() as patch:
        patch.setattr(theirs.nn, "Embedding", Ids)
        return [
            theirs.Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, layer - 1, index)  # type: ignore[arg-type]
            for index, layer in enumerate(config.ple_layer_ids)  # type: ignore[arg-type]
        ]


def random_tokens(config: Qwen4ExpTextConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    tokens[torch.rand(batch, length, generator=torch.Generator().manual_seed(seed + 1)) < 0.15] = EOS
    return tokens


@pytest.mark.parametrize("name", GEOMETRIES)
def test_ids_and_rows_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = GEOMETRIES[name]
    hasher = NgramHasher.from_config(geometry)
    tokens = random_tokens(geometry, 6, 400)
    tokens[0], tokens[1] = geometry.vocab_size - 1, EOS
    layers = modules(geometry, monkeypatch)
    assert [table.rows for table in hasher.tables] == [layer.ngram_embedding.rows for layer in layers]
    assert [table.name for table in hasher.tables] == [f"layer_{layer.layer_idx}" for layer in layers]
    expected = torch.stack([layer(tokens, None) for layer in layers], 2)
    assert torch.equal(hasher.row_ids(tokens), expected)


def test_token_by_token_ids_are_those_of_transformers_with_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = GEOMETRIES["three layers"]
    hasher, layers = NgramHasher.from_config(geometry), modules(geometry, monkeypatch)
    tokens = random_tokens(geometry, 3, 40)
    cache, context = DynamicCache(config=geometry), None
    for start, end in [(0, 1), (1, 2), (2, 9), *((t, t + 1) for t in range(9, 40))]:
        chunk = tokens[:, start:end]
        expected = torch.stack([layer(chunk, cache) for layer in layers], 2)
        assert torch.equal(hasher.row_ids(chunk, context), expected)
        context = hasher.next_context(chunk, context)


def test_flash_next_geometry() -> None:
    hasher = NgramHasher.from_config(GEOMETRIES["flash-next"])
    assert (hasher.family, hasher.num_tables, hasher.num_heads, hasher.context_length) == ("qwen4_exp", 1, 16, 2)
    assert hasher.tables[0].rows == 320_001_536


@pytest.mark.parametrize("name", GEOMETRIES)
def test_ids_equal_the_reference_in_plain_integers(name: str) -> None:
    geometry = GEOMETRIES[name]
    hasher = NgramHasher.from_config(geometry)
    batch = [*random_tokens(geometry, 3, 40).tolist(), [geometry.vocab_size - 1] * 40, [0, EOS] * 20]
    batch[0][:7] = [NO_TOKEN] * 7
    ids = hasher.row_ids(torch.tensor(batch))
    assert ids.tolist() == [reference(geometry, sequence) for sequence in batch]
    for layer, table in enumerate(hasher.tables):
        assert int(ids[:, :, layer].min()) >= 0 and int(ids[:, :, layer].max()) < sum(table.head_rows)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_chunking_with_carried_context_gives_the_ids_of_the_whole(data: st.DataObject) -> None:
    geometry = GEOMETRIES[data.draw(st.sampled_from(["three layers", "4-grams", "bigrams"]))]
    hasher = NgramHasher.from_config(geometry)
    length = data.draw(st.integers(1, 20))
    token = st.one_of(st.just(EOS), st.just(NO_TOKEN), st.integers(0, geometry.vocab_size - 1))
    tokens = torch.tensor([data.draw(st.lists(token, min_size=length, max_size=length)) for _ in range(2)])
    whole = hasher.row_ids(tokens)
    assert whole.tolist() == [reference(geometry, sequence) for sequence in tokens.tolist()]
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    pieces, context = [], None
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        pieces.append(hasher.row_ids(tokens[:, start:end], context))
        context = hasher.next_context(tokens[:, start:end], context)
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_padding_is_hashed_as_the_eos_that_transformers_puts_there(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = GEOMETRIES["flash-next"]
    [layer] = modules(geometry, monkeypatch)
    padded = torch.tensor([[NO_TOKEN, NO_TOKEN, 8, 9, 10]])
    expected = layer(padded.clamp_min(0) + EOS * (padded == NO_TOKEN), None)
    assert torch.equal(NgramHasher.from_config(geometry).row_ids(padded)[:, :, 0], expected)


def test_a_config_may_nest_the_text_model_and_leave_defaults_out(tmp_path: Path) -> None:
    text = {"ple_layer_ids": [2], "num_hidden_layers": 4, "eos_token_id": [EOS, 9]}
    wanted = NgramHasher.from_config(GEOMETRIES["flash-next"]).params()
    Qwen4ExpConfig(text_config=text).save_pretrained(tmp_path)
    for form in (tmp_path, Qwen4ExpConfig(text_config=text), {"model_type": "qwen4_exp", "text_config": text}):
        assert NgramHasher.from_config(form).params() == wanted


def test_params_survive_json_and_pickle() -> None:
    hasher = NgramHasher.from_config(GEOMETRIES["three layers"])
    tokens = torch.tensor([[1, EOS, 3, 4, 5, 0, 63]])
    for again in (
        NgramHasher.from_params(hasher.family, json.loads(json.dumps(hasher.params()))),
        pickle.loads(pickle.dumps(hasher)),
    ):
        assert again.tables == hasher.tables
        assert torch.equal(again.row_ids(tokens), hasher.row_ids(tokens))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"ple_layer_ids": []}, r"no n-gram tables: ple_layer_ids is \[\]"),
        ({"eos_token_id": None}, "eos_token_id None"),
        ({"eos_token_id": 248320}, "eos_token_id below vocab_size"),
        ({"ngram_size": 1}, "ngram_size >= 2"),
        ({"heads_per_ngram": 0}, "sizes of 1 and more"),
        ({"ple_layer_ids": [0]}, "ple_layer_ids >= 1"),
        ({"vocab_size": "9"}, "do not fit"),
    ],
)
def test_bad_configs_are_refused(bad: Any, says: str) -> None:
    keys = {"model_type": "qwen4_exp", "text_config": {"ple_layer_ids": [2], "eos_token_id": EOS, **bad}}
    with pytest.raises(InvalidRequest, match=says):
        NgramHasher.from_config(keys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ids_on_a_cuda_device_equal_those_on_the_cpu() -> None:
    hasher = NgramHasher.from_config(GEOMETRIES["flash-next"])
    tokens = random_tokens(GEOMETRIES["flash-next"], 4, 1000)
    assert torch.equal(hasher.row_ids(tokens.cuda()).cpu(), hasher.row_ids(tokens))
