"""A shard's side of `ControlService.Register`: report what is held, and do what the controller says, for life.

Lookups go on while the controller is away. The next connection repairs what was missed, because both sides send whole
states.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import grpc

from embedding_service.client.channels import open_channel_async
from embedding_service.client.router import Router
from embedding_service.errors import EmbeddingServiceError
from embedding_service.memory import resident_bytes
from embedding_service.placement.routing import Routing
from embedding_service.security.access import Access
from embedding_service.shard.duties import Duties
from embedding_service.shard.held import Counters, time_within
from embedding_service.shard.holdings import Holdings
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.control_pb2_grpc import ControlServiceStub

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
# Heartbeats over which times to answer are told.
LATENCY_BEATS = 10
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
# Seconds after which a draining shard without a controller ends. Starting a controller again takes less. A second
# SIGTERM ends the shard at once.
CONTROLLER_PATIENCE = 30.0
# Another shard has this one's id, or the controller does not accept what this one reports.
_REFUSALS = (
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)


class Registration:
    """Keeps the controller told about this shard.

    Args:
        about: The report's constant fields: shard id, address, device, tier, memory limit.
        set_serving: Called when there is a routing to serve by.
        access: What it shows the controller. None: plain text.
        branches: How far the branches are that this shard trains.
    """

    def __init__(
        self,
        controller: str,
        about: control.ShardReport,
        holdings: Holdings,
        router: Router,
        counters: Callable[[], Counters],
        set_serving: Callable[[bool], Awaitable[None]],
        access: Access | None = None,
        branches: Callable[[], Iterable[control.BranchStatus]] = tuple,
    ) -> None:
        self._controller = controller
        self._access = access
        self._duties = Duties(about, holdings, router, time.monotonic)
        self._holdings = holdings
        self._set_serving = set_serving
        self._stats = _Stats(counters, holdings, branches)
        self._connected = False
        self._refused = ""
        self._router = router
        self._unproven: wire.Routing | None = None

    async def run(self) -> None:
        """Register, again after each loss of the connection, until cancelled."""
        pause = FIRST_PAUSE
        while True:
            try:
                async with open_channel_async(self._controller, self._access) as channel:
                    async for assignment in ControlServiceStub(channel).Register(self._reports()):
                        pause = FIRST_PAUSE
                        self._connected, self._refused = True, ""
                        self._check(assignment)
                        if self._duties.obey(assignment):
                            await self._set_serving(True)
                log.warning("the controller at %s ended the registration", self._controller)
            except grpc.aio.AioRpcError as error:
                said = f"controller at {self._controller}: {error.code().name} {error.details()}"
                if error.code() not in _REFUSALS:
                    log.warning("%s", said)
                elif said != self._refused:  # the controller says it again and again
                    log.error("refused, and goes on trying: %s", said)
                    self._refused = said
            self._connected = False
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _check(self, assignment: control.Assignment) -> None:
        """Leave out a routing that the controller did not sign."""
        if self._access and assignment.HasField("routing"):
            try:
                self._access.check_routing(assignment.routing, (0, 0))
            except EmbeddingServiceError as error:
                log.error("ignored a routing from %s: %s", self._controller, error)
                self._unproven = wire.Routing()
                self._unproven.CopyFrom(assignment.routing)
                assignment.ClearField("routing")
            else:
                self._unproven = None

    async def _look_again(self) -> None:
        """A routing that nobody vouched for may count since: the file of authorities may have come after it."""
        if self._access and self._unproven:
            try:
                self._access.check_routing(self._unproven, (0, 0))
            except EmbeddingServiceError:
                return
            self._router.adopt(Routing(self._unproven))
            self._unproven = None
            await self._set_serving(True)

    async def drain(self, seconds: float) -> None:
        """Ask the controller to have this shard's parts held elsewhere, and wait until no routing names this shard.

        Ends without that after `seconds`, if there is no controller to ask, or if it refuses this shard.
        """
        if not self._holdings.held or not seconds:
            return
        log.info("draining: %d parts are to be held elsewhere first", len(self._holdings.held))
        self._duties.draining = True
        self._holdings.changed.set()
        deadline = time.monotonic() + seconds
        asked = time.monotonic()
        while not self._duties.released and time.monotonic() < deadline:
            if self._refused:
                log.warning("the controller refuses this shard: nothing can be handed over")
                return
            asked = time.monotonic() if self._connected else asked
            if time.monotonic() - asked > CONTROLLER_PATIENCE:
                log.warning("no controller to drain with")
                return
            await asyncio.sleep(0.05)
        log.info("drained" if self._duties.released else f"not drained after {seconds:.1f} s")

    async def _reports(self) -> AsyncIterator[control.ShardReport]:
        """Everything first, then heartbeats. A change is reported at once."""
        yield self._duties.first_report(self._stats.take())
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._holdings.changed.wait()
            await self._look_again()
            yield self._duties.report(self._stats.take())


class _Stats:
    """Counters with rates over the time since they were last taken."""

    def __init__(
        self,
        counters: Callable[[], Counters],
        holdings: Holdings,
        branches: Callable[[], Iterable[control.BranchStatus]],
    ) -> None:
        self._counters = counters
        self._branches = branches
        self._holdings = holdings
        self._started = self._taken = time.monotonic()
        self._last = deque([Counters()], maxlen=LATENCY_BEATS)

    def take(self) -> control.ShardStats:
        now, counters = time.monotonic(), self._counters()
        seconds = max(now - self._taken, 1e-3)
        before, oldest = self._last[-1], self._last[0]
        self._taken = now
        self._last.append(counters + Counters())  # a copy
        times = [here - then for here, then in zip(counters.times, oldest.times, strict=True)]
        anonymous, file = resident_bytes()
        return control.ShardStats(
            pid=os.getpid(),
            uptime_seconds=now - self._started,
            lookups=counters.lookups,
            rows=counters.rows,
            row_bytes=counters.row_bytes,
            forwarded_rows=counters.forwarded_rows,
            near_rows=counters.near_rows,
            errors=counters.errors,
            lookups_per_second=(counters.lookups - before.lookups) / seconds,
            rows_per_second=(counters.rows - before.rows) / seconds,
            near_rows_per_second=(counters.near_rows - before.near_rows) / seconds,
            p50_seconds=time_within(times, 0.5),
            p99_seconds=time_within(times, 0.99),
            held_bytes=self._holdings.held_bytes,
            anonymous_bytes=anonymous,
            file_bytes=file,
            branches=self._branches(),
        )
