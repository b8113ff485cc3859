"""A share that a shard has open: as its primary, or as a copy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from embedding_service.errors import Unavailable
from embedding_service.serving import cancel
from embedding_service.shard.copies import Copies
from embedding_service.training.branch import Branch
from embedding_service.training.seats import Seat
from embedding_service.training.share import Change, Share
from embedding_service.wire import training_pb2 as wire

T = TypeVar("T")


class Opened:
    """A share as this shard has it, with the thread that changes it and those who wait for its steps.

    Attributes:
        copies: Of a primary. None: this one is a copy.
        moving: The primary takes nothing, for it is being handed over.
    """

    def __init__(self, branch: Branch, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self.branch, self.name = branch, name
        self.share: Share
        self.seat: Seat
        self.copies: Copies | None = None
        self.moving = False
        self.admitting: set[str] = set()
        self.told = (0, 0)  # session and step when it was said last that somebody trains it
        self.asked: dict[str, float] = {}  # when shards were asked to join
        self.following: asyncio.Task[None] | None = None
        self.run = self.position = 0  # of the primary that is followed
        self.loaded = False  # whether a copy's rows are there, not only its log
        self.said: asyncio.Queue[wire.FollowRequest | None] = asyncio.Queue()
        self.waiting: set[asyncio.Future[None]] = set()
        self._loop = loop
        self._thread = ThreadPoolExecutor(1, f"train-{branch.full_name}/{name}")

    @property
    def required(self) -> set[str]:
        """The copies that must have what is accepted."""
        return set(self.seat.in_sync) - {self.share.shard} | self.admitting

    def wake(self) -> None:
        """On the event loop: let all look again."""
        for each in self.waiting:
            if not each.done():
                each.set_result(None)

    def on_applied(self) -> None:
        """On any thread."""
        self._loop.call_soon_threadsafe(self.wake)

    def on_change(self, change: Change) -> None:
        """On the share's thread. What is called so comes before what is done after the change."""
        self._loop.call_soon_threadsafe(self._hand_out, change)

    def _hand_out(self, change: Change) -> None:
        if self.copies:
            self.copies.hand_out(change, self.required)

    async def on(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do it on the share's own thread. It is done even if the caller has gone by then."""
        try:
            done = self._loop.run_in_executor(self._thread, partial(work, *arguments))
        except RuntimeError:
            raise self._elsewhere() from None
        return await asyncio.shield(done)

    def later(self, work: Callable[..., object], *arguments: Any) -> None:
        """Have it done on the share's own thread, which is not waited for."""
        with contextlib.suppress(RuntimeError):  # it was closed since
            self._thread.submit(work, *arguments)

    async def until(self, condition: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait for a condition that steps, checkpoints and copies fulfil. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not condition():
                woken = self._loop.create_future()
                self.waiting.add(woken)
                try:
                    if not condition():  # what came between looking and waiting woke nobody
                        await woken
                finally:
                    self.waiting.discard(woken)

    def check_leads(self) -> None:
        """Raise Unavailable unless this shard is the share's primary, and takes pushes."""
        if self.copies is None or self.moving:
            raise self._elsewhere()

    def _elsewhere(self) -> Unavailable:
        return Unavailable(
            f"share {self.name} of {self.branch.full_name} is at shard {self.seat.primary}, or on its way there: ask "
            "again"
        )

    async def make(self, share: Callable[[], Share]) -> None:
        """Have the share made on its own thread. `close` closes it though the caller has gone by then."""

        def make() -> None:
            self.share = share()

        await self.on(make)

    async def close(self) -> None:
        """Bring the log to disk. It is closed though the caller goes: nobody could open that log again."""
        await asyncio.shield(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        if self.copies:
            for shard in list(self.copies.links):
                self.copies.drop(shard)
        self.copies = None
        self.wake()
        if self.following:
            await cancel([self.following])
        await self.on(self._close_share)
        self._thread.shutdown(wait=False)

    def _close_share(self) -> None:
        if hasattr(self, "share"):
            self.share.close()
