"""How one row lies in bytes, a file for each kind of row. See `base.RowFormat`.

Decoding is pure torch: the light client does it without FBGEMM. Encoding n-bit rows, which only an import needs, uses
FBGEMM's quantizer. A new format is one class in a file of its own, and one line in `FORMATS`.
"""

from __future__ import annotations

from functools import cache

from embedding_service.formats.base import RowFormat
from embedding_service.registry import Registry

FORMATS: Registry[RowFormat] = Registry(
    "dtype",
    "embedding_service.formats.base:RowFormat",
    {
        "fp32": "embedding_service.formats.plain:Fp32Format",
        "fp16": "embedding_service.formats.plain:Fp16Format",
        "bf16": "embedding_service.formats.plain:Bf16Format",
        "int8": "embedding_service.formats.nbit:Int8Format",
        "int4": "embedding_service.formats.nbit:Int4Format",
        "fp8": "embedding_service.formats.fp8:Fp8Format",
        "fp8_rowwise": "embedding_service.formats.scaled:Fp8RowwiseFormat",
        "nvfp4": "embedding_service.formats.scaled:Nvfp4Format",
    },
)


@cache
def get_format(name: str) -> RowFormat:
    """Return the format of that name. Raises InvalidRequest naming the known ones."""
    return FORMATS.find(name)()


@cache
def kept_formats() -> dict[str, str]:
    """By safetensors dtype, the format that the rows of a checkpoint's matrix have already: what `keep` stands for."""
    return {each.source_dtype: name for name, each in FORMATS.items() if each.source_dtype}


__all__ = ["FORMATS", "RowFormat", "get_format", "kept_formats"]
