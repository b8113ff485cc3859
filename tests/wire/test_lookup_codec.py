"""What is written by hand says what protobuf says."""

import numpy as np
import pytest

from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import lookup_codec
from embedding_service.wire.lookup_codec import Shape

SHAPES = [
    Shape(count, row_bytes, dim, encoding, version)
    for count in (0, 1, 12, 4097)
    for row_bytes, dim in ((4, 1), (512, 256), (264, 256))
    for encoding in (wire.ROW_ENCODING_STORED, wire.ROW_ENCODING_FLOAT32)
    for version in ("1", "2026-11-24", "v" * 200)
]


def content(shape: Shape) -> np.ndarray:
    return np.random.default_rng(shape.count).integers(0, 256, (shape.count, shape.row_bytes), np.uint8)


def message(shape: Shape) -> wire.LookupResponse:
    return wire.LookupResponse(
        rows=content(shape).tobytes(),
        row_bytes=shape.row_bytes,
        dim=shape.dim,
        encoding=shape.encoding,  # type: ignore[arg-type]
        version=shape.version,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_answers_are_those_of_the_contract_and_lie_aligned(shape: Shape) -> None:
    answer, place = lookup_codec.allocate(shape)
    place[:] = content(shape)
    assert wire.LookupResponse.FromString(answer) == message(shape)
    assert place.ctypes.data % 16 == 0
    for request_id in (0, 7, 1 << 40):
        streamed, place = lookup_codec.allocate_streamed(shape, request_id)
        place[:] = content(shape)
        assert wire.StreamLookupResponse.FromString(streamed) == wire.StreamLookupResponse(
            request_id=request_id, rows=message(shape)
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_answers_are_read_however_they_were_written(shape: Shape) -> None:
    own, place = lookup_codec.allocate(shape)
    place[:] = content(shape)
    own_streamed, place = lookup_codec.allocate_streamed(shape, 0)
    place[:] = content(shape)
    others = message(shape)
    for answer in (
        lookup_codec.read(own, shape),
        lookup_codec.read(others.SerializeToString(), shape),
        lookup_codec.read_streamed(own_streamed, shape),
        lookup_codec.read_streamed(wire.StreamLookupResponse(rows=others).SerializeToString(), shape),
    ):
        assert isinstance(answer, lookup_codec.Answer)
        assert answer.version == shape.version
        assert answer.rows.tobytes() == content(shape).tobytes()


def test_an_answer_of_another_version_is_read_as_what_it_is() -> None:
    asked, given = SHAPES[-1], SHAPES[-1]._replace(version="other")
    answer, place = lookup_codec.allocate(given)
    place[:] = content(given)
    assert lookup_codec.read(answer, asked).version == "other"
    failure = wire.LookupFailure(code=10, message="moved", term=3, epoch=4)
    assert lookup_codec.read_streamed(wire.StreamLookupResponse(error=failure).SerializeToString(), asked) == failure


@pytest.mark.parametrize(
    ("table_rows", "field", "dtype"), [(1 << 32, "ids_uint32", "<u4"), (1 << 33, "ids_int64", "<i8")]
)
def test_requests_are_those_of_the_contract(table_rows: int, field: str, dtype: str) -> None:
    ids = np.array([0, 5, (1 << 32) - 1], np.int64)
    expected = wire.LookupRequest(
        model="m@1",
        table="t",
        encoding=wire.ROW_ENCODING_STORED,
        term=9,
        epoch=2,
    )
    setattr(expected, field, ids.astype(dtype).tobytes())
    request = lookup_codec.encode_lookup("m@1", "t", wire.ROW_ENCODING_STORED, 9, 2, ids, table_rows)
    assert wire.LookupRequest.FromString(request.message()) == expected
    assert wire.StreamLookupRequest.FromString(request.streamed) == wire.StreamLookupRequest(lookup=expected)


def test_requests_are_as_long_as_protobuf_s_whatever_their_length() -> None:
    for count in (*range(1, 40), 4095, 4096, 4097):
        ids = np.arange(count, dtype=np.int64)
        for model in ("m@1", "m@12", "m@123", "m@1234"):
            expected = wire.LookupRequest(model=model, table="t", ids_uint32=ids.astype("<u4").tobytes())
            request = lookup_codec.encode_lookup(model, "t", wire.ROW_ENCODING_UNSPECIFIED, 0, 0, ids, 5000)
            assert wire.LookupRequest.FromString(request.message()) == expected
            assert len(request.message()) == expected.ByteSize()
            assert len(request.streamed) == wire.StreamLookupRequest(lookup=expected).ByteSize()


def test_joined_requests_ask_for_the_ids_of_all_in_their_order() -> None:
    parts = [np.array(ids, np.int64) for ids in ([5, 7], [7], [], [1 << 31, 0])]
    requests = [lookup_codec.encode_lookup("m@1", "t", wire.ROW_ENCODING_STORED, 9, 2, ids, 1 << 32) for ids in parts]
    whole = np.concatenate(parts)
    expected = lookup_codec.encode_lookup("m@1", "t", wire.ROW_ENCODING_STORED, 9, 2, whole, 1 << 32)
    assert lookup_codec.join_lookups(requests) == expected


@pytest.mark.parametrize("shape", SHAPES[::7], ids=str)
def test_an_answer_with_more_after_its_rows_is_read_by_protobuf(shape: Shape) -> None:
    """As a later release may write it."""
    own, place = lookup_codec.allocate(shape)
    place[:] = content(shape)
    more = own + b"\xfa\x07\x03new"  # a field of number 127
    assert lookup_codec.read(more, shape).rows.tobytes() == content(shape).tobytes()
