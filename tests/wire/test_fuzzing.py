"""Any bytes: what is written by hand accepts and refuses what protobuf does, with the same values.

`make fuzz` runs these with 100,000 inputs each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st
from support.wire_bytes import NUMBERS, PACKED, alike, damaged, drawn_with_others, messages

from embedding_service.errors import InvalidRequest
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import lists, lookup_codec
from embedding_service.wire.lookup_codec import Shape

pytestmark = pytest.mark.fuzz


@pytest.fixture(params=["short", "long"], scope="module")
def every_length(request: pytest.FixtureRequest) -> Iterator[None]:
    """As short messages are read, and as long ones are."""
    with pytest.MonkeyPatch.context() as patches:
        if request.param == "long":
            patches.setattr(lists, "_SHORT", 0)
        yield


def same(drawn: bytes, kind: type[Message], read: Callable[[bytes], Any], said: Callable[[Any], Any]) -> None:
    """`read` reads what protobuf reads, or both refuse it. So with messages that are nearly the drawn one."""
    for message in alike(drawn):
        try:
            expected = said(kind.FromString(message))
        except DecodeError:
            expected = None
        try:
            found = read(message)
        except (DecodeError, InvalidRequest) as error:
            assert expected is None, (message, str(error), expected)
        else:
            assert found == expected, message


def lookup_of(request: wire.LookupRequest, ids: list[int]) -> tuple[Any, ...]:
    rest = wire.LookupRequest()
    rest.CopyFrom(request)
    rest.ClearField("ids")
    return rest.SerializeToString(deterministic=True), ids


@drawn_with_others
@given(message=messages(PACKED | st.binary(max_size=20) | st.text(max_size=4).map(str.encode)))
def test_lookups_are_read_as_protobuf_reads_them(every_length: None, message: bytes) -> None:
    def read(message: bytes) -> Any:
        asked = lists.read_lookup(message)
        assert len(asked.ids) == len(asked.ids.array())
        return lookup_of(asked.request, asked.ids.array().tolist())

    same(message, wire.LookupRequest, read, lambda request: lookup_of(request, list(request.ids)))


@drawn_with_others
@given(message=messages(messages(PACKED | st.text(max_size=4).map(str.encode))))
def test_streamed_lookups_are_read_as_protobuf_reads_them(every_length: None, message: bytes) -> None:
    def read(message: bytes) -> Any:
        asked = lists.read_streamed_lookup(message)
        return asked.request_id, lookup_of(asked.lookup.request, asked.lookup.ids.array().tolist())

    def said(request: wire.StreamLookupRequest) -> Any:
        return request.request_id, lookup_of(request.lookup, list(request.lookup.ids))

    same(message, wire.StreamLookupRequest, read, said)


@drawn_with_others
@given(message=messages(PACKED | st.text(max_size=4).map(str.encode)))
def test_ngram_lookups_are_read_as_protobuf_reads_them(every_length: None, message: bytes) -> None:
    def of(request: wire.LookupNgramsRequest, *numbers: list[int]) -> Any:
        rest = wire.LookupNgramsRequest()
        rest.CopyFrom(request)
        rest.ClearField("token_ids")
        rest.ClearField("context")
        return rest.SerializeToString(deterministic=True), numbers

    def read(message: bytes) -> Any:
        asked = lists.read_ngrams_lookup(message)
        return of(asked.request, asked.token_ids.array().tolist(), asked.context.array().tolist())

    same(message, wire.LookupNgramsRequest, read, lambda each: of(each, list(each.token_ids), list(each.context)))


SHAPES = st.builds(
    Shape,
    st.integers(0, 4),
    st.sampled_from([1, 4, 260]),
    st.integers(1, 300),
    st.sampled_from([1, 2]),
    st.sampled_from(["1", "2026-11-24", "é" * 30]),
)


@st.composite
def answers(draw: st.DrawFn) -> tuple[Shape, bytes, bool]:
    """An answer of a shape, as it should be or not quite, for a call or for a stream."""
    shape, streamed = draw(SHAPES), draw(st.booleans())
    if draw(st.booleans()):
        message, place = lookup_codec.allocate_streamed(shape, 0) if streamed else lookup_codec.allocate(shape)
        place[:] = draw(st.integers(0, 255))
        message = bytes(bytearray(message))
    else:
        message = draw(messages(messages(st.binary(max_size=20)) if streamed else st.binary(max_size=20)))
    if draw(st.booleans()):
        message = damaged(message, draw(st.integers(0, 400)), draw(st.integers(0, 255)), draw(st.integers(0, 3)))
    return shape, message + draw(st.sampled_from([b"", b"", b"\xfa\x07\x03new", b"\x18\x00"])), streamed


@drawn_with_others
@given(answers())
def test_answers_are_read_as_protobuf_reads_them(drawn: tuple[Shape, bytes, bool]) -> None:
    shape, message, streamed = drawn

    def of(response: wire.LookupResponse) -> Any:
        return response.rows, response.version

    def read(message: bytes) -> Any:
        answer = lookup_codec.read_streamed(message, shape) if streamed else lookup_codec.read(message, shape)
        if isinstance(answer, wire.LookupFailure):
            return answer.SerializeToString(deterministic=True)
        return answer.rows.tobytes(), answer.version

    def said(response: Any) -> Any:
        if not streamed:
            return of(response)
        if response.HasField("error"):
            return response.error.SerializeToString(deterministic=True)
        return of(response.rows)

    same(message, wire.StreamLookupResponse if streamed else wire.LookupResponse, read, said)


TABLE_ROWS = (1, 2**16, 2**32, 2**32 + 1, 2**63)
ENCODINGS = range(8)


@drawn_with_others
@given(
    name=st.text(max_size=12),
    ages=st.tuples(NUMBERS, NUMBERS),
    ids=st.lists(st.integers(0, 2**63 - 1), max_size=8),
    span=st.text(max_size=60),
)
def test_requests_are_written_as_protobuf_reads_them(
    name: str, ages: tuple[int, int], ids: list[int], span: str
) -> None:
    """For tables of any size, in any encoding, with a span and without one."""
    for rows, encoding in itertools.product(TABLE_ROWS, ENCODINGS):
        kept = np.array([each % rows for each in ids], np.int64)
        request = lookup_codec.encode_lookup(name, name, encoding, *ages, kept, rows)
        said = wire.StreamLookupRequest.FromString(request.streamed)
        assert said.lookup == wire.LookupRequest.FromString(request.message())
        assert (said.lookup.model, said.lookup.encoding, said.lookup.term, said.lookup.epoch) == (name, encoding, *ages)
        narrow = np.frombuffer(said.lookup.ids_uint32, "<u4").tolist()
        assert (narrow or np.frombuffer(said.lookup.ids_int64, "<i8").tolist()) == kept.tolist()
        expected = wire.LookupRequest.FromString(request.message())
        expected.traceparent = span
        traced = lookup_codec.with_traceparent(request, span)
        assert wire.LookupRequest.FromString(traced.message()) == expected
        assert wire.StreamLookupRequest.FromString(traced.streamed) == wire.StreamLookupRequest(lookup=expected)
