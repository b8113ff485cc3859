"""The manifest: what one version of a model's tables is, and where every row of it lies."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from embedding_service.errors import InvalidRequest, NotFound, StoreError
from embedding_service.foreign import printable
from embedding_service.formats import get_format

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")

# What the wire (dim: uint32), the planner (sums of bytes: int64) and a process can carry, with room to spare.
MOST_ROWS = 1 << 48
MOST_DIM = 1 << 20
MOST_PARTS = 100_000
MOST_BYTES = 1 << 56
# Of a row id in an overlay's file.
ID_BYTES = 8
# Of the errors that pydantic finds in a manifest.
_ERRORS_NAMED = 3


def check_name(name: str) -> str:
    """Return a valid model, version or table name (it becomes a folder). Raises InvalidRequest."""
    if not _NAME.fullmatch(name) or len(name) > 128:
        raise InvalidRequest(
            f"{name!r} cannot be a name: use up to 128 letters, digits and _ . + - and begin with a letter, digit or _"
        )
    return name


def part_file(table: str, index: int) -> str:
    """Where a part lies within the version's folder. No manifest can say otherwise."""
    return f"{table}/part-{index:05d}.safetensors"


def overlay_file(table: str, index: int) -> str:
    """Where the rows lie that replace some of a part of the base, within the version's folder."""
    return f"{table}/overlay-{index:05d}.safetensors"


def _without_infinities(value: Any) -> Any:
    """Refuse what Python reads and JSON cannot say: it would be written as null."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _without_infinities(each)
    return value


Json = str | bytes
Name = Annotated[str, AfterValidator(check_name)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Frozen):
    """A contiguous row range of a table: one file."""

    index: int = Field(ge=0, lt=MOST_PARTS)
    first_row: int = Field(ge=0, lt=MOST_ROWS)
    rows: int = Field(ge=1, le=MOST_ROWS)
    # Relative to the version's folder, with forward slashes.
    file: str
    # Bytes of the rows alone, without the file's header. The checksum is over these.
    bytes: int = Field(ge=1, le=MOST_BYTES)
    checksum: str = Field(pattern=r"^xxh3-128:[0-9a-f]{32}$")


class Table(_Frozen):
    """A matrix [rows, dim] stored in one dtype. Row r lies in part r // rows_per_part."""

    name: Name
    rows: int = Field(ge=1, le=MOST_ROWS)
    dim: int = Field(ge=1, le=MOST_DIM)
    dtype: str
    row_bytes: int = Field(ge=1)
    rows_per_part: int = Field(ge=1, le=MOST_ROWS)
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes

    @model_validator(mode="after")
    def _parts_cover_the_rows(self) -> Table:
        expected_row_bytes = get_format(self.dtype).row_bytes(self.dim)
        if self.row_bytes != expected_row_bytes:
            raise ValueError(f"{self.dtype} rows of {self.dim} have {expected_row_bytes} bytes, not {self.row_bytes}")
        if len(self.parts) != -(-self.rows // self.rows_per_part):
            raise ValueError(f"table {self.name}: {len(self.parts)} parts for {self.rows} rows")
        for index, part in enumerate(self.parts):
            first_row = index * self.rows_per_part
            rows = min(self.rows_per_part, self.rows - first_row)
            if (part.index, part.first_row, part.rows, part.bytes) != (index, first_row, rows, rows * self.row_bytes):
                raise ValueError(f"table {self.name}: part {index} must be rows {first_row} to {first_row + rows - 1}")
            if part.file != part_file(self.name, index):
                raise ValueError(f"table {self.name}: part {index} must be the file {part_file(self.name, index)}")
        return self


class Overlay(_Frozen):
    """Rows that replace some of a part of the base: one file, of their ids and of them as they are stored."""

    # Of the table's parts, the one they fall in.
    part: int = Field(ge=0, lt=MOST_PARTS)
    rows: int = Field(ge=1, le=MOST_ROWS)
    # Relative to the version's folder, with forward slashes.
    file: str
    # Of ids and rows together. The checksum is over these.
    bytes: int = Field(ge=1, le=MOST_BYTES)
    checksum: str = Field(pattern=r"^xxh3-128:[0-9a-f]{32}$")


class Base(_Frozen):
    """The version whose part files a version uses, and the rows that it replaces.

    A base is a whole version, never one with a base of its own.
    """

    model: Name
    version: Name
    # For each table that has any, in the order of the parts.
    overlays: dict[Name, tuple[Overlay, ...]]
    # The version whose rows these are, where a rollback made this one.
    restores: Name | None = None
    # MODEL@VERSION of the import to whose checkpoint's dense half these rows belong. None: this version's own import.
    checkpoint: str | None = None


class Dense(_Frozen):
    """Tensors of the checkpoint that stay with the worker."""

    tensors: tuple[str, ...]


class Provenance(_Frozen):
    """Where the tables came from."""

    checkpoint: str
    # The checkpoint's safetensors files that held rows, with their bytes.
    files: dict[str, int]
    # The safetensors dtypes of the rows there, and their bytes.
    source_dtype: str
    source_bytes: int
    imported_at: str
    importer: str


class Manifest(_Frozen):
    """One version of one model, as STORE/MODEL/VERSION/manifest.json says it."""

    # 2: with a base, which readers of 1 do not know.
    format_version: Literal[1, 2] = 1
    model: Name
    version: Name
    # "longcat", for example. Empty for tables that are addressed by row id only.
    family: str
    # What NgramHasher.from_params takes.
    hash_params: Annotated[dict[str, Any], AfterValidator(_without_infinities)]
    # With a base, these are the base's: its parts, to be found in its folder.
    tables: tuple[Table, ...] = Field(min_length=1)
    dense: Dense | None = None
    provenance: Provenance | None = None
    base: Base | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all rows of all tables."""
        return sum(table.bytes for table in self.tables)

    @property
    def full_name(self) -> str:
        """`model@version`."""
        return f"{self.model}@{self.version}"

    @property
    def root(self) -> tuple[str, str]:
        """(model, version) of the folder that the parts lie in: the base's, or its own."""
        return (self.base.model, self.base.version) if self.base else (self.model, self.version)

    @property
    def checkpoint(self) -> str:
        """`model@version` of the import to whose checkpoint's dense half the rows belong."""
        return (self.base.checkpoint if self.base else None) or self.full_name

    @property
    def replaced_rows(self) -> int:
        """Rows that are not the base's."""
        return sum(overlay.rows for table in self.tables for overlay in self.overlays(table.name).values())

    @property
    def replaced_bytes(self) -> int:
        """Bytes of those rows, with their ids."""
        return sum(overlay.bytes for table in self.tables for overlay in self.overlays(table.name).values())

    @property
    def own_bytes(self) -> int:
        """Bytes of the rows that lie in its own folder: all, or those that are not the base's, with their ids."""
        return self.replaced_bytes if self.base else self.bytes

    @property
    def own_files(self) -> list[str]:
        """The files that lie in its own folder, besides the manifest."""
        if self.base:
            return [overlay.file for overlays in self.base.overlays.values() for overlay in overlays]
        return [part.file for table in self.tables for part in table.parts]

    def overlays(self, table: str) -> dict[int, Overlay]:
        """The rows that a table replaces, by part. Empty for a version without a base."""
        return {overlay.part: overlay for overlay in self.base.overlays.get(table, ())} if self.base else {}

    @model_validator(mode="after")
    def _tables_can_be_told_apart_and_carried(self) -> Manifest:
        if self.bytes > MOST_BYTES or sum(len(table.parts) for table in self.tables) > MOST_PARTS:
            raise ValueError(f"a version has at most {MOST_BYTES:,} bytes in {MOST_PARTS:,} parts")
        counts = Counter(table.name for table in self.tables)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"more than one table is named {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _overlays_fit_the_tables(self) -> Manifest:
        if (self.format_version == 2) != (self.base is not None):
            raise ValueError("a manifest of format version 2 has a base, and no other has")
        if self.base is None:
            return self
        if self.root == (self.model, self.version):
            raise ValueError("a version cannot be its own base")
        tables = {table.name: table for table in self.tables}
        for name, overlays in self.base.overlays.items():
            if name not in tables:
                raise ValueError(f"an overlay of table {name}, which is not there")
            _check_overlays(tables[name], overlays)
        return self

    def table(self, name: str) -> Table:
        """Return a table by name. Raises NotFound naming the known ones."""
        for table in self.tables:
            if table.name == name:
                return table
        known = ", ".join(table.name for table in self.tables)
        raise NotFound(f"model {self.model}@{self.version} has no table {name!r}; it has: {known}")

    def to_json(self) -> str:
        """As it lies on disk. Nothing is said of a base where there is none, so that older readers take it."""
        return self.model_dump_json(indent=1, exclude=None if self.base else {"base"})

    @classmethod
    def from_json(cls, text: Json, source: str) -> Manifest:
        """Read a manifest. `source` names it in errors. Raises StoreError, with one line that says what is wrong."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            wrong = "; ".join(_in_one_line(each) for each in error.errors(include_url=False)[:_ERRORS_NAMED])
        except InvalidRequest as error:
            wrong = str(error)
        raise StoreError(f"{source} is not a manifest that this version can read: {wrong}")


def _check_overlays(table: Table, overlays: tuple[Overlay, ...]) -> None:
    """Raise ValueError unless they can be of that table."""
    if [each.part for each in overlays] != sorted({each.part for each in overlays}):
        raise ValueError(f"table {table.name}: overlays must be one for each part, in the order of the parts")
    for each in overlays:
        if each.part >= len(table.parts) or each.rows > table.parts[each.part].rows:
            raise ValueError(f"table {table.name}: an overlay of {each.rows} rows in part {each.part}")
        if each.bytes != each.rows * (ID_BYTES + table.row_bytes):
            raise ValueError(f"table {table.name}: the overlay of part {each.part} has not the bytes of its rows")
        if each.file != overlay_file(table.name, each.part):
            raise ValueError(
                f"table {table.name}: the overlay of part {each.part} must be {overlay_file(table.name, each.part)}"
            )


def _in_one_line(error: ErrorDetails) -> str:
    where = ".".join(map(str, error["loc"]))
    return printable(" ".join(f"{where}: {error['msg']}".removeprefix(": ").split())[:500])
