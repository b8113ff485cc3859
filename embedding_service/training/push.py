"""A push as it is read: everything that can be said about it without a table is checked here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from embedding_service.client.gradients import DTYPES, GRADIENTS, IDS, Checksum, check_finite, from_data
from embedding_service.errors import InvalidRequest
from embedding_service.training.branch import Branch
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
        tables: For each table its rows, a piece after the other. Ids ascend over all of them, each once.
    """

    session: int
    worker: int
    step: int
    learning_rate: float
    pieces: Sequence[bytes | memoryview]
    tables: dict[str, list[Rows]] = field(default_factory=dict)


def read_push(branch: Branch, pieces: Sequence[bytes | memoryview], *, check: bool = True) -> Push:
    """Read and check a push. Raises InvalidRequest naming the field, the table and the id.

    check: Without it, what was checked before it came into a log is not checked again: its numbers.
    """
    try:
        read = [large.read(wire.PushPiece, each, IDS, GRADIENTS) for each in pieces]
    except DecodeError as error:
        raise InvalidRequest(f"a piece of the push is malformed: {error}") from None
    if not read or not read[-1][0].last:
        raise InvalidRequest("the push has no last piece: send all pieces in one call, the last one with `last`")
    first, last = read[0][0], read[-1][0]
    if first.branch != branch.full_name:
        raise InvalidRequest(f"a push for branch {first.branch!r} came to {branch.full_name}")
    if not (math.isfinite(last.learning_rate) and last.learning_rate >= 0):
        raise InvalidRequest(f"learning_rate must be a number from 0 on, got {last.learning_rate}")
    if not first.step:
        raise InvalidRequest("step must be 1 or more: 0 is what the branch began from")
    if check:
        _check_sum([data for _, data in read], last.checksum)
    push = Push(first.session, first.worker, first.step, last.learning_rate, pieces)
    widths = {table.name: table.dim for table in branch.tables}
    for piece, (ids, gradients) in read:
        if piece.table or len(ids) or len(gradients):
            if piece.table not in widths:
                known = ", ".join(widths)
                raise InvalidRequest(f"no table {piece.table!r} in {branch.full_name}; its tables: {known}")
            push.tables.setdefault(piece.table, []).append(_read_rows(piece, ids, gradients, widths[piece.table]))
    if check:
        for name, rows in push.tables.items():
            _check_rows(name, rows)
    return push


def _check_sum(data: list[list[Bytes]], expected: int) -> None:
    checksum = Checksum()
    for fields in data:
        checksum.add(*fields)
    if checksum.value != expected:
        raise InvalidRequest(
            f"checksum of the push is {checksum.value:#018x}, the last piece says {expected:#018x}: send it again"
        )


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


def _check_rows(table: str, pieces: Sequence[Rows]) -> None:
    ids = torch.cat([each for each, _ in pieces])
    if len({gradients.dtype for _, gradients in pieces}) > 1:
        raise InvalidRequest(f"gradients of table {table} come in several encodings: send them in one")
    wrong = (ids[1:] <= ids[:-1]).nonzero()
    if len(wrong):
        raise InvalidRequest(
            f"ids of table {table} must ascend, each once: {int(ids[wrong[0] + 1])} comes after {int(ids[wrong[0]])}. "
            "Sum the gradients of an id"
        )
    for some, gradients in pieces:
        check_finite(table, some, gradients)
