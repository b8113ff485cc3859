"""Time, processes and the network. Whatever happens is an event in one queue; the seed decides the order."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

import grpc

from embedding_service.client.calls import Failure

REFUSED = Failure(grpc.StatusCode.UNAVAILABLE, "connection refused")
LATE = Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time")

Action = Callable[..., None]


class World:
    """Runs events in the order of their time.

    Attributes:
        now: Seconds since the beginning, for everybody's monotonic clock.
        clock_us: What the wall clock is ahead of that, in microseconds; somebody may set it.
        events: Events that ran. Timers that had nothing to do any more do not count.
        loss: Share of messages that get lost. `slowness`: what the network's delays are multiplied by.
        trace: Lines of what happened, where they are wanted.
    """

    def __init__(self, seed: int, tracing: bool = False) -> None:
        self.now = 0.0
        self.clock_us = 1_700_000_000_000_000
        self.events = 0
        self.loss = 0.0
        self.slowness = 1.0
        self.chance = random.Random(seed)
        self.trace: list[str] | None = [] if tracing else None
        self.cuts: set[tuple[str, str]] = set()
        self.addresses: dict[str, Process] = {}
        self.controllers: list[Any] = []
        self.streams: list[Any] = []
        self._queue: list[tuple[float, int, Process | None, int, Action, tuple[Any, ...]]] = []
        self._order = itertools.count()
        self.after(1.0, self._ping)

    def _ping(self) -> None:
        self.idle()
        for stream in list(self.streams):
            stream.check()
        self.after(1.0, self._ping)

    def clock(self) -> float:
        """The monotonic clock of everybody."""
        return self.now

    def wall_us(self) -> int:
        """The wall clock of everybody."""
        return self.clock_us + int(self.now * 1_000_000)

    def say(self, text: str, *arguments: object) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.now:8.3f}  {text % arguments}")

    def after(self, seconds: float, action: Action, *arguments: Any, of: Process | None = None) -> None:
        """An event. `of`: it is lost if that process has ended by then, and waits while it hangs."""
        if of is not None and not of.is_there:
            return
        life = of.life if of else 0
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), of, life, action, arguments))

    def next_time(self) -> float:
        """When the next event is."""
        return self._queue[0][0] if self._queue else float("inf")

    def step(self) -> None:
        """Run the next event."""
        self.now, _, process, life, action, arguments = heapq.heappop(self._queue)
        if process is None or (process.life == life and process.awake(action, arguments)):
            self.events += 1
            action(*arguments)

    def idle(self) -> None:
        """The event that runs had nothing to do."""
        self.events -= 1

    # The network

    def cut(self, one: str, other: str, both_ways: bool = True) -> None:
        """Nothing gets from one process to the other."""
        self.cuts |= {(one, other), (other, one)} if both_ways else {(one, other)}

    def heal(self, one: str = "", other: str = "") -> None:
        """The network between two is whole again, or all of it."""
        self.cuts = {pair for pair in self.cuts if one and set(pair) != {one, other}}
        for stream in list(self.streams):
            stream.flush()

    def reaches(self, source: str, target: str) -> bool:
        """Whether messages go that way."""
        return (source, target) not in self.cuts

    def delay(self) -> float:
        """Of one message: each its own, so that messages overtake each other."""
        return self.slowness * (0.0005 + self.chance.expovariate(500.0))

    def call(self, source: Process, address: str, request: Any, timeout: float, done: Callable[[Any], None]) -> None:
        """Ask the server at an address. `done` gets the answer or a Failure, once and by the timeout."""
        Exchange(self, source, address, request, timeout, done)


class Process:
    """What ends, hangs, and starts again. `life` counts its starts and ends: even where it is not there."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.life = 0
        self.hangs = False
        self._waiting: list[tuple[Action, tuple[Any, ...]]] = []

    @property
    def is_there(self) -> bool:
        """Whether it runs, be it that it hangs."""
        return self.life % 2 == 1

    def begin(self) -> None:
        """Start it."""
        assert not self.is_there
        self.life += 1

    def end(self) -> None:
        """It is gone, with all it was about to do."""
        assert self.is_there
        self.life += 1
        self.hangs = False
        self._waiting.clear()

    def hang(self) -> None:
        """Until `wake` nothing happens in it; what comes waits."""
        self.hangs = True

    def wake(self) -> None:
        """Do what waited, in its order."""
        self.hangs = False
        waiting, self._waiting = self._waiting, []
        for action, arguments in waiting:
            self.after(0.0, action, *arguments)

    def awake(self, action: Action, arguments: tuple[Any, ...]) -> bool:
        """Whether an event may run in it; else it waits."""
        if self.hangs:
            self._waiting.append((action, arguments))
        return not self.hangs

    def after(self, seconds: float, action: Action, *arguments: Any) -> None:
        """An event of this life."""
        self.world.after(seconds, action, *arguments, of=self)

    def receive(self, request: Any, timeout: float, reply: Callable[[Any], None]) -> None:
        """Answer a call."""
        raise NotImplementedError


class Exchange:
    """A unary call: a message there and one back, either of which may be late or lost."""

    __slots__ = ("_address", "_done", "_over", "_request", "_source", "_timeout", "_world")

    def __init__(
        self,
        world: World,
        source: Process,
        address: str,
        request: Any,
        timeout: float,
        done: Callable[[Any], None],
    ) -> None:
        self._world, self._source, self._address = world, source, address
        self._request, self._timeout, self._done = request, timeout, done
        self._over = False
        world.after(timeout, self._expire, of=source)
        target = world.addresses.get(address)
        if target is None or not self._is_lost(source, target):
            world.after(world.delay(), self._arrive)

    def _is_lost(self, source: Process, target: Process) -> bool:
        return not self._world.reaches(source.name, target.name) or self._world.chance.random() < self._world.loss

    def _arrive(self) -> None:
        target = self._world.addresses.get(self._address)
        if target is None or not target.is_there:
            self._world.after(self._world.delay(), self._finish, REFUSED, of=self._source)
        elif target.hangs:
            target.after(0.0, self._taken, target)
        else:
            self._taken(target)

    def _taken(self, target: Process) -> None:
        life = target.life

        def reply(answer: Any) -> None:
            if target.life == life and not self._is_lost(target, self._source):
                self._world.after(self._world.delay(), self._finish, answer, of=self._source)

        target.receive(self._request, self._timeout, reply)

    def _expire(self) -> None:
        if self._over:
            self._world.idle()
        self._finish(LATE)

    def _finish(self, answer: Any) -> None:
        if not self._over:
            self._over = True
            self._done(answer)
