"""Importing qwen4_exp, engram and any matrix: every row where it belongs, refusals that say what to do."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    ENGRAM_LAYERS,
    engram_checkpoint,
    engram_tables,
    engram_tensors,
    longcat_checkpoint,
    longcat_table,
    qwen4_exp_checkpoint,
    qwen4_exp_tables,
)

from embedding_service.errors import ImportRefused, InvalidRequest, StoreError
from embedding_service.formats import get_format
from embedding_service.formats.fp8 import e8m0_values
from embedding_service.ngram import NgramHasher
from embedding_service.store import Manifest, Store
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.split import split_checkpoint

PART_BYTES = 150 << 10  # two parts of fp8 rows: 66 bytes each, 2,048 fill whole pages
PLE = "model.layers.{}.ple.ple_embedding.ngram_embedding.{}"


def stored_rows(store: Path, manifest: Manifest, name: str) -> torch.Tensor:
    """All stored rows of a table, read back with the safetensors library: uint8 [rows, row_bytes]."""
    table = manifest.table(name)
    folder = store / manifest.model / manifest.version
    parts = [load_file(folder / part.file)["rows"] for part in table.parts]
    return torch.cat(parts).view(torch.uint8).view(-1, table.row_bytes)


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change a checkpoint's tensors."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return checkpoint


def reconfigure(checkpoint: Path, **keys: Any) -> Path:
    """Change a checkpoint's config."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config).update(keys)
    file.write_text(json.dumps(config))
    return checkpoint


def refused(checkpoint: Path, message: str, **options: Any) -> None:
    """Import, and expect ImportRefused with this message and a store without a trace of it."""
    store = checkpoint.parent / "refused"
    with pytest.raises(ImportRefused, match=message):
        import_checkpoint(checkpoint, store, "tiny", **options)
    assert not store.exists()


USUAL = re.compile(r"model\.ngram_embeddings\.(embedders|post_projs)\.(\d+)\.weight")
FLAT = {"embedders": "oe_embed_tokens", "post_projs": "oe_embed_proj"}
LONGCAT_LAYOUTS = ["model.ngram_embeddings.", "ngram_embeddings.", "model.oe_", "oe_"]


def renamed(name: str, layout: str) -> str:
    """A tensor of LongCat's n-gram embedding as another build calls it."""
    match = USUAL.fullmatch(name)
    if match is None:
        return name
    if layout.endswith("oe_"):
        return f"{layout.removesuffix('oe_')}{FLAT[match[1]]}{match[2]}.weight"
    return f"{layout}{match[1]}.{match[2]}.weight"


def in_layout(tensors: dict[str, torch.Tensor], layout: str, padding: int) -> None:
    """Rename all, and pad each head to a multiple of so many rows, with rows that nobody may see."""
    for name in list(tensors):
        tensor = tensors.pop(name)
        if ".embedders." in name and len(tensor) % padding:
            tensor = torch.cat([tensor, torch.full((-len(tensor) % padding, tensor.shape[1]), -9.0)])
        tensors[renamed(name, layout)] = tensor


@pytest.mark.parametrize("padding", [1, 64])
@pytest.mark.parametrize("layout", LONGCAT_LAYOUTS)
def test_longcat_under_every_name_and_padded(tmp_path: Path, layout: str, padding: int) -> None:
    """LongCat-Flash-Lite, LongCat-Flash-Lite-Sparse, LongCat-2.0."""
    checkpoint = rewrite(
        longcat_checkpoint(tmp_path / "checkpoint"), lambda tensors: in_layout(tensors, layout, padding)
    )
    if layout.endswith("oe_"):
        config = json.loads((checkpoint / "config.json").read_text())
        older = {"ngram_vocab_size_ratio": "oe_vocab_size_ratio"}
        older |= {f"emb_{name}_num": f"oe_{name}_num" for name in ("neighbor", "split")}
        config = {older.get(key, key): value for key, value in config.items()}
        config |= {"architectures": ["LongcatCausalLM"], "model_type": None}
        (checkpoint / "config.json").write_text(json.dumps(config))
    manifest = import_checkpoint(checkpoint, tmp_path / "store", "tiny", dtype="keep", part_bytes=PART_BYTES)
    assert torch.equal(stored_rows(tmp_path / "store", manifest, "ngram"), longcat_table().view(torch.uint8))
    assert manifest.dense is not None
    words = {renamed(f"model.ngram_embeddings.post_projs.{head}.weight", layout) for head in range(6)}
    assert set(manifest.dense.tensors) == {"model.embed_tokens.weight", *words}

    split_checkpoint(checkpoint, tmp_path / "split")
    assert set(load_file(tmp_path / "split" / "dense" / "model.safetensors")) == set(manifest.dense.tensors)
    again = import_checkpoint(tmp_path / "split" / "tables", tmp_path / "again", "tiny", dtype="keep")
    assert torch.equal(stored_rows(tmp_path / "again", again, "ngram"), longcat_table().view(torch.uint8))


def test_a_longcat_checkpoint_of_two_layouts_or_of_another_geometry_is_refused(tmp_path: Path) -> None:
    def fresh(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        return rewrite(longcat_checkpoint(tmp_path / name), change)

    first = "model.ngram_embeddings.embedders.0.weight"
    twice = fresh("a", lambda tensors: tensors.update({"oe_embed_tokens0.weight": tensors[first].clone()}))
    refused(twice, r"holds head 0 twice, as .*: remove one")
    short = fresh("b", lambda tensors: tensors.update({first: tensors[first][1:].clone()}))
    refused(short, r"embedders\.0\.weight is \[3240, 16\], but the config asks for \[3241, 16\]")
    refused(
        reconfigure(fresh("c", dict), vocab_size=990),
        "has 3,241 rows, but the config asks for 3,218: vocab_size or ngram_vocab_size_ratio is not this checkpoint's",
    )


@pytest.mark.parametrize("pieces", [1, 11])
def test_qwen4_exp_as_transformers_saves_it(tmp_path: Path, pieces: int) -> None:
    """Eleven pieces of unequal rows: sorted by name, piece 10 would come after piece 1."""
    checkpoint = qwen4_exp_checkpoint(tmp_path / "checkpoint", pieces=1)
    if pieces > 1:
        checkpoint = rewrite(checkpoint, lambda tensors: in_pieces(tensors, pieces))
    manifest = import_checkpoint(checkpoint, tmp_path / "store", "tiny", dtype="keep", part_bytes=PART_BYTES)
    assert [table.name for table in manifest.tables] == ["layer_0", "layer_2"]
    for name, table in qwen4_exp_tables().items():
        assert torch.equal(stored_rows(tmp_path / "store", manifest, name), table.view(torch.uint8))
    assert NgramHasher.from_params(manifest.family, manifest.hash_params).params() == (
        NgramHasher.from_config(checkpoint).params()
    )
    assert manifest.dense is not None
    assert set(manifest.dense.tensors) == {
        name for name in load_file(checkpoint / "model.safetensors") if not is_piece(name)
    }


def is_piece(name: str) -> bool:
    return ".ngram_embedding." in name


def in_pieces(tensors: dict[str, torch.Tensor], count: int) -> None:
    for layer in (0, 2):
        table = torch.cat([tensors.pop(name) for name in sorted(tensors) if PLE.format(layer, "") in name])
        for piece, rows in enumerate(table.tensor_split(count)):
            tensors[PLE.format(layer, f"shard_{piece}.weight")] = rows.clone()


def whole(tensors: dict[str, torch.Tensor]) -> None:
    for layer in (0, 2):
        tensors[PLE.format(layer, "weight")] = tensors.pop(PLE.format(layer, "shard_0.weight"))


def test_qwen4_exp_in_one_tensor_and_nested_in_a_model_that_sees(tmp_path: Path) -> None:
    checkpoint = rewrite(qwen4_exp_checkpoint(tmp_path / "checkpoint", pieces=1), whole)
    rewrite(
        checkpoint,
        lambda tensors: tensors.update(
            {name.replace("model.", "model.language_model.", 1): tensors.pop(name) for name in list(tensors)}
        ),
    )
    config = json.loads((checkpoint / "config.json").read_text())
    outer = {"model_type": "qwen4_exp", "architectures": ["Qwen4ExpForConditionalGeneration"], "text_config": config}
    (checkpoint / "config.json").write_text(json.dumps(outer))
    manifest = import_checkpoint(checkpoint, tmp_path / "store", "tiny", dtype="fp32")
    for name, table in qwen4_exp_tables().items():
        assert torch.equal(stored_rows(tmp_path / "store", manifest, name), table.view(torch.uint8))


def test_a_qwen4_exp_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    def fresh(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        return rewrite(qwen4_exp_checkpoint(tmp_path / name, pieces=4), change)

    lost = PLE.format(2, "shard_1.weight")
    refused(fresh("a", lambda t: t.pop(lost)), r"lacks tensor layers\.2\.ple.*shard_1\.weight: is the checkpoint whole")
    last = PLE.format(2, "shard_3.weight")
    refused(fresh("b", lambda t: t.pop(last)), r"3 pieces of layer 2's table hold 3,552 rows, but .* asks for 4,736")
    refused(
        fresh("c", lambda t: [t.pop(name) for name in list(t) if is_piece(name) and ".2." in name]),
        r"lacks tensor layers\.2\..*ngram_embedding\.weight, whole or in pieces",
    )
    refused(fresh("d", lambda t: t.update({PLE.format(0, "weight"): torch.zeros(4352, 8)})), "both whole and in pieces")
    refused(fresh("e", lambda t: t.update({lost: t[lost].half()})), "convert the checkpoint to one dtype")
    refused(fresh("f", lambda t: t.update({lost: t[lost][:, :4].clone()})), r"is \[1184, 4\], but .* \[rows, 8\]")
    refused(reconfigure(fresh("g", dict), ple_layer_ids=[1]), r"layers\.2\..* PLE layers of its config are 0,")
    refused(reconfigure(fresh("h", dict), ple_embed_dim=63), "ple_embed_dim 63 cannot be shared by 8 heads")
    refused(reconfigure(fresh("i", dict), eos_token_id=None), "eos_token_id None")


QUANTIZED = {"fp8": "fp8_rowwise", "nvfp4": "nvfp4"}
PLE_DIM = 16


def quantized_ple(build: str, layer: int, pieces: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a quantized PLE table whose codes name their row, and their values in float32."""
    rows = len(qwen4_exp_tables()[f"layer_{layer}"])
    generator = torch.Generator().manual_seed(layer)
    scale = torch.tensor([0.00019931793212890625 * (1 + layer)], dtype=torch.bfloat16)
    if build == "fp8":
        weight = torch.randn(rows, PLE_DIM, generator=generator).to(torch.float8_e4m3fn)
        tensors = {"weight": weight, "weight_scale": scale}
        values = weight.float() * scale.float()
    else:
        weight = torch.randint(256, (rows, PLE_DIM // 2), dtype=torch.uint8, generator=generator)
        blocks = torch.rand(rows, 1, generator=generator).to(torch.float8_e4m3fn)
        tensors = {"weight": weight, "weight_scale": blocks, "weight_scale_2": scale.float()}
        codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        values = torch.stack([codes[(weight & 15).int()], codes[(weight >> 4).int()]], 2).flatten(1)
        values = values * blocks.float() * scale.float()
    if pieces == 1:
        return {PLE.format(layer, name): tensor for name, tensor in tensors.items()}, values
    named = {}
    for name, tensor in tensors.items():
        if len(tensor) == 1:
            named[PLE.format(layer, name)] = tensor
        else:
            for piece, part in enumerate(tensor.view(torch.uint8).tensor_split(pieces)):
                named[PLE.format(layer, f"shard_{piece}.{name}")] = part.view(tensor.dtype).clone()
    return named, values


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("build", QUANTIZED)
def test_quantized_qwen4_exp_is_kept_as_it_is(tmp_path: Path, build: str, pieces: int) -> None:
    """The builds of Qwen3.8-Flash-Next with one scale for the table, and with one for 16 values beside it."""
    quantized = {layer: quantized_ple(build, layer, pieces) for layer in (0, 2)}

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if is_piece(name)]:
            del tensors[name]
        for named, _ in quantized.values():
            tensors.update(named)

    checkpoint = rewrite(qwen4_exp_checkpoint(tmp_path / "checkpoint"), quantize)
    reconfigure(checkpoint, ple_embed_dim=8 * PLE_DIM)
    manifest = import_checkpoint(checkpoint, tmp_path / "store", "tiny", dtype="keep", part_bytes=PART_BYTES)
    split_checkpoint(checkpoint, tmp_path / "split")
    again = import_checkpoint(tmp_path / "split" / "tables", tmp_path / "again", "tiny", dtype="keep")
    row_format = get_format(QUANTIZED[build])
    for layer, (_, values) in quantized.items():
        table = manifest.table(f"layer_{layer}")
        assert (table.dtype, table.row_bytes) == (row_format.name, row_format.row_bytes(PLE_DIM))
        stored = stored_rows(tmp_path / "store", manifest, table.name)
        assert torch.equal(row_format.decode(stored, PLE_DIM), values)
        assert torch.equal(stored_rows(tmp_path / "again", again, table.name), stored)
    floats = import_checkpoint(checkpoint, tmp_path / "store", "floats", dtype="fp32")
    assert torch.equal(
        stored_rows(tmp_path / "store", floats, "layer_2").view(torch.float32), quantized[2][1].view(-1, PLE_DIM)
    )
    assert manifest.dense is not None and not any(is_piece(name) for name in manifest.dense.tensors)


def test_a_quantized_qwen4_exp_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    def fresh(name: str, build: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        def quantize(tensors: dict[str, torch.Tensor]) -> None:
            for key in [key for key in tensors if is_piece(key)]:
                del tensors[key]
            for layer in (0, 2):
                tensors.update(quantized_ple(build, layer, 2)[0])
            change(tensors)

        return reconfigure(rewrite(qwen4_exp_checkpoint(tmp_path / name), quantize), ple_embed_dim=8 * PLE_DIM)

    scale, second = PLE.format(2, "weight_scale"), PLE.format(2, "weight_scale_2")
    refused(fresh("a", "fp8", lambda t: t.pop(scale)), r"shard_0\.weight in F8_E4M3, but no weight_scale beside it")
    refused(fresh("b", "nvfp4", lambda t: t.pop(second)), r"shard_0\.weight in U8, but no weight_scale_2 beside it")
    refused(fresh("c", "fp8", lambda t: t.update({scale: torch.ones(2)})), r"is F32 \[2\], but .* one number")
    lost = PLE.format(0, "shard_1.weight_scale")
    refused(fresh("d", "nvfp4", lambda t: t.pop(lost)), rf"lacks tensor .*{re.escape(lost)}")
    refused(fresh("e", "nvfp4", lambda t: t.update({lost: t[lost].float()})), "has dtype F32, not F8_E4M3")


def test_a_hash_that_is_not_the_checkpoints_own_is_refused(tmp_path: Path) -> None:
    """Checkpoints bring the multipliers of their hash. The config's seed must give the same ones."""
    name = "model.layers.2.ple.ple_embedding.layer_multipliers"
    expected = NgramHasher.from_config(qwen4_exp_checkpoint(tmp_path / "config")).multipliers[1]  # type: ignore[attr-defined]

    def bring(folder: str, multipliers: torch.Tensor) -> Path:
        return rewrite(qwen4_exp_checkpoint(tmp_path / folder), lambda tensors: tensors.update({name: multipliers}))

    import_checkpoint(bring("same", torch.tensor(expected)), tmp_path / "store", "tiny")
    refused(bring("other", torch.tensor(expected) + 2), rf"tensor {re.escape(name)} is not \[{expected[0]}, .* seed of")
    refused(bring("floats", torch.tensor(expected).float()), "take the config that the checkpoint was saved with")


ENGRAM_LAYOUTS = {
    "deepseek": ("embed", "scale"),
    "vllm": ("embed_tokens", "weight_scale_inv"),
    "sglang": ("multi_head_embedding", "scale"),
}


@pytest.mark.parametrize("scales", ["e8m0", "uint8", "float32"])
@pytest.mark.parametrize("layout", ENGRAM_LAYOUTS)
def test_engram_under_every_name_and_with_every_scale(tmp_path: Path, layout: str, scales: str) -> None:
    table_name, scale_name = ENGRAM_LAYOUTS[layout]

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for layer in ENGRAM_LAYERS:
            prefix = f"layers.{layer}.engram"
            scale = tensors.pop(f"{prefix}.embed.scale").view(torch.uint8)
            if scales == "float32":
                tensors[f"{prefix}.{table_name}.{scale_name}"] = e8m0_values()[scale.int()]
            else:
                kind = torch.uint8 if scales == "uint8" else torch.float8_e8m0fnu
                tensors[f"{prefix}.{table_name}.{scale_name}"] = scale.view(kind)
            tensors[f"{prefix}.{table_name}.weight"] = tensors.pop(f"{prefix}.embed.weight")

    checkpoint = rewrite(engram_checkpoint(tmp_path / "checkpoint"), rename)
    manifest = import_checkpoint(checkpoint, tmp_path / "store", "tiny", dtype="keep")
    split_checkpoint(checkpoint, tmp_path / "split")
    again = import_checkpoint(tmp_path / "split" / "tables", tmp_path / "again", "tiny", dtype="keep")
    for name, expected in engram_tables().items():
        stored = stored_rows(tmp_path / "store", manifest, name)
        assert torch.equal(get_format("fp8").decode(stored, 64), expected)
        assert torch.equal(stored_rows(tmp_path / "again", again, name), stored)


def test_engram_scales_that_fp8_cannot_hold_are_refused(tmp_path: Path) -> None:
    scale = "layers.14.engram.embed.scale"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        floats = e8m0_values()[tensors[scale].view(torch.uint8).int()]
        floats[17, 1] *= 1.5
        tensors[scale] = floats

    checkpoint = rewrite(engram_checkpoint(tmp_path / "checkpoint"), widen)
    with pytest.raises(StoreError, match=r"scale in row 17 that is no power of two, .*convert the table to bf16"):
        import_checkpoint(checkpoint, tmp_path / "store", "tiny", dtype="keep")
    assert Store(tmp_path / "store").models() == []


def test_engram_rows_and_scales_are_kept_as_they_are(tmp_path: Path) -> None:
    checkpoint = engram_checkpoint(tmp_path / "checkpoint")
    manifest = import_checkpoint(checkpoint, tmp_path / "store", "tiny", dtype="keep", part_bytes=PART_BYTES)
    tensors = engram_tensors()
    for layer, (name, expected) in zip(ENGRAM_LAYERS, engram_tables().items(), strict=True):
        table = manifest.table(name)
        assert (table.rows, table.dim, table.dtype, table.row_bytes) == (*expected.shape, "fp8", 66)
        assert len(table.parts) == 2
        stored = stored_rows(tmp_path / "store", manifest, name)
        assert torch.equal(stored[:, :64], tensors[f"layers.{layer}.engram.embed.weight"].view(torch.uint8))
        assert torch.equal(stored[:, 64:], tensors[f"layers.{layer}.engram.embed.scale"].view(torch.uint8))
        assert torch.equal(get_format("fp8").decode(stored, 64), expected)
    assert NgramHasher.from_params(manifest.family, manifest.hash_params).params() == (
        NgramHasher.from_config(checkpoint).params()
    )
    assert manifest.dense is not None and set(manifest.dense.tensors) == {"embed.weight", "layers.1.engram.wkv.weight"}
    assert manifest.provenance is not None and manifest.provenance.source_bytes == 66 * (3200 + 3700)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "fp8"])
def test_engram_rows_in_another_dtype_are_the_decoded_ones_encoded(tmp_path: Path, dtype: str) -> None:
    checkpoint = engram_checkpoint(tmp_path / "checkpoint")
    manifest = import_checkpoint(checkpoint, tmp_path / "store", "tiny", dtype=dtype)
    for name, table in engram_tables().items():
        stored = stored_rows(tmp_path / "store", manifest, name)
        if dtype == "fp8":  # as it lies in the checkpoint, not quantized again
            assert torch.equal(get_format(dtype).decode(stored, 64), table)
        else:
            assert torch.equal(stored, get_format(dtype).encode(table))


def test_engram_tables_that_were_dequantized(tmp_path: Path) -> None:
    def dequantize(tensors: dict[str, torch.Tensor]) -> None:
        for layer, table in zip(ENGRAM_LAYERS, engram_tables().values(), strict=True):
            tensors[f"layers.{layer}.engram.embed.weight"] = table.bfloat16()
            del tensors[f"layers.{layer}.engram.embed.scale"]

    checkpoint = rewrite(engram_checkpoint(tmp_path / "checkpoint"), dequantize)
    manifest = import_checkpoint(checkpoint, tmp_path / "store", "tiny", dtype="keep")
    for name, table in engram_tables().items():
        assert torch.equal(stored_rows(tmp_path / "store", manifest, name), table.bfloat16().view(torch.uint8))


def test_an_engram_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    weight, scale = "layers.14.engram.embed.weight", "layers.14.engram.embed.scale"

    def fresh(name: str, change: Callable[[dict[str, torch.Tensor]], object] = dict) -> Path:
        return rewrite(engram_checkpoint(tmp_path / name), change)

    refused(fresh("a", lambda t: t.pop(weight)), f"lacks tensor {weight}")
    refused(fresh("b", lambda t: t.pop(scale)), f"lacks tensor {scale}")
    refused(
        fresh("c", lambda t: t.update({scale: t[scale].view(torch.int8)})),
        "dtype I8, but scales of fp8 rows must be F8_E8M0, U8 or F32",
    )
    twice = {"layers.14.engram.embed_tokens.weight": torch.zeros(1)}
    refused(fresh("j", lambda t: t.update(twice)), "table of layer 14 twice, as .*embed.* and .*embed.*: remove one")
    refused(fresh("d", lambda t: t.update({scale: t[scale][1:].clone()})), r"is \[3699, 2\], but .* \[3700, 2\]")
    refused(fresh("e", lambda t: t.update({weight: t[weight].view(torch.uint8)})), "has dtype U8; F32, F16, BF16 can")
    refused(reconfigure(fresh("f"), engram_head_dim=None), "engram_head_dim is None")
    refused(reconfigure(fresh("g"), engram_layer_ids=[1], engram_num_embeddings=[3200]), r"layers\.14.* are 1:")
    refused(reconfigure(fresh("h"), engram_compressed_vocab_size=7), "is it this model's tokenizer")
    (fresh("i") / "tokenizer.json").unlink()
    refused(tmp_path / "i", r"tokenizer\.json is not there")


@pytest.mark.parametrize("make", [engram_checkpoint, qwen4_exp_checkpoint], ids=["engram", "qwen4_exp"])
def test_split_off_tables_import_as_the_whole_does(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    checkpoint = make(tmp_path / "checkpoint")
    split_checkpoint(checkpoint, tmp_path / "split", shard_bytes=200_000)
    halves = [import_checkpoint(tmp_path / "split" / "tables", tmp_path / "store", "half", dtype="keep")]
    halves.append(import_checkpoint(checkpoint, tmp_path / "store", "whole", dtype="keep"))
    assert halves[0].tables == halves[1].tables and halves[0].hash_params == halves[1].hash_params


def test_an_interrupted_import_goes_on_with_the_second_table(tmp_path: Path) -> None:
    checkpoint, store = engram_checkpoint(tmp_path / "checkpoint"), tmp_path / "store"

    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise Interrupted

    options: dict[str, Any] = {"dtype": "keep", "part_bytes": PART_BYTES}
    with pytest.raises(Interrupted):
        import_checkpoint(checkpoint, store, "tiny", progress=stop, **options)
    assert Store(store).models() == []
    finished = {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")}
    assert {path.parent.name for path in finished} == {"layer_1", "layer_14"}
    manifest = import_checkpoint(checkpoint, store, "tiny", **options)
    for path, written in finished.items():
        assert (store / "tiny" / "1" / path.parent.name / path.name).stat().st_mtime_ns == written
    for name, table in engram_tables().items():
        assert torch.equal(get_format("fp8").decode(stored_rows(store, manifest, name), 64), table)


@pytest.fixture
def matrices(tmp_path: Path) -> dict[str, torch.Tensor]:
    """`words.safetensors` and `more.safetensors` in a folder without config."""
    torch.manual_seed(0)
    tensors = {"words": torch.randn(1000, 24), "buckets": torch.randn(300, 8).half(), "bias": torch.randn(7)}
    (tmp_path / "files").mkdir()
    save_file(tensors, tmp_path / "files" / "words.safetensors")
    save_file({"more": torch.randn(50, 8).bfloat16()}, tmp_path / "files" / "more.safetensors")
    return tensors


@pytest.mark.parametrize("path", ["files", "files/words.safetensors"])
def test_any_matrix_becomes_a_table(tmp_path: Path, matrices: dict[str, torch.Tensor], path: str) -> None:
    wanted = {"words": "words", "buckets": "fast.text"}
    manifest = import_checkpoint(tmp_path / path, tmp_path / "store", "any", dtype="keep", generic=wanted)
    assert (manifest.family, manifest.hash_params, manifest.dense) == ("", {}, None)
    for tensor, table in wanted.items():
        assert torch.equal(stored_rows(tmp_path / "store", manifest, table), matrices[tensor].view(torch.uint8))
    int8 = import_checkpoint(tmp_path / path, tmp_path / "store", "int8", generic={"words": "w"})
    assert torch.equal(stored_rows(tmp_path / "store", int8, "w"), get_format("int8").encode(matrices["words"]))


def test_a_matrix_of_a_checkpoint_of_any_kind(checkpoint: object, tmp_path: Path) -> None:
    folder = checkpoint.folder  # type: ignore[attr-defined]
    words = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    name = "model.embed_tokens.weight"
    manifest = import_checkpoint(folder, tmp_path / "store", "any", dtype="keep", generic={name: name})
    assert torch.equal(stored_rows(tmp_path / "store", manifest, name), words.view(torch.uint8))


@pytest.mark.usefixtures("matrices")
def test_what_is_no_matrix_is_refused_with_those_there_are(tmp_path: Path) -> None:
    files = tmp_path / "files"
    known = "it has the matrices buckets, more, words$"
    refused(files, f"has no tensor 'wards'; {known}", generic={"wards": "words"})
    refused(
        files, rf"tensor bias is F32 \[7\]; a table must be a matrix of F32, F16, BF16; {known}", generic={"bias": "b"}
    )
    refused(files, "a table name of its own, not t, t", generic={"words": "t", "more": "t"})
    refused(files, "a table name of its own, not none", generic={})
    with pytest.raises(InvalidRequest, match="'a/b' cannot be a name"):
        import_checkpoint(files, tmp_path / "store", "any", generic={"words": "a/b"})
    save_file({"words": torch.zeros(2, 2)}, files / "again.safetensors")
    refused(
        files, r"both .*again\.safetensors and .*words\.safetensors hold a tensor words", generic={"words": "words"}
    )
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no safetensors file", generic={"words": "words"})
    refused(tmp_path / "nowhere", "nowhere", generic={"words": "words"})
