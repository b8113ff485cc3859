"""fp8: e4m3 values with one power-of-two scale for each 32 of a row, as DeepSeek-V4.1 stores its Engram tables.

A row is [values: one e4m3 byte each][scales: one e8m0 byte for each 32 values]. value = e4m3 * 2^(scale - 127). The two
encodings are those of the OCP Microscaling Formats (MX) specification 1.0. FBGEMM has no kernel for them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from embedding_service.formats.base import RowFormat, check_finite, narrow_into, output
from embedding_service.late import late

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

BLOCK = 32  # values that share a scale. A row's last block may be shorter
_BIAS = 127
_NAN = 0x7F  # an e4m3 NaN, but for its sign
# 448, the largest e4m3 value, is 0.875 * 2^9.
_LARGEST, _LARGEST_EXPONENT = 0.875, 9


class Fp8Format(RowFormat):
    """264 bytes for 256 values."""

    name, tensor_dtype = "fp8", "U8"

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row: a byte a value, a byte a scale."""
        return dim + -(-dim // BLOCK)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Quantize each block with the smallest scale that keeps its largest value within e4m3's 448.

        So nothing is clipped. Values round to nearest, ties to even. A value v is at most |v| / 16 off, or 2^-10 times
        its block's scale if that is more. A block of zeros gets scale 1. Scales end at 2^-127: blocks below
        448 * 2^-127 lose bits.
        """
        rows = rows.to(torch.float32)
        check_finite(rows)
        blocks = _blocks(rows)
        mantissa, exponent = torch.frexp(blocks.abs().amax(2))
        exponent = exponent - _LARGEST_EXPONENT + (mantissa > _LARGEST)
        exponent = exponent.masked_fill(mantissa == 0, 0).clamp_min(-_BIAS)
        # In two steps: the inverse of a large scale is below float32's normal numbers.
        scaled = torch.ldexp(blocks.double(), -exponent.unsqueeze(2)).float()
        stored = torch.empty(len(rows), self.row_bytes(rows.shape[1]), dtype=torch.uint8)
        stored[:, : rows.shape[1]] = scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)[:, : rows.shape[1]]
        stored[:, rows.shape[1] :] = exponent + _BIAS
        return stored

    def decode(
        self,
        stored: torch.Tensor,
        dim: int,
        out: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Dequantize. float32 is exact, other dtypes round once.

        The result is NaN if the value's byte (0x7F, 0xFF) or the scale's (255) is. There are no infinities, but
        products beyond float32's range become some.
        """
        self.check_stored(stored, dim)
        out = output(stored, dim, out, dtype)
        values = out if out.dtype == torch.float32 else torch.empty(out.shape, device=out.device)
        widen_e4m3(stored[:, :dim], values)
        scales = e8m0_values().to(stored.device)[stored[:, dim:].long()]
        whole = dim // BLOCK
        values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).mul_(scales[:, :whole].unsqueeze(2))
        values[:, whole * BLOCK :].mul_(scales[:, whole:])
        return out if values is out else narrow_into(out, values)


@cache
def e8m0_values() -> torch.Tensor:
    """float32 Tensor[256] of every scale byte, NaN for 255. It is on the CPU, with any default device at first."""
    powers = [2.0 ** (code - _BIAS) for code in range(255)]
    return torch.tensor([*powers, torch.nan], dtype=torch.float32, device="cpu")


def widen_e4m3(codes: torch.Tensor, values: torch.Tensor) -> None:
    """Write e4m3 bytes [n, dim] into float32 `values`, exactly.

    It goes by fp16, which holds the same bits one place to the right of its sign. They mean 2^8 less there. torch's own
    conversion from float8_e4m3fn takes four times as long on a CPU.
    """
    bits = codes.to(torch.int16).bitwise_left_shift_(8).bitwise_right_shift_(1).bitwise_and_(~0x4000)
    values.copy_(bits.view(torch.float16)).mul_(256)
    nan = codes.bitwise_and(_NAN) == _NAN
    if nan.any():
        values.masked_fill_(nan, torch.nan)


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    """[n, dim] -> [n, blocks, 32], the last one filled up with zeros."""
    filled = torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK))
    return filled.unflatten(1, (-1, BLOCK))
