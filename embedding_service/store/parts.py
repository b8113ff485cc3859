"""One part on disk: a safetensors file with one tensor, "rows", whose data begins on a page.

Every part of a table but the last is a whole number of pages long, so a shard can map the parts side by side into one
range of addresses in which a row id is an index.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import xxhash

from embedding_service.errors import BadTensorFile, CorruptPart, InvalidRequest
from embedding_service.formats import RowFormat
from embedding_service.late import late
from embedding_service.machine import open_file
from embedding_service.store.manifest import Part, part_file
from embedding_service.tensorfile import PAGE_BYTES, byte_view, header_bytes, read_spans

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

DEFAULT_PART_BYTES = 256 << 20
# By default a table has at least this many, if it has the rows. A small table is spread then, too.
DEFAULT_PARTS = 16
CHUNK_BYTES = 4 << 20
TENSOR_NAME = "rows"


def rows_per_part(row_bytes: int, part_bytes: int = DEFAULT_PART_BYTES) -> int:
    """Most rows that fill whole pages and at most `part_bytes`. Raises InvalidRequest if there are none."""
    step = PAGE_BYTES // math.gcd(PAGE_BYTES, row_bytes)
    if part_bytes < step * row_bytes:
        raise InvalidRequest(
            f"parts of {part_bytes:,} bytes are too small: rows of {row_bytes} bytes fill whole pages "
            f"only every {step * row_bytes:,} bytes"
        )
    return part_bytes // (step * row_bytes) * step


def default_rows_per_part(rows: int, row_bytes: int) -> int:
    """The default rows of a part: the most that give DEFAULT_PARTS parts and are at most DEFAULT_PART_BYTES."""
    least = PAGE_BYTES // math.gcd(PAGE_BYTES, row_bytes) * row_bytes
    share = (rows - 1) // (DEFAULT_PARTS - 1) * row_bytes
    return rows_per_part(row_bytes, max(least, min(share, DEFAULT_PART_BYTES)))


class PartLayout(NamedTuple):
    """Where a part's rows lie in its file, in bytes, and the tensor's dtype and shape there."""

    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


def part_layout(path: Path) -> PartLayout:
    """Read and check a part's header. Raises CorruptPart if this is no whole part file."""
    try:
        spans = read_spans(path)
    except BadTensorFile as error:
        raise CorruptPart(f"{error}: import the table again") from error
    if list(spans) != [TENSOR_NAME]:
        raise CorruptPart(f"{path} is not a part: it holds {sorted(spans)} and not one tensor {TENSOR_NAME!r}")
    span = spans[TENSOR_NAME]
    if span.offset % PAGE_BYTES:
        raise CorruptPart(f"{path} is not a part: its rows do not begin on a page")
    return PartLayout(span.offset, span.bytes, span.dtype, span.shape)


# Called with the bytes of each chunk that was read. It may wait, which slows the reading down.
Pace = Callable[[int], None]


def at_once(chunk_bytes: int) -> None:
    """The pace that does not wait."""


def read_into(path: Path, part: Part, buffer: memoryview | torch.Tensor, pace: Pace = at_once) -> None:
    """Fill `buffer` (contiguous, exactly part.bytes) with the part's rows, hashing on the way.

    Raises CorruptPart if the file or its checksum is not the manifest's. The buffer then holds rubbish. Raises
    InvalidRequest for a buffer of another size. Other threads run all the while.
    """
    view = byte_view(buffer) if isinstance(buffer, torch.Tensor) else buffer.cast("B")
    if len(view) != part.bytes:
        raise InvalidRequest(f"a buffer of {len(view):,} bytes for part {part.file} of {part.bytes:,}")
    _read_checked(path, part, lambda begin, end: view[begin:end], pace)


def verify(path: Path, part: Part, pace: Pace = at_once) -> None:
    """Read the whole part, chunk by chunk, and raise CorruptPart unless it is what the manifest says."""
    scratch = memoryview(bytearray(min(CHUNK_BYTES, part.bytes)))
    _read_checked(path, part, lambda begin, end: scratch[: end - begin], pace)


def _read_checked(path: Path, part: Part, place: Callable[[int, int], memoryview], pace: Pace) -> None:
    """Read the part's bytes [begin, end) into place(begin, end), chunk by chunk."""
    layout = part_layout(path)
    if layout.bytes != part.bytes or layout.shape[:1] != (part.rows,):
        raise CorruptPart(
            f"{path}: expected {part.rows:,} rows in {part.bytes:,} bytes, got {list(layout.shape)} in {layout.bytes:,}"
        )
    if (got := read_hashed(path, layout.offset, part.bytes, place, pace)) != part.checksum:
        raise CorruptPart(f"{path} is corrupt: expected {part.checksum}, got {got}. Import the table again")


def read_hashed(path: Path, offset: int, nbytes: int, place: Callable[[int, int], memoryview], pace: Pace) -> str:
    """Read [begin, end) of the `nbytes` at `offset` into place(begin, end), chunk by chunk. Returns their checksum."""
    digest = xxhash.xxh3_128()
    with open_file(path) as file:
        file.seek(offset)
        for begin in range(0, nbytes, CHUNK_BYTES):
            chunk = place(begin, min(begin + CHUNK_BYTES, nbytes))
            _read_exactly(file, chunk, path)
            digest.update(chunk)
            pace(len(chunk))
    return _checksum(digest)


def _read_exactly(file: FileIO, chunk: memoryview, path: Path) -> None:
    done = 0
    while done < len(chunk):
        count = file.readinto(chunk[done:])
        if not count:
            raise CorruptPart(f"{path} ended while it was read")
        done += count


def _checksum(digest: xxhash.xxh3_128) -> str:
    return f"xxh3-128:{digest.hexdigest()}"


@dataclass(frozen=True)
class NewPart:
    """A part that is to be: `rows` rows of a table from `first_row` on, of `dim` values in a format."""

    table: str
    index: int
    first_row: int
    rows: int
    dim: int
    row_format: RowFormat

    @property
    def bytes(self) -> int:
        """Of its rows."""
        return self.rows * self.row_format.row_bytes(self.dim)

    @property
    def file(self) -> str:
        """Within the version's folder."""
        return part_file(self.table, self.index)


class RowsWriter:
    """Writes one file of rows chunk by chunk. The file takes its name only when it is whole and on disk.

    Use it as a context manager. Leaving it by an exception removes what was written.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self._path = path
        self._partial = path.with_suffix(".partial")
        self._header = header
        self._digest = xxhash.xxh3_128()

    def write(self, data: torch.Tensor) -> None:
        """Append a contiguous tensor's bytes."""
        view = byte_view(data)
        self._digest.update(view)
        self._write_all(view)

    def close(self) -> str:
        """Bring the file to disk under its name. Returns its checksum."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self._path)
        return _checksum(self._digest)

    def _write_all(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) :]

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb", buffering=0)
        try:
            self._write_all(memoryview(self._header))
        except OSError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class PartWriter(RowsWriter):
    """Writes one part. Its rows come as uint8 Tensor[n, row_bytes]."""

    def __init__(self, folder: Path, part: NewPart) -> None:
        self._part = part
        shape = part.row_format.part_shape(part.rows, part.dim)
        super().__init__(folder / part.file, header_bytes({TENSOR_NAME: (part.row_format.tensor_dtype, shape)}))

    def finish(self) -> Part:
        """Bring the file to disk under its name and return its entry for the manifest."""
        return Part(
            index=self._part.index,
            first_row=self._part.first_row,
            rows=self._part.rows,
            file=self._part.file,
            bytes=self._part.bytes,
            checksum=self.close(),
        )
