"""int8 and int4: FBGEMM's row-wise n-bit layout for inference on CPUs.

A row is [scale: fp16][bias: fp16][codes], without padding. value = code * scale + bias. FBGEMM's
IntNBitTableBatchedEmbeddingBagsCodegen reads these bytes as they are (row_alignment 1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from embedding_service.errors import InvalidRequest, UnencodableRow
from embedding_service.formats.base import RowFormat, check_finite, narrow_into, narrowed, output
from embedding_service.formats.fbgemm import fbgemm_operator
from embedding_service.late import late

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

HEADER_BYTES = 4  # fp16 scale, fp16 bias

# 1 MiB of float32.
_CACHED_VALUES = 1 << 18

# uint8 [n, codes and header] -> float32 [n, dim].
Kernel = Callable[["torch.Tensor"], "torch.Tensor"]


class NbitFormat(RowFormat):
    """Codes of a few bits, with one scale and one bias for each row.

    Attributes:
        kernel_name: The operator of torch that decodes rows whose header comes last.
        kernel_header: What its scales and biases are, in numpy's words.
    """

    tensor_dtype = "U8"
    kernel_name: ClassVar[str]
    kernel_header: ClassVar[str]

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
        """Dequantize, by torch's build of FBGEMM's kernel where that takes less time, else in steps of torch."""
        self.check_stored(stored, dim)
        into_float32 = out is not None and out.dtype == torch.float32  # to copy the kernel's values costs a pass
        if stored.device.type == "cpu" and not into_float32 and (kernel := _kernel(self)):
            return self._by_kernel(kernel, stored.numpy(), dim, out, dtype or torch.float32)
        return self._by_steps(stored, output(stored, dim, out, dtype))

    def decode_array(self, stored: npt.NDArray[np.uint8], dim: int, dtype: torch.dtype) -> torch.Tensor:
        """`decode`, without a tensor of what is stored."""
        if stored.shape[1] != self.row_bytes(dim) or not (kernel := _kernel(self)):
            return super().decode_array(stored, dim, dtype)
        return self._by_kernel(kernel, stored, dim, None, dtype)

    def _by_kernel(
        self, kernel: Kernel, stored: npt.NDArray[np.uint8], dim: int, out: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Dequantize. What is narrowed goes in steps whose float32 values stay in a core's cache."""
        step = max(1, _CACHED_VALUES // dim)
        if out is None and (len(stored) <= step or dtype == torch.float32):
            return narrowed(kernel(torch.from_numpy(self._header_last(stored))), dtype)
        out = output(torch.from_numpy(stored), dim, out, dtype)
        for start in range(0, len(stored), step):
            rows = slice(start, start + step)
            narrow_into(out[rows], kernel(torch.from_numpy(self._header_last(stored[rows]))))
        return out

    def _header_last(self, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Rows as the kernel wants them: uint8 [n, codes and header]."""
        header = stored[:, :HEADER_BYTES].copy().view(np.float16).astype(self.kernel_header).view(np.uint8)
        codes = stored.shape[1] - HEADER_BYTES
        rows = np.empty((len(stored), codes + header.shape[1]), np.uint8)
        rows[:, :codes] = stored[:, HEADER_BYTES:]
        rows[:, codes:] = header
        return rows

    def _by_steps(self, stored: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Dequantize. A float32 `out` is written directly, others through a float32 scratch."""
        # A device takes few large steps. A CPU takes steps that stay in its cache.
        dim = out.shape[1]
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

    def _fill(self, values: torch.Tensor, codes: torch.Tensor, header: torch.Tensor) -> None:
        """Codes uint8 [n, row_bytes - 4] and float32 header [n, 2] -> float32 `values` [n, dim]."""
        self._unpack(codes, values)
        # Code times scale is exact in float32 (8 + 11 bits). So two steps round as FBGEMM's fused multiply-add.
        values *= header[:, :1]
        values += header[:, 1:]

    @abstractmethod
    def _quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [n, dim] -> codes uint8 [n, row_bytes - 4], header float16 [n, 2]."""

    @abstractmethod
    def _unpack(self, codes: torch.Tensor, values: torch.Tensor) -> None:
        """Codes uint8 [n, row_bytes - 4] -> the codes as numbers in `values` [n, dim]."""


def _compact(columns: torch.Tensor) -> torch.Tensor:
    """Copy columns of bytes to memory of their own. Within rows of an odd length they cannot be viewed as floats."""
    return columns.clone(memory_format=torch.contiguous_format)


@cache
def _kernel(row_format: NbitFormat) -> Kernel | None:
    """FBGEMM's dequantizer as torch has it, for its own quantized embeddings.

    It takes one pass where torch's general operators take three. None where this torch has no such operator, or where
    it gives other bits.
    """
    stored = np.tile(np.arange(HEADER_BYTES + 64, dtype=np.uint8), (2, 1))
    stored[:, :HEADER_BYTES] = np.array([[0.1, -3.0], [-7e-5, 0.7]], np.float16).view(np.uint8)
    try:
        kernel: Kernel = getattr(torch.ops.quantized, row_format.kernel_name).default
        values = kernel(torch.from_numpy(row_format._header_last(stored)))
        expected = row_format._by_steps(torch.from_numpy(stored), torch.empty(values.shape))
        return kernel if torch.equal(values, expected) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


@cache
def _quantizer(name: str) -> Any:
    """One of FBGEMM's quantizers, which only servers have."""
    return fbgemm_operator(name, "fbgemm_gpu_py.so")


class Int8Format(NbitFormat):
    """One byte a value."""

    name, fbgemm_type = "int8", 2
    kernel_name, kernel_header = "embedding_bag_byte_unpack", "float32"

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row: header and one byte a value."""
        return HEADER_BYTES + dim

    def _quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # FBGEMM's 8-bit rows end in a float32 scale and bias. Its inference tables want fp16 ones in front.
        fused = _quantizer("FloatToFused8BitRowwiseQuantized")(rows)
        header = _compact(fused[:, -8:]).view(torch.float32).to(torch.float16)
        return fused[:, : rows.shape[1]], header

    def _unpack(self, codes: torch.Tensor, values: torch.Tensor) -> None:
        values[:] = codes


class Int4Format(NbitFormat):
    """Two values a byte, the first in the low half."""

    name, fbgemm_type = "int4", 3
    kernel_name, kernel_header = "embedding_bag_4bit_unpack", "float16"

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row: header and half a byte a value. FBGEMM's quantizer wants dim to be a multiple of 4."""
        if dim % 4:
            raise InvalidRequest(f"int4 needs a dim that is a multiple of 4, got {dim}: use int8")
        return HEADER_BYTES + dim // 2

    def _quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fused = _quantizer("FloatToFusedNBitRowwiseQuantizedSBHalf")(rows, 4)
        return fused[:, :-HEADER_BYTES], _compact(fused[:, -HEADER_BYTES:]).view(torch.float16)

    def _unpack(self, codes: torch.Tensor, values: torch.Tensor) -> None:
        values[:, 0::2] = codes & 0x0F
        values[:, 1::2] = codes >> 4
