"""LongCat: what is read from a checkpoint, how rows are fused, and that attach leaves generation right."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import CONFIG, DIM, HEADS, HIDDEN, NGRAM_CONFIG, VOCAB, all_tensors, write_checkpoint, write_shards
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LongcatFlashForCausalLM

from embedding_service.errors import EmbeddingServiceError, InvalidRequest, StoreError
from embedding_service.ngram import NgramHasher
from embedding_service.store.split import split_checkpoint
from model_worker import attach
from model_worker.longcat import LocalTables, load_model

pytestmark = pytest.mark.slow

EOS = CONFIG["eos_token_id"]
WORDS = "model.embed_tokens.weight"
OTHER_WORDS = "model.ngram_embeddings.word_embeddings.weight"


def prompts(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def change(folder: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint whose tensors were edited."""
    shutil.copytree(folder, out)
    tensors = all_tensors(folder)
    edit(tensors)
    for file in out.glob("*.safetensors"):
        file.unlink()
    write_shards(out, {"model-00001-of-00001.safetensors": tensors})
    return out


def local(folder: Path) -> LongcatFlashForCausalLM:
    """The model of a folder with its own tables."""
    loaded = load_model(folder)
    attach(loaded, LocalTables(folder), "local")
    return loaded


def step_by_step(model: LongcatFlashForCausalLM, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy tokens [B, new_tokens], each from the whole sequence: no cache, no carried context."""
    sequence = prompt
    for _ in range(new_tokens):
        token = model(sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        sequence = torch.cat([sequence, token], dim=1)
    return sequence[:, prompt.shape[1] :]


def greedy(model: LongcatFlashForCausalLM, prompt: torch.Tensor, new_tokens: int, **options: Any) -> torch.Tensor:
    out = model.generate(  # type: ignore[misc]
        prompt, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    return out[:, prompt.shape[1] :]


# Loading


def test_table_files_are_never_opened(model_folder: Path, tmp_path: Path) -> None:
    whole = load_model(model_folder).state_dict()
    folder = shutil.copytree(model_folder, tmp_path / "without")
    (folder / "model-00002-of-00002.safetensors").unlink()  # holds the tables and nothing else
    without = load_model(folder).state_dict()
    assert whole.keys() == without.keys()
    assert all(torch.equal(whole[name], without[name]) for name in whole)
    assert not [name for name in whole if "embedders" in name]
    with pytest.raises(StoreError, match=r"embedders\.0\.weight.*fetch the checkpoint again"):
        LocalTables(folder)


def test_the_dense_half_of_a_split_is_enough(
    model_folder: Path, model: LongcatFlashForCausalLM, tmp_path: Path
) -> None:
    split_checkpoint(model_folder, tmp_path / "out")
    half = load_model(tmp_path / "out" / "dense")
    attach(half, LocalTables(tmp_path / "out" / "tables"), "local")
    ids = prompts(2, 9)
    assert torch.equal(half(ids).logits, model(ids).logits)


def test_an_older_index_beside_the_single_file_changes_nothing(
    model_folder: Path, model: LongcatFlashForCausalLM, tmp_path: Path
) -> None:
    """Imports, `split` and workers take each tensor from the same file, as transformers does."""
    folder = change(model_folder, tmp_path / "m", lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    save_file(all_tensors(model_folder), folder / "model.safetensors", {"format": "pt"})
    split_checkpoint(folder, tmp_path / "out")
    half = load_model(tmp_path / "out" / "dense")
    attach(half, LocalTables(tmp_path / "out" / "tables"), "local")
    ids = prompts(2, 9)
    assert torch.equal(local(folder)(ids).logits, model(ids).logits)
    assert torch.equal(half(ids).logits, model(ids).logits)


def test_words_may_lie_under_the_other_name(model_folder: Path, model: LongcatFlashForCausalLM, tmp_path: Path) -> None:
    folder = change(model_folder, tmp_path / "m", lambda t: t.update({OTHER_WORDS: t.pop(WORDS)}))
    ids = prompts(2, 9)
    assert torch.equal(local(folder)(ids).logits, model(ids).logits)


def test_words_that_from_pretrained_does_not_find_are_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = change(model_folder, tmp_path / "m", lambda t: t.update({OTHER_WORDS: t.pop(WORDS)}))
    guessed = LongcatFlashForCausalLM(load_model(folder).config)
    guessed.config.name_or_path = str(folder)
    with pytest.raises(InvalidRequest, match="load_model"):
        attach(guessed, LocalTables(folder), "local")


def test_from_pretrained_then_attach(model_folder: Path, model: LongcatFlashForCausalLM, tmp_path: Path) -> None:
    """Transformers' own loading, of a checkpoint that has the weights transformers asks for the zero experts."""

    def with_zero_experts(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts.0.gate" in name or ".experts.0.up" in name]:
            for expert in range(CONFIG["n_routed_experts"], CONFIG["n_routed_experts"] + CONFIG["zero_expert_num"]):
                tensors[name.replace(".experts.0.", f".experts.{expert}.")] = torch.full_like(tensors[name], 9.0)

    folder = change(model_folder, tmp_path / "m", with_zero_experts)
    config = load_model(folder).config
    config.save_pretrained(folder / "flash")
    theirs = LongcatFlashForCausalLM.from_pretrained(folder, config=config)
    attach(theirs, LocalTables(folder), "local")
    ids = prompts(2, 9)
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert torch.equal(local(folder)(ids).logits, model(ids).logits)


def test_the_stored_dtype_is_kept(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "half", torch.bfloat16)
    loaded = local(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.ngram_embeddings.projection.weight.dtype == torch.bfloat16
    assert torch.isfinite(loaded(prompts(2, 9)).logits).all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 missing tensors: model\.norm\.weight"),
        (lambda t: t.pop("model.layers.0.mlp.experts.1.up_proj.weight"), r"1 missing tensors: .*experts\.1\.up_proj"),
        (lambda t: t.update({"model.layers.0.extra": torch.zeros(2)}), r"1 unexpected tensors: .*layers\.0\.extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(HIDDEN + 1)}),
            r"1 mismatched tensors: .*norm\.weight",
        ),
        (lambda t: t.pop(WORDS), "no word embeddings"),
    ],
    ids=["missing", "missing expert", "extra", "shape", "words"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    model_folder: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        load_model(change(model_folder, tmp_path / "m", edit))


def test_a_missing_projection_is_refused(model_folder: Path, tmp_path: Path) -> None:
    name = "model.ngram_embeddings.post_projs.3.weight"
    folder = change(model_folder, tmp_path / "m", lambda t: t.pop(name))
    with pytest.raises(StoreError, match=name):
        attach(load_model(folder), LocalTables(model_folder), "local")


def test_another_architecture_is_refused(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(InvalidRequest, match=r"LlamaForCausalLM.*LongcatFlashNgramForCausalLM"):
        load_model(tmp_path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        load_model(tmp_path)


# Fusion


def plain_fused(folder: Path, tokens: list[int]) -> torch.Tensor:
    """(word + sum_i P_i e_i) / (1 + heads), row by row with Python's integers: [S, hidden]."""
    tensors = load_file(folder / "model-00001-of-00002.safetensors")
    tables = load_file(folder / "model-00002-of-00002.safetensors")
    neighbors, splits = NGRAM_CONFIG["emb_neighbor_num"], NGRAM_CONFIG["emb_split_num"]
    fused = []
    for t in range(len(tokens)):
        total = tensors[WORDS][tokens[t]].double()
        for n in range(2, neighbors + 1):
            gram = [tokens[t]]
            for d in range(1, n):
                if t - d < 0 or tokens[t - d] == EOS:
                    break
                gram.append(tokens[t - d])
            for j in range(splits):
                head = (n - 2) * splits + j
                rows = int(NGRAM_CONFIG["ngram_vocab_size_ratio"] * VOCAB) + 2 * head + 1
                row = sum(token * VOCAB**d for d, token in enumerate(gram)) % rows
                value = tables[f"model.ngram_embeddings.embedders.{head}.weight"][row].double()
                total = total + tensors[f"model.ngram_embeddings.post_projs.{head}.weight"].double() @ value
        fused.append(total / (1 + HEADS))
    return torch.stack(fused)


def test_fusion_is_the_plain_formula(model_folder: Path, model: LongcatFlashForCausalLM) -> None:
    tokens = [7, 450, EOS, 11, 12, 13, 450, 7, EOS, 5]
    expected = plain_fused(model_folder, tokens)
    ids = torch.tensor([tokens])
    fused = model.model.ngram_embeddings(model.model.embed_tokens(ids), ids)[0]
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e-6)


def test_logits_are_those_of_the_plain_model_fed_with_the_formula(
    model_folder: Path, model: LongcatFlashForCausalLM
) -> None:
    tokens = prompts(1, 12)[0].tolist()
    plain = load_model(model_folder)
    expected = plain(inputs_embeds=plain_fused(model_folder, tokens).float()[None]).logits
    torch.testing.assert_close(model(torch.tensor([tokens])).logits, expected, rtol=1e-3, atol=1e-3)
    alone = plain(torch.tensor([tokens])).logits
    assert not torch.allclose(alone, expected, atol=0.1)  # the n-grams matter


# attach and generate


def test_generate_carries_the_context_through_the_cache(model: LongcatFlashForCausalLM) -> None:
    ids = prompts(3, 7)
    expected = step_by_step(model, ids, 24)
    assert torch.equal(greedy(model, ids, 24), expected)
    assert torch.equal(greedy(model, ids, 24), expected)  # a new call starts from nothing
    assert torch.equal(greedy(model, ids, 24, use_cache=False), expected)


def test_decoding_from_a_cache_gives_the_logits_of_the_whole(model: LongcatFlashForCausalLM) -> None:
    ids = prompts(2, 20)
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([1, 5, 1, 1, 9, 3], 1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-3, atol=1e-4)


def test_left_padded_batches_give_what_each_gives_alone(model: LongcatFlashForCausalLM) -> None:
    lengths = [1, 3, 8, 5]
    alone = [prompts(1, length, seed=length) for length in lengths]
    padded = torch.full((len(lengths), max(lengths)), 9)  # a real token as padding: only the mask tells
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(alone):
        padded[row, -prompt.shape[1] :] = prompt
        mask[row, -prompt.shape[1] :] = 1
    together = greedy(model, padded, 16, attention_mask=mask)
    for row, prompt in enumerate(alone):
        assert torch.equal(together[row : row + 1], step_by_step(model, prompt, 16)), lengths[row]


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 3}], ids=str
)
def test_ways_to_generate_that_reshape_the_cache(model: LongcatFlashForCausalLM, options: dict[str, int]) -> None:
    """Beams reorder it, look-ahead crops it, chunks fill it piecemeal: the look-back must follow."""
    ids = prompts(1, 10)
    plain = {"num_beams": 3} if "num_beams" in options else {}
    expected = greedy(model, ids, 16, use_cache=False, **plain)
    assert torch.equal(greedy(model, ids, 16, **options), expected)


def test_a_copied_prompt_cache_goes_on_from_the_prompt(model: LongcatFlashForCausalLM) -> None:
    prefix, endings = prompts(1, 9), prompts(2, 4, seed=5)
    cache = DynamicCache()  # without a config it grows its layers one by one
    model(prefix, past_key_values=cache, use_cache=True)
    for ending in endings:
        whole = torch.cat([prefix, ending[None]], dim=1)
        out = greedy(model, whole, 10, past_key_values=copy.deepcopy(cache))
        assert torch.equal(out, step_by_step(model, whole, 10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(inputs_embeds=torch.zeros(1, 2, HIDDEN)), "input_ids"),
        (lambda m: m(prompts(1, 4), attention_mask=torch.ones(1, 1, 4, 4)), "attention_mask"),
        (lambda m: greedy(m, prompts(1, 4), 2, cache_implementation="static"), "StaticCache"),
        (lambda m: m(prompts(1, 4), past_key_values=filled_cache(m), use_cache=True), "start with a new cache"),
    ],
    ids=["inputs_embeds", "4d mask", "static cache", "unknown past"],
)
def test_what_cannot_be_right_is_refused(
    model: LongcatFlashForCausalLM, call: Callable[[LongcatFlashForCausalLM], object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        call(model)


def filled_cache(model: LongcatFlashForCausalLM) -> DynamicCache:
    """A cache as a model without n-grams leaves it."""
    cache = DynamicCache(config=model.config)
    plain = LongcatFlashForCausalLM(model.config)
    plain(prompts(1, 3), past_key_values=cache, use_cache=True)
    return cache


def test_a_failed_lookup_leaves_the_cache_as_it_was(model_folder: Path) -> None:
    class Broken(LocalTables):
        broken = False

        def lookup_ngrams(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.broken:
                raise EmbeddingServiceError("gone")
            return super().lookup_ngrams(*args, **kwargs)

    loaded, tables = load_model(model_folder), Broken(model_folder)
    attach(loaded, tables, "local")
    ids, cache = prompts(1, 8), DynamicCache(config=loaded.config)
    first = loaded(ids[:, :5], past_key_values=cache, use_cache=True).logits
    tables.broken = True
    with pytest.raises(EmbeddingServiceError, match="gone"):
        loaded(ids[:, 5:], past_key_values=cache, use_cache=True)
    tables.broken = False
    second = loaded(ids[:, 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, second], 1), loaded(ids).logits, rtol=1e-3, atol=1e-4)


def test_attach_refuses_the_wrong_model(model_folder: Path, model: LongcatFlashForCausalLM) -> None:
    tables = LocalTables(model_folder)
    with pytest.raises(InvalidRequest, match="already"):
        attach(model, tables, "local")
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(InvalidRequest, match="LlamaForCausalLM"):
        attach(llama, tables, "local")
    with pytest.raises(InvalidRequest, match="not loaded from a checkpoint"):
        attach(LongcatFlashForCausalLM(model.config.__class__(**CONFIG)), tables, "local")


def test_attach_refuses_tables_of_another_model(model_folder: Path) -> None:
    class Other(LocalTables):
        def hasher(self, model: str) -> NgramHasher:
            config = {**CONFIG, **NGRAM_CONFIG, "model_type": "longcat_flash_ngram", "emb_split_num": 1}
            return NgramHasher.from_config(config)

    with pytest.raises(InvalidRequest, match=r"'the-name'.*another model"):
        attach(load_model(model_folder), Other(model_folder), "the-name")


def test_attach_refuses_rows_of_another_width(model_folder: Path) -> None:
    class Wider(LocalTables):
        def lookup_ngrams(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().lookup_ngrams(*args, **kwargs).repeat(1, 1, 1, 1, 2)

    with pytest.raises(InvalidRequest, match=f"{2 * HEADS * DIM} values wide.*{HEADS * DIM}"):
        attach(load_model(model_folder), Wider(model_folder), "local")
