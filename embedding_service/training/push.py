"""A push as it is read: everything that can be said about it without a table is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from google.protobuf.message import DecodeError
from torch import Tensor
from xxhash import xxh3_64

from embedding_service.client.gradients import DTYPES, GRADIENTS, IDS, ascend, check_finite, from_data
from embedding_service.errors import EmbeddingServiceError, InvalidRequest
from embedding_service.training.branch import Branch
from embedding_service.training.log import Draft
from embedding_service.wire import large
from embedding_service.wire import training_pb2 as wire
from embedding_service.wire.lookup_codec import Bytes

# Ids int64 [n], and gradients [n, dim] as they were sent.
Rows = tuple[Tensor, Tensor]


@dataclass
class Push:
    """What one worker changes in one step.

    Attributes:
        pieces: As they came.
        draft: Has them, if they were written to the log as they came.
        tables: For each table its rows, a piece after the other. Ids ascend over all of them, each once.
    """

    session: int
    worker: int
    step: int
    learning_rate: float
    pieces: Sequence[bytes | memoryview]
    tables: dict[str, list[Rows]] = field(default_factory=dict)
    draft: Draft | None = None


class PushReader:
    """Reads a push a piece at a time, so that one is checked while the next one travels. One thread at a time.

    Args:
        check: Without it, what was checked before it came into a log is not checked again.
        locate: Raises for ids of a table that are not here.
        draft_of: Where to write the pieces of a push that begins so, while others travel. None: nowhere.
    """

    def __init__(
        self,
        branch: Branch,
        *,
        check: bool = True,
        locate: Callable[[str, Tensor], object] = lambda table, ids: None,
        draft_of: Callable[[wire.PushPiece], Draft | None] = lambda first: None,
    ) -> None:
        self._branch, self._check, self._locate, self._draft_of = branch, check, locate, draft_of
        self._widths = {table.name: table.dim for table in branch.tables}
        self._pieces: list[bytes | memoryview] = []
        self._first = self._last = wire.PushPiece()
        self._tables: dict[str, list[Rows]] = {}
        self._checksum = xxh3_64()
        self._draft: Draft | None = None
        self._failure: EmbeddingServiceError | None = None

    def add(self, data: bytes | memoryview) -> None:
        """Read a piece. Raises InvalidRequest for one that is none. What else is wrong, `end` raises."""
        try:
            piece, (ids, gradients) = large.read(wire.PushPiece, data, IDS, GRADIENTS)
        except DecodeError as error:
            raise InvalidRequest(f"a piece of the push is malformed: {error}") from None
        if not self._pieces:
            self._first, self._draft = piece, self._draft_of(piece)
        self._last = piece
        self._pieces.append(data)
        if self._check:
            self._checksum.update(ids.data)
            self._checksum.update(gradients.data)
        if self._failure is None and (piece.table or len(ids) or len(gradients)):
            try:
                self._add_rows(piece, ids, gradients)
            except EmbeddingServiceError as error:  # the checksum may say why
                self._failure = error
        if self._draft and self._failure is None:
            self._draft.add(data)

    def end(self) -> Push:
        """The push. Raises InvalidRequest naming the field, the table and the id, and what `locate` does."""
        first, last = self._first, self._last
        if not last.last:
            raise InvalidRequest("the push has no last piece: send all pieces in one call, the last one with `last`")
        if first.branch != self._branch.full_name:
            raise InvalidRequest(f"a push for branch {first.branch!r} came to {self._branch.full_name}")
        if not (math.isfinite(last.learning_rate) and last.learning_rate >= 0):
            raise InvalidRequest(f"learning_rate must be a number from 0 on, got {last.learning_rate}")
        if not first.step:
            raise InvalidRequest("step must be 1 or more: 0 is what the branch began from")
        if self._check and (checksum := self._checksum.intdigest()) != last.checksum:
            raise InvalidRequest(
                f"checksum of the push is {checksum:#018x}, the last piece says {last.checksum:#018x}: send it again"
            )
        if self._failure:
            raise self._failure
        about = first.session, first.worker, first.step, last.learning_rate
        return Push(*about, self._pieces, self._tables, self._draft)

    def _add_rows(self, piece: wire.PushPiece, ids: Bytes, gradients: Bytes) -> None:
        table = piece.table
        if table not in self._widths:
            known = ", ".join(self._widths)
            raise InvalidRequest(f"no table {table!r} in {self._branch.full_name}; its tables: {known}")
        rows, before = _read_rows(piece, ids, gradients, self._widths[table]), self._tables.setdefault(table, [])
        if self._check:
            _check_rows(table, rows, before[-1] if before else None)
            self._locate(table, rows[0])
        if len(rows[0]):  # else the next piece is compared with nothing
            before.append(rows)


def read_push(branch: Branch, pieces: Sequence[bytes | memoryview], *, check: bool = True) -> Push:
    """A push whose pieces are all here. See `PushReader`."""
    reader = PushReader(branch, check=check)
    for piece in pieces:
        reader.add(piece)
    return reader.end()


def _read_rows(piece: wire.PushPiece, ids: Bytes, gradients: Bytes, dim: int) -> Rows:
    dtype = DTYPES.get(piece.encoding)
    if dtype is None:
        raise InvalidRequest(
            f"gradients of table {piece.table} have encoding {piece.encoding}: send FLOAT32, FLOAT16 or BFLOAT16"
        )
    if len(ids) % 8:
        raise InvalidRequest(f"ids of table {piece.table} hold {len(ids)} bytes, not a multiple of 8")
    count, width = len(ids) // 8, dim * dtype.itemsize
    if len(gradients) != count * width:
        raise InvalidRequest(
            f"gradients of table {piece.table} hold {len(gradients):,} bytes: {count:,} ids take "
            f"{count * width:,}, {width} each"
        )
    return from_data(ids, torch.int64, [count]), from_data(gradients, dtype, [count, dim])


def _check_rows(table: str, rows: Rows, before: Rows | None) -> None:
    """`before`: the table's rows in the piece before."""
    ids, gradients = rows
    if before and before[1].dtype != gradients.dtype:
        raise InvalidRequest(f"gradients of table {table} come in several encodings: send them in one")
    together = torch.cat([before[0][-1:], ids]) if before else ids
    if not ascend(together):
        wrong = int((together[1:] <= together[:-1]).nonzero()[0])
        raise InvalidRequest(
            f"ids of table {table} must ascend, each once: {int(together[wrong + 1])} comes after "
            f"{int(together[wrong])}. Sum the gradients of an id"
        )
    check_finite(table, ids, gradients)
