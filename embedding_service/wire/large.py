"""Messages with large fields of bytes, written with one copy and read where they arrived.

protobuf copies such a field when it is set, when the message is serialized, when it is parsed and when it is looked
at. What is written here are the bytes of the contract in protos/embedding/v1, small fields first. Each large field
begins at a multiple of 8, and so does what follows the message. So numbers are used in place. Field 15, which these
messages never have, fills up. Any order of fields is read.

Written by hand, as `lookup_codec.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from embedding_service.errors import InvalidRequest
from embedding_service.wire.lists import fields_of
from embedding_service.wire.lookup_codec import Bytes, allocate_bytes, varint, view_of

_ALIGNMENT = 8
_BYTES = 2
_FILLER = bytes([15 << 3 | _BYTES])
M = TypeVar("M", bound=Message)


def write(small: Message, large: Mapping[int, int]) -> tuple[bytes, list[Bytes]]:
    """A serialized message, and the places of its large fields: uint8 [bytes] each.

    The caller fills them before anybody else sees the message.

    Args:
        small: All but the large fields.
        large: Of each field, by its number up to 14, how many bytes.
    """
    texts, begins = [(0, small.SerializeToString())], []
    at = len(texts[0][1])
    for number, nbytes in large.items():
        head = bytes([number << 3 | _BYTES]) + varint(nbytes)
        head = _filling(at + len(head)) + head
        texts.append((at, head))
        begins.append(at + len(head))
        at = begins[-1] + nbytes
    texts.append((at, _filling(at)))
    message = allocate_bytes(at + len(texts[-1][1]))
    memory = view_of(message, 0)
    for begin, text in texts:
        memory[begin : begin + len(text)] = np.frombuffer(text, np.uint8)
    return message, [memory[begin : begin + nbytes] for begin, nbytes in zip(begins, large.values(), strict=True)]


def _filling(position: int) -> bytes:
    """What to write so that a multiple of the alignment is reached from a position."""
    missing = -position % _ALIGNMENT
    if missing == 1:  # a field takes two bytes
        missing += _ALIGNMENT
    return _FILLER + bytes([missing - 2]) + bytes(missing - 2) if missing else b""


def read(kind: type[M], message: bytes | memoryview, *numbers: int) -> tuple[M, list[Bytes]]:
    """A serialized message without its large fields, and what those hold: uint8 [bytes] each, views of `message`.

    message: Nobody else writes to its memory. Raises DecodeError for bytes that are no such message.
    """
    rest, spans = [], dict.fromkeys(numbers, (0, 0))
    try:
        for number, wire_type, begin, value, end in fields_of(message):
            if number in spans and wire_type == _BYTES:
                spans[number] = value, end
            else:
                rest.append(message[begin:end])
    except InvalidRequest as error:
        raise DecodeError(str(error)) from None
    memory = view_of(message, 0) if isinstance(message, bytes) else np.frombuffer(message, np.uint8)
    return kind.FromString(b"".join(rest)), [memory[begin:end] for begin, end in spans.values()]
