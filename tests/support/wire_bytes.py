"""Bytes that are a message of protobuf's, or nearly so, for hypothesis to draw."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st

VARINT, EIGHT, BYTES, GROUP, END, FOUR = range(6)
NUMBERS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 127, 128, 2**31, 2**32 + 5, 2**63, 2**64 - 1])


def varint(value: int, more: int = 0) -> bytes:
    """`more`: zeros that are said over again, as a varint may have."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value | (0x80 if more else 0))
    if more:
        out += b"\x80" * (more - 1) + b"\x00"
    return bytes(out)


VARINTS = st.builds(varint, NUMBERS, st.sampled_from([0, 0, 0, 1, 3, 9])) | st.binary(max_size=11)
PACKED = st.lists(VARINTS, max_size=6).map(b"".join)


def tag(number: int, kind: int, more: int = 0) -> bytes:
    return varint(number << 3 | kind, more)


def field(number: int, kind: int, value: bytes, number_value: bytes, more: int) -> bytes:
    tag_more, length_more = divmod(more, 6)
    if kind == BYTES:
        return tag(number, kind, tag_more) + varint(len(value), length_more) + value
    fixed = {EIGHT: value[:8].ljust(8, b"\0"), FOUR: value[:4].ljust(4, b"\0"), VARINT: number_value}
    return tag(number, kind, tag_more) + fixed.get(kind, b"")


def fields(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A message of fields that the contract has, or that a later one may have, of any wire type."""
    numbers = st.integers(0, 12) | st.sampled_from([127, 2**29 - 1])
    kinds = st.sampled_from([VARINT, VARINT, BYTES, BYTES, BYTES, EIGHT, FOUR, GROUP, END, 6, 7])
    one = st.builds(field, numbers, kinds, values, VARINTS, st.just(0) | st.integers(0, 60))
    group = st.builds(lambda number, inner: tag(number, GROUP) + inner + tag(number, END), numbers, one)
    return st.lists(one | group, max_size=6).map(b"".join)


def damaged(message: bytes, where: int, byte: int, cut: int) -> bytes:
    place = where % max(len(message), 1)
    changed = message[:place] + bytes([byte]) + message[place + 1 :]
    return changed[: len(changed) - cut % (len(changed) + 1)] if cut else changed


def messages(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    whole = fields(values)
    cuts = st.sampled_from([0, 0, 1, 2, 5])
    broken = st.builds(damaged, whole, st.integers(0, 200), st.integers(0, 255), cuts)
    return whole | broken | st.binary(max_size=40)


# To draw a message takes longer than to read a hundred. So each is read with others that are made of it.
ALIKE = 40
# `make fuzz` counts all of them.
drawn_with_others = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", 25 * ALIKE)) // ALIKE)


def alike(message: bytes) -> Iterator[bytes]:
    """A message, and ALIKE - 1 others that differ from it in a place or two. The same ones each time."""
    yield message
    chance = random.Random(message)
    for _ in range(ALIKE - 1):
        begin, end = sorted(chance.choices(range(len(message) + 1), k=2))
        before, piece, after = message[:begin], message[begin:end], message[end:]
        byte = bytes([chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))])
        yield chance.choice(
            (
                message[:begin] + byte + message[begin + 1 :],
                message[:begin] + byte + message[begin:],
                message[:begin] + message[begin + 1 :],
                message[:end],
                before + piece + piece + after,
                before + after + piece,
            )
        )
