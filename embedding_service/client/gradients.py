"""Sums of gradients, and the pieces that pushes travel in."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from embedding_service.errors import InvalidRequest
from embedding_service.wire import embedding_pb2 as base_wire
from embedding_service.wire import training_pb2 as wire

# Bytes of gradients in a piece. The service takes messages of 16 MiB by default.
PIECE_BYTES = 4 << 20
# Ids in a message: they take 8 bytes each, as much as a narrow row or more.
MOST_IDS = 1 << 18
ENCODINGS = {
    torch.float32: base_wire.ROW_ENCODING_FLOAT32,
    torch.float16: base_wire.ROW_ENCODING_FLOAT16,
    torch.bfloat16: base_wire.ROW_ENCODING_BFLOAT16,
}
DTYPES = {encoding: dtype for dtype, encoding in ENCODINGS.items()}


def summed(ids: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sums of gradients by id: ascending ids [k], each once, and float32 [k, dim].

    ids: int64 [n] each, in any order. gradients: floating [n, dim] each. Those of one id are added in the order given,
    which says the sum's bits.
    """
    together, where = torch.unique(torch.cat(ids), return_inverse=True)
    sums = torch.zeros(len(together), gradients[0].shape[1])
    first = 0
    for some, gradient in zip(ids, gradients, strict=True):
        sums.index_add_(0, where[first : first + len(some)], gradient.float())
        first += len(some)
    return together, sums


def are_finite(values: Tensor) -> bool:
    """Whether all values are. A sum tells it faster, unless it overflows."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def check_finite(table: str, ids: Tensor, gradients: Tensor) -> None:
    """Raise InvalidRequest naming the first row whose gradient is not finite. ids: int64 [n]; gradients: [n, dim]."""
    if not are_finite(gradients):
        row = int((~torch.isfinite(gradients)).any(1).nonzero()[0])
        raise InvalidRequest(
            f"the gradient of table {table}, id {int(ids[row])} is not finite in {gradients.dtype}: leave this step "
            "out (session.zero_grad()), clip or scale gradients, or send them as torch.float32"
        )


def push_pieces(head: wire.PushPiece, tables: Mapping[str, tuple[Tensor, Tensor]], learning_rate: float) -> list[bytes]:
    """A push as serialized pieces.

    head: says the branch, session, worker and step. tables: ascending ids int64 [n], each once, and gradients [n, dim].
    """
    pieces, crc = [head], 0
    for name, (ids, gradients) in tables.items():
        for some, values in _cut(ids, gradients):
            piece = pieces[-1] if not pieces[-1].table else wire.PushPiece()
            if piece is not pieces[-1]:
                pieces.append(piece)
            piece.table, piece.encoding = name, ENCODINGS[values.dtype]
            piece.ids, piece.gradients = data_of(some), data_of(values)
            crc = zlib.crc32(piece.gradients, zlib.crc32(piece.ids, crc))
    pieces[-1].last, pieces[-1].learning_rate, pieces[-1].crc = True, learning_rate, crc
    return [piece.SerializeToString() for piece in pieces]


def _cut(ids: Tensor, gradients: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = min(max(1, PIECE_BYTES // (gradients.shape[1] * gradients.element_size())), MOST_IDS)
    yield from zip(ids.split(rows), gradients.split(rows), strict=True) if len(ids) else ()


def data_of(values: Tensor) -> bytes:
    """The bytes of a contiguous tensor."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def from_data(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """What `data_of` was given."""
    if not data:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(tuple(shape))
