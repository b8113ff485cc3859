"""Sums of gradients, and the pieces that pushes travel in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from xxhash import xxh3_64

from embedding_service.errors import InvalidRequest
from embedding_service.wire import embedding_pb2 as base_wire
from embedding_service.wire import large
from embedding_service.wire import training_pb2 as wire
from embedding_service.wire.lookup_codec import Bytes

# Bytes of gradients in a piece, and of rows in an answer. The service takes messages of 16 MiB by default.
PIECE_BYTES = 4 << 20
# Ids in a message: they take 8 bytes each, as much as a narrow row or more.
MOST_IDS = 1 << 18
ENCODINGS = {
    torch.float32: base_wire.ROW_ENCODING_FLOAT32,
    torch.float16: base_wire.ROW_ENCODING_FLOAT16,
    torch.bfloat16: base_wire.ROW_ENCODING_BFLOAT16,
}
# Fields of PushPiece.
IDS, GRADIENTS = (wire.PushPiece.DESCRIPTOR.fields_by_name[name].number for name in ("ids", "gradients"))
# Of ReadResponse.
ROWS = wire.ReadResponse.DESCRIPTOR.fields_by_name["rows"].number
DTYPES = {encoding: dtype for dtype, encoding in ENCODINGS.items()}


def summed(ids: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sums of gradients by id: ascending ids [k], each once, and float32 [k, dim].

    ids: int64 [n] each, in any order. gradients: floating [n, dim] each. Those of one id are added in the order given,
    which says the sum's bits. A single one whose ids ascend, each once, is its own sum, in the memory that it has.
    """
    if len(ids) == 1 and ascend(ids[0]):
        return ids[0], gradients[0].float()
    together, where = torch.unique(torch.cat(ids), return_inverse=True)
    sums = torch.zeros(len(together), gradients[0].shape[1])
    first = 0
    for some, gradient in zip(ids, gradients, strict=True):
        sums.index_add_(0, where[first : first + len(some)], gradient.float())
        first += len(some)
    return together, sums


def ascend(ids: Tensor) -> bool:
    """Whether they do, each once. int64 [n]."""
    return bool((ids[1:] > ids[:-1]).all())


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


def push_pieces(
    head: wire.PushPiece, tables: Mapping[str, tuple[Tensor, Tensor]], learning_rate: float
) -> Iterator[bytes]:
    """A push as serialized pieces. Each is made when it is asked for, so that the one before may travel.

    head: says the branch, session, worker and step. tables: ascending ids int64 [n], each once, and gradients [n, dim].
    """
    cut = [(name, *some) for name, (ids, gradients) in tables.items() for some in _cut(ids, gradients)]
    checksum = xxh3_64()
    for number, (name, ids, gradients) in enumerate(cut, 1):
        fields = [data_of(ids), data_of(gradients)]
        for data in fields:
            checksum.update(data.data)
        piece = wire.PushPiece() if number > 1 else head
        piece.table, piece.encoding = name, ENCODINGS[gradients.dtype]
        if number == len(cut):
            _end(piece, learning_rate, checksum)
        message, places = large.write(piece, {IDS: len(fields[0]), GRADIENTS: len(fields[1])})
        for place, data in zip(places, fields, strict=True):
            place[:] = data
        yield message
    if not cut:
        _end(head, learning_rate, checksum)
        yield head.SerializeToString()


def _end(piece: wire.PushPiece, learning_rate: float, checksum: xxh3_64) -> None:
    piece.last, piece.learning_rate, piece.checksum = True, learning_rate, checksum.intdigest()


def _cut(ids: Tensor, gradients: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = min(max(1, PIECE_BYTES // (gradients.shape[1] * gradients.element_size())), MOST_IDS)
    yield from zip(ids.split(rows), gradients.split(rows), strict=True) if len(ids) else ()


def data_of(values: Tensor) -> Bytes:
    """The bytes of a tensor in host memory: uint8 [n], a view of it if it is contiguous."""
    return values.contiguous().view(-1).view(torch.uint8).numpy()


def from_data(data: Bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """What `data_of` was given, in the same memory where that is aligned."""
    if not len(data):
        return torch.empty(tuple(shape), dtype=dtype)
    values = torch.from_numpy(data)
    return (values.clone() if values.data_ptr() % dtype.itemsize else values).view(dtype).view(tuple(shape))
