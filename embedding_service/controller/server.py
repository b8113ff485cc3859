"""The controller process: hears the shards, decides, publishes the routing, tells the shards what to hold.

Rules (ARCHITECTURE.md, "Rules of the protocol"): a part enters the routing when a shard reports that it holds it; a
shard drops a part only a grace time after the routing stopped naming it for that part; (term, epoch) only grows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NoReturn

import grpc
from prometheus_client.core import Metric

from embedding_service.controller import decisions
from embedding_service.controller.fleet import Fleet, IdTaken, Shard
from embedding_service.controller.planning import Planning
from embedding_service.controller.reports import check_report
from embedding_service.controller.watch import StoreWatch
from embedding_service.errors import EmbeddingServiceError, PlacementError, Unavailable
from embedding_service.methods import Context
from embedding_service.metrics import MetricsServer, counter, gauge
from embedding_service.placement.demand import CUDA, Node, PartDemand, Placement
from embedding_service.placement.parts import PartKey
from embedding_service.placement.routing import Routing
from embedding_service.serving import (
    RequestLimits,
    RoutingService,
    Server,
    abort,
    cancel,
    first_of,
    reachable_address,
    run_process,
    told_to_end,
)
from embedding_service.store.manifest import Manifest
from embedding_service.store.store import Store
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.control_pb2_grpc import ControlServiceServicer, add_ControlServiceServicer_to_server
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceServicer, add_EmbeddingServiceServicer_to_server

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
HEAT_SECONDS = 60.0
# Between two decisions: telling a shard takes about so long.
SECONDS_A_SHARD = 0.001
# A planner that failed is not asked the same again before.
REPLAN_SECONDS = 30.0
MOST_PROBLEMS = 100


@dataclass(frozen=True)
class ControllerOptions:
    """How the controller runs.

    Attributes:
        store: Path or URL of the store whose models are served, each in its newest version.
        listen: host:port; port 0 takes a free one.
        advertise: How others reach it, where that is not `listen`.
        replicas: Copies of every part, each on another shard.
        expect_shards: The first plan waits for so many shards (at most `patience` seconds); 0: until none has come for
            `settle` seconds.
        lost_after: Seconds without a word after which a shard counts as gone.
        grace: Seconds a shard keeps a part after the routing stopped naming it.
        limits: What one lookup may ask for; clients learn it from the routing.
        metrics_port: Port of Prometheus metrics, on the host of `listen`; 0: none.
    """

    store: str
    listen: str = "127.0.0.1:7069"
    advertise: str | None = None
    replicas: int = 1
    expect_shards: int = 0
    settle: float = 2.0
    patience: float = 60.0
    lost_after: float = 5.0
    grace: float = 5.0
    limits: RequestLimits = field(default_factory=RequestLimits)
    metrics_port: int = 0


class Controller(RoutingService, ControlServiceServicer, EmbeddingServiceServicer):
    """Keeps (routing, assignments) in step with (store, shards)."""

    def __init__(self, options: ControllerOptions, address: str) -> None:
        self._options = options
        self._address = address
        self._dirty = asyncio.Event()
        self._watch = StoreWatch(Store(options.store), self._dirty.set)
        self._fleet = Fleet(options.lost_after)
        self._planning = Planning()
        self._catalog: decisions.Catalog = {}
        self._target: dict[PartKey, list[str]] = {}
        self._planned_for: tuple[list[Node], set[tuple[str, str]]] = ([], set())
        self._planned_at = 0.0
        self._replan_at = 0.0
        self._left_out: set[tuple[str, str]] = set()
        self._wanted: list[Manifest] = []
        self._term = 0
        self._noted = False
        self._routing: Routing | None = None
        self._published = asyncio.Condition()
        self._settled = False
        self._ending = False
        self._plan_problem = ""
        self._replicas_problem = ""

    # Shards and watchers

    async def Register(
        self, reports: AsyncIterator[control.ShardReport], context: Context
    ) -> AsyncIterator[control.Assignment]:
        """A shard's life."""
        first = await anext(reports, None)
        if first is None:
            return
        try:
            check_report(first, self._term)
            shard = self._fleet.join(first)
        except EmbeddingServiceError as error:
            await self._refuse(first, error, context)
        log.info("shard %s registered: %s, holds %d parts", shard.name, first.address, len(shard.held))
        self._dirty.set()
        listening = asyncio.create_task(self._listen(shard, first, reports))
        try:
            while self._fleet.shards.get(shard.name) is shard and shard.connected and not self._ending:
                if shard.assigned is not None:
                    yield self._assignment(shard)
                await shard.outbox.wait()
                shard.outbox.clear()
            if isinstance(shard.dismissed, EmbeddingServiceError):
                await self._refuse(first, shard.dismissed, context)
        finally:
            self._fleet.leave(shard)
            await cancel([listening])

    async def _listen(
        self, shard: Shard, first: control.ShardReport, reports: AsyncIterator[control.ShardReport]
    ) -> None:
        try:
            async for report in reports:
                check_report(report, self._term, first)
                if self._fleet.hear(shard, report):
                    self._dirty.set()
        except EmbeddingServiceError as error:
            self._fleet.dismiss(shard, error)
        finally:
            self._fleet.leave(shard)
            shard.outbox.set()
            self._dirty.set()

    async def _refuse(self, report: control.ShardReport, why: EmbeddingServiceError, context: Context) -> NoReturn:
        """End a registration with the reason, which status tells as well."""
        if self._fleet.refuse(report.shard_id, why):
            log.error("refused shard %r at %r: %s", report.shard_id[:100], report.address[:100], why)
        if isinstance(why, IdTaken):
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(why))
        await abort(context, why)

    async def WatchRouting(self, request: control.WatchRoutingRequest, context: Context) -> AsyncIterator[wire.Routing]:
        """The routing now, and again each time it changes."""
        seen = (0, 0)
        while not self._ending:
            if self._routing and self._routing.age > seen:
                seen = self._routing.age
                yield self._routing.message
            async with self._published:
                await self._published.wait_for(lambda: self._ending or self._is_newer_than(seen))  # noqa: B023

    def _is_newer_than(self, age: tuple[int, int]) -> bool:
        return self._routing is not None and self._routing.age > age

    async def end_streams(self) -> None:
        """Let go of shards and watchers; they come again to whoever follows."""
        self._ending = True
        self._planning.close()
        for shard in self._fleet.shards.values():
            shard.outbox.set()
        async with self._published:
            self._published.notify_all()

    def current_routing(self) -> Routing | None:
        """The routing that was last published."""
        return self._routing

    async def GetStatus(self, request: control.GetStatusRequest, context: Context) -> control.Status:
        """Everything a person wants to know."""
        holders = self._fleet.holders()
        served = {model.full_name for model in self._routing.models} if self._routing else set()
        status = control.Status(problems=list(self._problems()))
        status.term, status.epoch = self._routing.age if self._routing else (self._term, 0)
        for _, shard in sorted(self._fleet.shards.items()):
            status.shards.append(_shard_status(shard))
        for manifest in self._wanted:
            keys = decisions.part_keys(manifest)
            status.models.add(
                model=decisions.model_info(manifest),
                parts=len(keys),
                parts_ready=sum(key in holders for key in keys),
                bytes=manifest.bytes,
                serving=f"{manifest.model}@{manifest.version}" in served,
            )
        return status

    def metrics(self) -> Iterator[Metric]:
        """For Prometheus."""
        shards, holders = list(self._fleet.shards.values()), self._fleet.holders()
        keys = [key for manifest in self._wanted for key in decisions.part_keys(manifest)]
        copies = [len(holders.get(key, ())) for key in keys]
        term, epoch = self._routing.age if self._routing else (self._term, 0)
        yield gauge("routing_term", "Term of the routing.", term)
        yield gauge("routing_epoch", "Epoch of the routing.", epoch)
        yield gauge("shards", "Shards that are there.", len(shards))
        yield gauge("draining_shards", "Shards that want to end.", sum(shard.report.draining for shard in shards))
        yield gauge(
            "served_versions", "Model versions in the routing.", len(self._routing.models if self._routing else ())
        )
        yield gauge("wanted_parts", "Parts of the wanted model versions.", len(keys))
        yield gauge("lost_parts", "Wanted parts that nobody holds.", copies.count(0))
        missing = sum(max(self._options.replicas - count, 0) for count in copies)
        yield gauge("missing_copies", "Copies of wanted parts that are not held yet.", missing)
        yield gauge(
            "problems", "What stands in the way; `embedding-service status` says it.", len(list(self._problems()))
        )

    def _problems(self) -> Iterator[control.Problem]:
        """What stands in the way, the first MOST_PROBLEMS of it."""
        problems = self._all_problems()
        yield from islice(problems, MOST_PROBLEMS)
        if more := sum(1 for _ in problems):
            yield control.Problem(message=f"and {more:,} more")

    def _all_problems(self) -> Iterator[control.Problem]:
        problem = control.Problem
        if not self._settled:
            expected = self._options.expect_shards or "more"
            message = f"waiting for shards: {len(self._fleet.shards)} registered, {expected} expected"
            yield problem(kind=problem.KIND_WAITING, message=message)
        if message := self._store_problem():
            yield problem(kind=problem.KIND_STORE, message=message)
        if self._plan_problem:
            yield problem(kind=problem.KIND_PLACEMENT, message=self._plan_problem)
        if self._replicas_problem:
            yield problem(kind=problem.KIND_COPIES, message=self._replicas_problem)
        for message in self._fleet.refusals():
            yield problem(kind=problem.KIND_SHARD, message=message)
        for name, shard in sorted(self._fleet.shards.items()):
            if not shard.connected:
                yield problem(kind=problem.KIND_SHARD, message=f"shard {name}: not connected")
            for key, message in sorted(shard.failures.items()):
                yield problem(kind=problem.KIND_SHARD, message=f"shard {name}: {key}: {message}")
        skipped = self._watch.found.problems.values() if self._watch.found else ()
        for message in (*skipped, *decisions.never_served(self._catalog)):
            yield problem(kind=problem.KIND_SKIPPED, message=message)

    def _store_problem(self) -> str:
        away = "what was loaded is served on, and nothing new can be loaded"
        if self._watch.problem:
            return f"{self._watch.problem}; {away}" if self._catalog else self._watch.problem
        if not self._watch.found or self._watch.found.manifests:
            return ""
        if decisions.is_away(self._watch.found, self._catalog):
            return f"store {self._options.store} is empty, as a folder is on which nothing is mounted: {away}"
        return f"no model in {self._options.store}: `embedding-service import` puts one there"

    # Deciding

    async def run(self) -> None:
        """Decide whenever something changed, until cancelled."""
        watching = asyncio.create_task(self._watch.run())
        try:
            await self._settle()
            await first_of(self._watch.looked.wait(), watching)
            await first_of(self._decide_for_ever(), watching)
        finally:
            await cancel([watching])

    async def _decide_for_ever(self) -> None:
        self._dirty.set()
        while True:
            self._forget_lost()
            if self._dirty.is_set() or self._graces_end() or self._heat_is_due():
                self._dirty.clear()
                await self._decide()
                # Whoever was told something takes it in before there is more: 1,000 shards get a routing a second.
                await asyncio.sleep(SECONDS_A_SHARD * len(self._fleet.shards))
            try:
                # Not wait_for: Python 3.11's drops a cancellation that comes as the event is set, as at the end.
                async with asyncio.timeout(TICK_SECONDS):
                    await self._dirty.wait()
            except TimeoutError:
                continue

    def _forget_lost(self) -> None:
        for name in self._fleet.forget_lost():
            log.warning("shard %s was not heard of for %g s: gone", name, self._options.lost_after)
            self._dirty.set()

    async def _settle(self) -> None:
        """Wait for the shards: the first to come must not get everything, nor a restart move what is still held."""
        began, options = time.monotonic(), self._options
        while True:
            self._forget_lost()
            now = time.monotonic()
            if decisions.settled(
                len(self._fleet.shards),
                options.expect_shards,
                now - began,
                now - max(began, self._fleet.joined),
                returning=self._fleet.newest_term > 0,
                settle=options.settle,
                patience=options.patience,
            ):
                break
            await asyncio.sleep(0.05)
        self._settled = True

    def _heat_is_due(self) -> bool:
        """Which parts belong into GPU memory changes with what is asked for: look again now and then."""
        gpus = any(shard.report.device == CUDA for shard in self._fleet.shards.values())
        return gpus and time.monotonic() - self._planned_at > HEAT_SECONDS

    def _graces_end(self) -> bool:
        now = time.monotonic()
        return any(
            now >= until and key in (shard.assigned or ())
            for shard in self._fleet.shards.values()
            for key, until in shard.grace.items()
        )

    async def _decide(self) -> None:
        await self._take_term()
        if self._routing:
            served = [(model.name, model.version) for model in self._routing.models]
        else:
            served = self._fleet.last_served()
        described = {} if self._routing else self._fleet.served_now()
        self._catalog = decisions.known_versions(self._watch.found, self._catalog, described)
        self._wanted, _ = decisions.choose_versions(self._catalog, served, self._fleet.holders())
        await self._plan_if_needed(served)
        shards, holders = self._fleet.shards, self._fleet.holders()  # planning took time
        self._wanted, serving = decisions.choose_versions(self._catalog, served, holders)
        addresses = {name: shard.report.address for name, shard in shards.items()}
        await self._publish(decisions.build_routing(serving, self._reachable_target(), holders, addresses))
        self._assign()

    def _reachable_target(self) -> dict[PartKey, list[str]]:
        """The target without shards that are gone or cannot load their part: nobody who leaves waits for those."""
        shards = self._fleet.shards
        return {
            key: [name for name in names if name in shards and key not in shards[name].failures]
            for key, names in self._target.items()
        }

    async def _take_term(self) -> None:
        """At the first decision: above every term that a shard has seen, and above those of controllers before.

        For the latter there is the term noted in the store, and the clock. Raises Unavailable when another controller
        took a term above ours: it started later, and there shall be one. Where the store says that ours is the last
        controller's, a higher term is a report's alone, and ends nobody.
        """
        if not self._term:
            noted = await self._watch.noted_term()
            self._term = max(self._fleet.newest_term + 1, noted + 1, time.time_ns() // 1_000_000)
        if not self._noted and self._watch.found and self._watch.found.manifests:  # else it may be no store
            self._noted = True
            await self._watch.note_term(self._term)
        newest = self._fleet.newest_term
        if newest <= self._term:
            return
        if await self._watch.noted_term() != self._term:
            raise Unavailable(f"a controller of term {newest} is there, above this one's {self._term}: ending")
        log.warning(
            "a shard knows term %d, which no controller noted after this one's %d: going above", newest, self._term
        )
        self._term = newest + 1
        await self._watch.note_term(self._term)

    async def _plan_if_needed(self, served: Sequence[tuple[str, str]]) -> None:
        """Place anew when a copy is missing, or when shards or versions came, went or changed."""
        wanted = {(each.model, each.version): each for each in self._wanted}
        nodes = [_node(shard, wanted) for _, shard in sorted(self._fleet.shards.items())]
        staying = {node.shard for node in nodes if not node.draining}
        replicas = min(self._options.replicas, len(staying))
        about = ([replace(node, held=frozenset()) for node in nodes], set(wanted))
        changed = about != self._planned_for
        if not staying or (not changed and time.monotonic() < self._replan_at):
            return
        placed = [each for name, each in wanted.items() if name not in self._left_out]
        missing = decisions.needs_plan(placed, self._target, staying, replicas)
        if missing or changed or self._heat_is_due():
            self._planned_for, self._planned_at = about, time.monotonic()
            self._replicas_problem = decisions.too_few_shards(self._options.replicas, replicas)
            await self._plan(nodes, replicas, served)

    async def _plan(self, nodes: list[Node], replicas: int, served: Sequence[tuple[str, str]]) -> None:
        """Place what is served, and as many further versions as fit."""
        manifests = decisions.by_importance(self._wanted, served)
        fits, fails = sum((each.model, each.version) in served for each in manifests) - 1, len(manifests) + 1
        placement: Placement | None = None
        problem, self._replan_at, count = "", 0.0, len(manifests)
        while fails - fits > 1:  # so many fit, and so many do not
            try:
                placement = await self._planning.plan(self._demands(manifests[:count]), nodes, replicas)
                fits = count
            except PlacementError as error:
                problem, fails = str(error), count
            except Exception as error:
                if self._ending:
                    raise
                problem = f"planning failed, and is tried again: {type(error).__name__}: {error}"
                self._replan_at = time.monotonic() + REPLAN_SECONDS
                break
            count = (fits + fails) // 2
        if placement:
            left_out = [f"{each.model}@{each.version}" for each in manifests[fits:]]
            self._target, self._left_out = (
                placement.shards_of,
                {(each.model, each.version) for each in manifests[fits:]},
            )
            problem = f"not placed: {', '.join(left_out)}: {problem}" if left_out else problem
            log.info("planned %d versions on %d shards", fits, len(nodes))
        if problem and problem != self._plan_problem:
            log.error("cannot place the models: %s", problem)
        self._plan_problem = problem

    def _demands(self, manifests: Sequence[Manifest]) -> list[PartDemand]:
        accesses = self._fleet.accesses()
        return [
            PartDemand(key, part.rows, table.row_bytes, float(accesses[key]))
            for manifest in manifests
            for table in manifest.tables
            for part in table.parts
            for key in [PartKey(manifest.model, manifest.version, table.name, part.index)]
        ]

    async def _publish(self, routing: wire.Routing) -> None:
        routing.controller = self._address
        routing.limits.CopyFrom(self._options.limits.to_wire())
        term, epoch = self._routing.age if self._routing else (0, 0)
        routing.term, routing.epoch = term, epoch
        if self._routing and term == self._term and routing == self._routing.message:
            return
        routing.term, routing.epoch = self._term, epoch + 1 if term == self._term else 1
        async with self._published:
            self._routing = Routing(routing)
            self._published.notify_all()
        log.info("published routing (%d, %d): %d models", routing.term, routing.epoch, len(routing.models))

    def _assign(self) -> None:
        """Tell each shard what to hold: what was planned for it, and for a grace time what clients may still ask."""
        assert self._routing
        routed = decisions.routed_parts(self._routing.message)
        planned: dict[str, set[PartKey]] = {}
        wanted = {key for manifest in self._wanted for key in decisions.part_keys(manifest)}
        for key, names in self._target.items():
            for name in names if key in wanted else ():
                planned.setdefault(name, set()).add(key)
        known = {(each.model, each.version) for versions in self._catalog.values() for each in versions}
        now = time.monotonic()
        for name, shard in self._fleet.shards.items():
            keep = planned.get(name, set()) | routed.get(name, set())
            keep |= {key for key in shard.held if key[:2] not in known and self._may_be_there(key)}
            leaving = shard.held - keep
            shard.grace = {key: shard.grace.get(key, now + self._options.grace) for key in leaving}
            assigned = frozenset(keep | {key for key, until in shard.grace.items() if now < until})
            released = shard.report.draining and (not assigned or self._all_drain())
            behind = shard.knows < self._routing.age
            if (assigned, released) != (shard.assigned, shard.released) or behind:
                shard.assigned, shard.released = assigned, released
                shard.outbox.set()

    def _may_be_there(self, key: PartKey) -> bool:
        """Whether the store may have the part's version, for all that could be read of it."""
        found = self._watch.found
        return found is None or found.cannot_tell(key.model, key.version)

    def _all_drain(self) -> bool:
        """Nobody is left to take anything over."""
        return all(shard.report.draining for shard in self._fleet.shards.values())

    def _assignment(self, shard: Shard) -> control.Assignment:
        assert shard.assigned is not None
        assignment = control.Assignment(
            term=self._term,
            has_parts=True,
            parts=[key.to_wire() for key in sorted(shard.assigned)],
            released=shard.released,
        )
        if self._routing and shard.knows < self._routing.age:
            shard.sent = self._routing.age
            assignment.routing.CopyFrom(self._routing.message)
        return assignment


def _node(shard: Shard, wanted: Container[tuple[str, str]]) -> Node:
    """A shard as the planner sees it, which knows nothing of versions that are not wanted."""
    report = shard.report
    return Node(
        shard.name,
        report.memory_limit,
        frozenset(key for key in shard.held | (shard.assigned or frozenset()) if key[:2] in wanted),
        device=report.device,
        topology=report.topology,
        draining=report.draining,
    )


def _shard_status(shard: Shard) -> control.ShardStatus:
    report = shard.report
    return control.ShardStatus(
        shard_id=report.shard_id,
        address=report.address,
        device=report.device,
        tier=report.tier,
        memory_limit=report.memory_limit,
        parts=len(shard.held),
        parts_missing=len((shard.assigned or frozenset()) - shard.held),
        stats=report.stats,
        draining=report.draining,
        topology=report.topology,
    )


def main(options: ControllerOptions) -> None:
    """Run the controller until SIGTERM or SIGINT."""
    run_process("controller", lambda: _serve(options))


async def _serve(options: ControllerOptions) -> None:
    controller = Controller(options, reachable_address(options.listen, options.advertise))
    server = Server(options.limits)
    server.add(add_ControlServiceServicer_to_server, controller, "embedding.v1.ControlService")
    server.add(add_EmbeddingServiceServicer_to_server, controller, "embedding.v1.EmbeddingService")
    front = await server.listen(options.listen)
    await server.set_serving(True)
    log.info("listening on %s", front.address)

    def collect() -> Iterator[Metric]:
        yield from controller.metrics()
        yield counter(
            "request_errors", "Requests that could not be read, or that there was no room for.", server.refused
        )

    metrics = MetricsServer(options.listen.rpartition(":")[0], options.metrics_port, collect)
    deciding = asyncio.create_task(controller.run())
    try:
        await first_of(told_to_end().wait(), deciding, server.death())
    finally:
        log.info("ending")
        await cancel([deciding])
        metrics.close()
        await controller.end_streams()
        await server.stop()
