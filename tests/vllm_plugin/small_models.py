"""Small random checkpoints with n-gram tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.tokenizers import byte_level_bpe
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    PreTrainedTokenizerFast,
    Qwen4ExpForCausalLM,
    Qwen4ExpTextConfig,
)

from embedding_service.ngram import NgramHasher

# A multiple of 256: vLLM's kernel for zero experts leaves the rest out.
VOCAB, HIDDEN, EOS = 500, 768, 2
LONGCAT: dict[str, Any] = {
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
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
ARCHITECTURE = "LongcatFlashNgramForCausalLM"
NGRAMS = {"ngram_vocab_size_ratio": 50, "emb_neighbor_num": 4, "emb_split_num": 2}


QWEN4_EXP: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    # Its sparse attention is FlashAttention's, for CUDA only.
    "layer_types": ["linear_attention"] * 2,
    "output_gate_type": "sigmoid",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_count": 2,
    "hc_lowrank": 32,
    "ple_layer_ids": [1, 2],
    "ple_embed_dim": 128,
    "heads_per_ngram": 4,
    "ngram_vocab_size_base": 30000,
    "split_ngram_parts": 4,
    "eos_token_id": EOS,
    "max_position_embeddings": 256,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}


@dataclass
class SmallModel:
    """A checkpoint that the service has under a name of its own.

    whole: with its tables.
    tableless: the same tensors, names and shapes, but each value of the tables is NaN.
    table_bytes: of the tables.
    """

    name: str
    whole: Path
    tableless: Path
    table_bytes: int


def small_model(name: str, whole: Path, tableless: Path) -> SmallModel:
    """The checkpoint and its copy without tables."""
    tableless.mkdir()
    table_bytes = 0
    for file in whole.iterdir():
        if file.suffix != ".safetensors":
            (tableless / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for tensor_name, values in tensors.items():
            if ".embedders." in tensor_name or ".ple_embedding.ngram_embedding." in tensor_name:
                table_bytes += values.nbytes
                values.fill_(float("nan"))
        save_file(tensors, tableless / file.name, {"format": "pt"})
    return SmallModel(name, whole, tableless, table_bytes)


def qwen4_exp_checkpoint(folder: Path) -> Path:
    """Qwen4-Exp's architecture in bfloat16, of linear attention, its tables in pieces beside the other tensors."""
    torch.manual_seed(5)
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**QWEN4_EXP))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


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
        "architectures": [ARCHITECTURE],
        "torch_dtype": "float32",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    }
    write_tokenizer(folder)
    tables, projections = ngram_tensors(config)
    dense = {name: value for name, value in dense.items() if not zero_expert(name)}
    write(folder, config, {"model-00001-of-00002": {**dense, **projections}, "model-00002-of-00002": tables})
    return folder


def llama_checkpoint(folder: Path) -> Path:
    """A Llama with LongCat's n-gram embedding (`ngram_llama.NgramLlama`), in float32."""
    torch.manual_seed(9)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.08)
    model.save_pretrained(folder)
    dense = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    config = {**json.loads((folder / "config.json").read_text()), **NGRAMS, "architectures": [ARCHITECTURE]}
    tables, projections = ngram_tensors(config)
    write(folder, config, {"model-00001-of-00002": {**dense, **projections}, "model-00002-of-00002": tables})
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of fewer tokens than the model has."""
    bpe = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), bos_token="<bos>", eos_token="<eos>")
    bpe.save_pretrained(folder)


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
