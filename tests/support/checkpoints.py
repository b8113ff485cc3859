"""Checkpoints with LongCat's layout whose n-gram rows say which head and row they are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

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


def row_ids_of(rows: torch.Tensor) -> torch.Tensor:
    """The row ids that rows [*, dim] name, for dtypes that keep them exactly."""
    return (rows[..., 1].double() * 128 + rows[..., 2].double()).long()


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
