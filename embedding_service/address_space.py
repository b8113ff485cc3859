"""One linear range of virtual addresses for a whole table.

A part's bytes are a whole number of pages (the store sees to it), so the parts of a table can be mapped side by side,
each where its rows belong: row r lies at r * row_bytes whatever part it is in and whichever parts are held. A row id is
then an index into one tensor, and one FBGEMM call serves a batch that spans parts. Addresses of parts that are not held
take no memory. They must be readable all the same (as zeros): FBGEMM's int4 kernel loads whole vectors and so reads up
to 64 bytes past a row's end, which may be the end of a part. Callers check what is held before they ask for a row.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from embedding_service.errors import NoRoom
from embedding_service.late import late

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
else:
    np, torch = late("numpy"), late("torch")

# Up to this many rows, numpy copies them sooner than torch. Of more, torch's threads may share the work.
_FEW_ROWS = 1024

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20

_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_MADV_RANDOM, _MADV_WILLNEED, _MADV_HUGEPAGE, _MADV_COLLAPSE = 1, 3, 14, 25
# From now on nobody maps or opens the file for writing. Existing mappings may go on. Python has no name for it.
_FUTURE_WRITE = 16
# Addresses without memory: they read as zeros.
_NOTHING = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def round_up(nbytes: int, unit: int = PAGE) -> int:
    """The smallest multiple of `unit` that holds `nbytes`."""
    return -(-nbytes // unit) * unit


def take_rows(
    rows: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Copies of the `rows` [rows, row_bytes] with these `ids` [n], each in range: [n, row_bytes], in `out` if given."""
    if len(ids) <= _FEW_ROWS:
        return rows.take(ids, 0, out, "clip")  # with another mode numpy would fill a copy of `out`
    taken = np.empty((len(ids), rows.shape[1]), np.uint8) if out is None else out
    torch.index_select(torch.from_numpy(rows), 0, torch.from_numpy(ids), out=torch.from_numpy(taken))
    return taken


def most_maps() -> int:
    """Mappings that the kernel lets a process have. Linux's own number where it does not say."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65_530


class AddressSpace:
    """A reserved range of `nbytes` addresses, into which memory and files are mapped by offset.

    Offsets must be multiples of the page size; lengths are rounded up to it. The addresses go when this object does:
    `tensor` and views of it must not outlive it.

    Args:
        shared: Each piece of memory is a file without a name, which other processes can map (`file_at`).

    Attributes:
        address: Of the first byte.
    """

    def __init__(self, nbytes: int, *, shared: bool = False) -> None:
        self.nbytes = nbytes
        self._files: dict[int, int] | None = None
        if shared:
            self._files = {}
            weakref.finalize(self, _close_all, self._files)
        # One huge page more than asked, so that the range can begin on a huge page's boundary.
        self._reserved = round_up(nbytes) + HUGE_PAGE
        self._origin = self._mmap(None, self._reserved, _PROT_READ, _NOTHING)
        # Not at the interpreter's exit: threads may still look at them then.
        weakref.finalize(self, _libc.munmap, self._origin, self._reserved).atexit = False
        self.address = round_up(self._origin, HUGE_PAGE)
        self.tensor: torch.Tensor = torch.frombuffer(
            (ctypes.c_uint8 * nbytes).from_address(self.address), dtype=torch.uint8
        )

    def map_memory(self, offset: int, nbytes: int) -> torch.Tensor:
        """Back [offset, offset + nbytes) with zeroed memory, in huge pages where the kernel gives them.

        Returns it as a uint8 tensor [nbytes]. Raises NoRoom.
        """
        if self._files is None:
            address = self._map(offset, nbytes, _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS)
            _libc.madvise(address, round_up(nbytes), _MADV_HUGEPAGE)
        else:
            self._files[offset] = fd = memory_file("embedding-rows", self._shift(offset) + round_up(nbytes))
            address = self._map(offset, nbytes, _PROT_READ | _PROT_WRITE, _MAP_SHARED, fd, self._shift(offset))
            _take_huge_pages(address, nbytes)
        return self.tensor[offset : offset + nbytes]

    def file_at(self, offset: int) -> tuple[int, int]:
        """The file of the memory at `offset`, of a `shared` one, and where in that file it begins."""
        assert self._files is not None
        return self._files[offset], self._shift(offset)

    def seal(self, offset: int) -> None:
        """Nobody else can write to the memory at `offset` from now on, nor cut it short. Where the kernel can: 5.1."""
        if self._files is not None:
            with suppress(OSError):
                seal(self._files[offset])

    def map_file(self, offset: int, nbytes: int, fd: int, file_offset: int) -> torch.Tensor:
        """Show `nbytes` of an open file from `file_offset` (a multiple of the page size) at `offset`, read-only.

        Returns it as a uint8 tensor [nbytes]. Raises NoRoom.
        """
        address = self._map(offset, nbytes, _PROT_READ, _MAP_SHARED, fd, file_offset)
        # Rows are asked at random: read-ahead would fill the page cache with neighbours nobody asked for.
        _libc.madvise(address, round_up(nbytes), _MADV_RANDOM)
        return self.tensor[offset : offset + nbytes]

    def resident(self, offsets: Sequence[int]) -> bool:
        """Whether the page at each offset is in memory: reading it waits for no disk.

        True too where the kernel does not say (of files that this process may not write).
        """
        page = ctypes.c_ubyte()
        for offset in offsets:
            if (
                _libc.mincore(self.address + offset // PAGE * PAGE, PAGE, ctypes.byref(page)) == 0
                and not page.value & 1
            ):
                return False
        return True

    def read_ahead(self, offsets: Sequence[int], nbytes: int) -> None:
        """Start reading the pages of `nbytes` at each offset from disk, in parallel. Does not wait for them."""
        for offset in offsets:
            first = offset // PAGE * PAGE
            _libc.madvise(self.address + first, offset + nbytes - first, _MADV_WILLNEED)

    def unmap(self, offset: int, nbytes: int) -> None:
        """Give the memory behind [offset, offset + nbytes) back; the addresses stay reserved."""
        self._map(offset, nbytes, _PROT_READ, _NOTHING)
        if self._files is not None and offset in self._files:
            os.close(self._files.pop(offset))  # its memory goes once nobody has it mapped

    @staticmethod
    def _shift(offset: int) -> int:
        """Where memory begins in its file: as far from a huge page's boundary as its address, so that it can be one."""
        return offset % HUGE_PAGE

    def _map(self, offset: int, nbytes: int, protection: int, flags: int, fd: int = -1, file_offset: int = 0) -> int:
        if offset % PAGE or file_offset % PAGE:
            raise ValueError(f"offset {offset} and file offset {file_offset} must be multiples of {PAGE}")
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ValueError(f"[{offset}, {offset + nbytes}) lies outside the {self.nbytes} reserved bytes")
        return self._mmap(self.address + offset, round_up(nbytes), protection, flags | _MAP_FIXED, fd, file_offset)

    @staticmethod
    def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int = -1, file_offset: int = 0) -> int:
        result = _libc.mmap(address, nbytes, protection, flags, fd, file_offset)
        if result is None or result == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise NoRoom(f"mapping {nbytes:,} bytes failed: {os.strerror(code)}")
        return int(result)


def memory_file(name: str, nbytes: int) -> int:
    """A file in memory, of zeros, which can be sealed: its descriptor. `name` is for people. Raises NoRoom."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise NoRoom(f"no file in memory: {error.strerror}") from error
    os.ftruncate(fd, nbytes)
    return fd


def seal(fd: int) -> None:
    """Let nobody write to a memory file, except by mappings that exist, nor change its size. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _FUTURE_WRITE | fcntl.F_SEAL_SEAL)


def can_seal() -> bool:
    """Whether this kernel can: Linux 5.1 can, and not everything that looks like Linux."""
    try:
        fd = memory_file("embedding-trial", PAGE)
    except MemoryError:
        return False
    try:
        seal(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def sealed(fd: int) -> bool | None:
    """Whether a memory file is sealed as `seal` does; None for a file that is none."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return None
    return bool(seals & fcntl.F_SEAL_SHRINK and seals & (fcntl.F_SEAL_WRITE | _FUTURE_WRITE))


def _take_huge_pages(address: int, nbytes: int) -> None:
    """Back new memory of a file with huge pages where the kernel can (6.1), whatever its default for such memory is.

    Rows at random take up to three times as long from small ones. A page is written to first, for there must be
    something to collapse; without zeros to copy it costs no more than small pages do.
    """
    first, last = round_up(address, HUGE_PAGE), (address + nbytes) // HUGE_PAGE * HUGE_PAGE
    for page in range(first, last, HUGE_PAGE):
        ctypes.memset(page, 0, 1)
        if _libc.madvise(page, HUGE_PAGE, _MADV_COLLAPSE):
            return


def _close_all(files: dict[int, int]) -> None:
    for fd in files.values():
        os.close(fd)
