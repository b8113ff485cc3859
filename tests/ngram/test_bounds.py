"""Configs of all three families with anything in their fields: an answer or one line that names the key, at once."""

import base64
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from embedding_service.errors import EmbeddingServiceError, ImportRefused, InvalidRequest
from embedding_service.ngram import NgramHasher
from embedding_service.ngram.token_map import pack, unpack
from embedding_service.ngram.xor import _is_prime
from embedding_service.store.importing import import_checkpoint

TOKEN_MAP = torch.arange(20)
CONFIGS: dict[str, dict[str, Any]] = {
    "longcat": {
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "model_type": "longcat_flash_ngram",
        "vocab_size": 20,
        "hidden_size": 32,
        "ngram_vocab_size_ratio": 2.5,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
        "eos_token_id": 2,
    },
    "qwen4_exp": {
        "architectures": ["Qwen4ExpForCausalLM"],
        "model_type": "qwen4_exp",
        "vocab_size": 20,
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 32,
        "ngram_size": 3,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "seed": 1234,
        "eos_token_id": 2,
    },
    "engram": {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "engram_layer_ids": [1, 2],
        "engram_num_embeddings": [400, 400],
        "engram_max_ngram_size": 3,
        "engram_n_heads": 2,
        "engram_head_dim": 32,
        "engram_vocab_size": 50,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 20,
    },
}
FIELDS = [(family, key) for family, config in CONFIGS.items() for key in config]
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 63, 64, 65, 10**5, 10**7, 10**9, 2**31, 2**32, 2**53, 2**63, 2**70, 10**400])
SCALARS: Any = st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | st.text(max_size=3)
VALUES: Any = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


def hashes(config: dict[str, Any]) -> None:
    """Make the hasher, and use it where there is one."""
    hasher = NgramHasher.from_config(config, TOKEN_MAP)
    again = NgramHasher.from_params(hasher.family, json.loads(json.dumps(hasher.params())))
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    ids = again.row_ids(tokens)
    assert ids.shape == (1, 2, again.num_tables, again.num_heads)
    for table in range(again.num_tables):
        assert int(ids[:, :, table].min()) >= 0 and int(ids[:, :, table].max()) < again.tables[table].rows


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FIELDS), VALUES, st.sampled_from(FIELDS), VALUES)
def test_any_value_of_any_field(one: tuple[str, str], value: Any, other: tuple[str, str], second: Any) -> None:
    family, key = one
    config = {**CONFIGS[family], key: value}
    if other[0] == family:
        config[other[1]] = second
    try:
        hashes(config)
    except EmbeddingServiceError as error:
        assert str(error).isprintable() and len(str(error)) < 1500


@pytest.mark.parametrize(
    ("family", "key", "value", "says"),
    [
        ("longcat", "emb_split_num", 10**7, "emb_split_num must be at most 4,096, got 10000000"),
        ("longcat", "emb_split_num", 4096, "emb_neighbor_num and emb_split_num ask for 1 tables of 8,192 heads"),
        ("longcat", "emb_neighbor_num", 10**9, "emb_neighbor_num must be at most 64"),
        ("longcat", "vocab_size", 2**70, "vocab_size must be at most"),
        ("longcat", "vocab_size", 20.0, "vocab_size must be a whole number, got 20.0"),
        ("longcat", "vocab_size", True, "vocab_size must be a whole number, got True"),
        ("longcat", "ngram_vocab_size_ratio", 1e308, "ngram_vocab_size_ratio > 0"),
        ("longcat", "ngram_vocab_size_ratio", [2], "ngram_vocab_size_ratio must be a number, got"),
        ("longcat", "eos_token_id", 2**70, "eos_token_id must be at most"),
        ("longcat", "eos_token_id", list(range(10**5)), "eos_token_id may have at most 256 numbers, got 100,000"),
        ("longcat", "eos_token_id", [[2]], r"eos_token_id must be a whole number, got \[2\]"),
        ("longcat", "architectures", 5, "architectures must be a list of names, got 5"),
        ("longcat", "architectures", [["x"]], "architectures must be a list of names"),
        ("qwen4_exp", "heads_per_ngram", 10**9, "heads_per_ngram must be at most 4,096"),
        ("qwen4_exp", "ple_layer_ids", list(range(1, 10**6)), "ple_layer_ids may have at most 1,024 numbers"),
        ("qwen4_exp", "ple_layer_ids", list(range(1, 1024)), None),
        ("qwen4_exp", "ple_layer_ids", "abc", "ple_layer_ids must be a list of whole numbers, got 'abc'"),
        ("qwen4_exp", "ple_layer_ids", {"1": 2}, "ple_layer_ids must be a list"),
        ("qwen4_exp", "ngram_vocab_size_base", 10**18, "ngram_vocab_size_base must be at most"),
        ("qwen4_exp", "seed", 2**70, "seed must be at most"),
        ("qwen4_exp", "eos_token_id", [2**70], "eos_token_id must be at most"),
        ("engram", "engram_n_heads", 10**7, "engram_n_heads must be at most 4,096"),
        ("engram", "engram_layer_ids", 10**9, "engram_layer_ids must be a list of whole numbers"),
        ("engram", "engram_layer_ids", [1, 1], r"engram_layer_ids must be different layers from 0 on, got \[1, 1\]"),
        ("engram", "engram_layer_ids", [-1, 1], "engram_layer_ids must be different layers"),
        ("engram", "engram_num_embeddings", [2**70, 1], "engram_num_embeddings must be at most"),
        ("engram", "engram_compressed_vocab_size", None, "lacks engram_compressed_vocab_size"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_key_is_named(family: str, key: str, value: Any, says: str | None) -> None:
    config = {**CONFIGS[family], key: value}
    if says is None:
        hashes(config)
        return
    with pytest.raises(InvalidRequest, match=says) as caught:
        NgramHasher.from_config(config, TOKEN_MAP)
    assert len(str(caught.value)) < 600
    if family == "engram":
        return  # its folder needs a tokenizer
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file({"x": torch.zeros(2, 2)}, Path(folder, "model.safetensors"))
        with pytest.raises(ImportRefused, match=rf"config\.json: .*{says}"):
            import_checkpoint(folder, Path(folder, "store"), "tiny")


def test_primes() -> None:
    assert [number for number in range(2, 60) if _is_prime(number)] == [
        2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59
    ]  # fmt: skip
    sieve = bytearray([1]) * 200_000
    for number in range(2, 450):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, len(sieve), number)))
    assert [number for number in range(2, 200_000) if _is_prime(number)] == [
        number for number in range(2, 200_000) if sieve[number]
    ]
    # Strong pseudoprimes to many bases, a Mersenne prime and its neighbour.
    assert not any(map(_is_prime, (3215031751, 3474749660383, 341550071728321, 3825123056546413051, 2**61 + 1)))
    assert _is_prime(2**61 - 1)


@pytest.mark.slow
def test_a_map_that_inflates_without_end() -> None:
    bomb = base64.b85encode(zlib.compress((5).to_bytes(4, "little") + bytes(100 << 20))).decode()
    for text in (bomb, base64.b85encode(zlib.compress(b"\xff" * 16)).decode()):
        with pytest.raises(InvalidRequest, match="no packed map"):
            unpack(text)
    assert torch.equal(unpack(pack(TOKEN_MAP)), TOKEN_MAP)
