"""`LookupResponse` without copies: rows are gathered into the message and read where it arrived.

protobuf copies a `bytes` field when it is set, again when the message is serialized, and again when it is parsed; for
answers of megabytes that is most of the work. The bytes written here are those of the contract in protos/embedding/v1,
small fields first and `rows` last. Who asks knows what all but the rows must be, so reading is a comparison; an answer
that is written in another order, or says something else, is parsed by protobuf.

Written by hand; everything else in this folder is generated.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedding_service.wire import embedding_pb2 as wire

Bytes = npt.NDArray[np.uint8]

# Field number << 3 | 2 (length-delimited).
_ROWS = b"\x0a"  # LookupResponse.rows = 1
_RESULT = b"\x12"  # StreamLookupResponse.rows = 2
_ENCODING = 0x20  # LookupResponse.encoding = 4, a varint
_LOOKUP = b"\x12"  # StreamLookupRequest.lookup = 2
# LookupRequest.traceparent
_TRACEPARENT = bytes([wire.LookupRequest.DESCRIPTOR.fields_by_name["traceparent"].number << 3 | 2])
_IDS_INT64, _IDS_UINT32 = (
    bytes([wire.LookupRequest.DESCRIPTOR.fields_by_name[name].number << 3 | 2]) for name in ("ids_int64", "ids_uint32")
)

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]
# A bytes object is a header, the bytes, and a zero that the type's basic size counts.
_BYTES_HEADER = bytes.__basicsize__ - 1
# Up to this many bytes, copying an array takes less time than making one that is not numpy's own.
_SMALL = 16 << 10
# Bytes; what numpy and torch ask for, and where the bytes of a bytes object begin.
_ALIGNMENT = 16


class Shape(NamedTuple):
    """All that a `LookupResponse` says besides its rows."""

    count: int
    row_bytes: int
    dim: int
    encoding: int
    version: str

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.count * self.row_bytes


class Answer(NamedTuple):
    """What a `LookupResponse` says; `rows`, uint8 [n * row_bytes], is a view of the message or a copy of few bytes."""

    rows: Bytes
    version: str


@lru_cache(1024)
def _before_rows(shape: Shape) -> bytes:
    return _aligned(shape, lambda answer: answer)


@lru_cache(1024)
def _before_streamed_rows(shape: Shape) -> bytes:
    return _aligned(shape, lambda answer: _RESULT + varint(len(answer) + shape.nbytes) + answer)


def _aligned(shape: Shape, wrap: Callable[[bytes], bytes]) -> bytes:
    """All that comes before the rows, so long that they begin at a multiple of `_ALIGNMENT` and are used in place.

    It is filled up with the encoding said over again, in two bytes or in three: of a field that is there more than
    once the last counts, and a varint may begin with zeros.
    """
    small = wire.LookupResponse(row_bytes=shape.row_bytes, dim=shape.dim, version=shape.version).SerializeToString()
    rows = _ROWS + varint(shape.nbytes) if shape.nbytes else b""
    for twos, threes in itertools.product(range(1, _ALIGNMENT), range(2)):
        encoding = bytes([_ENCODING, shape.encoding]) * twos + bytes([_ENCODING, shape.encoding | 0x80, 0]) * threes
        before = wrap(small + encoding + rows)
        if len(before) % _ALIGNMENT == 0:
            break
    return before


def allocate(shape: Shape) -> tuple[bytes, Bytes]:
    """A serialized `LookupResponse` and the place of its rows, uint8 [count, row_bytes].

    The caller writes the rows before anybody else sees the message.
    """
    return _allocate(_before_rows(shape), shape)


def allocate_streamed(shape: Shape, request_id: int) -> tuple[bytes, Bytes]:
    """`allocate` for a serialized `StreamLookupResponse`."""
    before = _before_streamed_rows(shape)
    if request_id:
        before = wire.StreamLookupResponse(request_id=request_id).SerializeToString() + before
    return _allocate(before, shape)


def _allocate(before: bytes, shape: Shape) -> tuple[bytes, Bytes]:
    message = allocate_bytes(len(before) + shape.nbytes)
    ctypes.memmove(id(message) + _BYTES_HEADER, before, len(before))
    return message, view_of(message, len(before)).reshape(shape.count, shape.row_bytes)


def allocate_bytes(nbytes: int) -> bytes:
    """A bytes object with any content. Its maker may write to it, by `view_of`, while nobody else knows it."""
    made: bytes = _new_bytes(None, nbytes)
    return made


class EncodedLookup(NamedTuple):
    """A serialized `StreamLookupRequest` with request_id 0 around a `LookupRequest`, and what it is made of.

    Attributes:
        head: Of the `LookupRequest`, all that comes before the bytes of its ids and their length.
        ids: The bytes of its ids.
    """

    streamed: bytes
    head: bytes
    ids: bytes

    def message(self) -> bytes:
        """The serialized `LookupRequest`."""
        return self.head + varint(len(self.ids)) + self.ids


def encode_lookup(
    model: str, table: str, encoding: int, term: int, epoch: int, ids: npt.NDArray[np.int64], rows: int
) -> EncodedLookup:
    """A request for `ids` [n] of a table of `rows` rows: 4 bytes an id if they suffice."""
    narrow = rows <= 1 << 32
    head = _before_ids(model, table, encoding, term, epoch, narrow)
    return _encoded(head, ids.astype("<u4" if narrow else "<i8").tobytes())


def with_traceparent(request: EncodedLookup, traceparent: str) -> EncodedLookup:
    """The same request, of this span."""
    said = traceparent.encode()
    return _encoded(_TRACEPARENT + varint(len(said)) + said + request.head, request.ids)


def join_lookups(requests: Sequence[EncodedLookup]) -> EncodedLookup:
    """One request for the ids of several that differ in nothing else."""
    return _encoded(requests[0].head, b"".join(request.ids for request in requests))


def _encoded(head: bytes, ids: bytes) -> EncodedLookup:
    before = head + varint(len(ids))
    return EncodedLookup(_LOOKUP + varint(len(before) + len(ids)) + before + ids, head, ids)


@lru_cache(1024)
def _before_ids(model: str, table: str, encoding: int, term: int, epoch: int, narrow: bool) -> bytes:
    request = wire.LookupRequest(
        model=model,
        table=table,
        encoding=encoding,  # type: ignore[arg-type]
        term=term,
        epoch=epoch,
    )
    return request.SerializeToString() + (_IDS_UINT32 if narrow else _IDS_INT64)


def read(message: bytes, shape: Shape) -> Answer:
    """A serialized `LookupResponse` to a request whose answer should have this shape.

    Raises google.protobuf.message.DecodeError for bytes that are none.
    """
    return _read(message, _before_rows(shape), shape) or _answer(wire.LookupResponse.FromString(message))


def read_streamed(message: bytes, shape: Shape) -> Answer | wire.LookupFailure:
    """`read` for a `StreamLookupResponse` with request_id 0."""
    if answer := _read(message, _before_streamed_rows(shape), shape):
        return answer
    parsed = wire.StreamLookupResponse.FromString(message)
    return parsed.error if parsed.HasField("error") else _answer(parsed.rows)


def _read(message: bytes, before: bytes, shape: Shape) -> Answer | None:
    if len(message) != len(before) + shape.nbytes or not message.startswith(before):
        return None
    return Answer(_copy_or_view(message, len(before)), shape.version)


def _answer(response: wire.LookupResponse) -> Answer:
    return Answer(view_of(response.rows, 0), response.version)


def view_of(message: bytes, start: int) -> Bytes:
    """A message from `start` on as an array that keeps it alive. Writable, for torch: the message is nobody else's."""
    return np.asarray(_Memory(message, start))


def _copy_or_view(message: bytes, start: int) -> Bytes:
    """`view_of`, or a copy where that costs less."""
    if len(message) <= _SMALL:
        return np.ndarray(len(message) - start, np.uint8, bytearray(message), start)
    return view_of(message, start)


class _Memory:
    """numpy's array interface for the inside of a bytes object."""

    def __init__(self, message: bytes, start: int) -> None:
        self._message = message
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (len(message) - start,),
            "data": (id(message) + _BYTES_HEADER + start, False),
        }


@lru_cache(1024)
def varint(value: int) -> bytes:
    """Base 128, low bits first, as protobuf writes lengths."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
