"""Where a model's rows come from, and what the lookups cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from embedding_service.errors import InvalidRequest, NotFound
from embedding_service.ngram import NgramHasher


class RowSource(Protocol):
    """An `EmbeddingClient`, or tables in this process as the reference."""

    def lookup_ngrams(
        self, model: str, token_ids: Tensor, context: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The rows of every token: int64 [B, S] and the [B, C] before them -> [B, S, L, H, dim]; -1 is no token."""

    def prefetch_ngrams(
        self, model: str, token_ids: Tensor, context: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Future[Tensor]:
        """Begin `lookup_ngrams` and return at once. The caller may then change the tokens."""

    def hasher(self, model: str) -> NgramHasher:
        """How the source turns the model's tokens into rows."""


def _nothing(seconds: float) -> None:
    """A function with a name, so that models can be pickled."""


def _itself(name: str) -> str:
    """As above."""
    return name


class Tables:
    """Whose tables the sequences of a batch have their rows from. Each may have those of another model of the source.

    source: gives the rows.
    name: the model in the source whose tables all sequences have, but where `of` says otherwise.

    Attributes:
        resolve: Says as what the source knows a name. Raises NotFound: as nothing, or as another checkpoint's.
    """

    def __init__(self, source: RowSource, name: str) -> None:
        self.source, self.name = source, name
        self.resolve: Callable[[str], str] = _itself
        self._names: Sequence[str] = ()

    @contextmanager
    def of(self, names: Sequence[str | None]) -> Iterator[None]:
        """In here the n-th sequence of each batch has the tables of the n-th name. None: those of all."""
        self._names = [name or self.name for name in names]
        try:
            yield
        finally:
            self._names = ()

    def lookup_ngrams(self, tokens: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The rows of int64 [B, S] tokens after [B, C] others -> [B, S, L, H, dim]."""
        first, *others = self._shares(len(tokens))
        if others:
            return self.prefetch_ngrams(tokens, context, dtype).result()
        return first.ask(partial(self._ngrams, tokens, context, dtype))

    def prefetch_ngrams(self, tokens: Tensor, context: Tensor | None, dtype: torch.dtype) -> RowsToCome:
        """Begin `lookup_ngrams` and return at once. The caller may then change the tokens."""
        asked = []
        # They may be looked up again later, and a model updates its look-back in place.
        tokens, context = tokens.clone(), None if context is None else context.clone()
        for share in self._shares(len(tokens)):
            ours = tokens[share.rows], None if context is None else context[share.rows], dtype
            future = self.source.prefetch_ngrams(self.resolve(share.name), ours[0], ours[1], dtype=dtype)
            asked.append(_Asked(share, future, partial(self._ngrams, *ours)))
        return RowsToCome(asked)

    def lookup(self, table: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of one table by int64 [B, *] ids -> [B, *, dim]."""
        source: Any = self.source

        def look_up(rows: Tensor | slice, name: str) -> Tensor:
            return source.lookup(f"{name}/{table}", ids[rows], dtype=dtype)  # type: ignore[no-any-return]

        return _joined([(share, share.ask(partial(look_up, share.rows))) for share in self._shares(len(ids))])

    def _ngrams(self, tokens: Tensor, context: Tensor | None, dtype: torch.dtype, name: str) -> Tensor:
        return self.source.lookup_ngrams(name, tokens, context, dtype=dtype)

    def _shares(self, sequences: int) -> list[_Share]:
        names = self._names or (self.name,)
        if len(set(names)) == 1:
            return [_Share(self, names[0], slice(None))]
        if len(names) != sequences:
            raise InvalidRequest(f"{len(names)} sequences have tables of their own, and the batch has {sequences}")
        rows = {name: [row for row, each in enumerate(names) if each == name] for name in dict.fromkeys(names)}
        return [_Share(self, name, torch.tensor(theirs)) for name, theirs in rows.items()]


class _Share(NamedTuple):
    """The sequences of a batch, at `rows` of it, that have the tables of one name."""

    tables: Tables
    name: str
    rows: Tensor | slice

    def ask(self, look_up: Callable[[str], Tensor]) -> Tensor:
        """Their rows. If the version was replaced at this moment, those of its successor."""
        return of_the_served(partial(self.tables.resolve, self.name), look_up)


class _Asked(NamedTuple):
    """A share's rows to come, and how to look them up again."""

    share: _Share
    rows: Future[Tensor]
    look_up: Callable[[str], Tensor]

    def result(self) -> Tensor:
        try:
            return self.rows.result()
        except NotFound:
            return self.share.ask(self.look_up)


class RowsToCome:
    """The rows of a batch, asked for share by share."""

    def __init__(self, asked: Sequence[_Asked]) -> None:
        self._asked = asked

    def result(self) -> Tensor:
        """Wait for all of them: [B, S, L, H, dim]. Raises what the source raises."""
        return self._rows

    @cached_property
    def _rows(self) -> Tensor:
        return _joined([(each.share, each.result()) for each in self._asked])


def _joined(shares: Sequence[tuple[_Share, Tensor]]) -> Tensor:
    """Each share's values at its rows of the batch."""
    if len(shares) == 1:
        return shares[0][1]
    first = shares[0][1]
    together = first.new_empty(sum(len(values) for _, values in shares), *first.shape[1:])
    for share, values in shares:
        together[share.rows] = values
    return together


def of_the_served(version: Callable[[], str], look_up: Callable[[str], Tensor]) -> Tensor:
    """The rows of the version that is served. If it was replaced at this moment, those of its successor."""
    known = version()
    try:
        return look_up(known)
    except NotFound:
        successor = version()
        if successor == known:
            raise
        return look_up(successor)


@dataclass
class Lookups:
    """Counts what a model asks of its row source.

    tables: whose rows it asks for.
    table_values: all rows of the tables times their width.
    tokens: tokens whose rows were asked for, padding included.
    wait_seconds: seconds that forward passes waited for rows.
    on_wait: called with the seconds of each wait.
    """

    tables: Tables
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
