"""What a shard reports to the controller, and what it does when told. It does no I/O. `registration` does that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from embedding_service.client.router import Router
from embedding_service.placement.parts import PartKey
from embedding_service.placement.routing import Routing
from embedding_service.wire import control_pb2 as control

log = logging.getLogger(__name__)

# How often the controller hears the accesses of parts, if nothing else changes.
ACCESSES_SECONDS = 30.0


class Changed(Protocol):
    """An asyncio.Event, or a stand-in for one."""

    def is_set(self) -> bool:
        """Whether it is set."""

    def set(self) -> None:
        """Set it."""

    def clear(self) -> None:
        """Unset it."""


class Held(Protocol):
    """What duties need of `Holdings`. Its docstrings explain them."""

    held: set[PartKey]
    failures: dict[PartKey, str]
    reserved: int

    @property
    def changed(self) -> Changed:
        """Set whenever `held` or `failures` changed."""

    def assign(self, wanted: Iterable[PartKey]) -> None:
        """Hold exactly these from now on."""

    def accesses(self, key: PartKey) -> int:
        """Rows gathered from a held part."""


class Duties:
    """A shard's side of the protocol with the controller.

    Args:
        about: The report's constant fields: shard id, address, device, tier, memory limit. What is reserved of that
            limit is not offered.
        clock: Seconds now.

    Attributes:
        draining: The shard wants to end.
        released: The shard may end: no routing names it any more.
    """

    def __init__(self, about: control.ShardReport, holdings: Held, router: Router, clock: Callable[[], float]) -> None:
        self.draining = False
        self.released = False
        self._about = about
        self._holdings = holdings
        self._router = router
        self._clock = clock
        self._counted = clock()
        self._term = 0
        self._obeyed = 0

    def first_report(self, stats: control.ShardStats | None = None) -> control.ShardReport:
        """The first report of a registration: everything."""
        self._holdings.changed.set()
        self._counted = self._clock()
        self._obeyed = 0
        report = self.report(stats)
        if self._router.current:
            report.models.extend(placement.model for placement in self._router.current.message.models)
        return report

    def report(self, stats: control.ShardStats | None = None) -> control.ShardReport:
        """A heartbeat, with the parts whenever they changed."""
        if self._clock() - self._counted > ACCESSES_SECONDS:
            self._holdings.changed.set()
            self._counted = self._clock()
        report = control.ShardReport()
        report.CopyFrom(self._about)
        if stats is not None:
            report.stats.CopyFrom(stats)
        report.draining, report.obeyed = self.draining, self._obeyed
        report.memory_limit = max(report.memory_limit - self._holdings.reserved, 0)
        if self._router.current:
            report.term, report.epoch = self._router.current.age
            report.served.extend(model.full_name for model in self._router.current.models)
        if self._holdings.changed.is_set():
            self._holdings.changed.clear()
            report.has_parts = True
            held = sorted(self._holdings.held)
            report.parts.extend(key.to_wire() for key in held)
            report.part_accesses.extend(self._holdings.accesses(key) for key in held)
            report.failures.extend(
                control.PartFailure(part=key.to_wire(), message=message)
                for key, message in self._holdings.failures.items()
            )
        return report

    def obey(self, assignment: control.Assignment) -> bool:
        """Do what the controller says, unless a later one spoke. Returns whether it brought a routing."""
        self._obeyed = assignment.number
        if assignment.term < self._term:
            log.warning("ignored an assignment of term %d, below term %d", assignment.term, self._term)
            return False
        self._term = assignment.term
        self.released |= assignment.released
        if assignment.has_parts:
            self._holdings.assign(PartKey.from_wire(part) for part in assignment.parts)
        if not assignment.HasField("routing"):
            return False
        self._router.adopt(Routing(assignment.routing))
        return True
