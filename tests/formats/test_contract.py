"""The contract of row formats: each one in FORMATS. A new one is tested by being registered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedding_service.errors import InvalidRequest, UnencodableRow
from embedding_service.formats import FORMATS, RowFormat, get_format, kept_formats
from embedding_service.formats.base import narrow_into
from embedding_service.rows.host import fbgemm_kernel
from embedding_service.tensorfile import ITEM_BITS, tensor_bytes

ROOT = Path(__file__).parent.parent.parent
DIM = 64


@pytest.fixture(params=FORMATS)
def row_format(request: pytest.FixtureRequest) -> RowFormat:
    return get_format(request.param)


def some_rows(count: int = 50) -> torch.Tensor:
    """float32 [count, DIM] of different magnitudes, the first of which is zero."""
    scales = torch.logspace(-3, 2, count - 1).unsqueeze(1)
    noise = torch.randn(count - 1, DIM, generator=torch.Generator().manual_seed(count))
    return torch.cat([torch.zeros(1, DIM), noise * scales])


def test_its_name_is_its_key(row_format: RowFormat) -> None:
    assert get_format(row_format.name) is row_format
    assert FORMATS[row_format.name] is type(row_format)


def test_a_part_is_a_tensor_of_just_its_bytes(row_format: RowFormat) -> None:
    assert row_format.tensor_dtype in ITEM_BITS
    for rows in (1, 7):
        shape = row_format.part_shape(rows, DIM)
        assert shape[0] == rows
        assert tensor_bytes(row_format.tensor_dtype, shape) == rows * row_format.row_bytes(DIM)


def test_rows_come_back_near_to_what_they_were_and_zero_exactly(row_format: RowFormat) -> None:
    rows = some_rows()
    stored = row_format.encode(rows)
    assert (stored.dtype, stored.shape) == (torch.uint8, (len(rows), row_format.row_bytes(DIM)))
    assert stored.is_contiguous()
    decoded = row_format.decode(stored, DIM)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded[0], rows[0])
    assert ((decoded - rows).abs() <= 0.2 * rows.abs().amax(1, keepdim=True)).all()


def test_a_row_is_encoded_and_decoded_alike_whatever_is_beside_it(row_format: RowFormat) -> None:
    rows = some_rows()
    stored = row_format.encode(rows)
    for row in (0, 1, 17, 49):
        assert torch.equal(row_format.encode(rows[row : row + 1]), stored[row : row + 1])
        alone = row_format.decode(stored[row : row + 1], DIM)
        assert torch.equal(alone, row_format.decode(stored, DIM)[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_dtype_is_rounded_once_and_out_is_filled(row_format: RowFormat, dtype: torch.dtype) -> None:
    for count in (3, 5000):  # few and many rows may go different ways
        stored = row_format.encode(some_rows(count))
        expected = row_format.decode(stored, DIM, dtype=dtype)
        if row_format.rounds_once:
            once = narrow_into(torch.empty(count, DIM, dtype=dtype), row_format.decode(stored, DIM))
            assert torch.equal(expected, once)
        beside = torch.full((count, 2 * DIM), 7.0, dtype=dtype)
        row_format.decode(stored, DIM, out=beside[:, DIM:])
        assert torch.equal(beside[:, DIM:], expected)
        assert (beside[:, :DIM] == 7).all()


def test_its_own_dtype_holds_the_values_exactly(row_format: RowFormat) -> None:
    stored = row_format.encode(some_rows())
    exact = row_format.decode(stored, DIM, dtype=row_format.dtype)
    assert torch.equal(exact.float(), row_format.decode(stored, DIM))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_first_row_that_it_cannot_hold_is_named(row_format: RowFormat, value: float) -> None:
    # Of another dtype than its own: rows of that one are taken as they are.
    rows = some_rows().to(torch.float16 if row_format.dtype == torch.float32 else torch.float32)
    rows[[4, 9], 3] = value
    try:
        decoded = row_format.decode(row_format.encode(rows), DIM)
    except UnencodableRow as error:
        assert error.row == 4
    else:
        assert torch.equal(decoded[4].isfinite(), rows[4].isfinite())


def test_what_are_no_rows_of_it_is_refused(row_format: RowFormat) -> None:
    width = row_format.row_bytes(DIM)
    for stored in (torch.zeros(2, width + 1, dtype=torch.uint8), torch.zeros(width, dtype=torch.uint8)):
        with pytest.raises(InvalidRequest, match=rf"stored {row_format.name} rows of {DIM} values must be uint8"):
            row_format.decode(stored, DIM)
    with pytest.raises(InvalidRequest, match="out must be"):
        row_format.decode(torch.zeros(2, width, dtype=torch.uint8), DIM, out=torch.empty(2, DIM + 1))


def test_fbgemm_reads_what_it_is_said_to_read(row_format: RowFormat) -> None:
    if row_format.fbgemm_type is None:
        return
    stored = row_format.encode(some_rows())
    memory = torch.cat([stored.flatten(), torch.zeros(64, dtype=torch.uint8)])  # its vector loads read beyond the last
    ids = torch.tensor([49, 0, 17, 17])
    for output_type, dtype in ((0, torch.float32), (1, torch.float16), (5, torch.bfloat16)):
        read = fbgemm_kernel(memory, DIM, row_format.fbgemm_type, output_type)(ids)
        assert torch.equal(read, row_format.decode(stored[ids], DIM, dtype=dtype))


def test_one_format_keeps_the_rows_of_a_dtype_in_checkpoints() -> None:
    named = [each.source_dtype for each in FORMATS.values() if each.source_dtype]
    assert sorted(kept_formats()) == sorted(named)
    for dtype, name in kept_formats().items():
        assert get_format(name).row_bytes(DIM) == DIM * ITEM_BITS[dtype] // 8


def test_each_format_is_named_where_people_look(row_format: RowFormat) -> None:
    if row_format.name == "e5m2":  # the example of docs/extending.md
        return
    assert f"`{row_format.name}`" in (ROOT / "README.md").read_text()
    assert f'"{row_format.name}"' in (ROOT / "protos/embedding/v1/embedding.proto").read_text()
