"""One large piece of memory in which the parts of all tables of a process find room.

torch cannot reserve a device's addresses without memory behind them, as `address_space` does for hosts. So memory is
taken once, and a part lies wherever there was room, at a multiple of its row's bytes: seen as rows of that size the
pool is one matrix, and a batch that spans parts is still one index_select, after a look at where its parts lie.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from embedding_service.address_space import round_up
from embedding_service.errors import NoRoom
from embedding_service.late import late

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")


class Pool:
    """First-fit room in `memory`, uint8 [bytes] on any device. Thread-safe."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._lock = threading.Lock()
        self._taken: dict[int, int] = {}  # where to where

    def take(self, nbytes: int, unit: int) -> int:
        """Where `nbytes` may lie, a multiple of `unit`. Raises NoRoom."""
        with self._lock:
            place = 0
            for begin, end in sorted(self._taken.items()):
                if place + nbytes <= begin:
                    break
                place = max(place, round_up(end, unit))
            if place + nbytes > len(self.memory):
                free = len(self.memory) - sum(end - begin for begin, end in self._taken.items())
                raise NoRoom(
                    f"no {nbytes:,} bytes in one piece among {free:,} free of {len(self.memory):,}: raise --memory"
                )
            self._taken[place] = place + nbytes
            return place

    def give_back(self, place: int) -> None:
        """Free what `take` gave."""
        with self._lock:
            del self._taken[place]

    def rows(self, row_bytes: int) -> torch.Tensor:
        """The pool as rows of `row_bytes`, in the widest words that divide them: int [rows, words].

        Copying rows word by word takes a fraction of what it takes byte by byte.
        """
        words = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
        width, dtype = next((w, d) for w, d in words if row_bytes % w == 0)
        rows = len(self.memory) // row_bytes
        return self.memory[: rows * row_bytes].view(dtype).view(rows, row_bytes // width)
