"""The rows of one version of a table, over rows that several versions share.

A version may be its base but for some rows. A shard holds the base's parts once, in a table of its tier: the ground.
Each version has an `OverlaidTable` on it. A gather reads the ground, and puts the rows over it that the version
replaces. Those lie in host memory, or under `mmap` in their file.
"""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedding_service.errors import InvalidRequest
from embedding_service.late import late
from embedding_service.rows.base import STORED, Bytes, Ids, Location, TableRows
from embedding_service.rows.mmap import FileTable
from embedding_service.store.manifest import Part, Table
from embedding_service.store.overlays import Replaced
from embedding_service.store.parts import Pace

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")

# What a word of a bitmap tells of: 64 numbers, the low 6 bits of which say which bit.
_WORD_ROWS, _WORD_BITS, _LOW = 64, 6, 63
_ONE = np.uint64(1)
# Ids up to which Python's numbers are faster than numpy's: a token's, and some.
_FEW = 24
# Encodings that `formats` decodes few rows to in less time than FBGEMM's kernel takes twice.
_QUICK = ("fp32", "fp16")
# Of a table's rows, the share above which nearly every word tells of some: then there is a word for all rows.
_DENSE = 1 / 64


class OverlaidTable(TableRows):
    """A version's table: rows of the ground, and those that the version replaces.

    It holds a part when the ground does and the replaced rows are there. `hold` and `drop` keep to that order: the
    ground's part is loaded before `hold`, and given up after `drop`.

    Args:
        table: As the manifest has it, which is as the ground's is.
        ground: The rows that versions share.
        replaced: Rows that the version replaces, in all parts together.
    """

    def __init__(self, table: Table, ground: TableRows, replaced: int = 0) -> None:
        super().__init__(table)
        self._ground = ground
        self._over = _Over(table, dense=replaced > table.rows * _DENSE) if replaced else None
        self._changing = threading.Lock()  # parts that go, against those that are folded in

    def hold(self, part: Part, replaced: Replaced, place: Location | None = None) -> None:
        """Answer for a part, which the ground holds, with these rows in place of the ground's.

        place: where the rows lie in a file, in which they are mapped. None: they are copied.
        """
        if len(replaced.ids):
            with self._changing:  # parts are loaded by several threads
                self._over = self._over or _Over(self.table, dense=False)
            self._over.put(part, replaced, place)
        self._generation[part.index] = next(self._loads)

    def drop(self, part: Part) -> None:
        """See the base class."""
        with self._changing:
            super().drop(part)

    def fold(self, part: Part) -> Replaced:
        """Put a part's replaced rows into the ground, which no other version uses there. Returns the ground's rows.

        Gathers go on, and are right at each moment. First the ground has the rows too, while those over it count. Then
        they count no more: what a gather found before that is used only if it ends before they go.
        """
        over = self._over
        with self._changing:
            if over is None or not self.replaces(part):
                return Replaced.none(self.table.row_bytes)
            replaced = over.content(part)
        below = Replaced(replaced.ids, self._ground.read(replaced.ids))
        self._ground.write(replaced.ids, replaced.rows)
        with self._changing:
            if self._generation[part.index]:
                over.forget(part)
                self._generation[part.index] = next(self._loads)
                over.remove(part)
        return below

    def at_hand(self, ids: Ids) -> bool:
        """See the base class."""
        if not self._ground.at_hand(ids):
            return False
        over = self._over
        return over is None or not over.in_files or over.rows.at_hand(over.find(ids)[1])

    def read_ahead(self, ids: Ids) -> None:
        """See the base class."""
        self._ground.read_ahead(ids)
        over = self._over
        if over is not None and over.in_files:
            over.rows.read_ahead(over.find(ids)[1])

    def location(self, part: Part, path: Path) -> Location:
        """Of a part without replaced rows: where the ground's are. Raises InvalidRequest for others."""
        if self.replaces(part):
            raise InvalidRequest(f"part {part.index} of {self.table.name} lies in two places: no process can map it")
        return self._ground.location(part, path)

    def replaces(self, part: Part) -> bool:
        """Whether any row of a held part is not the ground's."""
        return self._over is not None and self._over.has(part)

    def _load(self, part: Part, path: Path, pace: Pace) -> None:
        raise InvalidRequest("a part is loaded into the ground: see `hold`")

    def _unload(self, part: Part) -> None:
        if self._over is not None:
            self._over.remove(part)

    def _gather(self, ids: Ids, encoding: str, out: Bytes | None) -> Bytes:
        over = self._over
        if over is None:
            return self._ground._gather(ids, encoding, out)
        found, places = over.find(ids)  # before the ground is read: see `fold`
        if not len(found):
            return self._ground._gather(ids, encoding, out)
        # Decoding a few rows takes as long as decoding one, so it is done once.
        decodes = len(ids) <= _FEW and encoding in _QUICK and encoding != self.table.dtype
        source, place = (STORED, None) if decodes else (encoding, out)
        rows = self._ground._gather(ids, source, place)
        rows[found] = over.rows._gather(places, source, None)
        if not decodes:
            return rows
        values = self._decode(torch.from_numpy(rows), encoding).view(torch.uint8).numpy()
        if out is None:
            return values
        out[:] = values
        return out


class _Over:
    """The rows that a version replaces, and where each of them is.

    Row i of a part's replaced rows lies at the part's first row + i of `rows`, a table of as many addresses as the
    ground has. So parts come and go without moving others.

    The index is a bitmap of the table's rows with ranks: a word tells which of 64 rows are replaced, and where the
    first of them lies. A dense index has a word for all rows. A sparse one has words where rows are replaced, and
    another bitmap with ranks of the words, which is small enough for a processor's cache.

    Attributes:
        rows: The replaced rows.
        in_files: Whether some of them may have to come from a disk.
    """

    def __init__(self, table: Table, dense: bool) -> None:
        self.rows = _ReplacedRows(table)
        self._step = table.rows_per_part
        unit = _WORD_ROWS if dense else _WORD_ROWS * _WORD_ROWS
        # No word, and in a sparse index no word of words, tells of two parts.
        self._gap = -self._step % unit
        self._words_per_part = (self._step + self._gap) // _WORD_ROWS
        words = len(table.parts) * self._words_per_part
        self._words = _Bitmap(words)
        self._tops = None if dense else _Bitmap(words // _WORD_ROWS)
        self._ids: dict[int, Ids] = {}
        self.in_files = False

    def has(self, part: Part) -> bool:
        """Whether a part has replaced rows."""
        return part.index in self._ids

    def put(self, part: Part, replaced: Replaced, place: Location | None) -> None:
        """Take a part's rows in."""
        self.rows.put(part, replaced.rows, place)
        self.in_files |= place is not None
        begin, _ = self._words_of(part)
        local = replaced.ids - part.first_row
        if self._tops is None:
            self._words.put(begin * _WORD_ROWS + local, part.first_row)
        else:
            numbers, packed = np.unique(local // _WORD_ROWS, return_inverse=True)
            self._words.put((begin + packed) * _WORD_ROWS + local % _WORD_ROWS, part.first_row)
            self._tops.put(begin + numbers, begin)
        self._ids[part.index] = replaced.ids.copy()  # not a view of what was read with the rows

    def content(self, part: Part) -> Replaced:
        """What was put."""
        ids = self._ids[part.index]
        return Replaced(ids, self.rows.read(part.first_row + np.arange(len(ids))))

    def forget(self, part: Part) -> None:
        """Find none of a part's rows from now on. They stay where they are, for who found them before."""
        if self._tops is not None:
            self._tops.forget(*(end // _WORD_ROWS for end in self._words_of(part)))
        self._words.forget(*self._words_of(part))

    def remove(self, part: Part) -> None:
        """Give a part's memory back."""
        if self._ids.pop(part.index, None) is not None:
            if self._tops is not None:
                self._tops.clear(*(end // _WORD_ROWS for end in self._words_of(part)))
            self._words.clear(*self._words_of(part))
            self.rows.remove(part)

    def _words_of(self, part: Part) -> tuple[int, int]:
        return part.index * self._words_per_part, (part.index + 1) * self._words_per_part

    def find(self, ids: Ids) -> tuple[Ids, Ids]:
        """Which of `ids` are replaced, as positions int64 [k], and where in `rows` each of these lies, int64 [k]."""
        if len(ids) <= _FEW:
            found_few, places_few = self._find_few(ids.tolist())
            return np.array(found_few, np.int64), np.array(places_few, np.int64)
        at = ids + ids // self._step * self._gap if self._gap else ids
        if self._tops is None:
            return self._words.find(at)
        known, words = self._tops.find(at >> _WORD_BITS)
        if not len(known):
            return known, words
        found, places = self._words.find(words << _WORD_BITS | at[known] & _LOW)
        return known[found], places

    def _find_few(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """`find`, where numpy's calls would take longer than the work."""
        at = [id + id // self._step * self._gap for id in ids] if self._gap else ids
        if self._tops is None:
            return self._words.find_few(at)
        known, words = self._tops.find_few([each >> _WORD_BITS for each in at])
        packed = [word << _WORD_BITS | at[index] & _LOW for index, word in zip(known, words, strict=True)]
        found, places = self._words.find_few(packed)
        return [known[index] for index in found], places


class _Bitmap:
    """Which of some numbers are in a set, and the rank of those that are. Its memory is taken where it is written to.

    Args:
        words: Of 64 numbers each.
    """

    def __init__(self, words: int) -> None:
        nbytes, private = max(1, words) * 8, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = [mmap.mmap(-1, nbytes, private), mmap.mmap(-1, nbytes, private)]
        for each in self._memory:
            each.madvise(mmap.MADV_NOHUGEPAGE)
        self._bits = np.frombuffer(self._memory[0], np.uint64)
        self._first = np.frombuffer(self._memory[1], np.int64)
        # The same memory, for single numbers.
        self._bits_one = memoryview(self._memory[0]).cast("Q")
        self._first_one = memoryview(self._memory[1]).cast("q")

    def put(self, numbers: Ids, rank: int) -> None:
        """Add ascending numbers, the first of which has this rank. They are in words that have none yet."""
        words, begins = np.unique(numbers >> _WORD_BITS, return_index=True)
        bits = np.left_shift(np.uint64(1), (numbers & _LOW).view(np.uint64))
        self._first[words] = rank + begins
        self._bits[words] = np.bitwise_or.reduceat(bits, begins)

    def forget(self, begin: int, end: int) -> None:
        """Take all numbers of the words [begin, end) out. Ranks stay, for who is looking at them."""
        bits = self._bits[begin:end]
        bits[bits != 0] = 0  # pages that were never written to stay so

    def clear(self, begin: int, end: int) -> None:
        """Take all numbers of the words [begin, end) out, and give their memory back."""
        self.forget(begin, end)
        first = self._first[begin:end]
        first[first != 0] = 0
        page, last = -(-begin * 8 // mmap.PAGESIZE), end * 8 // mmap.PAGESIZE
        if last > page:
            for memory in self._memory:
                memory.madvise(mmap.MADV_DONTNEED, page * mmap.PAGESIZE, (last - page) * mmap.PAGESIZE)

    def find(self, numbers: Ids) -> tuple[Ids, Ids]:
        """Which of `numbers` are in the set, as positions int64 [k], and the rank of each of these, int64 [k]."""
        words = numbers >> _WORD_BITS
        bits = self._bits.take(words)
        shifts = (numbers & _LOW).view(np.uint64)
        found = (bits >> shifts & _ONE).nonzero()[0]
        if not len(found):
            return found, found
        below = bits.take(found) & (_ONE << shifts.take(found)) - _ONE
        return found, self._first.take(words.take(found)) + count_bits(below)

    def find_few(self, numbers: list[int]) -> tuple[list[int], list[int]]:
        """`find` in Python's numbers."""
        found, ranks = [], []
        for index, number in enumerate(numbers):
            bits, shift = self._bits_one[number >> _WORD_BITS], number & _LOW
            if bits >> shift & 1:
                found.append(index)
                ranks.append(self._first_one[number >> _WORD_BITS] + (bits & (1 << shift) - 1).bit_count())
        return found, ranks


class _ReplacedRows(FileTable):
    """Rows in the place of others. Those of a part lie side by side from the part's first row on."""

    def put(self, part: Part, rows: Bytes, place: Location | None) -> None:
        """Copy a part's rows into memory, or map them where they lie in a file."""
        begin = part.first_row * self.table.row_bytes
        if place is None:
            self._space.map_memory(begin, rows.nbytes).copy_(torch.from_numpy(rows.reshape(-1)))
            return
        with Path(place.path).open("rb") as file:
            self._space.map_file(begin, rows.nbytes, file.fileno(), place.offset)

    def remove(self, part: Part) -> None:
        """Give the memory back."""
        self._unload(part)

    def _place(self, part: Part, path: Path, offset: int, pace: Pace) -> None:
        raise InvalidRequest("rows are put here")


def count_bits(words: npt.NDArray[np.uint64]) -> Ids:
    """Bits that are set in each word: int64 [n]. numpy has a function for it since 2.0."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words).astype(np.int64)
    return np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1, dtype=np.int64)
