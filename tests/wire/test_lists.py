"""Requests as servers read them: whatever form a list has, its numbers are protobuf's."""

import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from embedding_service.errors import InvalidRequest
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lists import Numbers, read_lookup, read_ngrams_lookup, read_streamed_lookup

EDGES = [0, 1, 127, 128, 2**14 - 1, 2**14, 2**31 - 1, 2**32, 2**62, 2**63 - 1, -1, -(2**63)]


def numbers(seed: int, count: int, bits: int = 63) -> list[int]:
    generator = random.Random(seed)
    return [generator.choice([1, -1]) * generator.getrandbits(generator.randint(1, bits)) for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 100, 60_000])
def test_ids_are_read_as_protobuf_reads_them(count: int) -> None:
    ids = (EDGES + numbers(count, count))[: max(count, len(EDGES))]
    request = wire.LookupRequest(model="m", table="t", ids=ids, epoch=7, term=2**63)
    lookup = read_lookup(request.SerializeToString())
    assert lookup.ids.is_long == (count == 60_000)
    assert len(lookup.ids) == len(ids)
    assert lookup.ids.array().tolist() == ids
    assert (lookup.request.model, lookup.request.table, lookup.request.epoch, lookup.request.term) == (
        "m",
        "t",
        7,
        2**63,
    )
    streamed = read_streamed_lookup(wire.StreamLookupRequest(request_id=9, lookup=request).SerializeToString())
    assert streamed.request_id == 9
    assert streamed.lookup.ids.array().tolist() == ids
    assert streamed.lookup.request.model == "m"


def test_tokens_are_read_as_protobuf_reads_them() -> None:
    tokens, context = numbers(1, 40_000, 31), numbers(2, 30_000, 31)
    request = wire.LookupNgramsRequest(model="m", token_ids=tokens, batch=5, context=context)
    read = read_ngrams_lookup(request.SerializeToString())
    assert (read.request.model, read.request.batch) == ("m", 5)
    assert read.token_ids.array().tolist() == tokens
    assert read.context.array().tolist() == context


def test_bytes_of_ids_stay_with_protobuf() -> None:
    ids = np.arange(100_000).astype("<i8").tobytes()
    lookup = read_lookup(wire.LookupRequest(model="m", ids_int64=ids).SerializeToString())
    assert lookup.request.ids_int64 == ids
    assert len(lookup.ids) == 0


def test_a_list_in_pieces_is_one_list_and_of_one_value_the_last_counts() -> None:
    first, second = numbers(3, 30_000), numbers(4, 30_000)
    message = b"".join(
        wire.LookupRequest(model=model, ids=ids).SerializeToString() for model, ids in (("a", first), ("b", second))
    )
    lookup = read_lookup(message)
    assert lookup.ids.array().tolist() == first + second
    assert lookup.request.model == "b"
    assert list(wire.LookupRequest.FromString(message).ids) == first + second


LONG = wire.LookupRequest(model="m", table="t", ids=[300] * 40_000).SerializeToString()


@pytest.mark.parametrize("seed", range(40))
def test_damaged_messages_are_read_as_protobuf_reads_them_or_refused(seed: int) -> None:
    generator = random.Random(seed)
    message = bytearray(LONG)
    for _ in range(generator.randint(1, 4)):
        message[generator.choice([generator.randrange(20), generator.randrange(len(message))])] = generator.randrange(
            256
        )
    if generator.random() < 0.3:
        del message[generator.randrange(len(message)) :]
    try:
        expected = list(wire.LookupRequest.FromString(bytes(message)).ids)
    except DecodeError:
        expected = None
    try:
        read = read_lookup(bytes(message)).ids.array().tolist()
    except (DecodeError, InvalidRequest):
        read = None
    assert read == expected or read is None


@pytest.mark.parametrize(
    "message",
    [b"\x18\x05" * 40_000, b"\x78\x05" * 40_000, b"\x12\x00" * 40_000, b"\x0a\x00" * 40_000],
    ids=["ids one by one", "unknown fields", "empty tables", "empty models"],
)
def test_long_messages_of_many_fields_are_refused(message: bytes) -> None:
    with pytest.raises(InvalidRequest, match="more than 64 fields: send its list packed"):
        read_lookup(message)
    assert len(read_lookup(message[:1000]).ids) in (0, 500)


def test_numbers_are_counted_before_they_are_read() -> None:
    """What is no number ends in an error, not in memory."""
    long = Numbers((), b"\x80" * (1 << 20))
    assert len(long) == 0
    with pytest.raises(InvalidRequest, match="malformed"):
        long.array()
    with pytest.raises(InvalidRequest, match="malformed"):
        Numbers((), b"\x01" * 10 + b"\xff" * 10 + b"\x01").array()


def test_a_long_list_that_is_packed_in_part_has_all_its_numbers_in_their_order() -> None:
    """As protobuf has it. Numbers that came one by one were once left to whatever memory held."""
    packed = wire.LookupRequest(ids=range(70_000)).SerializeToString()
    message = b"\x18\x05" + packed + b"\x18\x07"
    lookup = read_lookup(message)
    assert lookup.ids.array().tolist() == [5, *range(70_000), 7] == list(wire.LookupRequest.FromString(message).ids)
    streamed = wire.StreamLookupRequest(request_id=3).SerializeToString() + b"\x12" + _length(message) + message
    assert read_streamed_lookup(streamed).lookup.ids.array().tolist() == lookup.ids.array().tolist()


def test_long_tokens_lose_the_bits_that_an_int32_has_not() -> None:
    message = b"\x12" + _length(b"\x85\x80\x80\x80\x10" * 20_000) + b"\x85\x80\x80\x80\x10" * 20_000
    expected = list(wire.LookupNgramsRequest.FromString(message).token_ids)
    assert read_ngrams_lookup(message).token_ids.array().tolist() == expected == [5] * 20_000


def test_a_long_message_with_a_group_of_a_later_release_is_read() -> None:
    message = b"\x7b\x18\x05\x7c" + wire.LookupRequest(model="m", ids=range(70_000)).SerializeToString()
    assert read_lookup(message).ids.array().tolist() == list(wire.LookupRequest.FromString(message).ids)


def _length(text: bytes) -> bytes:
    out, value = bytearray(), len(text)
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
