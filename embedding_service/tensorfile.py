"""The safetensors container, as far as streaming needs it: where each tensor's bytes lie in the file.

The safetensors library maps whole files. An import reads and writes pieces with plain reads and writes, so that its
memory stays small and its own. The format, as its README has it: the length of the header (u64, little-endian), the
header in JSON (it may end in spaces), and the tensors' bytes, which follow each other without gaps.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedding_service.errors import BadTensorFile
from embedding_service.foreign import shown
from embedding_service.late import late
from embedding_service.machine import open_file

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

ITEM_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
PAGE_BYTES = 4096
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
# No tensor library has as many. Products of many more would take for ever.
_MAX_DIMENSIONS = 64


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
    return -(-ITEM_BITS[dtype] * math.prod(shape) // 8)


def read_spans(path: Path) -> dict[str, TensorSpan]:
    """Return every tensor of a safetensors file, in the order of its header.

    Raises BadTensorFile unless its bytes are exactly its tensors', one after the other. Never waits for a FIFO.
    """
    try:
        header, start, size = _read_header(path)
        spans = {name: _span(name, entry, start) for name, entry in header.items() if name != "__metadata__"}
        _check_cover(path, spans, start, size)
    except OSError as error:
        raise BadTensorFile(f"{path}: {error.strerror}") from error
    except RecursionError:
        raise BadTensorFile(f"{path} is not a safetensors file: its header is nested without end") from None
    except ValueError as error:
        raise BadTensorFile(f"{path} is not a safetensors file: {error}") from error
    return spans


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the tensors begin, and the file's size."""
    with open_file(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or not 2 <= length <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    return header, _LENGTH_BYTES + length, size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header has two entries {shown(twice)}")
    return entries


def _span(name: str, entry: Any, start: int) -> TensorSpan:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise ValueError(f"tensor {shown(name)} has a dtype that is not known: {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {shown(name)} has no valid shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {shown(name)} has no valid data_offsets")
    begin, end = offsets
    if end - begin != tensor_bytes(dtype, shape):
        raise ValueError(f"tensor {shown(name)}: {dtype} {shown(shape)} does not fit the bytes {begin} to {end}")
    return TensorSpan(dtype, tuple(shape), start + begin, end - begin)


def _are_sizes(numbers: object) -> bool:
    """Whether they are a list of whole numbers of 64 bits."""
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _check_cover(path: Path, spans: dict[str, TensorSpan], start: int, size: int) -> None:
    """Raise BadTensorFile unless the tensors lie side by side from `start` to the file's end."""
    end, last = start, "the header"
    for name, span in sorted(spans.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if span.offset != end:
            between = "overlaps" if span.offset < end else "leaves a hole after"
            raise ValueError(f"tensor {shown(name)} {between} {last}")
        end, last = span.offset + span.bytes, f"tensor {shown(name)}"
    if end > size:
        raise BadTensorFile(f"{path} is cut short: {size:,} bytes, its header says {end:,}")
    if end < size:
        raise ValueError(f"it has {size - end:,} bytes that belong to no tensor")


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]], on_page: str | None = None) -> bytes:
    """The bytes before the data of `tensors` (name -> dtype, shape), which lie side by side in this order.

    The header is padded with spaces so that the data begins on a page, or that of tensor `on_page` does. Then it can be
    mapped wherever a page can.
    """
    entries, begin, before = {}, 0, 0
    for name, (dtype, shape) in tensors.items():
        before = begin if name == on_page else before
        end = begin + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    least = _LENGTH_BYTES + len(header) + before
    header = header.ljust(-(-least // PAGE_BYTES) * PAGE_BYTES - before - _LENGTH_BYTES)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header
