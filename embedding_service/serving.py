"""What every server process shares: its gRPC server with health and reflection, its addresses, its end."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from embedding_service.budget import Budget
from embedding_service.errors import EmbeddingServiceError, RequestTooLarge, Unavailable
from embedding_service.floods import FloodGuard
from embedding_service.foreign import LineFormatter
from embedding_service.front import Front, Kind, Options, open_front
from embedding_service.grpc_codes import code_of, trailing_of
from embedding_service.health import Health
from embedding_service.machine import allow_many_files, complete_address, join_address, split_address
from embedding_service.methods import MEMBERS, RIGHTS, Context, Method, Places
from embedding_service.placement.routing import Routing
from embedding_service.security.identity import Caller
from embedding_service.security.server import Security
from embedding_service.threads import apart
from embedding_service.wire import embedding_pb2 as wire

log = logging.getLogger("embedding_service")

# Streams that may be open in a process, in all and from one host: those that a task answers, and those that wait and
# cost only memory. A thousand shards of one host register, and it may watch ten times as much.
STREAMS, IDLE_STREAMS = (4096, 2048), (16384, 12288)
# Bytes under way in a process that answers without rows.
BUDGET_BYTES = 256 << 20
# The health service's name for "this process answers", even without a routing. Restart it only without that.
ALIVE = "alive"
# Seconds after which a task is cancelled again that did not end.
_CANCEL_AGAIN = 0.5
# Views of the routing that are kept, one for each set of models that somebody may read.
_VIEWS = 64


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request, in bytes: of the request itself and of the rows in its answer."""

    request_bytes: int = 16 << 20
    response_bytes: int = 64 << 20

    def to_wire(self) -> wire.Limits:
        """As the routing tells clients."""
        return wire.Limits(request_bytes=self.request_bytes, response_bytes=self.response_bytes)

    def check_response(self, ids: int, row_bytes: int) -> None:
        """Raise RequestTooLarge if the rows of `ids` ids are over the limit."""
        if ids * row_bytes > self.response_bytes:
            raise RequestTooLarge(
                f"{ids:,} rows of {row_bytes:,} bytes are {ids * row_bytes:,} bytes, over this service's limit of "
                f"{self.response_bytes:,}: ask for at most {self.response_bytes // row_bytes:,} rows a request"
            )


class Server:
    """All that a process answers, at any number of addresses: health, reflection, and what is added.

    To be made on the event loop that answers. Generated code takes it for a gRPC server.

    Args:
        limits: Larger requests are refused by gRPC itself, with RESOURCE_EXHAUSTED naming the limit.
        budget: The bytes under way in this process.
        security: Who may do what. None: plain text, and everybody may do everything.

    Attributes:
        refused: Calls that were refused before a handler saw them.
    """

    def __init__(self, limits: RequestLimits, budget: Budget | None = None, security: Security | None = None) -> None:
        self._security = security
        self.health = Health()
        self.refused = 0
        self._counting = threading.Lock()
        self._died = asyncio.get_running_loop().create_future()
        self._methods: dict[bytes, Method] = {}
        self._budget = budget or Budget(BUDGET_BYTES)
        self._watching: asyncio.Task[None] | None = None
        self._options = Options(
            self._methods,
            self._budget,
            limits.request_bytes,
            self._on_refused,
            self._on_death,
            security=security,
        )
        self._fronts: list[Front] = []
        self._guard = FloodGuard(self._options.arrivals)
        self._streams = Places(*STREAMS)
        self._services = [health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self)  # type: ignore[no-untyped-call]
        self.offer("grpc.health.v1.Health/Watch", Method(watch=self.health, places=Places(*IDLE_STREAMS)))

    def add(self, register: Callable[[Any, Any], None], servicer: object, name: str) -> None:
        """Offer a service under its full protobuf name."""
        register(servicer, self)
        self._services.append(name)

    def offer(self, path: str, method: Method) -> None:
        """Offer one method, "package.Service/Method". `methods.RIGHTS` says whose it is."""
        self._methods[f"/{path}".encode()] = replace(method, rights=RIGHTS.get(path), members=path in MEMBERS)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Called by generated code, which registers each method as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Called by generated code."""
        for name, handler in handlers.items():
            if not _is_written(handler):
                continue
            streams = handler.request_streaming or handler.response_streaming
            self.offer(f"{service}/{name}", Method(handler, places=self._streams if streams else None))

    async def listen(
        self, address: str, *, shared: bool = False, private: bool = False, kind: Kind | None = None
    ) -> Front:
        """Answer at an address, as `Front` says. Raises InvalidRequest naming one that cannot be had."""
        if not self._fronts:
            servicer = reflection.aio.ReflectionServicer(self._services)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, self)  # type: ignore[no-untyped-call]
            await self.set_serving(False)
            await self.health.set(ALIVE, True)
            self._watching = asyncio.create_task(self._budget.watch())
            if self._security:
                self._security.guard.watch(self._look_again)
        front = await open_front(address, self._options, shared=shared, private=private, kind=kind)
        self._fronts.append(front)
        if not private:
            self._guard.watch(split_address(front.address)[1])
        return front

    async def set_serving(self, serving: bool) -> None:
        """What health checks are told, for the process and for each of its services."""
        for name in ["", *self._services[2:]]:
            await self.health.set(name, serving)

    async def death(self) -> None:
        """Raises when no calls are answered any more at one of the addresses. Otherwise it never returns."""
        await asyncio.shield(self._died)

    async def stop(self) -> None:
        """Take no more calls, let those under way end for STOP_GRACE seconds, then cut them."""
        await self.health.end()
        await asyncio.gather(*(front.stop() for front in self._fronts))
        await apart(self._guard.stop)
        if self._security:
            await apart(self._security.guard.close)
        if self._watching:
            await cancel([self._watching])

    def _look_again(self) -> None:
        for front in self._fronts:
            front.look_again()

    def _on_refused(self) -> None:
        with self._counting:
            self.refused += 1

    def _on_death(self, error: BaseException) -> None:
        if not self._died.done():
            self._died.set_exception(Unavailable(f"calls are not answered any more: {error!r}"))


def _is_written(handler: Any) -> bool:
    """Whether a method is written. Those of generated code only say that they are missing, and are no coroutines.

    A controller has none of the lookups that its service declares.
    """
    behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    written = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return any(is_kind(behaviour) for behaviour in behaviours if behaviour for is_kind in written)


class RoutingService:
    """The part of EmbeddingService that needs only the routing. Shards and controller both answer it."""

    def __init__(self) -> None:
        # Of callers who may not read everything, by what they may read: the whole routing, and what they see of it.
        self._seen: dict[tuple[str, ...], tuple[Routing, Routing]] = {}

    def current_routing(self) -> Routing | None:
        """The routing now. None before the first one came."""
        raise NotImplementedError

    def known_routing(self) -> Routing:
        """The routing now. Raises Unavailable before the first one came."""
        routing = self.current_routing()
        if routing is None:
            raise Unavailable(
                "no routing yet: the controller has not published one (is it up, and do the models fit the shards?); "
                "`embedding-service status` says what is missing"
            )
        return routing

    def visible_routing(self, caller: Caller | None) -> Routing:
        """The routing with the models that a caller may read. Raises Unavailable before the first one came."""
        routing = self.known_routing()
        if caller is None or caller.reads_all:
            return routing
        key = caller.rights.models("read")
        seen = self._seen.get(key)
        if seen is None or seen[0] is not routing:
            if len(self._seen) >= _VIEWS:
                self._seen.clear()
            seen = self._seen[key] = routing, routing.only(caller.may_read)
        return seen[1]

    async def GetRouting(self, request: wire.GetRoutingRequest, context: Context) -> wire.Routing:
        """Where every part lies. The request carries the caller's age, and a routing is returned only if newer."""
        try:
            routing = self.visible_routing(context.caller)
        except EmbeddingServiceError as error:
            await abort(context, error)
        if (request.term, request.epoch) >= routing.age:
            return wire.Routing(term=routing.message.term, epoch=routing.message.epoch)
        return routing.message

    async def ListModels(self, request: wire.ListModelsRequest, context: Context) -> wire.ListModelsResponse:
        """What is served now."""
        try:
            models = self.visible_routing(context.caller).message.models
        except EmbeddingServiceError as error:
            await abort(context, error)
        return wire.ListModelsResponse(models=[placement.model for placement in models])


async def abort(context: Context, error: EmbeddingServiceError) -> NoReturn:
    """End a call with this error's status."""
    await context.abort(code_of(error), str(error), trailing_of(error))
    raise AssertionError("unreachable: abort raises")


async def first_of(*awaitables: Awaitable[object]) -> None:
    """Wait until one of them ends, and raise what it raised. Then cancel coroutines among them, but no tasks."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await cancel([task for task, given in zip(tasks, awaitables, strict=True) if task is not given])


async def cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """End tasks and wait until they did.

    They are told again and again. gRPC swallows a cancellation that comes while a call fails, and raises the call's
    error in place of it. A task that tries again whatever fails would never end.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN)
    await asyncio.gather(*tasks, return_exceptions=True)  # whose errors nobody asks for


def log_to_stderr(name: str) -> None:
    """Log as a process of this name."""
    # force: FBGEMM sets up the root logger when it is imported
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(f"%(asctime)s {name}[{os.getpid()}] %(levelname)s %(message)s"))
    logging.basicConfig(force=True, handlers=[handler])
    log.setLevel(logging.INFO)  # ours only: FBGEMM and TorchRec tell every library they load


def run_process(name: str, main: Callable[[], object]) -> None:
    """Run a server process's coroutine, with logging. A deliberate error is one line and exit code 1."""
    log_to_stderr(name)
    allow_many_files()
    try:
        asyncio.run(main())  # type: ignore[arg-type]
    except EmbeddingServiceError as error:
        log.error("%s", error)
        sys.exit(1)


def reachable_address(listen: str, advertise: str | None) -> str:
    """The address for others: as given, or the one listened on, with this host's name for a wildcard."""
    if advertise:
        return complete_address(advertise, split_address(listen)[1])
    host, port = split_address(listen)
    return join_address(socket.getfqdn(), port) if host in ("0.0.0.0", "[::]", "*") else listen
