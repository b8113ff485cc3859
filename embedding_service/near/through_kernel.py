"""Copying rows of mapped files in a way that survives what may become of a file.

A file may be cut short, or its disk may fail. A process that then reads the page is killed by a signal (SIGBUS). The
kernel, asked to write such a page somewhere, answers with an error instead. So rows of files are written from where
they are mapped into memory of this thread's own, a thousand in a call.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from embedding_service.address_space import AddressSpace, memory_file, round_up

# IOV_MAX: pieces a call may have.
_MOST_PIECES = 1024
# Rows that are looked at to find out whether they are in memory: a microsecond each.
_LOOKED_AT = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pwritev.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long]
_libc.pwritev.restype = ctypes.c_ssize_t


class _Memory:
    """Memory of one thread that is a file to the kernel."""

    def __init__(self, nbytes: int) -> None:
        self.fd = memory_file("embedding-copy", round_up(nbytes))
        self.bytes = np.frombuffer(mmap.mmap(self.fd, round_up(nbytes)), np.uint8)

    def __del__(self) -> None:
        with suppress(AttributeError):
            os.close(self.fd)


class _Scratch(threading.local):
    """A thread's own memory. It grows to its largest copy."""

    memory: _Memory | None = None

    def take(self, nbytes: int) -> _Memory:
        """At least `nbytes` bytes. Raises MemoryError, OSError."""
        if self.memory is None or nbytes > len(self.memory.bytes):
            self.memory = None  # before the new one is made: never twice the bytes
            self.memory = _Memory(nbytes)
        return self.memory


_scratch = _Scratch()


def _begin_fresh() -> None:
    """In a child of a fork, which would share its parent's memory, and write to it while its parent does."""
    global _scratch
    _scratch = _Scratch()


os.register_at_fork(after_in_child=_begin_fresh)


def copy(space: AddressSpace, ids: npt.NDArray[np.int64], row_bytes: int) -> npt.NDArray[np.uint8] | None:
    """Rows `ids` [n] of a table that begins with `space`: uint8 [n, row_bytes].

    None where they are not in memory, as a sample tells, or cannot be had.
    """
    sample = ids[:: max(1, len(ids) // _LOOKED_AT)]
    if not space.resident((sample * row_bytes).tolist()):
        return None
    try:
        memory = _scratch.take(len(ids) * row_bytes)
    except (MemoryError, OSError):
        return None
    pieces = np.empty((len(ids), 2), np.int64)
    pieces[:, 0] = ids * row_bytes + space.address
    pieces[:, 1] = row_bytes
    for begin in range(0, len(ids), _MOST_PIECES):
        count = min(_MOST_PIECES, len(ids) - begin)
        first = pieces.ctypes.data + begin * pieces.strides[0]
        if _libc.pwritev(memory.fd, first, count, begin * row_bytes) != count * row_bytes:
            return None
    return memory.bytes[: len(ids) * row_bytes].reshape(len(ids), row_bytes).copy()
