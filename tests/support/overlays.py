"""Rows that are published over the versions of tests/conftest.py's store. Each names its overlay and its id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from embedding_service.formats import get_format
from embedding_service.store.manifest import Manifest, Part
from embedding_service.store.overlays import Replaced
from support.checkpoints import DIM, longcat_table, named_rows

ROWS = len(longcat_table())


def some_ids(tag: int, share: float, rows: int = ROWS) -> np.ndarray:
    """Ascending ids of that share of all rows, others for each tag, with the first and the last row of the table."""
    chosen = np.random.default_rng(tag).random(rows) < share
    chosen[[0, -1]] = True
    return np.flatnonzero(chosen)


def new_rows(ids: np.ndarray, tag: int) -> torch.Tensor:
    """float32 [n, DIM]: as `checkpoints.named_rows` makes them."""
    return named_rows(0, ROWS, DIM, tag)[torch.from_numpy(ids)]


def rows_file(path: Path, ids: np.ndarray, tag: int) -> Path:
    """A file for `publish`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"ngram.ids": torch.from_numpy(ids), "ngram.rows": new_rows(ids, tag)}, path)
    return path


def replaced_of(manifest: Manifest, part: Part, ids: np.ndarray, tag: int) -> Replaced:
    """Those of `ids` that lie in a part, and their rows as the model stores them."""
    here = ids[(ids >= part.first_row) & (ids < part.first_row + part.rows)]
    return Replaced(here, get_format(manifest.tables[0].dtype).encode(new_rows(here, tag)).numpy())


def overlaid_table(dtype: str, *overlays: tuple[np.ndarray, int]) -> np.ndarray:
    """All stored rows of the store's model of that dtype, with these (ids, tag) over them, one after the other."""
    row_format = get_format(dtype)
    stored = row_format.encode(longcat_table())
    for ids, tag in overlays:
        stored[torch.from_numpy(ids)] = row_format.encode(new_rows(ids, tag))
    return stored.numpy()
