"""What the router may ask its driver for, and its drivers: the calling thread and the running event loop.

Code that speaks the protocol is a generator of steps. It does no I/O by itself, so threads, asyncio and tests with a
clock of their own share it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

from embedding_service.client.calls import Call
from embedding_service.client.transport import GrpcTransport

T = TypeVar("T")


class Exchange(NamedTuple):
    """Make calls at the same time. The driver sends their outcomes back, in order.

    `in_turn`: the outcomes may come one by one, each when it is there. That pays if each makes work.
    `meanwhile`: work to do once the calls are on their way.
    """

    calls: Sequence[Call]
    in_turn: bool = False
    meanwhile: Callable[[], object] | None = None

    def on_thread(self, transport: GrpcTransport) -> Any:
        """A list, or a generator that waits for each and is to be closed."""
        exchange = transport.exchange_in_turn if self.in_turn else transport.exchange
        return exchange(self.calls, self.meanwhile)

    async def on_loop(self, transport: GrpcTransport) -> Any:
        """A list."""
        return await transport.together.exchange(self.calls, self.meanwhile)


class Pause(NamedTuple):
    """Wait for `seconds`."""

    seconds: float

    def on_thread(self, transport: GrpcTransport) -> None:
        """Block the thread."""
        time.sleep(self.seconds)

    async def on_loop(self, transport: GrpcTransport) -> None:
        """Let other tasks run."""
        await asyncio.sleep(self.seconds)


class Aside(NamedTuple):
    """Make a call that nobody waits for. `done` gets its outcome, on any thread."""

    call: Call
    done: Callable[[Any], None]

    def on_thread(self, transport: GrpcTransport) -> None:
        """Begin it."""
        transport.send(self.call).add_done_callback(lambda future: self.done(future.result()))

    async def on_loop(self, transport: GrpcTransport) -> None:
        """Begin it."""
        self.on_thread(transport)


Steps = Generator[Exchange | Pause | Aside, Any, T]


def working(steps: Steps[T], work: Callable[[], object]) -> Steps[T]:
    """The same steps; `work` is done while calls are under way."""
    outcome: Any = None
    try:
        while True:
            step = steps.send(outcome)
            outcome = yield step._replace(meanwhile=work) if isinstance(step, Exchange) else step
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def run(steps: Steps[T], transport: GrpcTransport) -> T:
    """Drive steps on the calling thread, to what they return. Raises what they raise."""
    outcomes: Any = None
    try:
        while True:
            outcomes = steps.send(outcomes).on_thread(transport)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()  # steps that failed left some of them


async def run_async(steps: Steps[T], transport: GrpcTransport) -> T:
    """Drive steps on the running event loop, to what they return. Raises what they raise."""
    outcomes: Any = None
    try:
        while True:
            outcomes = await steps.send(outcomes).on_loop(transport)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
