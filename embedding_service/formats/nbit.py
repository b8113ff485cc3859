"""int8 and int4: FBGEMM's row-wise n-bit layout for inference on CPUs.

A row is [scale: fp16][bias: fp16][codes], without padding. value = code * scale + bias. FBGEMM's
IntNBitTableBatchedEmbeddingBagsCodegen reads these bytes as they are (row_alignment 1).
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedding_service.errors import InvalidRequest, UnencodableRow
from embedding_service.formats.base import RowFormat, check_finite, narrow_into, output
from embedding_service.formats.fbgemm import fbgemm_operator
from embedding_service.late import late

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

HEADER_BYTES = 4  # fp16 scale, fp16 bias

# 1 MiB of float32.
_CACHED_VALUES = 1 << 18
_FEW_VALUES = 1 << 14


class NbitFormat(RowFormat):
    """Codes of a few bits, with one scale and one bias for each row."""

    tensor_dtype = "U8"

    def part_shape(self, rows: int, dim: int) -> tuple[int, int]:
        """Rows of bytes."""
        return rows, self.row_bytes(dim)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Quantize with FBGEMM's quantizer.

        The error of a value is at most half a step plus the rounding of scale and bias to fp16. That is |bias| / 2^11
        and, at the far end of the row, range / 2^11 (or steps / 2^25 if the scale is below fp16's normal numbers).
        """
        self.row_bytes(rows.shape[1])
        rows = rows.to(torch.float32).contiguous()
        check_finite(rows)
        codes, header = self._quantize(rows)
        if not torch.isfinite(header.sum(dtype=torch.float32)):
            bad = ~torch.isfinite(header).all(dim=1)
            raise UnencodableRow(int(bad.int().argmax()), f"overflows the fp16 scale or bias of {self.name}")
        stored = torch.empty(len(rows), HEADER_BYTES + codes.shape[1], dtype=torch.uint8)
        stored[:, :HEADER_BYTES] = header.view(torch.uint8)
        stored[:, HEADER_BYTES:] = codes
        return stored

    def decode(
        self,
        stored: torch.Tensor,
        dim: int,
        out: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Dequantize. A float32 `out` is written directly, others through a float32 scratch."""
        self.check_stored(stored, dim)
        if out is None and stored.device.type == "cpu" and 0 < len(stored) * dim <= _FEW_VALUES:
            return self.decode_array(stored.numpy(), dim, dtype or torch.float32)
        out = output(stored, dim, out, dtype)
        # A device takes few large steps. A CPU takes steps that stay in its cache.
        step = max(1, _CACHED_VALUES // dim) if stored.device.type == "cpu" else max(1, len(stored))
        scratch = None if out.dtype == torch.float32 else torch.empty(min(step, len(out)), dim, device=out.device)
        header = _compact(stored[:, :HEADER_BYTES]).view(torch.float16).float()
        for start in range(0, len(stored), step):
            rows = slice(start, start + step)
            values = out[rows] if scratch is None else scratch[: len(out[rows])]
            self._fill(values, stored[rows, HEADER_BYTES:], header[rows])
            if scratch is not None:
                narrow_into(out[rows], values)
        return out

    def decode_array(self, stored: npt.NDArray[np.uint8], dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Decode a token's rows. numpy takes a third of torch's time to begin an operation."""
        # For no rows numpy makes an array whose strides torch will not view as bytes.
        if not 0 < len(stored) * dim <= _FEW_VALUES or stored.shape[1] != self.row_bytes(dim):
            return super().decode_array(stored, dim, dtype)
        values = np.empty((len(stored), dim), np.float32)
        header = stored[:, :HEADER_BYTES].copy().view(np.float16).astype(np.float32)
        self._fill(values, stored[:, HEADER_BYTES:], header)
        few = torch.from_numpy(values)
        if dtype == torch.bfloat16:
            return narrow_into(torch.empty(few.shape, dtype=dtype), few)
        return few.to(dtype)

    def _fill(self, values: Any, codes: Any, header: Any) -> None:
        """Codes uint8 [n, row_bytes - 4] and float32 header [n, 2] -> float32 `values` [n, dim], torch's or numpy's."""
        self._unpack(codes, values)
        # Code times scale is exact in float32 (8 + 11 bits). So two steps round as FBGEMM's fused multiply-add.
        values *= header[:, :1]
        values += header[:, 1:]

    @abstractmethod
    def _quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [n, dim] -> codes uint8 [n, row_bytes - 4], header float16 [n, 2]."""

    @abstractmethod
    def _unpack(self, codes: Any, values: Any) -> None:
        """Codes uint8 [n, row_bytes - 4] -> the codes as numbers in `values` [n, dim]."""


def _compact(columns: torch.Tensor) -> torch.Tensor:
    """Copy columns of bytes to memory of their own. Within rows of an odd length they cannot be viewed as floats."""
    return columns.clone(memory_format=torch.contiguous_format)


@cache
def _quantizer(name: str) -> Any:
    """One of FBGEMM's quantizers, which only servers have."""
    return fbgemm_operator(name, "fbgemm_gpu_py.so")


class Int8Format(NbitFormat):
    """One byte a value."""

    name, fbgemm_type = "int8", 2

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row: header and one byte a value."""
        return HEADER_BYTES + dim

    def _quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # FBGEMM's 8-bit rows end in a float32 scale and bias. Its inference tables want fp16 ones in front.
        fused = _quantizer("FloatToFused8BitRowwiseQuantized")(rows)
        header = _compact(fused[:, -8:]).view(torch.float32).to(torch.float16)
        return fused[:, : rows.shape[1]], header

    def _unpack(self, codes: Any, values: Any) -> None:
        values[:] = codes


class Int4Format(NbitFormat):
    """Two values a byte, the first in the low half."""

    name, fbgemm_type = "int4", 3

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row: header and half a byte a value. FBGEMM's quantizer wants dim to be a multiple of 4."""
        if dim % 4:
            raise InvalidRequest(f"int4 needs a dim that is a multiple of 4, got {dim}: use int8")
        return HEADER_BYTES + dim // 2

    def _quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fused = _quantizer("FloatToFusedNBitRowwiseQuantizedSBHalf")(rows, 4)
        return fused[:, :-HEADER_BYTES], _compact(fused[:, -HEADER_BYTES:]).view(torch.float16)

    def _unpack(self, codes: Any, values: Any) -> None:
        values[:, 0::2] = codes & 0x0F
        values[:, 1::2] = codes >> 4
