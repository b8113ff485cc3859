"""What every row format can do.

A format only knows one row's bytes. The store knows where rows lie, and the row tiers gather them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from embedding_service.errors import InvalidRequest, UnencodableRow
from embedding_service.late import late

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
else:
    torch = late("torch")


class RowFormat(ABC):
    """How `dim` values lie in `row_bytes(dim)` bytes. A format has no state. `get_format(name)` gives its instance."""

    name: ClassVar[str]
    # The safetensors dtype of a part in this format, for people who open one with the safetensors library.
    tensor_dtype: ClassVar[str]
    # The safetensors dtype of matrices in checkpoints whose rows lie like these, so that an import can keep them.
    source_dtype: ClassVar[str | None] = None
    # FBGEMM's number (SparseType) for such rows, if its kernel reads them. None: torch decodes them.
    fbgemm_type: ClassVar[int | None] = None
    # Whether narrower dtypes are float32's values, rounded once as FBGEMM does. False: `decode` says what they are.
    rounds_once: ClassVar[bool] = True

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that holds the values exactly."""
        dtype: torch.dtype = torch.float32
        return dtype

    @abstractmethod
    def row_bytes(self, dim: int) -> int:
        """Bytes of a stored row of `dim` values. Raises InvalidRequest for a dim that the format cannot hold."""

    def part_shape(self, rows: int, dim: int) -> tuple[int, int]:
        """Shape of the safetensors tensor that holds `rows` rows. By itself it is of bytes."""
        return rows, self.row_bytes(dim)

    @abstractmethod
    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Float Tensor[n, dim] on the CPU -> uint8 Tensor[n, row_bytes].

        Raises UnencodableRow for the first row that cannot be represented (non-finite or overflow).
        """

    @abstractmethod
    def decode(
        self,
        stored: torch.Tensor,
        dim: int,
        out: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """uint8 Tensor[n, row_bytes] -> Tensor[n, dim] of `dtype` (float32, float16 or bfloat16), in `out` if given.

        Without `out` and `dtype` it is float32. `out` decides if both are given. Equal bit for bit to FBGEMM's CPU
        kernel for inference tables. The one exception is -0.0 in plain rows, which that kernel reads as 0.0.
        """

    def decode_array(self, stored: npt.NDArray[np.uint8], dim: int, dtype: torch.dtype) -> torch.Tensor:
        """`decode` for an array in this process's memory, in the way that takes least time to begin."""
        return self.decode(torch.from_numpy(stored), dim, None, dtype)

    def check_stored(self, stored: torch.Tensor, dim: int) -> None:
        """Raise InvalidRequest unless `stored` is uint8 [n, row_bytes(dim)]."""
        row_bytes = self.row_bytes(dim)
        if stored.dtype != torch.uint8 or stored.dim() != 2 or stored.shape[1] != row_bytes:
            raise InvalidRequest(
                f"stored {self.name} rows of {dim} values must be uint8 [n, {row_bytes}], "
                f"got {stored.dtype} {list(stored.shape)}"
            )


def output(stored: torch.Tensor, dim: int, out: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor:
    """Return `out` if it fits `stored`, or a new Tensor[n, dim]. Raises InvalidRequest for a wrong shape or dtype."""
    if out is None:
        out = torch.empty(stored.shape[0], dim, dtype=dtype or torch.float32, device=stored.device)
    if out.shape != (stored.shape[0], dim) or out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InvalidRequest(
            f"out must be float32, float16 or bfloat16 [{stored.shape[0]}, {dim}], got {out.dtype} {list(out.shape)}"
        )
    return out


def narrow_into(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write float `values` into `out` with the rounding of FBGEMM's CPU kernels.

    Those round float32 to bfloat16 half up in magnitude ((bits + 0x8000) >> 16). torch rounds half to even. Few
    bits times a half-precision scale make ties common: about 2 % of int8 values differ between the two.
    """
    if out.dtype != torch.bfloat16 or values.dtype == torch.bfloat16:
        return out.copy_(values)
    bits = values.to(torch.float32, copy=True).view(torch.int32).add_(0x8000).bitwise_right_shift_(16)
    return out.copy_(bits.to(torch.int16).view(torch.bfloat16))


def narrowed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 `values` as `dtype`, rounded as `narrow_into` does."""
    if dtype == torch.bfloat16:
        return narrow_into(torch.empty(values.shape, dtype=dtype), values)
    return values.to(dtype)


def check_finite(rows: torch.Tensor) -> None:
    """Raise UnencodableRow for the first row with a NaN or an infinity."""
    # One sum finds any of them in one pass. It may overflow by itself, so look closer only then.
    if torch.isfinite(rows.sum(dtype=torch.float32)):
        return
    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        raise UnencodableRow(int(bad.int().argmax()), "holds a value that is not finite (NaN or infinity)")
