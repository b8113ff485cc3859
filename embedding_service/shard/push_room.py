"""The memory of pushes under way: which may take more of it, and which wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from embedding_service.budget import Budget
from embedding_service.errors import Overloaded
from embedding_service.memory import available_memory

# The part of the budget that pushes have together. Requests and answers keep the others.
_PART = 4


class PushRoom:
    """A part of a process's budget that pushes share. Used on the event loop.

    A piece waits until it fits. Pieces of the push that began first do not wait: they only need memory that the machine
    has. So that push ends, and the one after it is the first. No two pushes wait for each other.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget, self._most = budget, budget.most // _PART
        self._taken = 0
        self._pushes: dict[object, int] = {}  # the bytes of each, in the order in which they began
        self._freed = asyncio.Event()

    @contextmanager
    def enter(self) -> Iterator[Callable[[int], Awaitable[None]]]:
        """What takes bytes for a push. It waits for them, and they count until the context ends. Raises Overloaded."""
        push = object()
        try:
            yield partial(self._take, push)
        finally:
            self._add(-self._pushes.pop(push, 0))
            self._freed.set()

    async def _take(self, push: object, nbytes: int) -> None:
        self._pushes.setdefault(push, 0)
        while self._taken + nbytes > self._most:
            if push is next(iter(self._pushes)):
                _check_machine(nbytes)
                break
            self._freed.clear()
            await self._freed.wait()
        self._pushes[push] += nbytes
        self._add(nbytes)

    def _add(self, nbytes: int) -> None:
        """Take bytes, or give some back. What one push takes beyond the part is not taken from requests and answers."""
        before = min(self._taken, self._most)
        self._taken += nbytes
        self._budget.count(min(self._taken, self._most) - before)


def _check_machine(nbytes: int) -> None:
    if nbytes > (left := available_memory()):
        raise Overloaded(
            f"the next piece of this push needs {nbytes:,} bytes of memory, and {left:,} are free: send gradients as "
            "torch.bfloat16, take smaller steps, make the branch with more shares, or give the shard more memory"
        )
