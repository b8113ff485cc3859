"""Long lists of numbers in requests, as numpy reads them.

protobuf takes 25 ns a number, and holds Python's lock all the while: a list of 15 MiB would stop everybody for 0.4 s.
Here a long message is cut up first. What is left of it goes to protobuf, its lists are counted before they are read,
and reading them lets others run.

Written by hand, as `lookup_codec.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedding_service.errors import InvalidRequest
from embedding_service.wire import embedding_pb2 as wire

# Bytes up to which protobuf reads a message whole: a millisecond.
_SHORT = 64 << 10
# Fields that a longer message may have: each list is one, in the form that every library writes.
_FIELDS = 64
# Numbers that are read at a time.
_BLOCK = 1 << 16
_LONGEST = 10  # bytes of a number
_VARINT, _EIGHT, _BYTES, _GROUP, _GROUP_END, _FOUR = range(6)
# Packed, and one by one: both forms may be in a message.
_LIST = (_BYTES, _VARINT)
_TAG_BYTES = 5

_LOOKUP_IDS = wire.LookupRequest.DESCRIPTOR.fields_by_name["ids"].number
_TOKEN_IDS, _CONTEXT = (
    wire.LookupNgramsRequest.DESCRIPTOR.fields_by_name[name].number for name in ("token_ids", "context")
)
_STREAMED_LOOKUP = wire.StreamLookupRequest.DESCRIPTOR.fields_by_name["lookup"].number


class Numbers:
    """A `repeated` field of integers that may not have been read yet.

    Args:
        plain: As protobuf read it.
        packed: Or as it was sent, where it is long.
        of_32_bits: The field is an int32, of which larger numbers lose their upper bits.
    """

    def __init__(self, plain: Sequence[int], packed: bytes = b"", *, of_32_bits: bool = False) -> None:
        self._plain = plain
        self._packed = np.frombuffer(packed, np.uint8)
        self._of_32_bits = of_32_bits

    def __len__(self) -> int:
        return len(self._plain) + int(np.count_nonzero(self._packed < 0x80))

    def array(self) -> npt.NDArray[np.int64]:
        """int64 [n]. Raises InvalidRequest for bytes that are no such list."""
        if not len(self._packed):
            return np.array(self._plain, np.int64)
        numbers = _read(self._packed, len(self))
        return numbers.astype(np.int32).astype(np.int64) if self._of_32_bits else numbers

    @property
    def is_long(self) -> bool:
        """Reading it may take more than a millisecond."""
        return len(self._packed) > 0


class LookupAsked(NamedTuple):
    """A `LookupRequest`; `ids` stands for the field of that name, which `request` may lack."""

    request: wire.LookupRequest
    ids: Numbers


class StreamedLookupAsked(NamedTuple):
    """A `StreamLookupRequest`."""

    request_id: int
    lookup: LookupAsked


class NgramsAsked(NamedTuple):
    """A `LookupNgramsRequest`; the lists stand for the fields of their names, which `request` may lack."""

    request: wire.LookupNgramsRequest
    token_ids: Numbers
    context: Numbers


def read_lookup(message: bytes) -> LookupAsked:
    """A serialized `LookupRequest`. This and its like raise DecodeError or InvalidRequest for bytes that are none."""
    rest, [ids] = _cut(message, _LIST, _LOOKUP_IDS)
    request = wire.LookupRequest.FromString(rest)
    return LookupAsked(request, Numbers(request.ids, ids))


def read_streamed_lookup(message: bytes) -> StreamedLookupAsked:
    """A serialized `StreamLookupRequest`."""
    if len(message) <= _SHORT:
        request = wire.StreamLookupRequest.FromString(message)
        return StreamedLookupAsked(request.request_id, LookupAsked(request.lookup, Numbers(request.lookup.ids)))
    rest, [lookup] = _cut(message, (_BYTES,), _STREAMED_LOOKUP)
    return StreamedLookupAsked(wire.StreamLookupRequest.FromString(rest).request_id, read_lookup(lookup))


def read_ngrams_lookup(message: bytes) -> NgramsAsked:
    """A serialized `LookupNgramsRequest`."""
    rest, [tokens, context] = _cut(message, _LIST, _TOKEN_IDS, _CONTEXT)
    request = wire.LookupNgramsRequest.FromString(rest)
    return NgramsAsked(
        request,
        Numbers(request.token_ids, tokens, of_32_bits=True),
        Numbers(request.context, context, of_32_bits=True),
    )


def _cut(message: bytes, kinds: Sequence[int], *numbers: int) -> tuple[bytes, list[bytes]]:
    """What a long message holds in these fields, where they are of one of these wire types, and the rest of it."""
    if len(message) <= _SHORT:
        return message, [b""] * len(numbers)
    rest, taken = [], {number: list[bytes]() for number in numbers}
    for number, kind, begin, value, end in fields_of(message):
        if number in taken and kind in kinds:
            taken[number].append(message[value:end])  # of pieces of a field, the second goes on where the first ends
        else:
            rest.append(message[begin:end])
    return b"".join(rest), [b"".join(pieces) for pieces in taken.values()]


def fields_of(message: bytes | memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Number, wire type, where it begins, where its value does and ends: of each field of a message.

    Groups are of no message that we know. What is in one has the number 0.
    """
    position, fields, groups = 0, 0, list[int]()
    while position < len(message):
        if fields == _FIELDS:
            raise InvalidRequest(
                f"a request of over {_SHORT:,} bytes with more than {_FIELDS} fields: send its list packed, as proto3 "
                "does, or in a field of bytes"
            )
        fields += 1
        begin = position
        tag, position = _varint(message, position, _TAG_BYTES)
        number, kind, value = tag >> 3, tag & 7, position
        if kind == _VARINT:
            _, position = _varint(message, position)
        elif kind == _BYTES:
            length, value = _varint(message, position)
            position = value + length
        elif kind in (_EIGHT, _FOUR):
            position += 8 if kind == _EIGHT else 4
        elif kind == _GROUP:
            groups.append(number)
        elif kind != _GROUP_END or not groups or groups.pop() != number:
            raise _malformed()
        if position > len(message):
            raise _malformed()
        yield 0 if groups else number, kind, begin, value, position
    if groups:
        raise _malformed()


def _varint(message: bytes | memoryview, position: int, longest: int = _LONGEST) -> tuple[int, int]:
    """A number and where the next thing begins."""
    number = 0
    for index, byte in enumerate(message[position : position + longest]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, position + index + 1
    raise _malformed()


def _read(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int64]:
    out = np.empty(count, np.uint64)
    done = first = 0
    while first < len(packed):
        # Whole numbers only: a block ends where one does.
        block = packed[first : first + _BLOCK]
        ends = np.flatnonzero(block < 0x80)
        if not len(ends):
            raise _malformed()
        starts = np.concatenate((np.zeros(1, np.int64), ends[:-1] + 1))
        lengths = ends - starts + 1
        if lengths.max() > _LONGEST:
            raise _malformed()
        numbers = out[done : done + len(ends)]
        numbers[:] = block[starts] & 0x7F
        for index in range(1, int(lengths.max())):
            more = lengths > index
            numbers[more] |= (block[starts[more] + index] & 0x7F).astype(np.uint64) << np.uint64(7 * index)
        done += len(ends)
        first += int(ends[-1]) + 1
    return out.view(np.int64)


def _malformed() -> InvalidRequest:
    return InvalidRequest("the message is malformed: it is no valid protobuf of this method's request")
