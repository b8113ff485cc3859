"""A share's copies, as its primary sees them: what each is sent, and what each has. Used on the event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from itertools import islice

from embedding_service.training.share import Change
from embedding_service.wire import training_pb2 as wire

# Bytes of changes that wait for a copy. One that pushes do not wait for, and that is further behind, begins again.
_MOST_BYTES = 1 << 30
# Changes that a copy may be behind when it is let in.
_NEAR = 16

KINDS = {
    "session": wire.Followed.KIND_SESSION,
    "push": wire.Followed.KIND_PUSH,
    "rewind": wire.Followed.KIND_REWIND,
    "checkpoint": wire.Followed.KIND_CHECKPOINT,
}
NAMES = {kind: name for name, kind in KINDS.items()}


class Link:
    """What one copy is sent.

    Attributes:
        acked: The position up to which the copy has all in its log. None: it is still sent what came before.
        log: The identity of the copy's log.
        moved: When it said last that it has something.
    """

    def __init__(self, shard: str, log: str, position: int) -> None:
        self.shard, self.log = shard, log
        self.began_at = position
        self.acked: int | None = None
        self.moved = time.monotonic()
        self.stream: object = None
        self._first, self._sent = position, position
        self._waiting: deque[Change] = deque()  # those after position `_first`
        self._bytes = 0
        self._woken = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether the copy is too far behind."""
        return self._bytes > _MOST_BYTES

    @property
    def is_near(self) -> bool:
        """Whether the copy has nearly all."""
        return self.acked is not None and len(self._waiting) <= _NEAR

    def add(self, change: Change) -> None:
        """The next one."""
        self._waiting.append(change)
        self._bytes += sum(map(len, change.pieces))
        self._woken.set()

    def has(self, position: int) -> None:
        """The copy has all up to a position."""
        self.acked, self.moved = position, time.monotonic()
        while self._first < position and self._waiting:
            self._bytes -= sum(map(len, self._waiting.popleft().pieces))
            self._first += 1

    def take_stream(self) -> object:
        """A stream of it that is the only one from now on."""
        self.stream = object()
        self._woken.set()
        return self.stream

    def resume(self, position: int) -> bool:
        """Send what follows a position again, if it is still there."""
        if self.acked is None or not self._first <= position <= self._first + len(self._waiting):
            return False
        self.has(position)
        self._sent = position
        return True

    def end(self) -> None:
        """Its stream is over."""
        self.stream = None
        self._woken.set()

    async def changes(self, stream: object) -> AsyncIterator[tuple[int, Change]]:
        """Each change with its position, until another stream takes over."""
        while self.stream is stream:
            behind = self._sent - self._first
            if behind < len(self._waiting):
                self._sent += 1
                yield self._sent, next(islice(self._waiting, behind, None))
            else:
                self._woken.clear()
                await self._woken.wait()


class Copies:
    """What a primary's changes are, by position, and who has them.

    Args:
        on_moved: Called when a copy said what it has.

    Attributes:
        run: Sets this primary's positions apart from those of others.
        position: Of the last change.
    """

    def __init__(self, on_moved: Callable[[], object]) -> None:
        self.run, self.position = secrets.randbits(63) + 1, 0
        self.links: dict[str, Link] = {}
        self._on_moved = on_moved

    def hand_out(self, change: Change, required: Collection[str]) -> None:
        """The share changed. `required`: copies that what is accepted waits for, so they are not far behind."""
        self.position += 1
        for link in list(self.links.values()):
            link.add(change)
            if link.is_over and link.shard not in required:
                self.drop(link.shard)

    def link(self, shard: str, log: str) -> Link:
        """A new one, which is sent what comes from now on."""
        self.drop(shard)
        self.links[shard] = Link(shard, log, self.position)
        return self.links[shard]

    def drop(self, shard: str) -> None:
        """Nothing more for it."""
        if link := self.links.pop(shard, None):
            link.end()

    def lagging(self, shards: set[str], position: int) -> list[str]:
        """Those that do not have all up to a position."""
        return [shard for shard in sorted(shards) if self._acked(shard) < position]

    def _acked(self, shard: str) -> int:
        link = self.links.get(shard)
        return -1 if link is None or link.acked is None else link.acked

    async def hear(self, link: Link, requests: AsyncIterator[wire.FollowRequest]) -> None:
        """Note what a copy says it has, until it says no more."""
        async for request in requests:
            if request.run == self.run and self.links.get(link.shard) is link:
                link.has(request.position)
            self._on_moved()


def pieces_of(change: Change, position: int = 0) -> Iterator[wire.Followed]:
    """A change as messages."""
    pieces = list(change.pieces) or [b""]
    for number, piece in enumerate(pieces, 1):
        yield wire.Followed(
            kind=KINDS[change.kind], step=change.step, position=position, piece=bytes(piece), last=number == len(pieces)
        )
