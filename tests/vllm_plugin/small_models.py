"""Small random checkpoints with n-gram tables, and vLLM models that can chunk and cache prompts on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from embedding_service.ngram import NgramHasher

# A multiple of 256: vLLM's kernel for zero experts leaves the rest out.
VOCAB, HIDDEN, EOS = 500, 768, 2
LONGCAT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_layers": 2,
    "num_attention_heads": 2,
    "ffn_hidden_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 64,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 32,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
NGRAMS = {"ngram_vocab_size_ratio": 50, "emb_neighbor_num": 4, "emb_split_num": 2}


def register() -> None:
    """Tell vLLM of the models here."""


def longcat_checkpoint(folder: Path) -> Path:
    """LongCat's architecture in float32, the tables in a file of their own."""
    torch.manual_seed(7)
    model = LongcatFlashForCausalLM(LongcatFlashConfig(**LONGCAT))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            # Far from the usual small values, so that a wrong row or position shows in every logit.
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.06)
    model.save_pretrained(folder)
    dense = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    config = {
        **LONGCAT,
        **NGRAMS,
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "torch_dtype": "float32",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    }
    tables, projections = ngram_tensors(config)
    dense = {name: value for name, value in dense.items() if not zero_expert(name)}
    write(folder, config, {"model-00001-of-00002": {**dense, **projections}, "model-00002-of-00002": tables})
    return folder


def ngram_tensors(config: dict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random tables and projections of a LongCat config, by their published names."""
    heads = NgramHasher.from_config(config).tables[0].head_rows
    dim = HIDDEN // len(heads)
    names = "model.ngram_embeddings.{}.{}.weight"
    tables = {names.format("embedders", head): torch.randn(rows, dim) for head, rows in enumerate(heads)}
    projections = {names.format("post_projs", head): torch.randn(HIDDEN, dim) for head in range(len(heads))}
    return tables, projections


def zero_expert(name: str) -> bool:
    """Whether transformers wrote this for an expert that computes nothing, which published checkpoints do not have."""
    return any(f".experts.{expert}." in name for expert in (4, 5))


def write(folder: Path, config: dict, files: dict[str, dict[str, torch.Tensor]]) -> None:
    """config.json, the files and their index."""
    weight_map = {}
    for file, tensors in files.items():
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{file}.safetensors")
        weight_map.update(dict.fromkeys(tensors, f"{file}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
