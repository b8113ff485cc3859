"""The demo's checkpoint: laid out as LongCat-Flash-Lite is, loadable by transformers, and it learns."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LongcatFlashConfig, LongcatFlashForCausalLM

from embedding_service.ngram import NgramHasher

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "examples" / "demo" / "make_checkpoint.py"
TEXT = "The import statement. Function calls are evaluated from left to right."


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.make_checkpoint(tmp_path_factory.mktemp("demo") / "checkpoint", steps=40)


@pytest.fixture(scope="module")
def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor by its name, through the index."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    found = {}
    for name, file in index.items():
        with safe_open(checkpoint / file, framework="pt") as opened:
            found[name] = opened.get_tensor(name)
    return found


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> LongcatFlashConfig:
    """The base model's config. It must bear the base model's type, by which transformers joins the experts' tensors."""
    keys = json.loads((checkpoint / "config.json").read_text())
    return LongcatFlashConfig(**{key: value for key, value in keys.items() if key != "model_type"})


def test_config_names_the_architecture_and_its_ngram_geometry(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["LongcatFlashNgramForCausalLM"]
    hasher = NgramHasher.from_config(checkpoint)
    assert (hasher.family, hasher.num_heads, hasher.context_length) == ("longcat", 12, 3)


def test_tables_and_projections_have_the_published_names_and_shapes(
    checkpoint: Path, tensors: dict[str, torch.Tensor]
) -> None:
    rows = NgramHasher.from_config(checkpoint).tables[0].head_rows
    for head in range(12):
        assert tensors[f"model.ngram_embeddings.embedders.{head}.weight"].shape == (rows[head], 16)
        assert tensors[f"model.ngram_embeddings.post_projs.{head}.weight"].shape == (192, 16)
    in_tables = sum(t.numel() for name, t in tensors.items() if ".embedders." in name)
    assert in_tables > 0.9 * sum(t.numel() for t in tensors.values())


def test_transformers_loads_the_dense_half(checkpoint: Path, config: LongcatFlashConfig) -> None:
    _, report = LongcatFlashForCausalLM.from_pretrained(checkpoint, config=config, output_loading_info=True)  # type: ignore[misc]
    assert not report["missing_keys"]  # type: ignore[has-type]
    assert not report["mismatched_keys"]  # type: ignore[has-type]
    assert all(name.startswith("model.ngram_embeddings.") for name in report["unexpected_keys"])  # type: ignore[has-type]


def test_the_model_fuses_by_the_published_formula(
    demo: ModuleType, checkpoint: Path, config: LongcatFlashConfig, tensors: dict[str, torch.Tensor]
) -> None:
    """Its logits equal those of transformers' model fed the formula, a token and a head at a time."""
    tokens = torch.tensor([[9, 300, 2, 41, 1200, 7]])
    ids = NgramHasher.from_config(checkpoint).row_ids(tokens)[0, :, 0]
    table = torch.cat([tensors[f"model.ngram_embeddings.embedders.{head}.weight"] for head in range(12)])
    fused = []
    for position, token in enumerate(tokens[0]):
        total = tensors["model.embed_tokens.weight"][token].clone()
        for head in range(12):
            projection = tensors[f"model.ngram_embeddings.post_projs.{head}.weight"]
            total += projection @ table[ids[position, head]]
        fused.append(total / 13)
    base = LongcatFlashForCausalLM.from_pretrained(checkpoint, config=config)
    whole = demo.LongcatFlashNgramForCausalLM.from_pretrained(checkpoint, config=config)
    with torch.no_grad():
        expected = base(inputs_embeds=torch.stack(fused)[None]).logits
        torch.testing.assert_close(whole(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_it_learns_and_needs_its_tables(demo: ModuleType, checkpoint: Path, config: LongcatFlashConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = demo.LongcatFlashNgramForCausalLM.from_pretrained(checkpoint, config=config)
    tokens = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        trained = model(tokens, labels=tokens).loss.item()
        for embedder in model.model.ngram_embeddings.embedders:
            embedder.weight.zero_()
        without_tables = model(tokens, labels=tokens).loss.item()
    assert trained < math.log(2048) - 1
    assert without_tables > trained + 0.2


def test_tokenizer_round_trips_any_text_and_has_a_chat_template(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text in (TEXT, 'def f(x):\n\treturn x  # "€ 日本 🐈"'):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < 2048
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Function calls"}], tokenize=False)
    assert chat == "Function calls\n\n"


def test_a_checkpoint_that_is_there_is_kept(demo: ModuleType, checkpoint: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    assert demo.make_checkpoint(checkpoint) == checkpoint
    assert {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == before
    assert [folder.name for folder in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_a_folder_with_something_else_is_left_alone(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        demo.make_checkpoint(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
