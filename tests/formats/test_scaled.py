"""fp8_rowwise and nvfp4 rows: decoding against plain Python floats by their formulas, encoding against its promises."""

import pytest
import torch
from formats.test_fp8 import e4m3

from embedding_service.errors import InvalidRequest
from embedding_service.formats import get_format

FP8, NVFP4 = get_format("fp8_rowwise"), get_format("nvfp4")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALES = [1.0, 0.5, 0.00019931793212890625, 3.7e-3, 1.1e-6, 29.3]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def scale_bytes(scales: list[float]) -> torch.Tensor:
    return torch.tensor(scales).unsqueeze(1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fp8_code_times_the_scale_in_the_dtype_of_the_answer(dtype: torch.dtype) -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    stored = torch.cat([codes.expand(len(SCALES), -1), scale_bytes(SCALES)], 1)
    values = torch.tensor([e4m3(int(code)) for code in codes])
    expected = torch.stack([values.to(dtype) * torch.tensor(scale).to(dtype) for scale in SCALES])
    assert torch.equal(FP8.decode(stored, len(codes), dtype=dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_nvfp4_code_with_every_block_scale(dtype: torch.dtype) -> None:
    low_high = torch.tensor([0x10 * (2 * pair + 1) + 2 * pair for pair in range(8)], dtype=torch.uint8)
    block_codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    blocks = len(block_codes)
    stored = torch.cat(
        [low_high.repeat(blocks).expand(len(SCALES), -1), block_codes.expand(len(SCALES), -1), scale_bytes(SCALES)], 1
    )
    codes = torch.tensor([*E2M1, *(-value for value in E2M1)])
    block_scales = torch.tensor([e4m3(int(code)) for code in block_codes])
    products = (codes * block_scales.unsqueeze(1)).flatten()  # exact: 2 and 4 bits
    expected = torch.stack([(products * torch.tensor(scale)).to(dtype) for scale in SCALES])
    assert torch.equal(NVFP4.decode(stored, 16 * blocks, dtype=dtype), expected)


def test_what_a_row_holds_already_is_encoded_exactly() -> None:
    """Codes of a row whose largest code is the format's largest come back as they were."""
    codes = torch.tensor([[0x7E, *range(0x30), 0xFE]], dtype=torch.uint8)
    stored = torch.cat([codes, scale_bytes([0.25])], 1)
    assert torch.equal(FP8.encode(FP8.decode(stored, codes.shape[1])), stored)
    nvfp4 = torch.tensor([[0x70, 0x21, 0x43, 0x65, 0xF8, 0xA9, 0xCB, 0xED, 0x7E]], dtype=torch.uint8)
    nvfp4 = torch.cat([nvfp4, scale_bytes([0.25])], 1)
    values = NVFP4.decode(nvfp4, 16)
    assert torch.equal(NVFP4.decode(NVFP4.encode(values), 16), values)


def test_nvfp4_rounds_to_the_nearest_code_and_ties_to_even() -> None:
    """The first value makes the scales 1, so that the others are codes as they stand."""
    row = torch.tensor([[2688.0, *[448 * x for x in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.26, -5.1, 0.74)]]])
    row = torch.nn.functional.pad(row, (0, 5))
    expected = [2688.0, *[448 * x for x in (0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.5, -6.0, 0.5)], *[0.0] * 5]
    assert NVFP4.decode(NVFP4.encode(row), 16)[0].tolist() == expected


def test_tiny_rows_lose_bits_but_stay_finite() -> None:
    for row_format in (FP8, NVFP4):
        rows = torch.full((2, 16), 1e-44)
        rows[1] *= -1
        assert row_format.decode(row_format.encode(rows), 16).abs().amax() <= 2e-38


def test_dims_that_nvfp4_cannot_hold_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="nvfp4 needs a dim that is a multiple of 16, got 24: use fp8_rowwise"):
        NVFP4.row_bytes(24)
    assert (FP8.row_bytes(160), NVFP4.row_bytes(160)) == (164, 94)
