"""The controller as a state machine: events go in, instructions come out. It does no I/O and does not wait.

| state    | what it does                                                | left by                          |
| -------- | ----------------------------------------------------------- | -------------------------------- |
| settling | looks at the store, takes its term, waits for shards        | enough are there, or time passed |
| looking  | waits for the first look at the store                       | `Looked`                         |
| quiet    | waits for a change, and a moment after the last decision    | a `Tick` that finds one          |
| deciding | waits for an answer: the term that the store notes, a plan  | `TermRead`, `TermNoted`, `Planned` |
| ended    | nothing                                                     |                                  |

In every state it hears shards and looks who is lost. A decision takes its term, places what is missing, publishes the
routing, and tells each shard what to hold. The rules are in ARCHITECTURE.md ("Rules of the protocol").
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Container, Generator
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import Any

from embedding_service.controller import decisions
from embedding_service.controller.decisions import Version
from embedding_service.controller.events import (
    Dismiss,
    End,
    Event,
    Instruction,
    Joined,
    Left,
    Looked,
    NoteTerm,
    Planned,
    Publish,
    Question,
    ReadTerm,
    Renew,
    Reported,
    Stream,
    Tell,
    TermNoted,
    TermRead,
    Tick,
)
from embedding_service.controller.fleet import Fleet, IdTaken
from embedding_service.controller.last import LastOfEach
from embedding_service.controller.placing import Placing
from embedding_service.controller.reports import check_report
from embedding_service.errors import EmbeddingServiceError, Unavailable
from embedding_service.placement.parts import PartKey
from embedding_service.placement.routing import Routing
from embedding_service.store.manifest import Manifest
from embedding_service.store.store import Catalogue
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire

log = logging.getLogger(__name__)

TICK_SECONDS, SETTLING_TICK_SECONDS = 0.25, 0.05
# Terms are microseconds of the clock, and up to this many more, which is 8 s.
TERM_SPREAD = 1 << 23
# So long shards that serve have to come again to a controller that was restarted: they try every 2 s.
RETURN_SECONDS = 3.0
# And so long after a store is back: a controller that is still there has to see first that there is another.
STORE_BACK_SECONDS = 2 * RETURN_SECONDS
# A term that the store did not take is noted again after this time.
NOTE_SECONDS = 10.0
# Pause between two decisions for each shard: telling one takes about that. 1,000 shards get a routing a second.
SECONDS_A_SHARD = 0.001


class Phase(Enum):
    """The states of the table above."""

    SETTLING = "settling"
    LOOKING = "looking"
    QUIET = "quiet"
    DECIDING = "deciding"
    ENDED = "ended"


@dataclass(frozen=True)
class Settings:
    """What the controller is to keep.

    Attributes:
        address: Where clients and shards reach it. The routing says so.
        replicas: Copies of every part, each on another shard. 0: one on every shard.
        expect_shards: The first plan waits for this many shards, at most `patience` seconds. 0: until none has come for
            `settle` seconds.
        lost_after: Seconds of silence after which a shard counts as gone.
        grace: Seconds a shard keeps a part after the routing stopped naming it.
        limits: What one lookup may ask for. Clients learn it from the routing.
    """

    address: str
    replicas: int = 1
    expect_shards: int = 0
    settle: float = 2.0
    patience: float = 60.0
    lost_after: float = 5.0
    grace: float = 5.0
    limits: wire.Limits = field(default_factory=wire.Limits)


class ControllerState:
    """Keeps (routing, assignments) in step with (store, shards).

    Args:
        clock: Seconds now.
        chance: Tells terms apart.

    Attributes:
        phase: Where it is.
        fleet: The shards.
        placing: Which shard is to hold which part.
        catalog: The versions that are known.
        wanted: The versions that are to be held.
        found, store_problem: The last look at the store.
        routing: The one that was last published.
        term: The controller's own. 0 before the first decision.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float], chance: random.Random) -> None:
        self.settings = settings
        self.phase = Phase.SETTLING
        self.fleet = Fleet(settings.lost_after, clock)
        self.placing = Placing(settings.replicas, self.fleet, clock)
        self.catalog: decisions.Catalog = {}
        self.wanted: list[Manifest] = []
        self.found: Catalogue | None = None
        self.store_problem = ""
        self.routing: Routing | None = None
        self.term = 0
        self._clock, self._chance = clock, chance
        self._began = clock()
        self._looked = self._is_first = False
        self._returns_until = self._began + RETURN_SECONDS
        self._last_noted = 0
        self._notes_at = 0.0
        self._dirty = True
        self._renews = False
        self._decides_at = 0.0
        self._decision: Generator[Question, Any, None] | None = None
        self._out: list[Instruction] = []
        # What the last routing says, and for each version the parts that it names of each shard.
        self._published: tuple[list[wire.ShardAddress], list[wire.ModelPlacement]] = ([], [])
        self._named: dict[Version, dict[str, frozenset[PartKey]]] = {}
        self._copies: LastOfEach[Version, Counter[int]] = LastOfEach(decisions.copies_held)
        self._copying: LastOfEach[Version, set[PartKey]] = LastOfEach(decisions.still_copied)
        self._placed: LastOfEach[Version, wire.ModelPlacement] = LastOfEach(decisions.place_version)
        self._placed_parts: LastOfEach[Version, dict[str, frozenset[PartKey]]] = LastOfEach(decisions.placed_parts)
        self._planned_parts: LastOfEach[Version, dict[str, frozenset[PartKey]]] = LastOfEach(decisions.planned_parts)
        self._united: LastOfEach[str, frozenset[PartKey]] = LastOfEach(frozenset[PartKey]().union)
        self._leaving: LastOfEach[str, frozenset[PartKey]] = LastOfEach(frozenset.difference)

    def handle(self, event: Event) -> list[Instruction]:
        """Take an event in. Returns what to do about it, in that order."""
        if self.phase is Phase.ENDED:
            return []
        match event:
            case Joined(stream, report):
                self._join(stream, report)
            case Reported(stream, report):
                self._hear(stream, report)
            case Left(stream):
                self._leave(stream)
            case Looked(found, problem, noted):
                self._look(found, problem, noted)
            case Renew():
                self._renews = self._dirty = True
            case Tick():
                self._tick()
            case TermRead() | TermNoted() | Planned():
                self._go_on(event)
        out, self._out = self._out, []
        return out

    def tick_in(self) -> float:
        """Seconds until the next `Tick` is wanted, at the latest."""
        if self.phase is Phase.SETTLING:
            return SETTLING_TICK_SECONDS
        if self.phase is Phase.QUIET and self._dirty and self._decision is None:
            return min(max(self._decides_at - self._clock(), 0.0), TICK_SECONDS)
        return TICK_SECONDS

    def message(self, stream: Stream) -> control.Assignment | None:
        """The message for a shard now, or None. It counts as told."""
        shard = self.fleet.shard_of(stream)
        if shard is None or shard.assigned is None:
            return None
        assignment = shard.assignment()
        assignment.term, assignment.released, assignment.number = self.term, shard.released, shard.tell()
        if self.routing and shard.knows < self.routing.age:
            shard.sent = self.routing.age
            assignment.routing.CopyFrom(self.routing.message)
        return assignment

    # Shards

    def _join(self, stream: Stream, report: control.ShardReport) -> None:
        try:
            check_report(report, self.term)
            known = self.fleet.join(stream, report)
        except EmbeddingServiceError as error:
            self._refuse(stream, report, error)
            return
        log.info("shard %s registered: %s, holds %d parts", report.shard_id, report.address, len(report.parts))
        self._dirty = True
        if known and known.report.incarnation != report.incarnation:
            why = IdTaken(f"shard id {known.name} was taken over by {report.address} after a silence")
            self._refuse(known.stream, known.report, why, logging.INFO)
        elif known:
            self._out.append(Dismiss(known.stream))

    def _hear(self, stream: Stream, report: control.ShardReport) -> None:
        shard = self.fleet.shard_of(stream)
        if shard is None:
            return
        try:
            check_report(report, self.term, shard.report)
        except EmbeddingServiceError as error:
            self.fleet.remove(shard)
            self._dirty = True
            self._refuse(stream, shard.report, error)
            return
        self._dirty |= self.fleet.hear(shard, report)

    def _leave(self, stream: Stream) -> None:
        shard = self.fleet.shard_of(stream)
        if shard is not None:
            self.fleet.leave(shard)
            self._dirty = True
            self._out.append(Dismiss(stream))

    def _refuse(
        self, stream: Stream, report: control.ShardReport, why: EmbeddingServiceError, level: int = logging.ERROR
    ) -> None:
        """End a registration with the reason, which status tells as well."""
        if self.fleet.refuse(report.shard_id, why):
            log.log(level, "refused shard %r at %r: %s", report.shard_id[:100], report.address[:100], why)
        self._out.append(Dismiss(stream, why))

    # The store

    def _look(self, found: Catalogue | None, problem: str, noted: int) -> None:
        if self._is_unread() and found and not found.is_empty:
            self._returns_until = max(self._returns_until, self._clock() + STORE_BACK_SECONDS)
        self.found, self.store_problem = found, problem
        self._last_noted = max(self._last_noted, noted)
        self._looked = self._dirty = True
        if found and 0 < self.term < noted:
            self._end(noted)
        elif found and noted < self.term:  # lost, or the store could not be written to
            self._notes_at = 0.0

    def _end(self, term: int) -> None:
        """End, since a controller with a later term is there. One controller leads: the one that started last."""
        self.phase = Phase.ENDED
        self._out.append(
            End(Unavailable(f"a controller of term {term} is there, above this one's {self.term}: ending"))
        )

    # Deciding

    def _tick(self) -> None:
        for shard in self.fleet.forget_lost():
            log.warning("shard %s was not heard of for %g s: gone", shard.name, self.settings.lost_after)
            self._dirty = True
            self._out.append(Dismiss(shard.stream))  # if its stream is still open, it must register again
        if self.phase is Phase.SETTLING and self._is_settled():
            self.phase = Phase.LOOKING
        if self.phase is Phase.LOOKING and self._looked:
            self.phase = Phase.QUIET
        if self._decision is not None:
            return
        if self._looked and (not self.term or (self.phase is Phase.SETTLING and self._is_note_due())):
            self._decision = self._take_term()
            self._go_on(None)
        elif self.phase is Phase.QUIET and self._clock() >= self._decides_at and self._has_changed():
            self.phase, self._dirty = Phase.DECIDING, False
            self._decision = self._decide()
            self._go_on(None)

    def _has_changed(self) -> bool:
        return self._dirty or self._graces_end() or self.placing.is_due() or self._is_note_due()

    def _go_on(self, answer: TermRead | TermNoted | Planned | None) -> None:
        """Go on with the decision to its next question or its end."""
        if self._decision is None:
            return
        try:
            self._out.append(self._decision.send(answer))
        except StopIteration:
            self._decision = None
            if self.phase is Phase.DECIDING:
                self.phase = Phase.QUIET
                # Shards take in what they were told before there is more.
                self._decides_at = self._clock() + SECONDS_A_SHARD * len(self.fleet.shards)

    def _is_settled(self) -> bool:
        """Whether the expected shards are there. The first must not get everything, and a restart must move nothing."""
        now, settings = self._clock(), self.settings
        return decisions.settled(
            len(self.fleet.shards),
            settings.expect_shards,
            now - self._began,
            now - max(self._began, self.fleet.joined),
            returning=self.fleet.newest_term > 0,
            awaited=not self._is_first and (self._is_unread() or now < self._returns_until),
            settle=settings.settle,
            patience=settings.patience,
            lost=RETURN_SECONDS + settings.lost_after,
        )

    def _is_unread(self) -> bool:
        """Whether the store was looked at in vain: it is away, or empty like a folder with nothing mounted on it.

        Then shards that served are all there is to tell what is served.
        """
        return self.found.is_empty if self.found else bool(self.store_problem)

    def _graces_end(self) -> bool:
        now = self._clock()
        return any(
            now >= until and key in (shard.assigned or ())
            for shard in self.fleet.shards.values()
            if shard.connected
            for key, until in shard.grace.items()
        )

    def _decide(self) -> Generator[Question, Any, None]:
        """One decision. It yields questions, and is sent the answers."""
        if not (yield from self._keep_term()):
            return
        served, _ = self._choose(self.fleet.holders())
        yield from self.placing.update(self.wanted, served)
        shards, holders = self.fleet.shards, self.fleet.holders()  # planning took time
        _, serving = self._choose(holders)
        addresses = {name: decisions.shard_address(shard.report) for name, shard in shards.items()}
        if self.routing and decisions.is_away(self.found, self.catalog):
            holders, addresses = decisions.name_lost_holders(self.routing.message, self._named, holders, addresses)
        draining = frozenset(name for name, shard in shards.items() if shard.report.draining)
        away = frozenset(name for name, shard in shards.items() if not shard.connected)
        target, unable, names = self.placing.target, self.fleet.unable(), sorted(addresses)
        questions = {
            (each.model, each.version): (
                each,
                target.get((each.model, each.version), {}),
                holders.get((each.model, each.version), {}),
                names,
                unable.get((each.model, each.version), frozenset()),
                draining,
                self.placing.copies,
                away,
            )
            for each in serving
        }
        self._publish([addresses[name] for name in names], self._placed(questions))
        self._assign()

    def _choose(self, holders: decisions.Holders) -> tuple[list[tuple[str, str]], list[Manifest]]:
        """See which versions there are. Returns those that are served now, and those to be served from now on.

        A model that the routing does not name may be served all the same. The shards that serve it may have come after
        this controller's first routing, and do not know it yet.
        """
        routed = {model.name: model.version for model in self.routing.models} if self.routing else {}
        served = list({**self.fleet.served_before(self.term), **routed}.items())
        described = self.fleet.described()
        described = {name: described[name] for name in served if name in described}
        self.catalog = decisions.known_versions(self.found, self.catalog, described)
        held = {name for name, copies in self.copies(holders).items() if not copies[0]}
        self.wanted, serving = decisions.choose_versions(self.catalog, served, held, self._still_copied(holders))
        return served, serving

    def copies(self, holders: decisions.Holders) -> dict[Version, Counter[int]]:
        """Of each known version, of how many parts there are how many copies."""
        known = {(each.model, each.version): each for versions in self.catalog.values() for each in versions}
        return self._copies({name: (each, holders.get(name, {})) for name, each in known.items()})

    def _still_copied(self, holders: decisions.Holders) -> set[Version]:
        """Versions with parts that fewer shards hold than the plan gives them to."""
        able, unable = self.fleet.able(), self.fleet.unable()
        copying = self._copying(
            {
                name: (target, holders.get(name, {}), able, unable.get(name, frozenset()))
                for name, target in self.placing.target.items()
            }
        )
        return {name for name, parts in copying.items() if parts}

    def _take_term(self) -> Generator[Question, Any, None]:
        """At the start: above every term that a shard has seen, and above those of controllers before.

        For the latter there is the term noted in the store, and the clock. It is noted before shards are waited for: a
        controller that is still there learns so that this one came, and lets its shards go.
        """
        if not self.term:
            read: TermRead = yield ReadTerm()
            noted = max(read.noted, self._last_noted)  # the store may have gone away since it was looked at
            self._is_first = not noted and self.found is not None and bool(self.found.manifests)
            self.term = self._drawn(max(self.fleet.newest_term + 1, noted + 1, read.others + 1, read.clock))
        yield from self._note_term()

    def _drawn(self, least: int) -> int:
        """A term that is not another's, though two controllers take one at a time and neither can note it."""
        return least + self._chance.randrange(TERM_SPREAD)

    def _note_term(self) -> Generator[Question, Any, None]:
        """Where it is not noted, in what is a store for sure."""
        if self._is_note_due():
            self._notes_at = inf
            noted: TermNoted = yield NoteTerm(self.term)
            if not noted.is_there:
                self._notes_at = min(self._notes_at, self._clock() + NOTE_SECONDS)

    def _is_note_due(self) -> bool:
        return self._clock() >= self._notes_at and self.found is not None and bool(self.found.manifests)

    def _keep_term(self) -> Generator[Question, Any, bool]:
        """Before each decision: still the highest? Returns whether this controller stays.

        It ends when another controller took a term above ours. Where the store says that ours is the last controller's,
        a higher term is a report's alone, and ends nobody.
        """
        yield from self._note_term()
        newest = self.fleet.newest_term
        if newest < self.term or (newest == self.term and self.routing):
            return True
        if self.routing:
            read: TermRead = yield ReadTerm()
            if read.noted != self.term or read.others >= newest:
                self._end(newest)
                return False
        log.warning(
            "a shard knows term %d, which no controller noted after this one's %d: going above", newest, self.term
        )
        self.term, self._notes_at = self._drawn(newest + 1), 0.0
        yield from self._note_term()
        return True

    def _publish(self, shards: list[wire.ShardAddress], placed: dict[Version, wire.ModelPlacement]) -> None:
        published = shards, list(placed.values())
        self._named = self._placed_parts(
            {name: (placement, [shard.id for shard in shards]) for name, placement in placed.items()}
        )
        renews, self._renews = self._renews, False
        term, epoch = self.routing.age if self.routing else (0, 0)
        if self.routing and term == self.term and published == self._published and not renews:
            return
        self._published = published
        routing = wire.Routing(
            term=self.term,
            epoch=epoch + 1 if term == self.term else 1,
            controller=self.settings.address,
            limits=self.settings.limits,
            shards=published[0],
            models=published[1],
        )
        self.routing = Routing(routing)
        self._out.append(Publish(self.routing))
        log.info("published routing (%d, %d): %d models", routing.term, routing.epoch, len(routing.models))

    def _assign(self) -> None:
        """Tell each shard what to hold: its planned parts, and for a grace time those that clients may still want."""
        assert self.routing
        target, wanted = self.placing.target, {(each.model, each.version): each for each in self.wanted}
        planned = self._planned_parts({name: (each, target.get(name, {})) for name, each in wanted.items()})
        known = {(each.model, each.version) for versions in self.catalog.values() for each in versions}
        kept: dict[str, list[frozenset[PartKey]]] = {}
        for parts in (*planned.values(), *self._named.values()):
            for name, keys in parts.items():
                kept.setdefault(name, []).append(keys)
        # One that is not connected cannot be told, and holds what it was told before.
        shards = {name: shard for name, shard in self.fleet.shards.items() if shard.connected}
        for name, shard in shards.items():
            unknown = (keys for version, keys in shard.held_of.items() if self._may_be_there(version, known))
            kept.setdefault(name, []).extend(unknown)
        keep = self._united({name: tuple(kept[name]) for name in shards})
        leaving = self._leaving({name: (shard.keeps, keep[name]) for name, shard in shards.items()})
        now = self._clock()
        for name, shard in shards.items():
            shard.grace = {key: shard.grace.get(key, now + self.settings.grace) for key in leaving[name]}
            in_grace = {key for key, until in shard.grace.items() if now < until}
            assigned = keep[name] | in_grace if in_grace else keep[name]
            released = shard.report.draining and (not assigned or self._all_drain())
            behind = shard.knows < self.routing.age
            if (assigned, released) != (shard.assigned, shard.released) or behind:
                shard.assigned, shard.released = assigned, released
                self._out.append(Tell(shard.stream))

    def _may_be_there(self, version: Version, known: Container[Version]) -> bool:
        """Whether the store may have a version that is not known, as far as it could be read."""
        return version not in known and (self.found is None or self.found.cannot_tell(*version))

    def _all_drain(self) -> bool:
        """Whether all shards drain, so that none is left to take parts over."""
        return all(shard.report.draining for shard in self.fleet.shards.values())
