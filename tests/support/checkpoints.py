"""Small checkpoints of every family. The values of their n-gram rows name the table and the row."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from embedding_service.ngram.token_map import token_map_of
from support.tokenizers import byte_level_bpe

VOCAB, NEIGHBORS, SPLITS, HIDDEN, RATIO = 997, 4, 2, 96, 3.25
HEADS = SPLITS * (NEIGHBORS - 1)
DIM = HIDDEN // HEADS


def head_rows() -> list[int]:
    """Rows of each head."""
    return [int(RATIO * VOCAB) + 2 * head + 1 for head in range(HEADS)]


def named_rows(first: int, rows: int, dim: int, tag: int) -> torch.Tensor:
    """float32 [rows, dim]: tag, row id (in two halves that fp16 and bf16 hold exactly), then noise of its own."""
    ids = torch.arange(first, first + rows)
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(1000 * tag + first))
    values[:, 0] = tag
    values[:, 1] = (ids // 128).float()
    values[:, 2] = (ids % 128).float()
    return values


def longcat_table(tag: int = 1) -> torch.Tensor:
    """The one stacked table [rows, dim] that an import makes of `longcat_checkpoint`."""
    return named_rows(0, sum(head_rows()), DIM, tag)


def longcat_checkpoint(folder: Path, tag: int = 1) -> Path:
    """A checkpoint folder; `tag` names it in every row."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "model_type": "longcat_flash_ngram",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "eos_token_id": 2,
        "ngram_vocab_size_ratio": RATIO,
        "emb_neighbor_num": NEIGHBORS,
        "emb_split_num": SPLITS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    for head, rows in enumerate(longcat_table(tag).split(head_rows())):
        tensors[f"model.ngram_embeddings.embedders.{head}.weight"] = rows.contiguous()
        tensors[f"model.ngram_embeddings.post_projs.{head}.weight"] = torch.randn(HIDDEN, DIM)
    save_file(tensors, folder / "model.safetensors")
    return folder


QWEN_PLE_LAYERS = [1, 3]


def qwen4_exp_model(pieces: int = 4) -> torch.nn.Module:
    """A Qwen4-Exp model of transformers with two tables. Each row names its layer (from 0) and its id.

    Args:
        pieces: Tensors that `save_pretrained` parts each table into.
    """
    from transformers import Qwen4ExpForCausalLM, Qwen4ExpTextConfig

    config = Qwen4ExpTextConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=QWEN_PLE_LAYERS,
        ple_embed_dim=64,
        heads_per_ngram=4,
        ngram_vocab_size_base=500,
        split_ngram_parts=pieces,
        eos_token_id=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=16,
        indexer_compress_ratio=4,
    )
    torch.manual_seed(0)
    model = Qwen4ExpForCausalLM(config).eval()
    with torch.no_grad():
        for name, table in qwen4_exp_tables().items():
            layer = model.model.layers[int(name.removeprefix("layer_"))]
            layer.ple.ple_embedding.ngram_embedding.weight.copy_(table)
    return model


def qwen4_exp_tables() -> dict[str, torch.Tensor]:
    """Its tables as an import must make them: float32 [rows, 8] each."""
    rows = {"layer_0": 4352, "layer_2": 4736}
    return {name: named_rows(0, count, 8, int(name[-1])) for name, count in rows.items()}


def qwen4_exp_checkpoint(folder: Path, pieces: int = 4) -> Path:
    """That model as transformers saves it."""
    qwen4_exp_model(pieces).save_pretrained(folder)  # type: ignore[operator]
    return folder


ENGRAM_LAYERS, ENGRAM_DIM, ENGRAM_ROWS = [1, 14], 64, [3200, 3700]


def engram_tensors() -> dict[str, torch.Tensor]:
    """The tables of a checkpoint as DeepSeek-V4.1 has them.

    A row's first value is its layer, its next four the digits of its id to the base 16, which e4m3 holds exactly; then
    come all kinds of values and scales, but for NaN.
    """
    tensors = {}
    for layer, rows in zip(ENGRAM_LAYERS, ENGRAM_ROWS, strict=True):
        generator = torch.Generator().manual_seed(layer)
        values = torch.randint(256, (rows, ENGRAM_DIM), dtype=torch.uint8, generator=generator)
        values = values.masked_fill(values & 0x7F == 0x7F, 0).view(torch.float8_e4m3fn)
        values[:, 0] = layer
        ids = torch.arange(rows)
        for digit in range(4):
            values[:, 1 + digit] = (ids // 16**digit % 16).to(torch.float8_e4m3fn)
        scales = torch.randint(100, 131, (rows, ENGRAM_DIM // 32), dtype=torch.uint8, generator=generator)
        scales[:, 0] = 127
        prefix = f"layers.{layer}.engram.embed"
        tensors[f"{prefix}.weight"], tensors[f"{prefix}.scale"] = values, scales.view(torch.float8_e8m0fnu)
    return tensors


def engram_tables() -> dict[str, torch.Tensor]:
    """Those tables in float32 [rows, 64], by torch's own conversions."""
    tensors = engram_tensors()
    tables = {}
    for layer in ENGRAM_LAYERS:
        prefix = f"layers.{layer}.engram.embed"
        scales = tensors[f"{prefix}.scale"].float().repeat_interleave(32, 1)
        tables[f"layer_{layer}"] = tensors[f"{prefix}.weight"].float() * scales
    return tables


def engram_checkpoint(folder: Path) -> Path:
    """A folder with config, tokenizer, the tables and a few other tensors of such a checkpoint."""
    folder.mkdir(parents=True)
    tokenizer = byte_level_bpe()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "text_config": {
            "engram_layer_ids": ENGRAM_LAYERS,
            "engram_num_embeddings": ENGRAM_ROWS,
            "engram_max_ngram_size": 4,
            "engram_n_heads": 2,
            "engram_head_dim": ENGRAM_DIM,
            "engram_vocab_size": 500,
            "engram_pad_token_id": 2,
            "engram_compressed_vocab_size": int(token_map_of(tokenizer).max()) + 1,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    dense = {"embed.weight": torch.randn(420, 32), "layers.1.engram.wkv.weight": torch.randn(96, 384)}
    save_file({**dense, **engram_tensors()}, folder / "model.safetensors")
    return folder
