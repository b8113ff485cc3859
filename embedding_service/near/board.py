"""The board: words that a shard writes and that its near clients read, in memory that both have mapped.

A word is 8 bytes at a multiple of 8: processors read and write it whole. The first words tell how the shard does; then
comes a word a slot, the generation of the part that lies there. Generations never come again, so a reader that sees the
same one before and after it has copied rows knows that the part was held all along.
"""

from __future__ import annotations

import mmap
import os
import platform
import threading
import time

import numpy as np

from embedding_service.address_space import memory_file, round_up, seal
from embedding_service.errors import InvalidRequest

# Of the words and of the messages around them; it changes when either means something else.
VERSION = 1
WORD_BYTES = 8
# Where the words are. At NOTHING there is always 0, the generation of no part.
VERSION_WORD, BEAT, TERM, EPOCH, NOTHING, FIRST_SLOT = 0, 1, 2, 3, 4, 8
MOST_SLOTS = 1 << 18
BOARD_BYTES = round_up((FIRST_SLOT + MOST_SLOTS) * WORD_BYTES)
BOARD_WORDS = BOARD_BYTES // WORD_BYTES
# The shard writes the time so often. One whose last beat is older than a second is taken to hang.
BEAT_SECONDS, LONGEST_SILENCE = 0.2, 1.0

# x86 keeps loads in order, and stores too.
_IN_ORDER = platform.machine().lower() in ("x86_64", "amd64")
_first, _second = threading.Lock(), threading.Lock()


def _new_locks() -> None:
    """In a child of a fork: a thread that is not here may have held one."""
    global _first, _second
    _first, _second = threading.Lock(), threading.Lock()


os.register_at_fork(after_in_child=_new_locks)


def fence() -> None:
    """Keep what comes before it before what comes after it, reads and writes, for other processes too.

    Python has no such thing of its own. To release a lock orders what came before, to take one what comes after, and no
    processor takes a lock before it has released the last one. Calls into C keep compilers from moving anything.
    """
    if not _IN_ORDER:
        with _first:
            pass
        with _second:
            pass


class Board:
    """The shard's side. Raises OSError where the kernel cannot keep others from writing to it.

    Attributes:
        fd: Of its file.
    """

    def __init__(self) -> None:
        self.fd = memory_file("embedding-board", BOARD_BYTES)
        self._words = np.frombuffer(mmap.mmap(self.fd, BOARD_BYTES), np.int64)
        seal(self.fd)
        self._words[VERSION_WORD] = VERSION
        self._free: list[int] = []
        self._used = FIRST_SLOT  # slots from here on were never taken

    def beat(self) -> None:
        """Say that this shard lives."""
        self._words[BEAT] = time.monotonic_ns()

    def tell_age(self, term: int, epoch: int) -> None:
        """The routing's; a reader that sees one without the other takes it for another one than its own, and asks."""
        self._words[EPOCH] = epoch
        fence()
        self._words[TERM] = term

    def hold(self, generation: int) -> int:
        """The slot of a part that is held from now on. Raises InvalidRequest where there is none left."""
        if not self._free and self._used == FIRST_SLOT + MOST_SLOTS:
            raise InvalidRequest(f"at most {MOST_SLOTS:,} parts can be near")
        if not self._free:
            self._free.append(self._used)
            self._used += 1
        slot = self._free.pop()
        fence()  # after the rows
        self._words[slot] = generation
        return slot

    def drop(self, slot: int) -> None:
        """The part there is held no more. Readers that are at it will not use what they read."""
        self._words[slot] = 0
        fence()
        self._free.append(slot)

    def close(self) -> None:
        """Tell all readers that this shard is gone."""
        self._words[BEAT] = 0
        self._words[FIRST_SLOT : self._used] = 0
        os.close(self.fd)
