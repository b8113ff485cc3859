"""fp32, fp16 and bf16: the values one after the other, little-endian."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar

from embedding_service.errors import UnencodableRow
from embedding_service.formats.base import RowFormat, check_finite, narrow_into, output
from embedding_service.late import late

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
else:
    torch = late("torch")


class PlainFormat(RowFormat):
    """A torch float dtype as it is.

    Attributes:
        item_bytes: Bytes of a value.
        torch_name: The dtype's name in torch. Knowing a row's bytes does not import torch.
        numpy_name: In numpy, which has no bfloat16.
    """

    item_bytes: ClassVar[int]
    torch_name: ClassVar[str]
    numpy_name: ClassVar[str | None] = None

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row: dim values."""
        return dim * self.item_bytes

    def part_shape(self, rows: int, dim: int) -> tuple[int, int]:
        """Rows of values."""
        return rows, dim

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Convert values. Rows that already have this dtype are taken bit for bit, unchecked."""
        if rows.dtype != self.dtype:
            check_finite(rows)
            rows = self._narrow(rows)
        return rows.contiguous().view(torch.uint8)

    def decode(
        self,
        stored: torch.Tensor,
        dim: int,
        out: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Convert values to the dtype asked for. It is only a view if that is the stored dtype and `out` is None."""
        self.check_stored(stored, dim)
        if not stored.shape[0]:  # torch will not view bytes without rows as floats
            return output(stored, dim, out, dtype)
        stored = stored.contiguous()
        if stored.data_ptr() % self.item_bytes:  # rows in a message lie at any address
            stored = stored.clone()
        values = stored.view(self.dtype)
        if out is None and (dtype or torch.float32) == self.dtype:
            return values
        return narrow_into(output(stored, dim, out, dtype), values)

    def decode_array(self, stored: npt.NDArray[np.uint8], dim: int, dtype: torch.dtype) -> torch.Tensor:
        """A view, where that is all: numpy makes one in a third of torch's time."""
        if dtype != self.dtype or self.numpy_name is None or stored.shape[1] != self.row_bytes(dim):
            return super().decode_array(stored, dim, dtype)
        values = stored.view(self.numpy_name)
        return torch.from_numpy(values if values.flags.aligned else values.copy())

    def _narrow(self, rows: torch.Tensor) -> torch.Tensor:
        narrowed = rows.to(self.dtype)
        finite = torch.isfinite(narrowed)
        if not finite.all():
            raise UnencodableRow(int((~finite.all(dim=1)).int().argmax()), f"holds a value beyond {self.name}'s range")
        return narrowed


class Fp32Format(PlainFormat):
    """IEEE single precision."""

    name, tensor_dtype, item_bytes, torch_name = "fp32", "F32", 4, "float32"
    source_dtype, fbgemm_type, numpy_name = "F32", 0, "float32"


class Fp16Format(PlainFormat):
    """IEEE half precision."""

    name, tensor_dtype, item_bytes, torch_name = "fp16", "F16", 2, "float16"
    source_dtype, fbgemm_type, numpy_name = "F16", 1, "float16"


class Bf16Format(PlainFormat):
    """Brain floating point: float32's range with 8 bits of precision. FBGEMM's kernel reads no tables of it."""

    name, tensor_dtype, item_bytes, torch_name = "bf16", "BF16", 2, "bfloat16"
    source_dtype = "BF16"


@cache
def plain_dtypes() -> dict[str, torch.dtype]:
    """The torch dtype that each of these formats holds as it is."""
    return {each.name: each.dtype for each in (Fp32Format(), Fp16Format(), Bf16Format())}
