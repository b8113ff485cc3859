"""The front of last resort: grpc's public asyncio server, where `grpc_core` cannot be used.

It answers the same calls by the same code (`kinds`), on the event loop. Limits, refusals, health and drains are alike,
for they are channel arguments, or ours. What is not alike:

- Everything takes longer: each message passes from a thread of grpc's to the loop and back (BENCHMARKS.md).
- Rows are gathered on the event loop, so one that is stuck answers nothing at all.
- An open call costs two tasks of the loop, an idle health watch too.
- A method's name that is no UTF-8 ends the server of some releases. Then this front cuts its connections, so that those
  who wait hear UNAVAILABLE and ask again. It begins another server at its address, ten times a second at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, NamedTuple

import grpc

from embedding_service.errors import InvalidRequest
from embedding_service.front.base import (
    ENDING_TICK,
    Front,
    Kind,
    Options,
    cannot_listen,
    channel_arguments,
    with_port,
)
from embedding_service.front.call import settle
from embedding_service.front.kinds import take
from embedding_service.sockets import hang_up

log = logging.getLogger(__name__)

# Seconds between the end of a server and the begin of the next, and how often that is tried.
PAUSE, TRIES = 0.1, 50


class PublicFront(Front):
    """A port and grpc's asyncio server; see `Front`."""

    def __init__(
        self,
        address: str,
        options: Options,
        *,
        shared: bool = False,
        private: bool = False,
        kind: Kind | None = None,
    ) -> None:
        super().__init__(address, options, private=private, kind=kind)
        self._arguments = partial(channel_arguments, options.request_bytes, shared=shared, ages=self.has_tls)
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._failed: asyncio.Future[BaseException | None] = self.loop.create_future()

    async def start(self) -> None:
        """See `Front`."""
        await self._serve()
        self._keeping = self.loop.create_task(self._keep_serving())

    async def stop(self) -> None:
        """See `Front`."""
        self.ending = True
        server, self._server = self._server, None
        if server is None:
            return
        self.begin_to_end()
        while not self.has_ended():
            await asyncio.sleep(ENDING_TICK)
        # As where we poll: for those who hear no answer the connection is closed, which is UNAVAILABLE.
        hang_up(self.address)
        await server.stop(None)
        if self._keeping:
            self._keeping.cancel()

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine beside what runs here. On the event loop."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def answer(self, path: bytes, _: Any, context: grpc.aio.ServicerContext) -> None:
        """A call's handler, as grpc wants it: returns when the call has its status."""
        rpc = _PublicCall(self, path, context)
        take(self, rpc)
        await rpc.until_ended()

    async def _serve(self) -> None:
        """Begin a server. Raises InvalidRequest where the address cannot be had."""
        server = grpc.aio.server(handlers=[_Handlers(self)], options=self._arguments())
        try:
            credentials = self.credentials()
            if credentials is None:
                bound = server.add_insecure_port(self.address)
            else:
                bound = server.add_secure_port(self.address, credentials)
        except RuntimeError:
            raise cannot_listen(self.address) from None
        self.address = with_port(self.address, bound)
        self._failed = self.loop.create_future()
        before = asyncio.all_tasks()
        await server.start()
        self._server = server
        for task in asyncio.all_tasks() - before:
            task.add_done_callback(partial(self._on_task_ended, self._failed))

    def _on_task_ended(self, failed: asyncio.Future[BaseException | None], task: asyncio.Task[Any]) -> None:
        """A task that began with grpc's server ended. Nothing but an error of one tells that the server fails.

        grpc is about to cancel calls that it has taken in and not passed on.
        """
        if not (task.cancelled() or task.exception() is None or self.ending or failed.done()):
            failed.set_result(task.exception())
            hang_up(self.address)

    async def _keep_serving(self) -> None:
        """Begin another server whenever grpc's fails."""
        try:
            while True:
                error = await self._failed
                log.warning("grpc's server at %s failed, another begins: %r", self.address, error)
                await asyncio.sleep(PAUSE)
                if self._server:
                    await self._server.stop(None)
                    await self._serve_again()
        except Exception as error:
            log.critical("grpc's server at %s cannot be begun again", self.address, exc_info=True)
            self.options.died(error)

    async def _serve_again(self) -> None:
        for _ in range(TRIES - 1):
            with contextlib.suppress(InvalidRequest):  # the one before has not left the port yet
                return await self._serve()
            await asyncio.sleep(PAUSE)
        return await self._serve()


class _Handlers(grpc.GenericRpcHandler):
    """All methods, and those that are none. On the wire, calls of all kinds are streams of messages both ways."""

    def __init__(self, front: PublicFront) -> None:
        self._front = front

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(partial(self._front.answer, details.method.encode()))


class _Status(NamedTuple):
    code: grpc.StatusCode
    details: str
    trailing: tuple[tuple[str, str], ...]
    message: bytes | None
    tag: Callable[[None], None]


class _PublicCall:
    """A call of grpc's asyncio server as an `Rpc`. Tags are called on the event loop."""

    def __init__(self, front: PublicFront, path: bytes, context: grpc.aio.ServicerContext) -> None:
        remaining = context.time_remaining()
        self.path = path
        self.peer: str = context.peer()
        self.due = math.inf if remaining is None else time.time() + remaining
        self.metadata = context.invocation_metadata() or ()
        self._front = front
        self._context = context
        self._status: asyncio.Future[_Status] = front.loop.create_future()

    def certificate(self) -> bytes | None:
        """See `Rpc`."""
        found = self._context.auth_context().get("x509_pem_cert")
        return bytes(found[0]) if found else None

    async def until_ended(self) -> None:
        """Send the status when there is one."""
        try:
            status = await self._status
            if status.message is not None:
                await self._context.write(status.message)
            self._context.set_trailing_metadata(status.trailing)
            if status.code is not grpc.StatusCode.OK:
                await self._context.abort(status.code, status.details, status.trailing)
        except asyncio.CancelledError:
            self._cancelled = True
            raise

    def await_close(self, tag: Callable[[bool], None]) -> None:
        """See `Rpc`."""
        self._context.add_done_callback(lambda _: self._on_done(tag))

    def receive(self, tag: Callable[[bytes | None], None]) -> None:
        """See `Rpc`."""
        self._do(self._read(), tag)

    def send(self, message: bytes, tag: Callable[[None], None]) -> None:
        """See `Rpc`."""
        self._do(self._context.write(message), tag)

    def exchange(self, message: bytes, tag: Callable[[bytes | None], None]) -> None:
        """See `Rpc`."""
        self._do(self._write_and_read(message), tag)

    def end(
        self,
        code: grpc.StatusCode,
        details: str,
        trailing: Iterable[tuple[str, str]],
        message: bytes | None,
        tag: Callable[[None], None],
    ) -> None:
        """See `Rpc`."""
        self._front.to_loop(settle, self._status, _Status(code, details, tuple(trailing), message, tag))

    _cancelled = False

    def _do(self, work: Coroutine[Any, Any, Any], tag: Callable[[Any], None]) -> None:
        self._front.to_loop(self._front.run, self._tell(work, tag))

    async def _tell(self, work: Coroutine[Any, Any, Any], tag: Callable[[Any], None]) -> None:
        try:
            outcome = await work
        except grpc.aio.BaseError:  # the call has ended
            outcome = None
        self._front.tell(tag, outcome)

    async def _read(self) -> bytes | None:
        message = await self._context.read()
        return None if message is grpc.aio.EOF else message  # type: ignore[no-any-return]

    async def _write_and_read(self, message: bytes) -> bytes | None:
        await self._context.write(message)
        return await self._read()

    def _on_done(self, on_close: Callable[[bool], None]) -> None:
        self._front.tell(on_close, self._cancelled)
        if self._status.done() and not self._status.cancelled():
            self._front.tell(self._status.result().tag, None)
