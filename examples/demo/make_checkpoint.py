"""Makes a small LongCat-Flash-Lite: the real architecture, layout and tensor names, trained here in about a minute.

    python examples/demo/make_checkpoint.py OUT

Nothing is downloaded. It learns from the language reference that Python ships (`pydoc_data.topics`), enough to continue
a prompt in recognizable English. Most of its parameters lie in twelve n-gram tables, as in the real model. Run again,
it keeps what is there.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM, PreTrainedTokenizerFast

from embedding_service.ngram import NgramHasher

PROMPT = "A function definition"
STEPS = 300
BATCH, LENGTH = 16, 96
SEED = 1234

# The real tokenizer's special tokens, in the order of their ids from 0.
UNKNOWN, BEGIN, END, PADDING = SPECIAL_TOKENS = ["<longcat_unk>", "<longcat_s>", "</longcat_s>", "<longcat_pad>"]
# A message takes the place of a headline in the text that the model has read.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"

CONFIG: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "num_layers": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
    "v_head_dim": 32,
    "ffn_hidden_size": 384,
    "expert_ffn_hidden_size": 128,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    # As in the real model: 12 heads of 78 times the vocabulary.
    "ngram_vocab_size_ratio": 78,
    "emb_neighbor_num": 4,
    "emb_split_num": 4,
}


class NgramEmbeddings(nn.Module):
    """The tables and their projections, named as in a checkpoint."""

    def __init__(self, hasher: NgramHasher, hidden_size: int) -> None:
        super().__init__()
        self.hasher = hasher
        head_rows = hasher.tables[0].head_rows
        self.first_rows = [0, *accumulate(head_rows[:-1])]
        dim = hidden_size // len(head_rows)
        self.embedders = nn.ModuleList(nn.Embedding(rows, dim, sparse=True) for rows in head_rows)
        self.post_projs = nn.ModuleList(nn.Linear(dim, hidden_size, bias=False) for _ in head_rows)
        for table in self.embedders.parameters():
            nn.init.normal_(table, std=0.1)

    def forward(self, token_ids: Tensor, words: Tensor) -> Tensor:
        """(word + sum of P_i e_i) / (1 + heads): int64 [B, S] and word embeddings [B, S, hidden] -> [B, S, hidden]."""
        ids = self.hasher.row_ids(token_ids)[:, :, 0]
        total = words
        for head, (embedder, project) in enumerate(zip(self.embedders, self.post_projs, strict=True)):
            total = total + project(embedder(ids[..., head] - self.first_rows[head]))
        return total / (1 + len(self.embedders))


class LongcatFlashNgramForCausalLM(LongcatFlashForCausalLM):
    """transformers' LongCat-Flash with n-gram embeddings, whole sequences only (no cache)."""

    def __init__(self, config: LongcatFlashConfig) -> None:
        super().__init__(config)
        hasher = NgramHasher.from_config(config)
        self.model.ngram_embeddings = NgramEmbeddings(hasher, config.hidden_size)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)

    def forward(self, token_ids: Tensor, labels: Tensor | None = None) -> Any:
        """Token ids int64 [B, S] -> the output of LongcatFlashForCausalLM."""
        fused = self.model.ngram_embeddings(token_ids, self.model.embed_tokens(token_ids))
        return super().forward(inputs_embeds=fused, labels=labels, use_cache=False)


def read_documents() -> list[str]:
    """Python's language reference, a document for each topic: its headline and paragraphs, without code and grammar."""
    documents = []
    for _, topic in sorted(topics.topics.items()):
        headline, *blocks = re.split(r"\n\s*\n", topic.strip())
        paragraphs = [" ".join(re.sub(r"(?<=\w)-\n\s*", "-", block).split()) for block in blocks if block[0] != " "]
        prose = [text for text in paragraphs if len(text) > 60 and text[-1] in ".:" and "::=" not in text]
        if prose:
            documents.append("\n\n".join([headline.splitlines()[0].replace('"', ""), *dict.fromkeys(prose)]))
    return documents


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the documents. It encodes any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONFIG["max_position_embeddings"],
    )


def train(model: LongcatFlashNgramForCausalLM, stream: Tensor, steps: int) -> None:
    """Trains on windows of the stream, int64 [tokens]. Tables get sparse gradients, because a step meets few rows."""
    tables = list(model.model.ngram_embeddings.embedders.parameters())
    dense = [parameter for name, parameter in model.named_parameters() if ".embedders." not in name]
    optimizers = [torch.optim.SparseAdam(tables, lr=0.02), torch.optim.AdamW(dense, lr=0.006, betas=(0.9, 0.95))]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.defaults["lr"], total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        for optimizer in optimizers
    ]
    # A quarter of the windows begin where a document begins, as prompts do. A headline is learnt nowhere else.
    ends = (stream == CONFIG["eos_token_id"]).nonzero().flatten()
    beginnings = torch.cat((torch.zeros(1, dtype=torch.int64), ends + 1))
    beginnings = beginnings[beginnings <= len(stream) - LENGTH]
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.2f}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        for _ in range(steps):
            starts = torch.randint(len(stream) - LENGTH, (BATCH,))
            starts[: BATCH // 4] = beginnings[torch.randint(len(beginnings), (BATCH // 4,))]
            tokens = stream[starts[:, None] + torch.arange(LENGTH)]
            loss = model(tokens, labels=tokens).loss
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(dense, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            progress.update(task, advance=1, loss=loss.item())


def make_checkpoint(out: Path, steps: int = STEPS) -> Path:
    """Trains for `steps` steps (a step takes about 0.2 s, 0 are fine) and saves the checkpoint to the folder `out`.

    A checkpoint that is there is kept. `out` appears only when it is whole. Raises FileExistsError if `out` holds
    something else. Draws from torch's global random generator, seeded here, so the same machine gives the same weights.
    """
    if (out / "config.json").exists():
        return out
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no checkpoint; name another folder")
    torch.manual_seed(SEED)
    documents = read_documents()
    tokenizer = train_tokenizer(documents)
    encoded = tokenizer.backend_tokenizer.encode_batch([text + END for text in documents])
    model = LongcatFlashNgramForCausalLM(LongcatFlashConfig(**CONFIG))
    # One thread. On a busy machine two wait for each other at every operation, and take ten times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if steps:
        train(model, torch.tensor([token for document in encoded for token in document.ids]), steps)
    torch.set_num_threads(threads)
    return save_checkpoint(model, tokenizer, out)


def save_checkpoint(
    model: LongcatFlashNgramForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write the folder `out`, which appears only when it is whole. finish: called with what there is of it before."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size="32MB")
    tokenizer.save_pretrained(partial)
    # Only now. Saved under the base model's type, the experts' tensors get the published names.
    config = json.loads((partial / "config.json").read_text())
    (partial / "config.json").write_text(json.dumps(config | {"model_type": "longcat_flash_ngram"}, indent=2) + "\n")
    finish(partial)
    return partial.rename(out)


@torch.no_grad()
def continue_text(checkpoint: Path, prompt: str, tokens: int = 60) -> str:
    """The prompt and its likeliest continuation, from the files of a checkpoint made here."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = LongcatFlashNgramForCausalLM.from_pretrained(checkpoint, config=LongcatFlashConfig(**CONFIG))
    ids = torch.tensor([tokenizer.encode(prompt)])
    for _ in range(tokens):
        following = model(ids).logits[:, -1:].argmax(-1)
        if following.item() == CONFIG["eos_token_id"]:
            break
        ids = torch.cat((ids, following), 1)
    return str(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(continue_text(make_checkpoint(Path(sys.argv[1])), PROMPT))
