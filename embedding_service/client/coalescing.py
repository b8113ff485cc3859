"""Small lookups of many tasks as few requests.

Tasks of one event loop make calls in the same turn of the loop. Those to the same shard for rows of the same table go
as one request. Nobody waits for a clock. The busier a loop is, the more tasks run in a turn, and the more travels
together. Each call keeps its own outcome. A shard that does not answer fails the calls to it, and each lookup retries
its own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import grpc

from embedding_service.client.calls import Call
from embedding_service.wire.lookup_codec import Answer, EncodedLookup, join_lookups

# Bytes of rows of a call that waits for others, and of a request of several calls.
SMALL, FULL = 64 << 10, 1 << 20
# Calls whose timeouts differ by less travel together, and have the shortest of them.
_ALIKE = 1.05


class Coalescer:
    """Joins calls. Several event loops may use it at a time. Calls of different loops are not joined."""

    def __init__(self, send: Callable[[Call], Future[Any]]) -> None:
        self._send = send
        self._open: dict[Any, _Together] = {}

    async def exchange(self, calls: Sequence[Call], meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """`GrpcTransport.exchange` for the running loop. If it is cancelled, so are its calls that travel alone."""
        loop = asyncio.get_running_loop()
        outcomes = [self._begin(call, loop) for call in calls]
        try:
            if meanwhile is not None:
                meanwhile()
            return [await outcome for outcome in outcomes]
        except BaseException:
            for outcome in outcomes:
                outcome.cancel()
            raise

    def _begin(self, call: Call, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
        if not isinstance(call.request, EncodedLookup) or call.nbytes > SMALL:
            return asyncio.wrap_future(self._send(call), loop=loop)
        key = (loop, call.address, call.request.head, math.floor(math.log(call.timeout, _ALIKE)))
        joint = self._open.get(key)
        if joint is None or joint.nbytes + call.nbytes > FULL:
            joint = self._open[key] = _Together()
            loop.call_soon(self._flush, key, joint)
        waiting = loop.create_future()
        joint.add(call, waiting)
        return waiting

    def _flush(self, key: Any, joint: _Together) -> None:
        if self._open.get(key) is joint:
            del self._open[key]
        self._ask(joint)

    def _ask(self, joint: _Together) -> None:
        try:
            answer = asyncio.wrap_future(self._send(joint.joined()))
        except Exception as error:
            joint.fail(error)
        else:
            answer.add_done_callback(lambda answered: self._settle(joint, answered.result()))

    def _settle(self, joint: _Together, outcome: Any) -> None:
        if len(joint.members) > 1 and getattr(outcome, "code", None) is grpc.StatusCode.RESOURCE_EXHAUSTED:
            for call, waiting in joint.members:  # a service that answers less than FULL at a time
                alone = _Together()
                alone.add(call, waiting)
                self._ask(alone)
        else:
            joint.settle(outcome)


class _Together:
    """Calls that differ in their rows only, and the tasks that wait for each."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.members: list[tuple[Call, asyncio.Future[Any]]] = []

    def add(self, call: Call, waiting: asyncio.Future[Any]) -> None:
        """One more."""
        self.nbytes += call.nbytes
        self.members.append((call, waiting))

    def joined(self) -> Call:
        """One call for all."""
        calls = [call for call, _ in self.members]
        first = calls[0]
        if len(calls) == 1:
            return first
        assert first.shape is not None
        return first._replace(
            request=join_lookups([call.request for call in calls if isinstance(call.request, EncodedLookup)]),
            shape=first.shape._replace(count=self.nbytes // first.shape.row_bytes),
            timeout=min(call.timeout for call in calls),
        )

    def settle(self, outcome: Any) -> None:
        """Give each call its rows. If the answer is not these rows, all calls get it as it is."""
        split = isinstance(outcome, Answer) and len(outcome.rows) == self.nbytes
        start = 0
        for call, waiting in self.members:
            end = start + call.nbytes
            if not waiting.done():  # nobody waits if the task was cancelled
                waiting.set_result(outcome._replace(rows=outcome.rows[start:end]) if split else outcome)
            start = end

    def fail(self, error: Exception) -> None:
        """Nothing could be sent."""
        for _, waiting in self.members:
            if not waiting.done():
                waiting.set_exception(error)
