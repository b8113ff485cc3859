"""The controller process. It carries messages between its state and shards, the store, the planner and clients."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import grpc
from prometheus_client.core import Metric

from embedding_service.controller.claims import Claims, ShardClaims
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
    Question,
    ReadTerm,
    Renew,
    Reported,
    Tell,
    TermNoted,
    TermRead,
    Tick,
)
from embedding_service.controller.fleet import IdTaken
from embedding_service.controller.page import Page
from embedding_service.controller.planning import Planning
from embedding_service.controller.presenter import metrics_of, status_of
from embedding_service.controller.state import ControllerState, Settings
from embedding_service.controller.watch import StoreWatch
from embedding_service.ending import end_within, told_to_end
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, PermissionDenied
from embedding_service.front import Kind
from embedding_service.machine import spare_collections, split_address
from embedding_service.methods import Context
from embedding_service.metrics import MetricsServer, counter
from embedding_service.page.app import PageApp
from embedding_service.placement.routing import Routing
from embedding_service.security.audit import Audit
from embedding_service.security.certificates import stands_for
from embedding_service.security.files import Stamp, stamp_of
from embedding_service.security.identity import Caller
from embedding_service.security.proofs import Signer
from embedding_service.security.routing import sign_routing
from embedding_service.security.server import Files, Security
from embedding_service.serving import (
    RequestLimits,
    RoutingService,
    Server,
    abort,
    cancel,
    first_of,
    reachable_address,
    run_process,
)
from embedding_service.store.store import Store
from embedding_service.web import WebServer
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.control_pb2_grpc import ControlServiceServicer, add_ControlServiceServicer_to_server
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceServicer, add_EmbeddingServiceServicer_to_server

log = logging.getLogger(__name__)

# Microseconds that a member's term may be ahead of the clock, or of this controller's own.
TERM_AHEAD = 86_400_000_000
# Pause before the routing is signed by other files again, which take their time to change.
SIGN_SECONDS = 1.0


@dataclass(frozen=True)
class ControllerOptions:
    """How the controller runs.

    Attributes:
        store: Path or URL of the store whose models are served, each in its newest version.
        listen: host:port. Port 0 takes a free one.
        advertise: How others reach it, if that is not `listen`.
        replicas: Copies of every part, each on another shard. 0: one on every shard.
        expect_shards: The first plan waits for this many shards, at most `patience` seconds. 0: until none has come for
            `settle` seconds.
        lost_after: Seconds of silence after which a shard counts as gone.
        grace: Seconds a shard keeps a part after the routing stopped naming it.
        limits: What one lookup may ask for. Clients learn it from the routing.
        metrics_port: Port of Prometheus metrics, on the host of `listen`. 0: none.
        control_listen: A host:port of its own for members, which `listen` then does not answer. With `security`, they
            have to show a certificate there. None: `listen` answers members too.
        security: Certificate, key, authorities and policy. None: plain text, and everybody may do everything.
        health_listen: A further host:port that answers health checks alone, in plain text.
        http_port: Port of the cluster's page. 0: none.
        http_host: Address that the page is at.
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
    control_listen: str | None = None
    security: Files | None = None
    health_listen: str | None = None
    http_port: int = 0
    http_host: str = "127.0.0.1"

    def settings(self, address: str) -> Settings:
        """The settings for its state. `address` is where clients reach it."""
        return Settings(
            address,
            replicas=self.replicas,
            expect_shards=self.expect_shards,
            settle=self.settle,
            patience=self.patience,
            lost_after=self.lost_after,
            grace=self.grace,
            limits=self.limits.to_wire(),
        )


class _Stream:
    """A shard's registration, as long as it lasts.

    Attributes:
        outbox: Set when there is something to tell the shard.
        is_over: The state has ended it, with the error `why` if there is one.
    """

    def __init__(self) -> None:
        self.outbox = asyncio.Event()
        self.is_over = False
        self.why: EmbeddingServiceError | None = None

    def end(self, why: EmbeddingServiceError | None = None) -> None:
        self.is_over, self.why = True, self.why or why  # the first error is the cause
        self.outbox.set()


class Controller(RoutingService, ControlServiceServicer, EmbeddingServiceServicer):
    """Tells `state` what happens, and does what it says. It decides nothing."""

    def __init__(self, options: ControllerOptions, address: str, audit: Audit | None = None) -> None:
        super().__init__()
        self.state = ControllerState(options.settings(address), time.monotonic, random.Random())
        self._store = options.store
        self._watch = StoreWatch(Store(options.store), address, self._looked)
        self._planning = Planning()
        self._streams: set[_Stream] = set()
        self._questions: asyncio.Queue[Question] = asyncio.Queue()
        self._tick_at = 0.0
        self._sooner = asyncio.Event()
        self._routing: Routing | None = None
        self._signer = Signer(options.security.certificate, options.security.key) if options.security else None
        self._audit = audit or Audit(None)
        self._files = options.security
        self._signs_by, self._signs_at = self._stamp(), 0.0
        self._signature = ""
        self._claims = None
        if options.security:
            self._claims = Claims(Store(options.store), options.security.access, lambda: self.state.found)
        self._ending = False
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # Shards and watchers

    async def Register(
        self, reports: AsyncIterator[control.ShardReport], context: Context
    ) -> AsyncIterator[control.Assignment]:
        """A shard's life."""
        first = await anext(reports, None)
        if first is None:
            return
        if context.caller:
            try:
                _check_certificate(context.caller, first)
                self._check_term(first)
            except EmbeddingServiceError as error:
                await abort(context, error)
        stream = _Stream()
        self._streams.add(stream)
        tasks = []
        claims = self._claims.of(first) if self._claims else None
        try:
            if claims:
                tasks.append(asyncio.create_task(claims.run(lambda report: self._handle(Reported(stream, report)))))
                first = await claims.begin(first)
            self._handle(Joined(stream, first))
            drains = self._note_drain(first, False, context.caller)
            tasks.append(asyncio.create_task(self._listen(stream, reports, claims, context.caller, drains)))
            while not stream.is_over and not self._ending:
                message = self.state.message(stream)
                if message is not None:
                    if message.HasField("routing"):
                        message.routing.signature = self._signature
                    yield message
                await stream.outbox.wait()
                stream.outbox.clear()
            if stream.why is not None:
                await _refuse(stream.why, context)
        finally:
            self._handle(Left(stream))
            self._streams.discard(stream)
            await cancel(tasks)

    async def _listen(
        self,
        stream: _Stream,
        reports: AsyncIterator[control.ShardReport],
        claims: ShardClaims | None,
        caller: Caller | None,
        drains: bool,
    ) -> None:
        try:
            async for report in reports:
                drains = self._note_drain(report, drains, caller)
                if self._signer:
                    self._check_term(report)
                self._handle(Reported(stream, claims.hear(report) if claims else report))
        except InvalidRequest as error:
            stream.end(error)
        finally:
            self._handle(Left(stream))

    def _note_drain(self, report: control.ShardReport, before: bool, caller: Caller | None) -> bool:
        """Whether the shard drains by now. `before`: whether it did already."""
        if caller and report.draining and not before:
            self._audit.note("drain", caller.name, shard=report.shard_id, address=report.address)
        return before or report.draining

    def _check_term(self, report: control.ShardReport) -> None:
        """Raise InvalidRequest if a member would raise the term by more than clocks differ."""
        most = max(time.time_ns() // 1_000, self.state.term) + TERM_AHEAD
        if report.term > most:
            raise InvalidRequest(f"term must be at most {most:,}, a day ahead of this clock, got {report.term:,}")

    def current_routing(self) -> Routing | None:
        """The routing that was last published."""
        return self._routing

    async def GetStatus(self, request: control.GetStatusRequest, context: Context) -> control.Status:
        """Everything a person wants to know."""
        return status_of(self.state, self._store)

    def page(self) -> Page:
        """What the cluster's page shows. To be called on the loop."""
        ca = self._files.ca if self._files else None
        return Page(self.state, self._store, self._planning, asyncio.get_running_loop(), ca)

    def metrics(self) -> Iterator[Metric]:
        """For Prometheus."""
        return metrics_of(self.state, self._store)

    async def end_streams(self) -> None:
        """Let go of shards. They come again to the next controller."""
        self._ending = True
        self._planning.close()
        for stream in self._streams:
            stream.outbox.set()

    # The state: what happens goes in, what it wants done comes out

    async def run(self) -> None:
        """Run until cancelled. Raises Unavailable if another controller is there."""
        tasks = [asyncio.create_task(each) for each in (self._watch.run(), self._tick(), self._answer())]
        try:
            await first_of(*tasks, self._over)
        finally:
            await cancel(tasks)

    async def _tick(self) -> None:
        while True:
            self._handle(Tick())
            wait = self.state.tick_in()
            self._tick_at = time.monotonic() + wait
            self._sooner.clear()
            with contextlib.suppress(TimeoutError):
                # Not wait_for. Python 3.11's drops a cancellation that comes as the event is set, as at the end.
                async with asyncio.timeout(wait):
                    await self._sooner.wait()

    def _signed(self, routing: Routing) -> Routing:
        """A routing as it is given away. The state compares its own with the next one, so that stays as it is."""
        if self._signer is None:
            return routing
        message = wire.Routing()
        message.CopyFrom(routing.message)
        message.ClearField("signature")
        message.signature = sign_routing(message, self._signer)
        return Routing(message)

    def look_at_files(self) -> None:
        """Have the routing published again if what signs it was replaced, by files that count for others."""
        stamp = self._stamp()
        if stamp == self._signs_by or self._files is None or self._routing is None:
            return
        if time.monotonic() < self._signs_at:
            return
        self._signs_at = time.monotonic() + SIGN_SECONDS
        try:
            signed = self._signed(Routing(self._routing.message))
            self._files.access.check_routing(signed.message, (0, 0))
        except EmbeddingServiceError as error:
            log.debug("the routing stays signed as it is: %s", error)
            return
        self._signs_by = stamp
        self._handle(Renew())

    def _stamp(self) -> Stamp:
        return stamp_of(self._files[:3]) if self._files else ()

    async def _answer(self) -> None:
        """The state asks one thing at a time. Shards are heard all the while."""
        while True:
            self._handle(await self._answer_to(await self._questions.get()))

    async def _answer_to(self, question: Question) -> Event:
        match question:
            case ReadTerm():
                noted, others = await self._watch.noted_term(), await self._watch.others_term()
                return TermRead(noted, time.time_ns() // 1_000, others)
            case NoteTerm(term):
                return TermNoted(await self._watch.note_term(term))
            case Plan(parts, nodes, replicas):
                try:
                    return Planned(await self._planning.plan(parts, nodes, replicas))
                except Exception as error:  # any error: the state goes on
                    return Planned(error)

    def _looked(self) -> None:
        self._handle(Looked(self._watch.found, self._watch.problem, self._watch.noted))

    def _handle(self, event: Event) -> None:
        for instruction in self.state.handle(event):
            self._do(instruction)
        if time.monotonic() + self.state.tick_in() < self._tick_at:
            self._sooner.set()

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case Tell(_Stream() as stream):
                stream.outbox.set()
            case Dismiss(_Stream() as stream, why):
                stream.end(why)
            case Publish(routing):
                served = {model.full_name for model in self._routing.models} if self._routing else set()
                self._routing = self._signed(routing)
                self._signature = self._routing.message.signature
                for name in sorted({model.full_name for model in routing.models} - served):
                    self._audit.note("serve", "controller", model=name)
            case ReadTerm() | NoteTerm() | Plan():
                self._questions.put_nowait(instruction)
            case End(why) if not self._over.done():
                self._over.set_exception(why)


def _check_certificate(caller: Caller, report: control.ShardReport) -> None:
    """Raise PermissionDenied if a member's certificate is not the one of the shard that it speaks for."""
    names = caller.credential.names
    if not stands_for(names, split_address(report.address)[0], report.shard_id):
        raise PermissionDenied(
            f"the certificate of {', '.join(names)} does not speak for shard {report.shard_id} at {report.address}: "
            "its names must hold the shard's id and the host of its address"
        )


async def _refuse(why: EmbeddingServiceError, context: Context) -> NoReturn:
    if isinstance(why, IdTaken):
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(why))
    await abort(context, why)


def main(options: ControllerOptions) -> None:
    """Run the controller until SIGTERM or SIGINT."""
    run_process("controller", lambda: _serve(options))


async def _serve(options: ControllerOptions) -> None:
    security = Security(options.security) if options.security else None
    address = reachable_address(options.listen, options.advertise)
    controller = Controller(options, address, security.audit if security else None)
    server = Server(options.limits, security=security)
    server.add(add_ControlServiceServicer_to_server, controller, "embedding.v1.ControlService")
    server.add(add_EmbeddingServiceServicer_to_server, controller, "embedding.v1.EmbeddingService")
    front = await server.listen(options.listen, kind=Kind(apart=options.control_listen is not None))
    if options.control_listen:
        await server.listen(options.control_listen, kind=Kind(members=True))
    if options.health_listen:
        await server.listen(options.health_listen, kind=Kind(health_only=True))
    spare_collections()
    await server.set_serving(True)
    log.info("listening on %s", front.address)

    def collect() -> Iterator[Metric]:
        yield from controller.metrics()
        yield counter(
            "request_errors", "Requests that could not be read, or that there was no room for.", server.refused
        )

    metrics = MetricsServer(options.listen.rpartition(":")[0], options.metrics_port, collect, security)
    page = _serve_page(options, controller, security)
    if security:
        security.guard.watch(partial(asyncio.get_running_loop().call_soon_threadsafe, controller.look_at_files))
    deciding = asyncio.create_task(controller.run())
    try:
        await first_of(told_to_end().wait(), deciding, server.death())
    finally:
        log.info("ending")
        end_within()
        await cancel([deciding])
        metrics.close()
        if page:
            await asyncio.to_thread(page.close)  # a thread of its may wait for the loop
        await controller.end_streams()
        await server.stop()


def _serve_page(options: ControllerOptions, controller: Controller, security: Security | None) -> WebServer | None:
    if not options.http_port:
        return None
    app = PageApp(controller.page(), options.http_host, security)
    return WebServer(options.http_host, options.http_port, app, "--http-port", security)
