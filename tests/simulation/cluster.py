"""The service: controllers and shards around their real insides, and the streams between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from support.planner import plan

from embedding_service.client.calls import Failure
from embedding_service.client.router import Router
from embedding_service.client.wants import StoredRows, Want
from embedding_service.controller.events import (
    Dismiss,
    End,
    Event,
    Instruction,
    Joined,
    Left,
    Looked,
    NoteTerm,
    Plan,
    Planned,
    Publish,
    ReadTerm,
    Reported,
    Tell,
    TermNoted,
    TermRead,
    Tick,
)
from embedding_service.controller.state import ControllerState, Settings
from embedding_service.controller.watch import SCAN_SECONDS, TERM_SECONDS
from embedding_service.errors import EmbeddingServiceError, NotFound, PlacementError
from embedding_service.grpc_codes import code_of
from embedding_service.placement.parts import PartKey
from embedding_service.placement.routing import Model, Routing
from embedding_service.security.identity import Caller
from embedding_service.serving import RequestLimits
from embedding_service.shard.duties import Duties
from embedding_service.shard.held import CheckedLookup, HeldRows, Redirect
from embedding_service.shard.holdings import RETRY_SECONDS
from embedding_service.shard.registration import FIRST_PAUSE, HEARTBEAT_SECONDS, LONGEST_PAUSE
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lists import read_lookup
from embedding_service.wire.lookup_codec import Answer, EncodedLookup
from simulation.steps import drive
from simulation.store import ROW_BYTES, ROWS_PER_PART, Rows, Store, manifest, shared
from simulation.world import Process, World

if TYPE_CHECKING:
    from simulation.checks import Checks

CONTROLLER = "ctl:1"
LIMITS = RequestLimits()
# `client.channels`: a ping after 10 s of silence, and 5 s for its answer.
PING_SECONDS = 15.0
PART_BYTES = ROWS_PER_PART * ROW_BYTES
UNKNOWN = Failure(grpc.StatusCode.UNAVAILABLE, "no routing yet")
MOVED = Failure(grpc.StatusCode.ABORTED, "moved")


def routing_for(request: wire.GetRoutingRequest, routing: Routing | None) -> Any:
    """What `serving.RoutingService` answers."""
    if routing is None:
        return UNKNOWN
    if (request.term, request.epoch) >= routing.age:
        return wire.Routing(term=routing.message.term, epoch=routing.message.epoch)
    return routing.message


class Stream:
    """A registration: two directions in which messages keep their order, and two ends that may learn of an end apart.

    While the network is cut, messages wait, as TCP repeats them.
    """

    def __init__(self, shard: Shard, controller: Controller) -> None:
        self.shard, self.controller = shard, controller
        self.world = shard.world
        self.open = {shard.name: True, controller.name: True}
        self.telling = False
        self._heard = {shard.name: self.world.now, controller.name: self.world.now}
        self._free_at = {shard.name: 0.0, controller.name: 0.0}
        self._held_up: list[tuple[Process, Process, Callable[..., None], tuple[Any, ...]]] = []
        self.world.streams.append(self)

    def send(self, source: Process, target: Process, action: Callable[..., None], *arguments: Any) -> None:
        """Have the target do something, after all that was sent to it before."""
        at = self._free_at[target.name] = max(self._free_at[target.name], self.world.now + self.world.delay())
        self.world.after(at - self.world.now, self._arrive, source, target, action, arguments)

    def flush(self) -> None:
        """The network is whole: what waited goes on its way."""
        held_up, self._held_up = self._held_up, []
        for source, target, action, arguments in held_up:
            self._arrive(source, target, action, arguments)

    def _arrive(
        self, source: Process, target: Process, action: Callable[..., None], arguments: tuple[Any, ...]
    ) -> None:
        if not self.open[target.name]:
            return
        if self._held_up or not self.world.reaches(source.name, target.name):
            self._held_up.append((source, target, action, arguments))
        elif target.hangs:
            target.after(0.0, self._act, target, action, arguments)
            self.world.idle()
        else:
            action(*arguments)

    def _act(self, target: Process, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.open[target.name]:
            action(*arguments)

    def end_at(self, process: Shard | Controller, code: grpc.StatusCode | None = None) -> None:
        """This end learns that it is over."""
        if self.open[process.name]:
            self.open[process.name] = False
            process.after(0.0, process.lost, self, code)
        if not any(self.open.values()) and self in self.world.streams:
            self.world.streams.remove(self)

    def check(self) -> None:
        """GRPC's pings: an end that has heard nothing for a while gives the connection up."""
        world = self.world
        for end, other in ((self.shard, self.controller), (self.controller, self.shard)):
            silent = other.hangs or not world.reaches(end.name, other.name) or not world.reaches(other.name, end.name)
            if not silent:
                self._heard[end.name] = world.now
            elif world.now - self._heard[end.name] > PING_SECONDS and not end.hangs:
                self.end_at(end, grpc.StatusCode.UNAVAILABLE)

    def break_(self) -> None:
        """Both ends learn of it, each in its own time; one may take long."""
        for process in (self.shard, self.controller):
            self.world.after(self.world.chance.choice((0.01, 0.5, 3.0)), self.end_at, process)


class Controller(Process):
    """A controller's process: its real state, and all that the state asks for."""

    def __init__(self, world: World, name: str, store: Store, settings: Settings, checks: Checks) -> None:
        super().__init__(world, name)
        self.store, self.settings, self.checks = store, settings, checks
        self.state = self._state()
        self.planner_fails = False
        self.start_again: Callable[[Controller], None] = lambda controller: None
        self._tick_at = 0.0
        self._seen: Any = self

    def begin(self) -> None:
        """Start it at the controllers' address, with all that it knew forgotten."""
        super().begin()
        self.checks.controller_begins()
        self.world.addresses[CONTROLLER] = self
        self.world.controllers = [*(each for each in self.world.controllers if each.is_there), self]
        self.state = self._state()
        self._seen = self
        self.after(self.world.delay(), self._look)
        self._plan_tick(0.0)

    def _state(self) -> ControllerState:
        return ControllerState(self.settings, self.world.clock, random.Random(self.world.chance.random()))

    def end(self) -> None:
        """It is gone; shards learn it sooner or later."""
        super().end()
        for stream in [each for each in self.world.streams if each.controller is self]:
            stream.open[self.name] = False
            self.world.after(self.world.delay(), stream.end_at, stream.shard)

    def handle(self, event: Event) -> None:
        """Tell the state, and do what it says."""
        instructions = self.state.handle(event)
        for instruction in instructions:
            self._do(instruction)
            if not self.is_there:
                return
        if not instructions and isinstance(event, Tick):
            self.world.idle()
        self._plan_tick(self.state.tick_in())

    def _plan_tick(self, seconds: float) -> None:
        at = self.world.now + seconds
        if at < self._tick_at or self._tick_at <= self.world.now:
            self._tick_at = at
            self.after(seconds, self._tick, at)

    def _tick(self, at: float) -> None:
        if at == self._tick_at:
            self.handle(Tick())
        else:
            self.world.idle()

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case Tell(Stream() as stream):
                self._wake(stream)
            case Dismiss(Stream() as stream, why):
                self._dismiss(stream, code_of(why) if why else None)
            case Publish(routing):
                self.checks.published(self, routing)
            case ReadTerm():
                self.after(0.01 if not self.store.is_away else TERM_SECONDS, self._read_term)
            case NoteTerm(term):
                self.after(0.01 if not self.store.is_away else TERM_SECONDS, self._note_term, term)
            case Plan(parts, nodes, replicas):
                try:
                    outcome: Any = plan(parts, nodes, replicas)
                except PlacementError as error:
                    outcome = error
                if self.planner_fails:
                    self.planner_fails, outcome = False, RuntimeError("the process that plans has died")
                self.after(self.world.chance.choice((0.01, 0.3, 2.0)), self.handle, Planned(outcome))
            case End():
                self.world.say("%s: ends, for there is another", self.name)
                self.end()
                self.world.after(1.0, self.start_again, self)

    def _read_term(self) -> None:
        self.handle(TermRead(self.store.read_term(), self.world.wall_us()))

    def _note_term(self, term: int) -> None:
        store = self.store
        if store.takes_notes and not store.is_away and not store.is_bare:
            store.noted = max(store.noted, term)
        if is_there := store.read_term() == term:
            self._seen = (self._seen[0], term)
        self.handle(TermNoted(is_there))

    def _look(self) -> None:
        found, noted = self.store.catalogue(), self.store.read_term()
        self.after(SCAN_SECONDS, self._look)
        if self._seen is self or (found, noted) != self._seen:
            self._seen = found, noted
            self.handle(Looked(found, "" if found else "away", noted))
        else:
            self.world.idle()

    # Streams

    def joined(self, stream: Stream, report: control.ShardReport) -> None:
        """The first report of a stream."""
        self.handle(Joined(stream, report))
        self._wake(stream)

    def reported(self, stream: Stream, report: control.ShardReport) -> None:
        """Another one."""
        self.handle(Reported(stream, report))

    def lost(self, stream: Stream, code: grpc.StatusCode | None) -> None:
        """A stream ended."""
        self.handle(Left(stream))

    def _wake(self, stream: Stream) -> None:
        if not stream.telling:
            stream.telling = True
            self.after(0.0, self._tell, stream)

    def _tell(self, stream: Stream) -> None:
        stream.telling = False
        message = self.state.message(stream) if stream.open[self.name] else None
        if message is None:
            self.world.idle()
        else:
            stream.send(self, stream.shard, stream.shard.told, self, stream, message, self.world.now)

    def _dismiss(self, stream: Stream, code: grpc.StatusCode | None) -> None:
        if stream.open[self.name]:
            stream.open[self.name] = False
            stream.send(self, stream.shard, stream.end_at, stream.shard, code)

    def receive(self, request: Any, timeout: float, reply: Callable[[Any], None]) -> None:
        """A controller answers with its routing, and has no rows."""
        if isinstance(request, wire.GetRoutingRequest):
            reply(routing_for(request, self.state.routing))
        else:
            reply(Failure(grpc.StatusCode.UNIMPLEMENTED, "no rows here"))


class Changed:
    """Stands for `Holdings.changed`, an asyncio.Event."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._is_set = False
        self._wake = wake

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._wake()

    def clear(self) -> None:
        self._is_set = False


class Holdings:
    """Follows the rules of `shard.holdings.Holdings`, which loads on threads; here a load is an event."""

    def __init__(self, shard: Shard, store: Store, memory_limit: int, checks: Checks) -> None:
        self.held: set[PartKey] = set()
        self.failures: dict[PartKey, str] = {}
        self.reserved = 0
        self.changed = Changed(shard.poke)
        self.tables: dict[tuple[str, str, str], Rows] = {}
        self._shard, self._store, self._checks = shard, store, checks
        self._limit = memory_limit
        self._taken = 0
        self._users: dict[PartKey, set[PartKey]] = {}  # of each part that versions share
        self._wanted: set[PartKey] = set()
        self._loading: set[PartKey] = set()
        self._waiting: set[PartKey] = set()

    def table(self, model: str, version: str, table: str) -> Any:
        """What of a table is held."""
        return self.tables.get((model, version, table))

    def accesses(self, key: PartKey) -> int:
        """Nobody counts them here."""
        return 0

    def assign(self, wanted: Iterable[PartKey]) -> None:
        """Hold exactly these from now on."""
        self._checks.obeys(self._shard, *self._shard.told_last)
        self._wanted = set(wanted)
        for key in sorted(self.held - self._wanted):
            self._drop(key)
        for key in [key for key in self.failures if key not in self._wanted]:
            del self.failures[key]
        for key in sorted(self._wanted - self.held - self._loading):
            self._loading.add(key)
            self._try(key)

    def _try(self, key: PartKey) -> None:
        self._waiting.discard(key)
        if key not in self._wanted:
            self._loading.discard(key)
        elif not self._store.can_load(key):
            self._again(key, "cannot be read")
        elif self._taken + self._needed(key) > self._limit:
            self._again(key, "waits for room")
        else:
            self._taken += self._needed(key)
            self._users.setdefault(shared(key), set()).add(key)
            self._shard.after(self._shard.load_seconds(), self._loaded, key)

    def _again(self, key: PartKey, why: str) -> None:
        if self.failures.get(key) != why:
            self.failures[key] = why
            self.changed.set()
        self._waiting.add(key)
        self._shard.after(RETRY_SECONDS, self._retry, key)

    def _retry(self, key: PartKey) -> None:
        if key in self._waiting:
            self._try(key)
        else:
            self._shard.world.idle()

    def _loaded(self, key: PartKey) -> None:
        if not self._store.can_load(key):
            self._give_back(key)
            self._again(key, "cannot be read")
            return
        self._loading.discard(key)
        self.failures.pop(key, None)
        self.held.add(key)
        if key[:3] not in self.tables:
            self.tables[key[:3]] = Rows(*key[:3])
        self.tables[key[:3]].parts.add(key.part)
        self._checks.holds(self._shard, key)
        self.changed.set()
        if key not in self._wanted:
            self._drop(key)

    def _drop(self, key: PartKey) -> None:
        self._checks.drops(self._shard, key)
        self.held.discard(key)
        rows = self.tables[key[:3]]
        rows.parts.discard(key.part)
        if not rows.parts:
            del self.tables[key[:3]]
        self._give_back(key)
        self.changed.set()
        for other in sorted(self._waiting):
            self._try(other)

    def _needed(self, key: PartKey) -> int:
        """Bytes of rows of its own, and of those of the base if no version holds them."""
        return _overlay_bytes(key) + (0 if shared(key) in self._users else PART_BYTES)

    def _give_back(self, key: PartKey) -> None:
        users = self._users[shared(key)]
        users.discard(key)
        self._taken -= _overlay_bytes(key)
        if not users:
            del self._users[shared(key)]
            self._taken -= PART_BYTES


def _overlay_bytes(key: PartKey) -> int:
    overlay = manifest(*key[:2]).overlays(key.table).get(key.part)
    return overlay.bytes if overlay else 0


class Lookups(HeldRows):
    """The real checks of a request. What is not held is the caller's business, or fetched for a thin client."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard.holdings.table, LIMITS)
        self._shard = shard

    def known_model(self, name: str, caller: Caller | None) -> Model:
        """As `shard.service.LookupService`."""
        if self._shard.router.current is None:
            raise NotFound("no routing yet")
        return self._shard.router.current.model(name)

    def receive(self, request: EncodedLookup, timeout: float, reply: Callable[[Any], None]) -> None:
        """Answer a lookup; a thin client's may take a while."""
        try:
            lookup = self._read(read_lookup(request.message()), None)
            if lookup.model is None:
                reply(self._held(lookup))
            else:
                self._any(lookup, timeout, reply)
        except Redirect:
            reply(MOVED)
        except EmbeddingServiceError as error:
            reply(Failure(code_of(error), str(error)))

    def _held(self, lookup: CheckedLookup) -> Any:
        held: Any = lookup.held
        try:
            return Answer(held.gather(lookup.ids).reshape(-1), lookup.shape.version)
        except NotFound:
            return MOVED

    def _any(self, lookup: CheckedLookup, timeout: float, reply: Callable[[Any], None]) -> None:
        held: Any = lookup.held
        mine = held.holds(lookup.ids) if held else np.zeros(len(lookup.ids), np.bool_)
        rows = np.empty((len(lookup.ids), ROW_BYTES), np.uint8)
        if mine.any():
            rows[mine] = held.gather(lookup.ids[mine])
        if mine.all():
            reply(Answer(rows.reshape(-1), lookup.shape.version))
            return
        model: Any = lookup.model
        sink = StoredRows(int(np.count_nonzero(~mine)), ROW_BYTES)

        def wants_of(model: Model) -> list[Want]:
            return [Want(model.table(lookup.table), lookup.ids[~mine], lookup.shape.encoding, ROW_BYTES, sink)]

        def done(outcome: Any) -> None:
            if isinstance(outcome, EmbeddingServiceError):
                reply(Failure(code_of(outcome), str(outcome)))
            else:
                rows[~mine] = sink.rows
                reply(Answer(rows.reshape(-1), lookup.shape.version))

        shard = self._shard
        drive(shard.router.fetch(model.full_name, wants_of, shard.world.now + timeout), shard, done)


class Shard(Process):
    """A shard's process: its real duties, router and checks of requests, and simulated memory."""

    def __init__(self, world: World, name: str, store: Store, memory_limit: int, topology: str, checks: Checks) -> None:
        super().__init__(world, name)
        self.address = f"{name}:1"
        self.store, self.memory_limit, self.topology, self.checks = store, memory_limit, topology, checks
        self.has_cache = False
        self.stops_at = float("inf")

    def begin(self) -> None:
        """Start it; it holds nothing."""
        super().begin()
        world = self.world
        world.addresses[self.address] = self
        self.stream: Stream | None = None
        self.stops_at = float("inf")
        self._pause = FIRST_PAUSE
        self._poked = False
        self.router = Router([CONTROLLER], clock=world.clock, chance=random.Random(world.chance.random()))
        self.holdings = Holdings(self, self.store, self.memory_limit, self.checks)
        about = control.ShardReport(
            shard_id=self.name,
            address=self.address,
            device="cpu",
            tier="ram",
            memory_limit=self.memory_limit,
            topology=self.topology,
            incarnation=world.chance.getrandbits(63),
        )
        self.duties = Duties(about, self.holdings, self.router, world.clock)
        self.lookups = Lookups(self)
        self.checks.begins(self)
        self.after(world.delay(), self._connect)
        self._look_around()

    def _look_around(self) -> None:
        drive(self.router.look_around(), self, lambda seconds: self.after(seconds, self._look_around))

    def end(self) -> None:
        """It is gone, with what it held."""
        self.checks.ends(self)
        self.has_cache = bool(self.holdings.held)
        super().end()
        for stream in [each for each in self.world.streams if each.shard is self]:
            stream.open[self.name] = False
            self.world.after(self.world.delay(), stream.end_at, stream.controller)

    def load_seconds(self) -> float:
        """How long a part takes; less where its file is in this machine's memory still."""
        return self.world.chance.uniform(0.01, 0.05 if self.has_cache else 0.5)

    def drain(self, seconds: float) -> None:
        """SIGTERM: hand over first."""
        if not self.holdings.held:
            self.end()
            return
        self.duties.draining = True
        self.stops_at = self.world.now + seconds
        self.holdings.changed.set()
        self.after(seconds, self._stop)

    def _stop(self) -> None:
        self.world.say("%s: ends", self.name)
        self.end()

    # The controller

    def _connect(self) -> None:
        there = [each for each in self.world.controllers if each.is_there]
        # A name may stand for the one before for a while.
        controller: Controller | None = there[-1] if there else None
        if len(there) > 1 and self.world.chance.random() < 0.3:
            controller = there[-2]
        if controller is None or not self.world.reaches(self.name, controller.name):
            self._retry()
            return
        stream = self.stream = Stream(self, controller)
        stream.send(self, controller, controller.joined, stream, self.duties.first_report())
        self.after(HEARTBEAT_SECONDS, self._beat, stream)

    def _retry(self) -> None:
        self.after(self._pause, self._connect)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def lost(self, stream: Stream, code: grpc.StatusCode | None) -> None:
        """The registration ended: register again."""
        if stream is self.stream:
            self.stream = None
            self._retry()

    def poke(self) -> None:
        """There is something to report."""
        if not self._poked and self.stream is not None:
            self._poked = True
            self.after(0.0, self._report)

    def _report(self) -> None:
        self._poked = False
        if self.stream is not None and self.holdings.changed.is_set():
            self._send(self.stream)
        else:
            self.world.idle()

    def _beat(self, stream: Stream) -> None:
        if self.stream is stream:
            self._send(stream)
            self.after(HEARTBEAT_SECONDS, self._beat, stream)
        else:
            self.world.idle()

    def _send(self, stream: Stream) -> None:
        stream.send(self, stream.controller, stream.controller.reported, stream, self.duties.report())

    def told(self, controller: Controller, stream: Stream, assignment: control.Assignment, sent: float) -> None:
        """An assignment came, of a moment ago."""
        if stream is not self.stream:
            return
        self._pause = FIRST_PAUSE
        self.told_last = controller, sent, assignment.term
        self.duties.obey(assignment)
        if self.duties.draining and self.duties.released:
            self.checks.released(self, controller)
            self._stop()

    # Requests

    def receive(self, request: Any, timeout: float, reply: Callable[[Any], None]) -> None:
        """Answer a call."""
        if isinstance(request, wire.GetRoutingRequest):
            reply(routing_for(request, self.router.current))
        else:
            self.lookups.receive(request, timeout, reply)
