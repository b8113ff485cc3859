"""Messages with large fields: what is written is protobuf's, and all that protobuf writes is read."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from embedding_service.client.gradients import GRADIENTS, IDS
from embedding_service.wire import large
from embedding_service.wire import training_pb2 as wire

texts = st.text(max_size=20)
data = st.binary(max_size=300)


@given(texts, st.integers(0, 2**64 - 1), data, data)
def test_what_is_written_protobuf_reads(branch: str, step: int, ids: bytes, gradients: bytes) -> None:
    small = wire.PushPiece(branch=branch, step=step, table="t")
    message, places = large.write(small, {IDS: len(ids), GRADIENTS: len(gradients)})
    for place, each in zip(places, (ids, gradients), strict=True):
        assert len(place) == 0 or place.ctypes.data % 8 == 0
        place[:] = np.frombuffer(each, np.uint8)
    expected = wire.PushPiece(branch=branch, step=step, table="t", ids=ids, gradients=gradients)
    got = wire.PushPiece.FromString(message)
    got.DiscardUnknownFields()  # type: ignore[attr-defined]  # what fills up
    assert got == expected and len(message) % 8 == 0


@given(texts, st.integers(0, 2**64 - 1), data, data, st.booleans())
def test_what_protobuf_writes_is_read(branch: str, step: int, ids: bytes, gradients: bytes, mapped: bool) -> None:
    message = wire.PushPiece(branch=branch, step=step, ids=ids, gradients=gradients, last=True).SerializeToString()
    message = wire.PushPiece(ids=b"of a field that comes twice the last counts").SerializeToString() + message
    given_message: bytes | memoryview = message
    if mapped:
        memory = mmap.mmap(-1, len(message))
        memory[:] = message
        given_message = memoryview(memory)
    small, fields = large.read(wire.PushPiece, given_message, IDS, GRADIENTS)
    whole = wire.PushPiece.FromString(message)
    assert [each.tobytes() for each in fields] == [whole.ids, whole.gradients]
    assert small == wire.PushPiece(branch=branch, step=step, last=True)


@pytest.mark.parametrize("message", [b"\xff\xff", b"\x32\x7f", b"\x32", b"\x3a\x05abc", b"\x0b"])
def test_what_is_no_message_is_an_error(message: bytes) -> None:
    with pytest.raises(DecodeError):
        large.read(wire.PushPiece, message, IDS, GRADIENTS)
