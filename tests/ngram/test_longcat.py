"""Row ids of family longcat against a reference in plain Python integers, written from the published formula."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LongcatFlashConfig

from embedding_service.errors import InvalidRequest, StoreError
from embedding_service.ngram import NO_TOKEN, NgramHasher, TableShape
from embedding_service.ngram.longcat import LongcatHasher

EOS = 2


def config(vocab_size: int = 131072, ratio: float = 78, n: int = 4, k: int = 4, eos: Any = EOS) -> dict[str, Any]:
    return {
        "model_type": "longcat_flash_ngram",
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "vocab_size": vocab_size,
        "ngram_vocab_size_ratio": ratio,
        "emb_neighbor_num": n,
        "emb_split_num": k,
        "eos_token_id": eos,
    }


LITE = config()
GEOMETRIES = [
    LITE,
    config(n=2, k=1),
    config(vocab_size=997, ratio=5, n=3, k=2),
    config(vocab_size=1009, ratio=3.7, n=4, k=3),
    config(vocab_size=64, ratio=0.3, n=4, k=2),  # fewer rows than tokens
    config(vocab_size=163840, ratio=100.567, n=5, k=4),  # LongCat-2.0
]


def reference(config: dict[str, Any], sequence: list[int]) -> list[list[int]]:
    """[S][H] ids of one sequence that starts at its first token, one token and one head at a time."""
    v, n_max, k = config["vocab_size"], config["emb_neighbor_num"], config["emb_split_num"]
    ids = []
    for t in range(len(sequence)):
        row, offset = [], 0
        for n in range(2, n_max + 1):
            for j in range(k):
                rows = int(config["ngram_vocab_size_ratio"] * v) + 2 * ((n - 2) * k + j) + 1
                value = max(sequence[t], 0)
                for d in range(1, n):
                    if t - d < 0 or sequence[t - d] in (config["eos_token_id"], NO_TOKEN):
                        break
                    value += sequence[t - d] * v**d
                row.append(offset + value % rows)
                offset += rows
        ids.append(row)
    return ids


def ids_of(hasher: NgramHasher, sequence: list[int], context: list[int] | None = None) -> Any:
    before = None if context is None else torch.tensor([context], dtype=torch.int64)
    return hasher.row_ids(torch.tensor([sequence], dtype=torch.int64), before)[0, :, 0].tolist()


def test_flash_lite_geometry() -> None:
    hasher = NgramHasher.from_config(LITE)
    assert hasher.family == "longcat"
    assert hasher.tables == (TableShape("ngram", 122_683_536, tuple(10_223_617 + 2 * i for i in range(12))),)
    assert (hasher.num_tables, hasher.num_heads, hasher.context_length) == (1, 12, 3)


def test_golden_vector() -> None:
    """Worked by hand: V^2 = 2^34, rows of head 0 = 10223617, of head 4 = 10223625, of head 8 = 10223633."""
    ids = ids_of(NgramHasher.from_config(LITE), [7, 3, 5])
    starts = [sum(10_223_617 + 2 * i for i in range(head)) for head in (0, 4, 8)]
    assert [ids[0][head] for head in (0, 4, 8)] == [start + 7 for start in starts]
    assert [ids[1][head] for head in (0, 4, 8)] == [start + 3 + 7 * 131072 for start in starts]
    assert ids[2][0] == (5 + 3 * 2**17) % 10_223_617
    assert ids[2][4] == starts[1] + (5 + 3 * 2**17 + 7 * 2**34) % 10_223_625
    assert ids[2][8] == starts[2] + (5 + 3 * 2**17 + 7 * 2**34) % 10_223_633


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"V{g['vocab_size']}r{g['ngram_vocab_size_ratio']}")
def test_ids_equal_the_reference(geometry: dict[str, Any]) -> None:
    """Random tokens, and the largest ones everywhere, which make the largest sums."""
    hasher = NgramHasher.from_config(geometry)
    top = geometry["vocab_size"] - 1
    random = torch.randint(0, top + 1, (3, 50), generator=torch.Generator().manual_seed(1)).tolist()
    batch = [*random, [top] * 50, [0] * 50, [top, EOS] * 25]
    ids = hasher.row_ids(torch.tensor(batch))
    assert ids.shape == (6, 50, 1, geometry["emb_split_num"] * (geometry["emb_neighbor_num"] - 1))
    assert ids.dtype == torch.int64
    assert ids[:, :, 0].tolist() == [reference(geometry, sequence) for sequence in batch]
    assert int(ids.min()) >= 0 and int(ids.max()) < hasher.tables[0].rows


@pytest.mark.parametrize(
    "sequence",
    [[11, 523, EOS, 44, 7, 88, 4], [EOS, 5, EOS, EOS, 9, 13, 21, EOS], [EOS] * 5, [9, EOS], [EOS, 9], [1, 2, 3, 2, 5]],
)
def test_eos_ends_a_segment(sequence: list[int]) -> None:
    assert ids_of(NgramHasher.from_config(LITE), sequence) == reference(LITE, sequence)


def test_look_back_stops_after_an_eos_but_the_eos_itself_looks_back() -> None:
    hasher = NgramHasher.from_config(LITE)
    assert ids_of(hasher, [11, 523, EOS, 44, 7])[3:] == ids_of(hasher, [44, 7])
    assert ids_of(hasher, [11, EOS])[1] != ids_of(hasher, [EOS])[0]


def test_every_listed_eos_ends_a_segment_and_none_ends_nothing() -> None:
    several = NgramHasher.from_config(config(eos=[2, 9]))
    assert ids_of(several, [4, 9, 5, 2, 6]) == [
        *ids_of(several, [4, 9]),
        *ids_of(several, [5, 2]),
        *ids_of(several, [6]),
    ]
    none = NgramHasher.from_config(config(eos=None))
    assert ids_of(none, [4, 2, 6]) == reference(config(eos=-7), [4, 2, 6])


def test_an_absent_eos_key_means_the_published_default() -> None:
    absent = {key: value for key, value in LITE.items() if key != "eos_token_id"}
    assert NgramHasher.from_config(absent).params()["eos_token_ids"] == [2]


def test_left_padding_changes_nothing_after_it_and_padded_ids_are_token_0s() -> None:
    hasher = NgramHasher.from_config(LITE)
    padded = ids_of(hasher, [NO_TOKEN, NO_TOKEN, 8, 9, 10, 11])
    assert padded[2:] == ids_of(hasher, [8, 9, 10, 11])
    assert padded[:2] == [*ids_of(hasher, [0]), *ids_of(hasher, [0])]


def test_a_batch_equals_its_sequences_alone() -> None:
    hasher = NgramHasher.from_config(LITE)
    batch = torch.tensor([[NO_TOKEN, NO_TOKEN, 5, 6], [7, EOS, 9, 10], [11, 12, 13, 14]])
    context = torch.tensor([[NO_TOKEN] * 3, [1, 3, 4], [NO_TOKEN, EOS, 8]])
    together = hasher.row_ids(batch, context)
    for row in range(3):
        assert torch.equal(together[row : row + 1], hasher.row_ids(batch[row : row + 1], context[row : row + 1]))


@pytest.mark.parametrize("context", [[], [5], [5, 6], [5, 6, 7], [3, 5, 6, 7], [3, EOS, 7], [NO_TOKEN, 6, 7]])
def test_a_context_of_any_width_counts_by_its_last_tokens(context: Any) -> None:
    hasher = NgramHasher.from_config(LITE)
    assert ids_of(hasher, [8, 9], context) == reference(LITE, [*context, 8, 9])[len(context) :]


def test_next_context_is_padded_on_the_left() -> None:
    hasher = NgramHasher.from_config(LITE)
    assert hasher.next_context(torch.tensor([[5]])).tolist() == [[NO_TOKEN, NO_TOKEN, 5]]
    assert hasher.next_context(torch.tensor([[5]]), torch.tensor([[1, 2, 3, 4]])).tolist() == [[3, 4, 5]]
    assert hasher.next_context(torch.empty(2, 0, dtype=torch.int64)).tolist() == [[NO_TOKEN] * 3] * 2


def test_next_context_does_not_share_memory_with_its_input() -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    context = NgramHasher.from_config(LITE).next_context(tokens)
    tokens.zero_()
    assert context.tolist() == [[6, 7, 8]]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_input_gives_empty_ids(shape: tuple[int, int]) -> None:
    hasher = NgramHasher.from_config(LITE)
    assert hasher.row_ids(torch.empty(shape, dtype=torch.int64)).shape == (*shape, 1, 12)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_chunking_with_carried_context_gives_the_ids_of_the_whole(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([4, 50, 131072]))
    geometry = config(
        vocab_size,
        ratio=data.draw(st.sampled_from([0.5, 2.7, 78])),
        n=data.draw(st.integers(2, 5)),
        k=data.draw(st.integers(1, 4)),
    )
    hasher = NgramHasher.from_config(geometry)
    token = st.one_of(st.just(EOS), st.integers(0, vocab_size - 1))
    length = data.draw(st.integers(1, 24))
    batch = data.draw(st.lists(st.lists(token, min_size=length, max_size=length), min_size=1, max_size=3))
    for sequence in batch:  # left padding, as a batch of prompts has it
        padding = data.draw(st.integers(0, length))
        sequence[:padding] = [NO_TOKEN] * padding
    tokens = torch.tensor(batch)
    whole = hasher.row_ids(tokens)
    assert whole[:, :, 0].tolist() == [reference(geometry, sequence) for sequence in batch]

    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    pieces, context = [], None
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        pieces.append(hasher.row_ids(tokens[:, start:end], context))
        context = hasher.next_context(tokens[:, start:end], context)
        assert context.shape == (len(batch), hasher.context_length)
    assert torch.equal(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize(
    ("tokens", "context", "says"),
    [
        ([[1, 2]], None, "must be a torch.Tensor, got list"),
        (torch.tensor([[1, 2]], dtype=torch.int32), None, "token_ids must be int64, got torch.int32"),
        (torch.tensor([[1.0]]), None, "token_ids must be int64"),
        (torch.tensor([1, 2]), None, r"\[batch, length\], got the shape \[2\]"),
        (torch.tensor([[[1]]]), None, r"got the shape \[1, 1, 1\]"),
        (torch.tensor([[1]]), torch.tensor([[1]], dtype=torch.int32), "context must be int64"),
        (torch.tensor([[1]]), torch.tensor([1]), "context must be"),
        (torch.tensor([[1]]), torch.tensor([[1], [2]]), "context has 2 sequences, token_ids 1"),
        (torch.tensor([[1, 2], [3, 131072]]), None, r"token_ids\[1, 1\] is 131072, not in \[0, 131072\)"),
        (torch.tensor([[1, -2]]), None, r"token_ids\[0, 1\] is -2"),
        (torch.tensor([[1]]), torch.tensor([[4, 2**40]]), r"context\[0, -1\] is 1099511627776"),
        (torch.tensor([[1]]), torch.tensor([[-5, 3]]), r"context\[0, -2\] is -5"),
    ],
)
def test_bad_tokens_are_refused_by_position_and_bound(tokens: Any, context: Any, says: str) -> None:
    hasher = NgramHasher.from_config(LITE)
    for call in (hasher.row_ids, hasher.next_context):
        with pytest.raises(InvalidRequest, match=says):
            call(tokens, context)


def test_a_config_may_come_as_object_mapping_folder_or_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LITE))
    wanted = NgramHasher.from_config(LITE).params()
    as_object = LongcatFlashConfig(**{key: value for key, value in LITE.items() if key != "model_type"})
    for form in (as_object, tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert NgramHasher.from_config(form).params() == wanted


def test_the_older_keys_mean_the_same() -> None:
    older = {
        "model_type": None,
        "architectures": ["LongcatCausalLM"],
        "vocab_size": 163840,
        "oe_vocab_size_ratio": 100.567,
        "oe_neighbor_num": 5,
        "oe_split_num": 4,
        "eos_token_id": 2,
    }
    assert NgramHasher.from_config(older).params() == NgramHasher.from_config(GEOMETRIES[-1]).params()
    assert NgramHasher.from_config(older).tables[0].head_rows[0] == 16_476_898


NEXT = {
    **config(vocab_size=1009, ratio=3.7, n=4, k=3),
    "model_type": "longcat_next",
    "architectures": ["LongcatNextForCausalLM"],
    "vocab_size": 1400,
    "text_vocab_size": 1009,
    "oe_ignored_token_ids": list(range(1009, 1020)),
}


def reference_of_next(sequence: list[int]) -> list[list[int]]:
    """LongCat-Next's ids: those of the segments of text, each for itself, and of token 0 between them."""
    text = {**NEXT, "vocab_size": NEXT["text_vocab_size"]}
    ids: list[list[int]] = []
    segment: list[int] = []
    for token in [0 if token in NEXT["oe_ignored_token_ids"] else token for token in sequence]:
        if token == 0:
            ids += [*reference(text, segment), *reference(text, [0])]
            segment = []
        else:
            segment.append(token)
    return ids + reference(text, segment)


def test_ignored_tokens_of_longcat_next_count_as_token_0_and_cut() -> None:
    hasher = NgramHasher.from_config(NEXT)
    assert hasher.tables[0].head_rows[0] == int(3.7 * 1009) + 1
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 1400, (20, 40), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.1] = 1012
    tokens[torch.rand(tokens.shape, generator=generator) < 0.1] = EOS
    tokens[torch.rand(tokens.shape, generator=generator) < 0.05] = 0
    expected = [reference_of_next(sequence) for sequence in tokens.tolist()]
    assert hasher.row_ids(tokens)[:, :, 0].tolist() == expected
    again = NgramHasher.from_params("longcat", json.loads(json.dumps(hasher.params())))
    assert again.row_ids(tokens[:, 7:], tokens[:, :7])[:, :, 0].tolist() == [ids[7:] for ids in expected]
    with pytest.raises(InvalidRequest, match="text_vocab_size <= vocab_size, got 1401 and 1400"):
        NgramHasher.from_config({**NEXT, "text_vocab_size": 1401})


def test_keys_alone_are_enough_where_a_config_names_no_architecture() -> None:
    bare = {key: value for key, value in LITE.items() if key not in ("model_type", "architectures")}
    assert NgramHasher.from_config(bare).params() == NgramHasher.from_config(LITE).params()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"V{g['vocab_size']}r{g['ngram_vocab_size_ratio']}")
def test_params_survive_json_and_give_the_same_ids(geometry: dict[str, Any]) -> None:
    hasher = NgramHasher.from_config(geometry)
    again = NgramHasher.from_params(hasher.family, json.loads(json.dumps(hasher.params())))
    tokens = torch.tensor([[1, EOS, 3, 4, 5, 0, 63]])
    assert isinstance(again, LongcatHasher)
    assert again.tables == hasher.tables
    assert torch.equal(again.row_ids(tokens), hasher.row_ids(tokens))


def test_a_hasher_can_be_pickled_and_made_where_the_default_device_is_another() -> None:
    with torch.device("meta"):
        hasher = NgramHasher.from_config(LITE)
    tokens = torch.tensor([[1, 5, 3]])
    assert pickle.loads(pickle.dumps(hasher)).row_ids(tokens)[0, :, 0].tolist() == reference(LITE, [1, 5, 3])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "model_type='llama'.*known families: engram, gemma, longcat, qwen4_exp",
        ),
        ({**LITE, "model_type": "llama", "architectures": None}, "model_type='llama'"),  # its keys, another's name
        ({}, "known families"),
        ({**LITE, "emb_split_num": None}, "lacks emb_split_num"),
        ({"model_type": "longcat_flash", "vocab_size": 9}, "no n-gram tables: it lacks ngram_vocab_size_ratio, emb_n"),
        ({**LITE, "oe_ignored_token_ids": [3]}, "oe_ignored_token_ids"),
        ({**LITE, "emb_neighbor_num": 1}, "emb_neighbor_num >= 2"),
        ({**LITE, "ngram_vocab_size_ratio": float("nan")}, "ngram_vocab_size_ratio > 0"),
        ({**LITE, "vocab_size": 0}, "vocab_size >= 1"),
        ({**LITE, "vocab_size": "131072"}, "do not fit"),
        ({**LITE, "eos_token_id": "2"}, "do not fit"),
        ({**LITE, "vocab_size": 2**22, "ngram_vocab_size_ratio": 500}, "beyond exact hashing"),
        (7, "got int"),
    ],
)
def test_bad_configs_are_refused(bad: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        NgramHasher.from_config(bad)


@pytest.mark.parametrize(
    ("family", "params", "says"),
    [
        ("nope", {}, "'nope'; known: engram, gemma, longcat, qwen4_exp"),
        ("longcat", {"vocab_size": 5}, "do not fit"),
        ("longcat", {"a": 1}, "'a'"),
    ],
)
def test_bad_params_are_refused(family: str, params: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        NgramHasher.from_params(family, params)


@pytest.mark.parametrize(
    ("text", "says"), [(None, "is .* a checkpoint"), ("{", "not JSON"), ("[]", "not a JSON object")]
)
def test_a_folder_without_a_config_is_refused(tmp_path: Path, text: Any, says: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(StoreError, match=says):
        NgramHasher.from_config(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ids_on_a_cuda_device_equal_those_on_the_cpu() -> None:
    hasher = NgramHasher.from_config(LITE)
    tokens = torch.randint(0, 131072, (4, 1000), generator=torch.Generator().manual_seed(2))
    tokens[0, :9], tokens[1, 50], tokens[2] = NO_TOKEN, EOS, 131071
    ids = hasher.row_ids(tokens.cuda(), tokens[:, :3])
    assert ids.is_cuda
    assert torch.equal(ids.cpu(), hasher.row_ids(tokens, tokens[:, :3]))
