"""Row formats against FBGEMM's own kernels and quantizers, and against their bounds."""

import math
import subprocess
import sys

import fbgemm_gpu  # noqa: F401 (registers torch.ops.fbgemm)
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_service.errors import InvalidRequest, UnencodableRow
from embedding_service.formats import FORMATS, get_format, nbit

SPARSE = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "int8": SparseType.INT8, "int4": SparseType.INT4}
OUTPUTS = {torch.float32: SparseType.FP32, torch.float16: SparseType.FP16, torch.bfloat16: SparseType.BF16}
DIMS = {"fp32": (4, 256), "fp16": (4, 256), "int8": (1, 3, 7, 16, 160, 255, 256), "int4": (4, 12, 160, 256)}
KERNEL_CASES = [(name, dim) for name, dims in DIMS.items() for dim in dims]


def rows_of_every_kind(dim: int) -> torch.Tensor:
    """Usual rows, constant rows, tiny and huge ranges, offsets far from zero; float32 [n, dim]."""
    noise = torch.randn(60, dim, generator=torch.Generator().manual_seed(dim))
    constants = torch.tensor([0.0, -0.0, 1.0, -3.7, 65504.0, -65504.0, 1e-8, 6e-8]).unsqueeze(1).expand(8, dim)
    scaled = [noise * scale for scale in (0.02, 1.0, 1e-5, 1e-9, 1e-30, 5000.0)]
    return torch.cat([constants, *scaled, noise + 1000, noise * 1e-4 - 7])


def fbgemm_rows(stored: torch.Tensor, dim: int, weights: SparseType, output: SparseType) -> torch.Tensor:
    """What FBGEMM's CPU kernel reads from these bytes: Tensor[n, dim]."""
    rows = len(stored)
    tables = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("", rows, dim, weights, EmbeddingLocation.HOST)],
        pooling_mode=PoolingMode.NONE,
        output_dtype=output,
        device="cpu",
    )
    tables.initialize_weights()
    tables.split_embedding_weights(split_scale_shifts=False)[0][0].copy_(stored)
    return tables(torch.arange(rows, dtype=torch.int32), torch.tensor([0, rows], dtype=torch.int32))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
@pytest.mark.parametrize(("name", "dim"), KERNEL_CASES)
def test_decode_equals_fbgemms_kernel_bit_for_bit(name: str, dim: int, dtype: torch.dtype) -> None:
    row_format = get_format(name)
    stored = row_format.encode(rows_of_every_kind(dim))
    if name in ("fp32", "fp16"):
        # FBGEMM's kernel adds plain values to zero and so reads a stored -0.0 as 0.0; ours keeps it.
        stored = row_format.encode(row_format.decode(stored, dim) + 0.0)
    expected = fbgemm_rows(stored, dim, SPARSE[name], OUTPUTS[dtype])
    decoded = row_format.decode(stored, dim, dtype=dtype)
    out = torch.full((len(stored), 2 * dim), 7.0, dtype=dtype)
    row_format.decode(stored, dim, out=out[:, dim:])
    assert torch.equal(bits(out[:, dim:]), bits(decoded))
    assert (out[:, :dim] == 7).all()
    assert torch.equal(bits(decoded), bits(expected))
    for few in (0, 9):
        assert torch.equal(bits(row_format.decode(stored[:few], dim, dtype=dtype)), bits(expected[:few]))


@pytest.mark.parametrize("torch_has_the_kernel", [True, False])
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_decode_equals_fbgemm_on_any_bytes(
    name: str, dtype: torch.dtype, torch_has_the_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dim = 64
    assert nbit._kernel(get_format(name)), "this torch has it"
    if not torch_has_the_kernel:
        monkeypatch.setattr(nbit, "_kernel", lambda row_format: None)
    stored = torch.randint(0, 256, (4000, get_format(name).row_bytes(dim)), generator=torch.Generator().manual_seed(1))
    stored = stored.to(torch.uint8)
    finite = torch.isfinite(stored[:, :4].contiguous().view(torch.float16)).all(dim=1)
    stored = stored[finite]
    expected = fbgemm_rows(stored, dim, SPARSE[name], OUTPUTS[dtype])
    assert torch.equal(bits(get_format(name).decode(stored, dim, dtype=dtype)), bits(expected))
    assert torch.equal(bits(get_format(name).decode_array(stored.numpy(), dim, dtype)), bits(expected))


@pytest.mark.parametrize("dim", [4, 12, 256])
def test_int4_bytes_are_fbgemms_with_the_header_in_front(dim: int) -> None:
    rows = rows_of_every_kind(dim)
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4)
    assert torch.equal(get_format("int4").encode(rows), torch.cat([fused[:, -4:], fused[:, :-4]], 1))


@pytest.mark.parametrize("dim", [1, 7, 256])
def test_int8_bytes_are_fbgemms_with_the_header_narrowed(dim: int) -> None:
    rows = rows_of_every_kind(dim)
    fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows)
    stored = get_format("int8").encode(rows)
    assert torch.equal(stored[:, 4:], fused[:, :dim])
    header = fused[:, -8:].clone().view(torch.float32).to(torch.float16)
    assert torch.equal(stored[:, :4].clone(memory_format=torch.contiguous_format).view(torch.float16), header)


def nbit_bound(rows: torch.Tensor, steps: int) -> torch.Tensor:
    """The most a value may be off, [n, 1]: half a step, and scale and bias rounded to fp16 (see NbitFormat.encode)."""
    low, high = rows.double().amin(1, keepdim=True), rows.double().amax(1, keepdim=True)
    step = (high - low) / steps
    bias_error = (low.abs() / 2**11).clamp(min=2**-25)
    scale_error = steps * ((step + bias_error / steps) / 2**11).clamp(min=2**-25)
    # int8: FBGEMM adds 1e-8 to the range; the rest is float32's own rounding.
    return 0.5 * step + bias_error + scale_error + 1e-8 + 1e-6 * (high - low + low.abs())


def float_rows(draw: st.DrawFn, dim: int, bound: float) -> torch.Tensor:
    value = st.floats(-bound, bound, width=32)
    return torch.tensor(draw(st.lists(st.lists(value, min_size=dim, max_size=dim), min_size=1, max_size=6)))


@st.composite
def nbit_cases(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    name = draw(st.sampled_from(["int8", "int4"]))
    dim = draw(st.integers(1, 12)) if name == "int8" else 4 * draw(st.integers(1, 4))
    return name, float_rows(draw, dim, draw(st.sampled_from([2.0**-20, 1.0, 30000.0])))


@given(nbit_cases())
@settings(max_examples=60, deadline=None)
def test_quantized_rows_come_back_within_the_bound(case: tuple[str, torch.Tensor]) -> None:
    name, rows = case
    row_format = get_format(name)
    stored = row_format.encode(rows)
    assert stored.shape == (len(rows), row_format.row_bytes(rows.shape[1]))
    error = (row_format.decode(stored, rows.shape[1]).double() - rows.double()).abs()
    assert (error <= nbit_bound(rows, 255 if name == "int8" else 15)).all(), error.max()


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_plain_rows_of_the_same_dtype_come_back_bit_for_bit(data: st.DataObject) -> None:
    name, dtype = data.draw(
        st.sampled_from([("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
    )
    raw = data.draw(st.binary(min_size=12, max_size=48).filter(lambda raw: len(raw) % 12 == 0))
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).view(-1, 12 // dtype.itemsize)
    stored = get_format(name).encode(rows)
    # Any bits, NaNs with their payload too.
    assert torch.equal(stored, bits(rows))
    assert torch.equal(bits(get_format(name).decode(stored, rows.shape[1], dtype=dtype)), bits(rows))


def test_plain_conversions_round_to_nearest() -> None:
    rows = rows_of_every_kind(8)
    assert torch.equal(get_format("fp16").encode(rows).view(torch.float16), rows.half())
    assert torch.equal(get_format("bf16").encode(rows).view(torch.bfloat16), rows.bfloat16())
    assert torch.equal(get_format("fp32").encode(rows.half()).view(torch.float32), rows.half().float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int8", "int4", "fp16", "bf16"])
def test_a_row_that_is_not_finite_is_refused(name: str, value: float) -> None:
    rows = torch.ones(9, 8)
    rows[5, 3] = rows[7, 0] = value
    with pytest.raises(UnencodableRow, match=r"row 5 .*not finite") as caught:
        get_format(name).encode(rows)
    assert caught.value.row == 5


@pytest.mark.parametrize(("name", "value"), [("int8", 70000.0), ("int4", -70000.0), ("fp16", 70000.0)])
def test_a_row_beyond_half_precision_is_refused(name: str, value: float) -> None:
    rows = torch.zeros(4, 8)
    rows[2] = value
    with pytest.raises(UnencodableRow, match=rf"row 2 .*{name}"):
        get_format(name).encode(rows)


def test_a_large_sum_of_small_rows_is_no_overflow() -> None:
    rows = torch.full((2, 4), 3e38)
    assert torch.equal(get_format("bf16").encode(rows).view(torch.bfloat16), rows.bfloat16())


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_at_all(name: str) -> None:
    row_format = get_format(name)
    stored = row_format.encode(torch.empty(0, 16))
    assert stored.shape == (0, row_format.row_bytes(16))
    assert row_format.decode(stored, 16).shape == (0, 16)
    assert row_format.decode_array(stored.numpy(), 16, torch.float16).shape == (0, 16)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_anywhere_in_memory_decode_alike(name: str) -> None:
    """Stored rows may be a slice at an odd address, as in an answer from the wire."""
    row_format = get_format(name)
    rows = rows_of_every_kind(16)
    stored = row_format.encode(rows)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), stored.flatten()])[1:].view(stored.shape)
    for first, count in ((0, len(rows)), (3, 1), (5, 2)):
        chosen = slice(first, first + count)
        assert torch.equal(row_format.decode(shifted[chosen], 16), row_format.decode(stored, 16)[chosen])
        for dtype in OUTPUTS:
            decoded = row_format.decode_array(shifted[chosen].numpy(), 16, dtype)
            assert torch.equal(bits(decoded), bits(row_format.decode(stored, 16, dtype=dtype)[chosen]))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidRequest, match="'int5'; known: fp32, fp16, bf16, int8, int4"):
        get_format("int5")
    with pytest.raises(InvalidRequest, match="multiple of 4, got 6: use int8"):
        get_format("int4").row_bytes(6)
    with pytest.raises(InvalidRequest, match=r"uint8 \[n, 12\], got torch.uint8 \[2, 11\]"):
        get_format("int8").decode(torch.zeros(2, 11, dtype=torch.uint8), 8)
    with pytest.raises(InvalidRequest, match=r"\[2, 8\], got torch.float32 \[2, 9\]"):
        get_format("int8").decode(torch.zeros(2, 12, dtype=torch.uint8), 8, out=torch.empty(2, 9))


def test_real_row_sizes() -> None:
    assert [get_format(name).row_bytes(256) for name in ("fp32", "fp16", "bf16", "int8", "int4")] == [
        1024,
        512,
        512,
        260,
        132,
    ]


@pytest.mark.slow
def test_decoding_loads_no_fbgemm() -> None:
    code = (
        "import sys, torch\n"
        "from embedding_service.formats import FORMATS, get_format\n"
        "for f in map(get_format, FORMATS): f.decode(torch.zeros(3, f.row_bytes(16), dtype=torch.uint8), 16)\n"
        "print([name for name in sys.modules if name.startswith(('fbgemm', 'torchrec', 'pydantic', 'fsspec'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
