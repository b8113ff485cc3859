"""The safetensors container, as far as streaming needs it: where each tensor's bytes lie in the file.

The safetensors library maps whole files; an import reads and writes pieces with plain reads and writes, so that its
memory stays small and its own. The format, as its README has it: u64 little-endian length
of the header, the header in JSON (it may end in spaces), the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from embedding_service.errors import StoreError

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
PAGE_BYTES = 4096
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


class BadTensorFile(StoreError):
    """Not a whole safetensors file; the message says which and why."""


@dataclass(frozen=True)
class TensorSpan:
    """One tensor of a file: its safetensors dtype and shape, and its bytes at [offset, offset + bytes) of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return ITEM_BYTES[dtype] * math.prod(shape)


def read_spans(path: Path) -> dict[str, TensorSpan]:
    """Return every tensor of a safetensors file. Raises BadTensorFile if it cannot be one or is cut short."""
    try:
        size = path.stat().st_size
        header, start = _read_header(path, size)
        spans = {name: _span(entry, start) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise BadTensorFile(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadTensorFile(f"{path} is not a safetensors file: {error}") from error
    end = max((span.offset + span.bytes for span in spans.values()), default=start)
    if end > size:
        raise BadTensorFile(f"{path} is cut short: {size:,} bytes, its header speaks of {end:,}")
    return spans


def _read_header(path: Path, size: int) -> tuple[dict[str, dict], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or not 2 <= length <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        return json.loads(file.read(length)), _LENGTH_BYTES + length


def _span(entry: dict, start: int) -> TensorSpan:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if begin < 0 or min(shape, default=0) < 0 or end - begin != tensor_bytes(dtype, shape):
        raise ValueError(f"{dtype} {list(shape)} does not fit the bytes {begin} to {end}")
    return TensorSpan(dtype, shape, start + begin, end - begin)


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Bytes that go before the data of `tensors` (name -> dtype, shape), laid side by side in this order.

    The header is padded with spaces so that the data begins on a page: then it can be mapped wherever a page can.
    """
    entries, begin = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = begin + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header = header.ljust(-(-(_LENGTH_BYTES + len(header)) // PAGE_BYTES) * PAGE_BYTES - _LENGTH_BYTES)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header
