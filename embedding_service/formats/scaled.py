"""fp8_rowwise and nvfp4: codes of 8 or 4 bits, scaled by a float32, as quantized Qwen3.8-Flash-Next has them.

Its builds have one scale for a whole table. Here each row carries it in its last 4 bytes. A row is then decoded by
itself, whatever table, overlay or piece of a checkpoint it is from. FBGEMM has no kernel for these rows.

A narrower dtype is rounded as the models do it, which is not once from float32: see each `decode`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from embedding_service.errors import InvalidRequest
from embedding_service.formats.base import RowFormat, check_finite, output
from embedding_service.formats.fp8 import widen_e4m3
from embedding_service.late import late

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

BLOCK = 16  # values of nvfp4 that share an e4m3 scale
SCALE_BYTES = 4
_E4M3_MOST, _E2M1_MOST = 448.0, 6.0
# float32's smallest normal number: below it a quotient by the scale would be far off.
_LEAST_SCALE = 2.0**-126
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGN = 8


class Fp8RowwiseFormat(RowFormat):
    """[values: one e4m3 byte each][scale: float32]. 164 bytes for 160 values."""

    name, tensor_dtype = "fp8_rowwise", "U8"
    rounds_once = False

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row: a byte a value, 4 for the scale."""
        return dim + SCALE_BYTES

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Quantize with a scale that makes a row's largest value 448, so nothing is clipped. Ties go to even."""
        rows = rows.to(torch.float32)
        check_finite(rows)
        scale = _scale(rows.abs().amax(1, keepdim=True), _E4M3_MOST)
        codes = (rows.double() / scale).float().to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([codes, scale.view(torch.uint8)], 1)

    def decode(
        self,
        stored: torch.Tensor,
        dim: int,
        out: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return e4m3 * scale, both in the output's dtype, as vLLM and SGLang do for such tables."""
        self.check_stored(stored, dim)
        out = output(stored, dim, out, dtype)
        values = out if out.dtype == torch.float32 else torch.empty(out.shape, device=out.device)
        widen_e4m3(stored[:, :dim], values)
        values *= _float32(stored[:, dim:]).to(out.dtype).float()
        return out if values is out else out.copy_(values)


class Nvfp4Format(RowFormat):
    """[codes: two e2m1 a byte, the first in the low half][e4m3 scale of each 16 values][scale: float32].

    94 bytes for 160 values. An e2m1 code is 0, 0.5, 1, 1.5, 2, 3, 4 or 6, and its highest bit is the sign.
    """

    name, tensor_dtype = "nvfp4", "U8"
    rounds_once = False

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row: half a byte a value, a byte for 16, 4 for all."""
        if dim % BLOCK:
            raise InvalidRequest(f"nvfp4 needs a dim that is a multiple of {BLOCK}, got {dim}: use fp8_rowwise or int8")
        return dim // 2 + dim // BLOCK + SCALE_BYTES

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Quantize. A row's scale makes its largest block's scale 448, and a block's scale its largest value 6.

        Block scales and codes round to nearest, ties to even. What is above 6 after that becomes 6.
        """
        dim = rows.shape[1]
        self.row_bytes(dim)
        rows = rows.to(torch.float32)
        check_finite(rows)
        blocks = rows.double().unflatten(1, (-1, BLOCK))
        most = blocks.abs().amax(2)
        scale = _scale(most.amax(1, keepdim=True), _E4M3_MOST * _E2M1_MOST)
        block_codes = (most / _E2M1_MOST / scale).float().to(torch.float8_e4m3fn)
        steps = (block_codes.double() * scale).unsqueeze(2)
        codes = _e2m1_codes(torch.where(steps == 0, 0, blocks / steps).flatten(1))
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        return torch.cat([packed, block_codes.view(torch.uint8), scale.view(torch.uint8)], 1)

    def decode(
        self,
        stored: torch.Tensor,
        dim: int,
        out: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return code * block scale * row scale in float32, then the output's dtype, ties to even."""
        self.check_stored(stored, dim)
        out = output(stored, dim, out, dtype)
        values = out if out.dtype == torch.float32 else torch.empty(out.shape, device=out.device)
        codes = _codes().to(stored.device)
        values[:, 0::2] = codes[(stored[:, : dim // 2] & 0x0F).int()]
        values[:, 1::2] = codes[(stored[:, : dim // 2] >> 4).int()]
        block_scales = torch.empty(len(stored), dim // BLOCK, device=out.device)
        widen_e4m3(stored[:, dim // 2 : -SCALE_BYTES], block_scales)
        values.unflatten(1, (-1, BLOCK)).mul_(block_scales.unsqueeze(2))
        values *= _float32(stored[:, -SCALE_BYTES:])
        return out if values is out else out.copy_(values)


def _scale(most: torch.Tensor, code: float) -> torch.Tensor:
    """float32 [n, 1] that takes `most` to `code`. It is 1 where that is 0."""
    return (most / code).float().clamp_min(_LEAST_SCALE).masked_fill(most == 0, 1.0)


def _float32(columns: torch.Tensor) -> torch.Tensor:
    """4 columns of bytes -> float32 [n, 1]. Within rows of an odd length they cannot be viewed as floats."""
    return columns.clone(memory_format=torch.contiguous_format).view(torch.float32)


@cache
def _codes() -> torch.Tensor:
    """float32 of every e2m1 code. It is on the CPU, with any default device at the first call."""
    return torch.tensor([*_E2M1, *(-value for value in _E2M1)], device="cpu")


def _e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """float64 [n, dim] -> the nearest code of each, ties to an even one: uint8 [n, dim]."""
    borders = (_codes()[:7] + _codes()[1:8]).double() / 2
    borders[1::2] = torch.nextafter(
        borders[1::2], torch.zeros((), dtype=torch.float64)
    )  # a tie goes up, to an even code
    return torch.bucketize(values.abs(), borders).to(torch.uint8) + _SIGN * (values < 0).to(torch.uint8)
