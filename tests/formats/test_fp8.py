"""fp8 rows: decoding against plain Python floats by the specification, encoding against its promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_service.errors import InvalidRequest, UnencodableRow
from embedding_service.formats import get_format

FP8 = get_format("fp8")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def e4m3(code: int) -> float:
    """OCP e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, S.1111.111 is NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    value = math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)
    return -value if code & 0x80 else value


def e8m0(code: int) -> float:
    """A power of two with bias 127; 255 is NaN."""
    return math.nan if code == 255 else math.ldexp(1.0, code - 127)


def every_row() -> torch.Tensor:
    """uint8 [256, 264]: a row for each scale with every e4m3 code in it."""
    return torch.cat([torch.arange(256).expand(256, 256), torch.arange(256).unsqueeze(1).expand(256, 8)], 1).byte()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale(dtype: torch.dtype) -> None:
    rows = FP8.decode(every_row(), 256, dtype=dtype)
    exact = torch.tensor(
        [[e4m3(code) * e8m0(scale) for code in range(256)] for scale in range(256)], dtype=torch.float64
    )
    if dtype == torch.float32:
        assert torch.equal(rows.double().nan_to_num(7e77), exact.float().double().nan_to_num(7e77))
        finite = exact.abs() <= torch.finfo(torch.float32).max
        assert torch.equal(rows[finite].double(), exact[finite])  # not even rounded
        assert torch.equal(torch.signbit(rows[:255, 128]), torch.ones(255, dtype=torch.bool))  # -0.0
    else:
        # Few bits: all that float16 and bfloat16 can round is below their normal numbers.
        normal = (exact.abs() >= torch.finfo(dtype).tiny) & (exact.abs() <= torch.finfo(dtype).max)
        assert torch.equal(rows[normal].double(), exact[normal])
        small = exact.abs() < torch.finfo(dtype).tiny
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((rows[small].double() - exact[small]).abs() <= step / 2).all()
        assert torch.equal(rows.isnan(), exact.isnan())


def test_decoding_equals_torch() -> None:
    """Torch's own conversions of the two dtypes, its product in float32."""
    stored = torch.randint(256, (500, 264), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = stored[:, :256].contiguous().view(torch.float8_e4m3fn).float()
    scales = stored[:, 256:].contiguous().view(torch.float8_e8m0fnu).float()
    expected = values * scales.repeat_interleave(32, 1)
    assert torch.equal(FP8.decode(stored, 256).view(torch.int32) & 0x7FFFFFFF == 0x7FC00000, expected.isnan())
    assert torch.equal(FP8.decode(stored, 256).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(("dim", "row_bytes"), [(256, 264), (160, 165), (32, 33), (33, 35), (8, 9), (1, 2)])
def test_any_dim(dim: int, row_bytes: int) -> None:
    assert FP8.row_bytes(dim) == row_bytes
    rows = torch.randn(5, dim, generator=torch.Generator().manual_seed(dim)) * torch.logspace(-6, 6, 5).unsqueeze(1)
    stored = FP8.encode(rows)
    assert stored.shape == (5, row_bytes)
    decoded = FP8.decode(stored, dim, out=torch.empty(5, dim))
    assert ((decoded - rows).abs() <= error_bound(rows, stored)).all()


def error_bound(rows: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """What `encode` promises: |v| / 16 or 2^-10 scales."""
    dim = rows.shape[1]
    scales = torch.pow(2.0, stored[:, dim:].double() - 127).repeat_interleave(32, 1)
    return torch.maximum(rows.double().abs() / 16, scales[:, :dim] * 2.0**-10)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_encoding_keeps_its_bound_and_takes_the_smallest_scale(data: st.DataObject) -> None:
    largest = data.draw(st.sampled_from([2.0**-140, 2.0**-120, 1.0, 448.0, 2.0**127]))
    values = data.draw(st.lists(st.floats(-largest, largest, width=32), min_size=1, max_size=70))
    rows = torch.tensor([values])
    stored = FP8.encode(rows)
    decoded = FP8.decode(stored, len(values)).double()
    assert ((decoded - rows.double()).abs() <= error_bound(rows, stored)).all()
    for block in range(0, len(values), 32):
        scale, top = int(stored[0, len(values) + block // 32]), max(abs(value) for value in values[block : block + 32])
        assert top <= 448 * e8m0(scale)
        assert top == 0 or scale == 0 or top > 448 * e8m0(scale - 1)
        assert top > 0 or scale == 127


def test_ties_go_to_even_and_448_is_not_clipped() -> None:
    rows = torch.tensor([[448.0, 17.0, 19.0, -17.0, 0.0, -0.0, 1.5 * 2.0**-9, 2.0**-10]])
    decoded = FP8.decode(FP8.encode(rows), 8)
    assert decoded.tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, -0.0, 2 * 2.0**-9, 0.0]]
    assert torch.signbit(decoded)[0].tolist() == [False, False, False, True, False, True, False, False]
    assert FP8.encode(torch.tensor([[449.0]]))[0, 1] == 128


def test_what_was_decoded_encodes_to_the_same_values() -> None:
    rows = FP8.decode(every_row()[1:240], 256).nan_to_num(0.0)
    rows = rows.masked_fill(rows.isinf(), 0.0)
    assert torch.equal(FP8.decode(FP8.encode(rows), 256), rows)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_refused(value: float) -> None:
    rows = torch.ones(9, 40)
    rows[5, 33] = value
    with pytest.raises(UnencodableRow, match=r"row 5 .*not finite"):
        FP8.encode(rows)


def test_bytes_of_another_width_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"uint8 \[n, 264\], got torch.uint8 \[2, 256\]"):
        FP8.decode(torch.zeros(2, 256, dtype=torch.uint8), 256)
