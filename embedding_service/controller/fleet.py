"""The shards as they report themselves. Soft state: a controller that starts anew is told everything again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from embedding_service.placement.parts import PartKey
from embedding_service.wire import control_pb2 as control

# A controller that looks at its shards seldom has no time to hear them: seconds that count as silence a look, at most.
LONGEST_LOOK = 1.0


@dataclass
class Shard:
    """One shard: its last report, and what it was last told.

    Attributes:
        connection: Counts registrations, so that a stream that ends late does not end its successor.
        heard: When it last reported, by the fleet's clock.
        outbox: Set when there is something new to tell it.
        assigned: What it shall hold; None before the first decision.
        sent: Age of the routing that it was last sent on this connection.
        released: It is draining and may end.
        grace: Parts it holds and shall hold no longer, and until when (monotonic seconds) it keeps them for clients who
            do not know yet.
    """

    report: control.ShardReport
    connection: int = 0
    connected: bool = True
    heard: float = 0.0
    held: set[PartKey] = field(default_factory=set)
    accesses: dict[PartKey, int] = field(default_factory=dict)
    failures: dict[PartKey, str] = field(default_factory=dict)
    outbox: asyncio.Event = field(default_factory=asyncio.Event)
    assigned: frozenset[PartKey] | None = None
    sent: tuple[int, int] = (0, 0)
    released: bool = False
    grace: dict[PartKey, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its shard id."""
        return self.report.shard_id

    @property
    def knows(self) -> tuple[int, int]:
        """Age of the newest routing that it has seen, or will have when it reads what it was sent."""
        return max((self.report.term, self.report.epoch), self.sent)


class Fleet:
    """All shards that are there, or were until a moment ago.

    Args:
        lost_after: Seconds without a word after which a shard counts as gone. They are counted by a clock that stands
            still while this process does not listen: a controller that was held up hears first what came meanwhile.
    """

    def __init__(self, lost_after: float) -> None:
        self.shards: dict[str, Shard] = {}
        self.joined = time.monotonic()
        self._lost_after = lost_after
        self._listened = 0.0
        self._looked = time.monotonic()

    @property
    def newest_term(self) -> int:
        """The highest term that any shard has seen."""
        return max((shard.report.term for shard in self.shards.values()), default=0)

    def last_served(self) -> list[tuple[str, str]]:
        """(model, version) of what the newest routing serves that any shard has seen."""
        reports = [shard.report for shard in self.shards.values()]
        newest = max(reports, key=lambda report: (report.term, report.epoch), default=control.ShardReport())
        names = [name.partition("@") for name in newest.served]
        return [(model, version) for model, _, version in names]

    def join(self, report: control.ShardReport) -> Shard:
        """A shard registers, for the first time or again."""
        known = self.shards.get(report.shard_id)
        shard = Shard(report, connection=known.connection + 1 if known else 0)
        self.shards[shard.name] = shard
        self.joined = time.monotonic()
        self.hear(shard, report)
        return shard

    def hear(self, shard: Shard, report: control.ShardReport) -> bool:
        """Take a report in; returns whether it calls for a decision."""
        before = (shard.held, shard.failures, shard.report.draining)
        another_term = report.term > shard.report.term  # another controller's, perhaps: then this one must end
        shard.report, shard.heard = report, self._listened
        if report.has_parts:
            held = [PartKey.from_wire(part) for part in report.parts]
            shard.held = set(held)
            shard.accesses = dict(zip(held, report.part_accesses, strict=False))
            shard.failures = {PartKey.from_wire(failure.part): failure.message for failure in report.failures}
        return (shard.held, shard.failures, report.draining) != before or another_term

    def leave(self, shard: Shard) -> None:
        """Its stream ended. It may be back in a moment, unless it was released."""
        shard.connected = False
        if shard.released and self.shards.get(shard.name) is shard:
            del self.shards[shard.name]

    def forget_lost(self) -> list[str]:
        """Look who was not heard of for too long, and drop them; returns their names."""
        now = time.monotonic()
        self._listened += min(now - self._looked, LONGEST_LOOK)
        self._looked = now
        oldest = self._listened - self._lost_after
        lost = [shard.name for shard in self.shards.values() if shard.heard < oldest]
        for name in lost:
            self.shards.pop(name).outbox.set()  # ends its stream, should it still be open: it must register again
        return lost

    def accesses(self) -> Counter[PartKey]:
        """Rows that were asked of each part, over all shards that hold it, as of their last report of parts."""
        total: Counter[PartKey] = Counter()
        for shard in self.shards.values():
            total.update(shard.accesses)
        return total

    def holders(self) -> dict[PartKey, list[str]]:
        """For each part the shards that hold it now, in the order of their topologies.

        Where every topology holds every part once, the n-th holders of all parts are then the shards of one topology.
        """
        holders: dict[PartKey, list[str]] = {}
        for name, shard in sorted(self.shards.items(), key=lambda item: (item[1].report.topology, item[0])):
            for key in shard.held:
                holders.setdefault(key, []).append(name)
        return holders
