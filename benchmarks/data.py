"""What every peer serves: one table whose rows name themselves, and the ids that clients ask for."""

from __future__ import annotations

import asyncio
import email
import json
import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from embedding_service.ngram import NgramHasher
from embedding_service.store.importing import import_checkpoint

HEADS, DIM, VOCAB = 12, 256, 8192
ROW_BYTES = 2 * DIM
TABLE = "ngram"
# Many parts, so that four shards have something to share.
PART_BYTES = 8 << 20
# Requests that are made ready before a slice, by tokens. A slice that used them all begins again.
READY = {1: 4096, 64: 512, 1024: 64}

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float16]
_FACTORS = np.random.default_rng(1).integers(1, 1 << 31, DIM, dtype=np.uint32) | np.uint32(1)


def named_rows(ids: Ids) -> Rows:
    """float16 [n, 256] of whole numbers from 0 to 255: 0, 255, the id in three digits, then bytes of its own.

    Both ends of that range are in every row. So its int8 scale is 1 and its bias 0, and all dtypes hold it exactly.
    """
    short = ids.astype(np.uint32)
    values = (short[:, None] * _FACTORS) >> np.uint32(24)
    values[:, 0], values[:, 1] = 0, 255
    for digit in range(3):
        values[:, 2 + digit] = (short >> np.uint32(8 * digit)) & np.uint32(255)
    return values.astype(np.float16)


@dataclass(frozen=True)
class Data:
    """A folder with `rows.bin` (float16 [rows, 256]), `text.npy` (ids of a text) and `store` (models fp16 and int8)."""

    folder: Path
    head_rows: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Of all heads."""
        return sum(self.head_rows)

    @property
    def first_rows(self) -> Ids:
        """int64 [12], the id of each head's first row."""
        return np.cumsum([0, *self.head_rows[:-1]])

    @property
    def store(self) -> Path:
        """The store that our service serves."""
        return self.folder / "store"

    def table(self) -> Rows:
        """All rows, mapped read-only. All pages are in memory, so that no first touch is measured."""
        with (self.folder / "rows.bin").open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
        return np.frombuffer(pages, np.float16).reshape(self.rows, DIM)

    def tensor(self) -> torch.Tensor:
        """`table` for torch, in the same memory. Do not write to it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(self.table())

    def requests(self, kind: str, tokens: int, seed: int) -> list[Ids]:
        """Ids int64 [tokens * 12] of many requests, a row of each head for each token.

        kind: "uniform" (each head's at random) or "text" (of consecutive tokens).
        """
        random = np.random.default_rng(seed)
        count = READY.get(tokens, max(16, 65536 // tokens))
        if kind == "uniform":
            ids = random.integers(0, self.head_rows, (count * tokens, HEADS)) + self.first_rows
            return list(ids.reshape(count, tokens * HEADS))
        text: Ids = np.load(self.folder / "text.npy")
        begin = int(random.integers(len(text)))
        positions = (begin + np.arange(count * tokens)) % len(text)
        return list(text[positions].reshape(count, tokens * HEADS))


def make_data(folder: Path, rows: int) -> Data:
    """Fill a folder. The table gets about `rows` rows, in heads as LongCat has them."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    config: dict[str, Any] = {
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HEADS * DIM,
        "ngram_vocab_size_ratio": rows / HEADS / VOCAB,
        "emb_neighbor_num": 4,
        "emb_split_num": 4,
        "eos_token_id": 2,
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    hasher = NgramHasher.from_config(config)
    head_rows = hasher.tables[0].head_rows
    with (folder / "rows.bin").open("wb") as file:
        for begin in range(0, sum(head_rows), 1 << 16):
            named_rows(np.arange(begin, min(begin + (1 << 16), sum(head_rows)))).tofile(file)
    data = Data(folder, tuple(head_rows))
    heads = data.tensor().split(list(head_rows))
    save_file(
        {f"model.ngram_embeddings.embedders.{head}.weight": part.clone() for head, part in enumerate(heads)},
        checkpoint / "model.safetensors",
    )
    for dtype in ("fp16", "int8"):
        import_checkpoint(checkpoint, str(data.store), dtype, dtype=dtype, part_bytes=PART_BYTES)
    (checkpoint / "model.safetensors").unlink()
    np.save(folder / "text.npy", hasher.row_ids(torch.tensor([text_tokens()])).view(-1, HEADS).numpy())
    return data


def text_tokens() -> list[int]:
    """Python's language reference and some of its modules, by a byte-level BPE tokenizer that learnt from them."""
    documents = [*topics.topics.values(), *_module_sources()]
    tokenizer = text_tokenizer(documents)
    return [token for document in documents for token in tokenizer.encode(document).ids]


def text_tokenizer(documents: list[str]) -> Any:
    """A `tokenizers.Tokenizer`: byte-level BPE of VOCAB tokens that learnt from these documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _module_sources() -> list[str]:
    return [path.read_text() for package in (asyncio, email) for path in sorted(Path(package.__path__[0]).glob("*.py"))]
