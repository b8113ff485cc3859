"""What every server process shares: its gRPC server with health and reflection, its addresses, its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from embedding_service.errors import EmbeddingServiceError, InvalidRequest, RequestTooLarge, Unavailable
from embedding_service.machine import allow_many_files, split_address
from embedding_service.placement.routing import Routing
from embedding_service.status import code_of
from embedding_service.wire import embedding_pb2 as wire

log = logging.getLogger("embedding_service")

# How long calls under way may take to end after SIGTERM; then they are cut. Everything together stays under 5 s.
STOP_GRACE = 1.0
# Calls open at a time on a connection, each with its request in memory; clients queue further ones.
CALLS = 256
# The health service's name for "this process answers", whatever it has to answer with: restart it only without that.
ALIVE = "alive"


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for, in bytes: of the request itself and of the rows it is answered with."""

    request_bytes: int = 16 << 20
    response_bytes: int = 64 << 20

    def to_wire(self) -> wire.Limits:
        """As the routing tells clients."""
        return wire.Limits(request_bytes=self.request_bytes, response_bytes=self.response_bytes)

    def check_response(self, ids: int, row_bytes: int) -> None:
        """Raise RequestTooLarge if the rows of so many ids are over the limit."""
        if ids * row_bytes > self.response_bytes:
            raise RequestTooLarge(
                f"{ids:,} rows of {row_bytes:,} bytes are {ids * row_bytes:,} bytes, over this service's limit of "
                f"{self.response_bytes:,}: ask for at most {self.response_bytes // row_bytes:,} rows a request"
            )


def server_options(limits: RequestLimits, *, shared: bool = False, streams: int = CALLS) -> list[tuple[str, int]]:
    """Settings of a gRPC server; `shared` and `streams` as `Server` and its kin say."""
    return [
        # Room for what a request holds besides its ids.
        ("grpc.max_receive_message_length", limits.request_bytes + 65536),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", streams),
        ("grpc.so_reuseport", 1 if shared else 0),
        # Clients may ping while they wait (client/transport.py); and we find out about those cut off.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def bind(add_port: Callable[[str], int], address: str) -> str:
    """Listen: the address with the port that was taken. Raises InvalidRequest naming an address that cannot be had."""
    if address.startswith("unix"):
        add_port(address)
        return address
    host, _ = split_address(address)
    try:
        bound = add_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise InvalidRequest(f"cannot listen on {address}: is another process there? Give another port")
    return f"{host}:{bound}"


class Server:
    """A gRPC server on one address, with health and reflection.

    Args:
        address: host:port to listen on, port 0 takes a free one; or `unix-abstract:name`.
        limits: Larger requests are refused by gRPC itself, with RESOURCE_EXHAUSTED naming the limit.
        streams: Calls open at a time on a connection.
    """

    def __init__(self, address: str, limits: RequestLimits, *, streams: int = CALLS) -> None:
        self.grpc = grpc.aio.server(options=server_options(limits, streams=streams))
        self.address = address
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._services = [health.SERVICE_NAME, reflection.SERVICE_NAME]

    def add(self, register: Callable[[Any, grpc.aio.Server], None], servicer: object, name: str) -> None:
        """Offer a service under its full protobuf name."""
        register(servicer, self.grpc)
        self._services.append(name)

    async def start(self) -> None:
        """Listen. Raises InvalidRequest naming an address that cannot be had."""
        reflection.enable_server_reflection(self._services, self.grpc)
        await self.set_serving(False)
        self.address = bind(self.grpc.add_insecure_port, self.address)
        await self.grpc.start()
        await self._health.set(ALIVE, health_pb2.HealthCheckResponse.SERVING)

    async def set_serving(self, serving: bool) -> None:
        """What health checks are told, for the process and for each of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ["", *self._services[2:]]:
            await self._health.set(name, status)

    async def stop(self) -> None:
        """Take no more calls, let those under way end for STOP_GRACE seconds, then cut them."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(STOP_GRACE)


class RoutingService:
    """The part of EmbeddingService that only needs the routing: shards and controller both answer it."""

    def current_routing(self) -> Routing | None:
        """The routing now; None before the first one came."""
        raise NotImplementedError

    def known_routing(self) -> Routing:
        """The routing now; raises Unavailable before the first one came."""
        routing = self.current_routing()
        if routing is None:
            raise Unavailable(
                "no routing yet: the controller has not published one (is it up, and do the models fit the shards?); "
                "`embedding-service status` says what is missing"
            )
        return routing

    async def GetRouting(self, request: wire.GetRoutingRequest, context: grpc.aio.ServicerContext) -> wire.Routing:
        """Where every part lies; to who knows that already, only how old it is."""
        try:
            routing = self.known_routing()
        except EmbeddingServiceError as error:
            await abort(context, error)
        if (request.term, request.epoch) >= routing.age:
            return wire.Routing(term=routing.message.term, epoch=routing.message.epoch)
        return routing.message

    async def ListModels(
        self, request: wire.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> wire.ListModelsResponse:
        """What is served now."""
        try:
            models = self.known_routing().message.models
        except EmbeddingServiceError as error:
            await abort(context, error)
        return wire.ListModelsResponse(models=[placement.model for placement in models])


async def abort(context: grpc.aio.ServicerContext, error: EmbeddingServiceError) -> NoReturn:
    """End a call with this error's status."""
    await context.abort(code_of(error), str(error))
    raise AssertionError("unreachable: abort raises")


def told_to_end() -> asyncio.Event:
    """Set by each SIGTERM and SIGINT from now on."""
    told = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, told.set)
    return told


async def first_of(*awaitables: Awaitable[object]) -> None:
    """Wait until one of them ends; raise what it raised. Coroutines among them are then cancelled, tasks are not."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await cancel([task for task, given in zip(tasks, awaitables, strict=True) if task is not given])


async def cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """End tasks and wait until they did."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def log_to_stderr(name: str) -> None:
    """Log as a process of this name."""
    # force: FBGEMM sets up the root logger when it is imported
    logging.basicConfig(
        force=True, stream=sys.stderr, format=f"%(asctime)s {name}[{os.getpid()}] %(levelname)s %(message)s"
    )
    log.setLevel(logging.INFO)  # ours only: FBGEMM and TorchRec tell every library they load


def run_process(name: str, main: Callable[[], object]) -> None:
    """Run a server process's coroutine: logging set up, a deliberate error as one line and exit code 1."""
    log_to_stderr(name)
    allow_many_files()
    try:
        asyncio.run(main())  # type: ignore[arg-type]
    except EmbeddingServiceError as error:
        log.error("%s", error)
        sys.exit(1)


def reachable_address(listen: str, advertise: str | None) -> str:
    """The address others shall use: as given, or the one listened on, with this host's name for a wildcard."""
    if advertise:
        return advertise if ":" in advertise else f"{advertise}:{listen.rpartition(':')[2]}"
    host, _, port = listen.rpartition(":")
    return f"{socket.getfqdn()}:{port}" if host in ("0.0.0.0", "[::]", "*") else listen
