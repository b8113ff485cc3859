"""Small LongCat checkpoints whose every row says in its values which head and row it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

VOCAB, RATIO, NEIGHBORS, SPLITS = 300, 20.5, 3, 2
HEADS, DIM = SPLITS * (NEIGHBORS - 1), 16
HEAD_ROWS = tuple(int(RATIO * VOCAB) + 2 * head + 1 for head in range(HEADS))
CONFIG = {
    "architectures": ["LongcatFlashNgramForCausalLM"],
    "model_type": "longcat_flash_ngram",
    "vocab_size": VOCAB,
    "hidden_size": HEADS * DIM,
    "ngram_vocab_size_ratio": RATIO,
    "emb_neighbor_num": NEIGHBORS,
    "emb_split_num": SPLITS,
    "eos_token_id": 2,
}
HEAD_NAME = "model.ngram_embeddings.embedders.{}.weight"


def head_table(head: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows of the head, DIM]: head, row (two digits to the base 100) and column, exact in every float dtype."""
    row = torch.arange(HEAD_ROWS[head]).unsqueeze(1)
    columns = torch.arange(DIM) * torch.ones_like(row)
    columns[:, 0], columns[:, 1], columns[:, 2] = head, row[:, 0] // 100, row[:, 0] % 100
    columns[:, 3] = -columns[:, 2]
    return columns.to(dtype)


class Checkpoint:
    """A checkpoint folder and what it should hold."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.tables = {HEAD_NAME.format(head): head_table(head, dtype) for head in range(HEADS)}
        self.dense = {
            "model.embed_tokens.weight": torch.randn(VOCAB, HEADS * DIM).to(dtype),
            "model.norm.weight": torch.randn(HEADS * DIM),
            **{
                f"model.ngram_embeddings.post_projs.{head}.weight": torch.randn(HEADS * DIM, DIM).to(dtype)
                for head in range(HEADS)
            },
        }
        self.config = dict(CONFIG)

    @property
    def rows(self) -> torch.Tensor:
        """The table as the service must hold it: the heads stacked."""
        return torch.cat(list(self.tables.values()))

    def write(self, files: int = 1) -> "Checkpoint":
        """Write config, tokenizer and the weights, in one file or in several with an index."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        (self.folder / "tokenizer.json").write_text('{"version": "1.0"}')
        tensors = {**self.dense, **self.tables}
        if files == 1:
            save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
            return self
        weight_map = {name: f"model-{i % files:05d}.safetensors" for i, name in enumerate(tensors)}
        for file in sorted(set(weight_map.values())):
            save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, self.folder / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return self


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Make checkpoints that are not written yet, so that a test can spoil them first."""

    def make(dtype: torch.dtype = torch.bfloat16, name: str = "checkpoint") -> Checkpoint:
        return Checkpoint(tmp_path / name, dtype)

    return make


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    """One bf16 checkpoint in one file."""
    return make_checkpoint().write()
