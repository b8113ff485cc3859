"""The committed generated code is what the protos give, and rows are what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embedding_service import wire
from embedding_service.formats import FORMATS, get_format

sys.path.insert(0, str(Path(__file__).parent.parent / "protos"))
from generate import generate


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    generate(tmp_path)
    committed = Path(wire.__file__).parent
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert fresh
    assert fresh == {path.name: path.read_text() for path in committed.glob("*_pb2*.py*")}, "run `make proto`"


def floats(data: np.ndarray, dtype: str) -> np.ndarray:
    return np.frombuffer(data.tobytes(), dtype).astype(np.float64)


def decoded(dtype: str, row: np.ndarray, dim: int) -> np.ndarray:
    """A stored row, uint8 [row_bytes], by nothing but what embedding.proto says of ROW_ENCODING_STORED."""
    if dtype in ("fp32", "fp16"):
        return floats(row, {"fp32": "<f4", "fp16": "<f2"}[dtype])
    if dtype == "bf16":
        return floats(np.stack((np.zeros(dim, "<u2"), np.frombuffer(row.tobytes(), "<u2")), 1), "<f4")
    if dtype in ("int8", "int4"):
        scale, bias = floats(row[:4], "<f2")
        codes = row[4:] if dtype == "int8" else np.stack((row[4:] & 15, row[4:] >> 4), 1).flatten()
        return codes * scale + bias
    if dtype == "nvfp4":
        codes = np.stack((row[: dim // 2] & 15, row[: dim // 2] >> 4), 1).flatten()
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes & 8, -1, 1)
        return values * e4m3(row[dim // 2 : -4]).repeat(16) * floats(row[-4:], "<f4")
    if dtype == "fp8_rowwise":
        return e4m3(row[:dim]) * floats(row[dim:], "<f4")
    assert dtype == "fp8"
    return e4m3(row[:dim]) * np.ldexp(1.0, row[dim:].astype(int) - 127).repeat(32)[:dim]


def e4m3(codes: np.ndarray) -> np.ndarray:
    sign, exponent, fraction = codes >> 7, codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + fraction / 8, exponent.astype(int) - 7)
    return np.where(exponent, normal, np.ldexp(fraction / 8, -6)) * np.where(sign, -1, 1)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("dim", [16, 48, 256])
def test_stored_rows_are_laid_out_as_the_contract_says(dtype: str, dim: int) -> None:
    rows = torch.randn(50, dim, generator=torch.Generator().manual_seed(dim)) * torch.logspace(-3, 3, 50).unsqueeze(1)
    stored = get_format(dtype).encode(rows)
    expected = get_format(dtype).decode(stored, dim).double().numpy()
    got = np.stack([decoded(dtype, row, dim) for row in stored.numpy()])
    np.testing.assert_allclose(got, expected, rtol=2e-7, atol=0 if dtype == "fp8" else 1e-6 * abs(expected).max())
