"""A push as it is read: everything that can be said about it without a table is checked here."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from embedding_service.client.gradients import DTYPES, check_finite, from_data
from embedding_service.errors import InvalidRequest
from embedding_service.training.branch import Branch
from embedding_service.wire import training_pb2 as wire


@dataclass
class Push:
    """What one worker changes in one step.

    Attributes:
        pieces: As they came.
        tables: For each table ids, int64 [n], ascending, each once; and gradients [n, dim] as they were sent.
    """

    session: int
    worker: int
    step: int
    learning_rate: float
    pieces: Sequence[bytes]
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def read_push(branch: Branch, pieces: Sequence[bytes]) -> Push:
    """Read and check a push. Raises InvalidRequest naming the field, the table and the id."""
    try:
        messages = [wire.PushPiece.FromString(each) for each in pieces]
    except DecodeError as error:
        raise InvalidRequest(f"a piece of the push is malformed: {error}") from None
    if not messages or not messages[-1].last:
        raise InvalidRequest("the push has no last piece: send all pieces in one call, the last one with `last`")
    first, last = messages[0], messages[-1]
    if first.branch != branch.full_name:
        raise InvalidRequest(f"a push for branch {first.branch!r} came to {branch.full_name}")
    if not (math.isfinite(last.learning_rate) and last.learning_rate >= 0):
        raise InvalidRequest(f"learning_rate must be a number from 0 on, got {last.learning_rate}")
    if not first.step:
        raise InvalidRequest("step must be 1 or more: 0 is what the branch began from")
    crc = 0
    for message in messages:
        crc = zlib.crc32(message.gradients, zlib.crc32(message.ids, crc))
    if crc != last.crc:
        raise InvalidRequest(f"crc of the push is {crc:#010x}, the last piece says {last.crc:#010x}: send it again")
    push = Push(first.session, first.worker, first.step, last.learning_rate, pieces)
    widths = {table.name: table.dim for table in branch.tables}
    read: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for message in messages:
        if message.table or message.ids or message.gradients:
            if message.table not in widths:
                known = ", ".join(widths)
                raise InvalidRequest(f"no table {message.table!r} in {branch.full_name}; its tables: {known}")
            read.setdefault(message.table, []).append(_read_rows(message, widths[message.table]))
    push.tables = {name: _joined(name, read[name]) for name in widths if name in read}
    return push


def _read_rows(message: wire.PushPiece, dim: int) -> tuple[Tensor, Tensor]:
    dtype = DTYPES.get(message.encoding)
    if dtype is None:
        raise InvalidRequest(
            f"gradients of table {message.table} have encoding {message.encoding}: send FLOAT32, FLOAT16 or BFLOAT16"
        )
    if len(message.ids) % 8:
        raise InvalidRequest(f"ids of table {message.table} hold {len(message.ids)} bytes, not a multiple of 8")
    count, width = len(message.ids) // 8, dim * dtype.itemsize
    if len(message.gradients) != count * width:
        raise InvalidRequest(
            f"gradients of table {message.table} hold {len(message.gradients):,} bytes: {count:,} ids take "
            f"{count * width:,}, {width} each"
        )
    return from_data(message.ids, torch.int64, [count]), from_data(message.gradients, dtype, [count, dim])


def _joined(table: str, pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ids = torch.cat([each for each, _ in pieces])
    if len({gradients.dtype for _, gradients in pieces}) > 1:
        raise InvalidRequest(f"gradients of table {table} come in several encodings: send them in one")
    gradients = torch.cat([each for _, each in pieces])
    wrong = (ids[1:] <= ids[:-1]).nonzero()
    if len(wrong):
        raise InvalidRequest(
            f"ids of table {table} must ascend, each once: {int(ids[wrong[0] + 1])} comes after {int(ids[wrong[0]])}. "
            "Sum the gradients of an id"
        )
    check_finite(table, ids, gradients)
    return ids, gradients
