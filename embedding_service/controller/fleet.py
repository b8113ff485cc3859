"""The shards as they report themselves. This is soft state: a restarted controller is told everything again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache

from embedding_service.controller import decisions
from embedding_service.controller.decisions import Version
from embedding_service.controller.events import Stream
from embedding_service.controller.last import Last, LastOfEach
from embedding_service.controller.reports import FAILURE_CHARACTERS, MOST_FAILURES
from embedding_service.errors import Unavailable
from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import Manifest
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire

# The most seconds of silence that one look counts. A controller that looks seldom has no time to hear its shards.
LONGEST_LOOK = 1.0
# A shard reports every second. One that was heard of within this time is alive, and keeps its id.
ALIVE_SECONDS = 3.0
# Seconds for which a refusal is a problem. A refused shard tries again every 2 s.
REFUSAL_SECONDS = 10.0
MOST_REFUSALS = 100
# Assignments of a shard that are kept apart until it follows them.
MOST_UNREAD = 32


class IdTaken(Unavailable):
    """Another process has this shard's id, and is alive."""


@dataclass
class Shard:
    """One shard: its last report, and what it was last told.

    Attributes:
        stream: Its registration.
        heard: When it last reported, by the fleet's clock.
        described: The versions it served when it registered.
        assigned: The parts that it is to hold. None before the first decision.
        sent: Age of the routing that it was last sent on this connection.
        told: How many assignments it was sent on this connection.
        released: It is draining and may end.
        unread: Assignments that it was sent and has not said to follow, by their numbers.
        grace: Parts that it is to drop, and until when it keeps them for clients that do not know yet.
    """

    stream: Stream
    report: control.ShardReport
    connected: bool = True
    heard: float = 0.0
    held: frozenset[PartKey] = frozenset()
    accesses: dict[PartKey, int] = field(default_factory=dict)
    failures: dict[PartKey, str] = field(default_factory=dict)
    described: dict[tuple[str, str], Manifest] = field(default_factory=dict)
    assigned: frozenset[PartKey] | None = None
    sent: tuple[int, int] = (0, 0)
    told: int = 0
    released: bool = False
    unread: dict[int, frozenset[PartKey]] = field(default_factory=dict)
    grace: dict[PartKey, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._keeps, self._parts = Last(_kept), Last(_parts_message)
        self._keeps_of, self._held_of = Last(_by_version), Last(_by_version)

    @property
    def name(self) -> str:
        """Its shard id."""
        return self.report.shard_id

    @property
    def keeps(self) -> frozenset[PartKey]:
        """What it holds, without what it was told to drop and may be dropping now."""
        return self._keeps(self.held, self.assigned, list(self.unread.values()))

    @property
    def keeps_of(self) -> Mapping[Version, frozenset[PartKey]]:
        """`keeps`, by version."""
        return self._keeps_of(self.keeps)

    @property
    def held_of(self) -> Mapping[Version, frozenset[PartKey]]:
        """`held`, by version."""
        return self._held_of(self.held)

    @property
    def knows(self) -> tuple[int, int]:
        """Age of the newest routing that it has seen, or will have when it reads what it was sent."""
        return max((self.report.term, self.report.epoch), self.sent)

    @property
    def dropping(self) -> Set[PartKey]:
        """What it was told to drop, and may be dropping now, though it may have been told to hold it again."""
        return _dropping(self.held, self.unread.values())

    def assignment(self) -> control.Assignment:
        """A message of its own with what it is to hold."""
        return control.Assignment.FromString(self._parts(self.assigned))

    def tell(self) -> int:
        """It is sent its assignment. Returns the number of that message."""
        if len(self.unread) >= MOST_UNREAD:
            oldest, second = sorted(self.unread)[:2]
            self.unread[second] &= self.unread.pop(oldest)
        self.told += 1
        self.unread[self.told] = self.assigned or frozenset()
        return self.told


def _dropping(held: frozenset[PartKey], unread: Iterable[frozenset[PartKey]]) -> Set[PartKey]:
    return set().union(*(held - parts for parts in unread))


def _kept(
    held: frozenset[PartKey], assigned: frozenset[PartKey] | None, unread: Sequence[frozenset[PartKey]]
) -> frozenset[PartKey]:
    return (held if assigned is None else held & assigned) - _dropping(held, unread)


def _by_version(keys: Iterable[PartKey]) -> dict[Version, frozenset[PartKey]]:
    groups: dict[Version, list[PartKey]] = {}
    for key in keys:
        groups.setdefault(key[:2], []).append(key)
    return {version: frozenset(group) for version, group in groups.items()}


def _parts_message(assigned: Iterable[PartKey]) -> bytes:
    return control.Assignment(has_parts=True, parts=[key.to_wire() for key in sorted(assigned)]).SerializeToString()


def _described(info: wire.ModelInfo) -> Manifest:
    return _manifest_of(info.SerializeToString(deterministic=True))


@lru_cache(maxsize=256)
def _manifest_of(info: bytes) -> Manifest:
    """A version's manifest. All shards say the same of it, and a large one takes a while."""
    return decisions.manifest_of(wire.ModelInfo.FromString(info))


class Fleet:
    """All shards that are there, or were until a moment ago.

    Args:
        lost_after: Seconds of silence after which a shard counts as gone. Each check counts at most 1 s of silence, so
            a stalled controller reads queued heartbeats before it declares a shard dead.
        clock: Seconds now.

    Attributes:
        shards: By their ids.
        joined: When a new shard came last.
    """

    def __init__(self, lost_after: float, clock: Callable[[], float]) -> None:
        self.shards: dict[str, Shard] = {}
        self.joined = clock()
        self._clock = clock
        self._streams: dict[Stream, Shard] = {}
        self._lost_after = lost_after
        self._listened = 0.0
        self._looked = clock()
        self._refusals: dict[str, tuple[str, float]] = {}
        self._holders: LastOfEach[Version, dict[PartKey, list[str]]] = LastOfEach(_holders_of)

    def shard_of(self, stream: Stream) -> Shard | None:
        """The shard of a stream. None for a stream that counts no more."""
        return self._streams.get(stream)

    @property
    def newest_term(self) -> int:
        """The highest term that any shard has seen."""
        return max((shard.report.term for shard in self.shards.values()), default=0)

    def served_before(self, term: int) -> dict[str, str]:
        """Each model's version by the newest routing of an earlier term that any shard goes by."""
        reports = [shard.report for shard in self.shards.values() if shard.report.term < term]
        newest = max(reports, key=lambda report: (report.term, report.epoch), default=control.ShardReport())
        names = [name.partition("@") for name in newest.served]
        return {model: version for model, _, version in names}

    def described(self) -> dict[tuple[str, str], Manifest]:
        """Versions as shards described them when they registered."""
        return {name: each for shard in self.shards.values() for name, each in shard.described.items()}

    def join(self, stream: Stream, report: control.ShardReport) -> Shard | None:
        """A shard registers, for the first time or again. Returns what was known by its id before.

        Of two processes with one id the first stays while it is heard of, and the other is refused. A process that was
        restarted while its old connection hangs must wait for that silence.

        Raises IdTaken, and InvalidRequest for versions that cannot be.
        """
        known = self.shards.get(report.shard_id)
        another = known is not None and known.report.incarnation != report.incarnation
        if known and another and known.connected and self._listened - known.heard < ALIVE_SECONDS:
            raise IdTaken(
                f"shard id {report.shard_id} of {report.address} is taken by the shard at {known.report.address}, "
                "which is alive: give each shard an --id of its own"
            )
        shard = Shard(stream, report, described={(info.name, info.version): _described(info) for info in report.models})
        if known is None or another:
            self.joined = self._clock()
        if known:
            self.remove(known)
        self.shards[shard.name] = self._streams[stream] = shard
        self.hear(shard, report)
        return known

    def remove(self, shard: Shard) -> None:
        """Make it a member no more, and hear nothing from its stream."""
        self._streams.pop(shard.stream, None)
        if self.shards.get(shard.name) is shard:
            del self.shards[shard.name]

    def refuse(self, shard_id: str, why: Exception) -> bool:
        """Remember that a shard was refused. Returns whether that is news."""
        now = self._clock()
        self._refusals = {
            name: refusal for name, refusal in self._refusals.items() if now - refusal[1] < REFUSAL_SECONDS
        }
        if len(self._refusals) >= MOST_REFUSALS and shard_id not in self._refusals:
            return False
        said, _ = self._refusals.get(shard_id, ("", now))
        self._refusals[shard_id] = (str(why), now)
        return said != str(why)

    def refusals(self) -> list[str]:
        """Why registrations were refused of late."""
        now = self._clock()
        return [why for _, (why, when) in sorted(self._refusals.items()) if now - when < REFUSAL_SECONDS]

    def hear(self, shard: Shard, report: control.ShardReport) -> bool:
        """Take a report in. Returns whether it calls for a decision."""
        before = (shard.held, shard.dropping, shard.failures, shard.report.draining, shard.report.memory_limit)
        another_term = report.term > shard.report.term  # another controller's, perhaps: then this one must end
        shard.report, shard.heard = report, self._listened
        if report.has_parts:
            held = [PartKey.from_wire(part) for part in report.parts]
            shard.held = frozenset(held)
            shard.accesses = dict(zip(held, report.part_accesses, strict=False))
            shard.failures = {
                PartKey.from_wire(failure.part): failure.message[:FAILURE_CHARACTERS]
                for failure in report.failures[:MOST_FAILURES]
            }
        shard.unread = {number: parts for number, parts in shard.unread.items() if number > report.obeyed}
        now = (shard.held, shard.dropping, shard.failures, report.draining, report.memory_limit)
        return now != before or another_term

    def leave(self, shard: Shard) -> None:
        """Its stream ended. It may be back in a moment, unless it was released."""
        shard.connected = False
        self._streams.pop(shard.stream, None)
        if shard.released:
            self.remove(shard)

    def forget_lost(self) -> list[Shard]:
        """Drop the shards that were silent for too long, and return them."""
        now = self._clock()
        self._listened += min(now - self._looked, LONGEST_LOOK)
        self._looked = now
        oldest = self._listened - self._lost_after
        lost = [shard for shard in self.shards.values() if shard.heard < oldest]
        for shard in lost:
            self.remove(shard)
        return lost

    def accesses(self) -> Counter[PartKey]:
        """Rows that were asked of each part, over all shards that hold it, as of their last report of parts."""
        total: Counter[PartKey] = Counter()
        for shard in self.shards.values():
            total.update(shard.accesses)
        return total

    def able(self) -> frozenset[str]:
        """The shards that may be counted on to hold parts: those that are connected and stay."""
        return frozenset(name for name, shard in self.shards.items() if shard.connected and not shard.report.draining)

    def unable(self) -> dict[Version, frozenset[tuple[str, PartKey]]]:
        """For each version the shards with parts that they could not load."""
        unable: dict[Version, set[tuple[str, PartKey]]] = {}
        for name, shard in self.shards.items():
            for key in shard.failures:
                unable.setdefault(key[:2], set()).add((name, key))
        return {version: frozenset(pairs) for version, pairs in unable.items()}

    def holders(self) -> decisions.Holders:
        """For each part the shards that hold and keep it, in the order of their topologies.

        If every topology holds every part once, the n-th holders of all parts are the shards of one topology.
        """
        kept: dict[Version, list[tuple[str, frozenset[PartKey]]]] = {}
        for name, shard in sorted(self.shards.items(), key=lambda item: (item[1].report.topology, item[0])):
            for version, keys in shard.keeps_of.items():
                kept.setdefault(version, []).append((name, keys))
        return self._holders({version: (shards,) for version, shards in kept.items()})


def _holders_of(kept: Sequence[tuple[str, frozenset[PartKey]]]) -> dict[PartKey, list[str]]:
    holders: dict[PartKey, list[str]] = {}
    for name, keys in kept:
        for key in keys:
            holders.setdefault(key, []).append(name)
    return holders
