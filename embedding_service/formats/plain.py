"""fp32, fp16 and bf16: the values one after the other, little-endian."""

from __future__ import annotations

import torch

from embedding_service.formats.base import RowFormat, UnencodableRow, check_finite, narrow_into, output


class PlainFormat(RowFormat):
    """A torch float dtype as it is."""

    dtype: torch.dtype

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row: dim values."""
        return dim * self.dtype.itemsize

    def part_shape(self, rows: int, dim: int) -> tuple[int, int]:
        """Rows of values."""
        return rows, dim

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Convert values; rows that already have this dtype are taken bit for bit, unlooked at."""
        if rows.dtype != self.dtype:
            check_finite(rows)
            rows = self._narrow(rows)
        return rows.contiguous().view(torch.uint8)

    def decode(
        self,
        stored: torch.Tensor,
        dim: int,
        out: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Convert values to the dtype asked for; no more than a view where it is the stored one and `out` is None."""
        self.check_stored(stored, dim)
        if not stored.shape[0]:  # torch will not view bytes without rows as floats
            return output(stored, dim, out, dtype)
        stored = stored.contiguous()
        if stored.data_ptr() % self.dtype.itemsize:  # rows in a message lie at any address
            stored = stored.clone()
        values = stored.view(self.dtype)
        if out is None and dtype == self.dtype:
            return values
        return narrow_into(output(stored, dim, out, dtype), values)

    def _narrow(self, rows: torch.Tensor) -> torch.Tensor:
        narrowed = rows.to(self.dtype)
        finite = torch.isfinite(narrowed)
        if not finite.all():
            raise UnencodableRow(int((~finite.all(dim=1)).int().argmax()), f"holds a value beyond {self.name}'s range")
        return narrowed


class Fp32Format(PlainFormat):
    """IEEE single precision."""

    name, tensor_dtype, dtype = "fp32", "F32", torch.float32


class Fp16Format(PlainFormat):
    """IEEE half precision."""

    name, tensor_dtype, dtype = "fp16", "F16", torch.float16


class Bf16Format(PlainFormat):
    """Brain floating point: float32's range with 8 bits of precision."""

    name, tensor_dtype, dtype = "bf16", "BF16", torch.bfloat16


# The torch dtype that each of these formats holds as it is.
PLAIN_DTYPES = {each.name: each.dtype for each in (Fp32Format, Fp16Format, Bf16Format)}
