"""A server of toy methods in this process, at a port of its own. It shows what `front` does, without a shard."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from embedding_service.budget import Budget
from embedding_service.methods import Context, Method
from embedding_service.security.identity import Caller
from embedding_service.serving import RequestLimits, Server

Request = health_pb2.HealthCheckRequest
TOY = "toy.Toy"


class Toy:
    """Methods of every kind. `waiting`: calls of `Wait` under way, until `let_go`. `said`: messages of `Repeat`."""

    def __init__(self) -> None:
        self.waiting = self.said = 0
        self._go = asyncio.Event()

    def add_to(self, server: Server) -> None:
        read, write = Request.FromString, Request.SerializeToString
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo, read, write),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail, read, write),
            "Wait": grpc.unary_unary_rpc_method_handler(self.wait, read, write),
            "Repeat": grpc.unary_stream_rpc_method_handler(self.repeat, read, write),
            "Join": grpc.stream_unary_rpc_method_handler(self.join, read, write),
            "Absent": grpc.unary_unary_rpc_method_handler(self.absent, read, write),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat, read, write),
        }
        server.add_registered_method_handlers(TOY, handlers)
        each = handlers["Echo"]
        server.offer(f"{TOY}/Each", Method(each, at_once=self.quick, each=True))
        server.offer(f"{TOY}/Quick", Method(each, at_once=self.quick))
        server.offer(f"{TOY}/Private", Method(each, private=True))

    def quick(self, message: bytes, room: int, caller: Caller | None) -> bytes | None:
        """Answers what begins with q, on the polling thread."""
        if message.startswith(b"\x0a") and message[2:3] == b"q":
            return Request(service="at once").SerializeToString()
        if message == b"break":
            raise RuntimeError("broken")
        return None

    async def echo(self, request: Any, context: Context) -> Any:
        return Request(service=f"{request.service}, {context.peer()}")

    def absent(self, request: Any, context: Any) -> Any:
        """As generated code has it for a method that nobody wrote."""
        raise NotImplementedError

    async def fail(self, request: Any, context: Context) -> Any:
        if request.service == "raise":
            raise RuntimeError("a secret of the process")
        context.set_trailing_metadata((("toy", "1"),))
        await context.abort(grpc.StatusCode.ABORTED, f"aborted: {request.service}")

    async def wait(self, request: Any, context: Context) -> Any:
        self.waiting += 1
        try:
            await self._go.wait()
            return request
        finally:
            self.waiting -= 1

    async def let_go(self) -> None:
        """Answer the calls of `Wait` that are under way."""
        self._go.set()
        self._go = asyncio.Event()

    async def repeat(self, request: Any, context: Context) -> AsyncIterator[Any]:
        for number in range(int(request.service)):
            self.said += 1
            yield Request(service=str(number).ljust(10_000))

    async def join(self, requests: AsyncIterator[Any], context: Context) -> Any:
        return Request(service="".join([request.service async for request in requests]))

    async def chat(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for request in requests:
            yield Request(service=request.service.upper())


class ToyServer:
    """As tests see it: `address`, `private` (a unix socket's), and what runs behind."""

    def __init__(self, private: str, budget: Budget | None) -> None:
        self.toy = Toy()
        self.budget = budget
        self.private = private
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.run(self._start())

    def run(self, work: Any) -> Any:
        """A coroutine's result, on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(240)

    async def _start(self) -> None:
        self.server = Server(RequestLimits(request_bytes=1 << 20), self.budget)
        self.server.add(Toy.add_to, self.toy, TOY)
        self.front = await self.server.listen("127.0.0.1:0")
        self.address = self.front.address
        await self.server.listen(f"unix:{self.private}", private=True)

    def close(self) -> None:
        self.run(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def toy_server(private: str, budget: Budget | None = None) -> Iterator[ToyServer]:
    """One that runs. It is ended afterwards."""
    server = ToyServer(private, budget)
    try:
        yield server
    finally:
        server.close()
