"""Where a model's rows come from, and what the lookups cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from embedding_service.errors import InvalidRequest
from embedding_service.ngram import NgramHasher


class RowSource(Protocol):
    """An `EmbeddingClient`, or tables in this process as the reference."""

    def lookup_ngrams(
        self, model: str, token_ids: Tensor, context: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The rows of every token: int64 [B, S] and the [B, C] before them -> [B, S, L, H, dim]; -1 is no token."""

    def hasher(self, model: str) -> NgramHasher:
        """How the source turns the model's tokens into rows."""


def _nothing(seconds: float) -> None:
    """A function with a name, so that models can be pickled."""


@dataclass
class Lookups:
    """Counts what a model asks of its row source.

    table_values: all rows of the tables times their width.
    tokens: tokens whose rows were asked for, padding included.
    wait_seconds: seconds that forward passes waited for rows.
    on_wait: called with the seconds of each wait.
    """

    table_values: int
    count: int = 0
    tokens: int = 0
    wait_seconds: float = 0.0
    on_wait: Callable[[float], object] = _nothing

    def waited(self, seconds: float) -> None:
        """A forward pass got its rows."""
        self.wait_seconds += seconds
        self.on_wait(seconds)

    def asked(self, tokens: int) -> None:
        """Rows of this many tokens were asked for."""
        self.count += 1
        self.tokens += tokens


def check_same_hash(ours: NgramHasher, theirs: NgramHasher, name: str) -> None:
    """Raises InvalidRequest if the tables `name` have another hash than the model's."""
    if (ours.family, ours.params()) != (theirs.family, theirs.params()):
        raise InvalidRequest(
            f"the tables of {name!r} are hashed with {theirs.params()}, this checkpoint with {ours.params()}: "
            "it is another model; give the name of the one imported from this checkpoint"
        )
