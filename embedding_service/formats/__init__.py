"""How one row lies in bytes, a file for each kind of row. See `base.RowFormat`.

Decoding is pure torch, so the light client needs no FBGEMM. Encoding n-bit rows, which only an import does, uses
FBGEMM's quantizer. A new format is one class here.
"""

from __future__ import annotations

from embedding_service.errors import InvalidRequest
from embedding_service.formats.base import RowFormat, UnencodableRow
from embedding_service.formats.fp8 import Fp8Format
from embedding_service.formats.nbit import Int4Format, Int8Format
from embedding_service.formats.plain import Bf16Format, Fp16Format, Fp32Format

FORMATS: dict[str, RowFormat] = {
    row_format.name: row_format
    for row_format in (Fp32Format(), Fp16Format(), Bf16Format(), Int8Format(), Int4Format(), Fp8Format())
}


def get_format(name: str) -> RowFormat:
    """Return the format of that name. Raises InvalidRequest naming the known ones."""
    try:
        return FORMATS[name]
    except KeyError:
        raise InvalidRequest(f"unknown dtype {name!r}; known: {', '.join(FORMATS)}") from None


__all__ = ["FORMATS", "RowFormat", "UnencodableRow", "get_format"]
