"""A small checkpoint of the real architecture, as published: tables, projections, words and transformer in files."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM, PreTrainedTokenizerFast

from embedding_service.ngram import NgramHasher

VOCAB = 500
CONTEXT = 2048
HIDDEN = 48
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_layers": 2,
    "num_attention_heads": 2,
    "ffn_hidden_size": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 8,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 16,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NGRAM_CONFIG: dict[str, Any] = {"ngram_vocab_size_ratio": 1.5, "emb_neighbor_num": 4, "emb_split_num": 2}
HEADS = 6
DIM = HIDDEN // HEADS
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A byte-level BPE of VOCAB tokens, trained on the Python manual."""
    bpe = ByteLevelBPETokenizer()
    text = list(pydoc_data.topics.topics.values())[:20]
    bpe.train_from_iterator(text, vocab_size=VOCAB, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def write_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as published: no weights for the zero experts, the tables in a file of their own."""
    torch.manual_seed(7)
    model = LongcatFlashForCausalLM(LongcatFlashConfig(**CONFIG)).to(dtype)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            # Far from the usual small values, so that a wrong row or position shows in every logit.
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.15)
    model.save_pretrained(folder)
    written = all_tensors(folder)
    dense = {name: value for name, value in written.items() if not zero_expert(name)}
    hasher = NgramHasher.from_config({**CONFIG, **NGRAM_CONFIG, "model_type": "longcat_flash_ngram"})
    tables = {}
    for head, rows in enumerate(hasher.tables[0].head_rows):
        dense[f"model.ngram_embeddings.post_projs.{head}.weight"] = torch.randn(HIDDEN, DIM, dtype=dtype)
        tables[f"model.ngram_embeddings.embedders.{head}.weight"] = torch.randn(rows, DIM, dtype=dtype)
    (folder / "model.safetensors").unlink()
    write_shards(folder, {"model-00001-of-00002.safetensors": dense, "model-00002-of-00002.safetensors": tables})
    config = {
        **CONFIG,
        **NGRAM_CONFIG,
        "model_type": "longcat_flash_ngram",
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "num_hidden_layers": CONFIG["num_layers"],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def write_shards(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> None:
    """The files, and the index over them."""
    for file, tensors in files.items():
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def add_draft_layer(folder: Path, config: dict[str, Any] = CONFIG) -> None:
    """Give a checkpoint the published draft layer (MTP), of random values: 17 tensors in a file of their own."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    query, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value, ffn = config["qk_nope_head_dim"], config["v_head_dim"], config["ffn_hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config["vocab_size"], hidden),
        "layers.0.enorm.m": (hidden,),
        "layers.0.hnorm.m": (hidden,),
        "layers.0.eh_proj": (hidden, 2 * hidden),
        "layers.0.self_attn.q_a_proj": (query, hidden),
        "layers.0.self_attn.q_a_layernorm": (query,),
        "layers.0.self_attn.q_b_proj": (heads * (nope + rope), query),
        "layers.0.self_attn.kv_a_proj_with_mqa": (latent + rope, hidden),
        "layers.0.self_attn.kv_a_layernorm": (latent,),
        "layers.0.self_attn.kv_b_proj": (heads * (nope + value), latent),
        "layers.0.self_attn.o_proj": (hidden, heads * value),
        "layers.0.transformer_layer.mlp.gate_proj": (ffn, hidden),
        "layers.0.transformer_layer.mlp.up_proj": (ffn, hidden),
        "layers.0.transformer_layer.mlp.down_proj": (hidden, ffn),
        "layers.0.input_layernorm": (hidden,),
        "layers.0.post_attention_layernorm": (hidden,),
        "norm": (hidden,),
    }
    generator = torch.Generator().manual_seed(9)
    made = {f"model.mtp.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(made, folder / "draft.safetensors", {"format": "pt"})
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= dict.fromkeys(made, "draft.safetensors")
    file.write_text(json.dumps(index))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint written in one file or several."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def zero_expert(name: str) -> bool:
    """Whether transformers wrote this for an expert that computes nothing."""
    return any(f".experts.{expert}." in name for expert in range(CONFIG["n_routed_experts"], 6))
