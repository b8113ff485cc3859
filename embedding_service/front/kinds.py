"""The kinds of calls, and how each is answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any

import grpc

from embedding_service import tracing
from embedding_service.budget import COUNTED_BYTES
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, QuotaExceeded
from embedding_service.floods import CALL_BYTES
from embedding_service.front.base import CALLER, ENDS, MOST_FIELDS, PEER, SHOWN_BYTES, STREAM_WINDOW, Front, Rpc
from embedding_service.front.call import Call, Malformed, host_of, settle
from embedding_service.grpc_codes import code_of, trailing_of
from embedding_service.methods import Aborted, Context, Method
from embedding_service.security.guard import HEADER
from embedding_service.security.identity import Caller


def take(front: Front, rpc: Rpc) -> Call:
    """Begin to answer a new call."""
    call = _call_of(front, rpc)
    front.options.arrivals.count(rpc.peer, CALL_BYTES)
    if len(rpc.metadata) > MOST_FIELDS:
        front.options.arrivals.blame(host_of(rpc.peer))
    front.calls.add(call)
    call.begin()
    return call


def _call_of(front: Front, rpc: Rpc) -> Call:
    peer, path = _peer(front, rpc), rpc.path
    if front.ending:
        return _Refused(front, rpc, peer, Method(), grpc.StatusCode.UNAVAILABLE, ENDS)
    method = front.options.methods.get(path)
    if method is None or (method.private and not front.private) or not front.kind.offers(method, path):
        details = f"there is no method {path[:SHOWN_BYTES].decode(errors='backslashreplace')!r} here"
        return _Refused(front, rpc, peer, Method(), grpc.StatusCode.UNIMPLEMENTED, details)
    caller = None
    if front.security:
        try:
            caller = _caller(front, rpc, method)
            if caller and caller.quota:
                caller.quota.enter()
        except EmbeddingServiceError as error:
            return _Refused(front, rpc, peer, Method(), code_of(error), str(error), trailing_of(error))
    if method.places and (full := method.places.take(host_of(peer))):
        if caller and caller.quota:
            caller.quota.leave()
        return _Refused(front, rpc, peer, Method(), grpc.StatusCode.RESOURCE_EXHAUSTED, full)
    call = _kind(method)(front, rpc, peer, method)
    call.caller = caller
    call.quota = caller.quota if caller else None
    return call


def _kind(method: Method) -> Callable[[Front, Rpc, str, Method], Call]:
    if method.watch:
        return _Watch
    if method.each:
        return _Each
    return _Stream if method.handler.request_streaming or method.handler.response_streaming else _Unary


def _caller(front: Front, rpc: Rpc, method: Method) -> Caller | None:
    """Whose a call is. None where the method is anybody's. Raises Unauthenticated, PermissionDenied."""
    assert front.security
    shown = dict(rpc.metadata)  # the last one of a name counts
    if front.private:
        passed_on = str(shown.get(CALLER, ""))
        return front.security.admit(method.rights, rpc.path, passed_on=passed_on, peer=rpc.peer)
    if front.kind.members:  # a proof may be a stolen one, a certificate's key is used in the handshake
        return front.security.admit(method.rights, rpc.path, certificate=rpc.certificate, peer=rpc.peer)
    return front.security.admit(method.rights, rpc.path, bearer=shown.get(HEADER), peer=rpc.peer)


def _peer(front: Front, rpc: Rpc) -> str:
    if front.private:
        for key, value in rpc.metadata:
            if key == PEER:
                return str(value)
    return rpc.peer


class _Refused(Call):
    """A call that is answered with a status, whatever it holds."""

    refused = True

    def __init__(
        self,
        front: Front,
        rpc: Rpc,
        peer: str,
        method: Method,
        code: grpc.StatusCode,
        details: str,
        trailing: Iterable[tuple[str, str]] = (),
    ) -> None:
        super().__init__(front, rpc, peer, method)
        self._status = code, details, trailing

    def begin(self) -> None:
        self._rpc.await_close(self._on_close)
        self.refuse(*self._status)


class _Unary(Call):
    """A call with one message there and one back."""

    _task: asyncio.Task[None] | None = None
    _admitted = 0
    _traceparent = ""

    def on_message(self, message: bytes) -> None:
        if tracing.tracer is not None:
            self._traceparent = tracing.traceparent_of(self._rpc.metadata)
        try:
            answer = None if self._traceparent else self.at_once(message)
        except QuotaExceeded as error:
            self.refuse(code_of(error), str(error), trailing_of(error))
            return
        if answer is None:
            admitted = self.admit(message)
            if admitted is not None:
                self._admitted = admitted
                self._front.to_loop(self._begin_task, message)
            return
        self.count(len(answer))
        self.end(message=answer)

    def on_last(self) -> None:
        self.refuse(grpc.StatusCode.INVALID_ARGUMENT, "the call holds no request")

    def on_cancelled(self) -> None:
        self._front.to_loop(self._cancel)

    def _begin_task(self, message: bytes) -> None:
        if not self.cancelled:
            self._context = Context(self._peer, self._rpc.due, self.caller, self._traceparent)
            self._task = self._front.loop.create_task(self.guarded(self._answer(message), self._context))

    async def _answer(self, message: bytes) -> None:
        request = await self.read(message)
        answer = self.written(await self._method.handler.unary_unary(request, self._context))
        self.end(trailing=self._context.trailing, message=answer)

    def _cancel(self) -> None:
        if self._task:
            self._task.cancel()

    def _side_ended(self) -> None:
        super()._side_ended()
        if self not in self._front.calls:
            self._front.options.budget.give_back(self._admitted)
            self._admitted = 0
            if self._task:
                self._front.to_loop(self._context.finish)


class _Stream(Call):
    """A call with a side that streams, and the task that answers it."""

    _task: asyncio.Task[None] | None = None
    _received: asyncio.Future[bytes | None] | None = None

    def begin(self) -> None:
        self._rpc.await_close(self._on_close)
        self._front.to_loop(self._begin_task)

    def on_message(self, message: bytes) -> None:
        self._front.to_loop(settle, self._received, message)

    def on_last(self) -> None:
        self._front.to_loop(settle, self._received, None)

    def on_cancelled(self) -> None:
        self._front.to_loop(self._cancel)

    def end_stream(self) -> None:
        self._front.to_loop(self._cancel)

    def _begin_task(self) -> None:
        if not self.cancelled:
            self._context = Context(self._peer, self._rpc.due, self.caller)
            self._task = self._front.loop.create_task(self.guarded(self._answer(), self._context))

    async def _answer(self) -> None:
        handler, context = self._method.handler, self._context
        requests = self._requests()
        request: Any = requests if handler.request_streaming else await anext(requests, None)
        if request is None:
            self.refuse(grpc.StatusCode.INVALID_ARGUMENT, "the call holds no request")
        elif handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
            async with aclosing(behaviour(request, context)) as answers:
                async for answer in answers:
                    if not await self.sent(self.written(answer)):
                        break
            self.end(trailing=context.trailing)
        else:
            answer = self.written(await handler.stream_unary(request, context))
            self.end(trailing=context.trailing, message=answer)

    async def _requests(self) -> AsyncIterator[Any]:
        """Each message when it is asked for, so that no more than one is in memory."""
        while not self.over:
            self._received = self._front.loop.create_future()
            self.receive()
            message = await self._received
            if message is None:
                return
            try:
                yield await self.read(message)
            except Malformed as malformed:  # a handler may read in a task of its own
                self.refuse(grpc.StatusCode.INVALID_ARGUMENT, str(malformed))

    def _on_received(self, message: bytes | None) -> None:
        if self.over:
            self.on_last()
        else:
            super()._on_received(message)

    def _cancel(self) -> None:
        if self._task:
            self._task.cancel()


class _Each(Call):
    """A stream of messages that are answered one by one: at once if possible, else by tasks, a window of them."""

    def __init__(self, front: Front, rpc: Rpc, peer: str, method: Method) -> None:
        super().__init__(front, rpc, peer, method)
        self._waiting = 0
        self._paused = self._last = self._ends = False
        # The tasks' turn, because gRPC takes one message at a time.
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def on_message(self, message: bytes) -> None:
        self.on_taken()
        answer = None if self._waiting else self.at_once(message)
        if answer is None:
            admitted = self.admit(message)
            if admitted is not None:
                self._waiting += 1
                self._front.to_loop(self._begin_task, message, admitted)
                self._receive_or_pause(1 if admitted else STREAM_WINDOW)
        elif len(answer) < COUNTED_BYTES:
            # Comes back when the answer was taken and the next message is there: one event in place of two.
            self.exchange(answer)
        else:
            self.count(len(answer))
            self.send(answer, self._on_large)

    def on_last(self) -> None:
        self.on_taken()
        self._last = True
        self._end_if_done()

    def on_cancelled(self) -> None:
        self._front.to_loop(self._cancel)

    def end_stream(self) -> None:
        self._ends = True
        self._end_if_done()

    def _begin_task(self, message: bytes, admitted: int) -> None:
        if self.cancelled:
            self._front.options.budget.give_back(admitted)
            return
        context = Context(self._peer, self._rpc.due, self.caller)
        task = self._front.loop.create_task(self.guarded(self._answer(message, context), context))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: context.finish())
        task.add_done_callback(lambda _: self._front.options.budget.give_back(admitted))

    async def _answer(self, message: bytes, context: Context) -> None:
        request = await self.read(message)
        try:
            answer = self.written(await self._method.handler.unary_unary(request, context))
        except Aborted as aborted:
            async with self._turn:  # after the answers that are on their way
                self.end(aborted.code, aborted.details, context.trailing)
            return
        async with self._turn:
            await self.sent(answer, self._on_answered)

    def _cancel(self) -> None:
        for task in list(self._tasks):
            task.cancel()

    def _on_answered(self) -> None:
        self._waiting -= 1
        if self._paused and not self.over:
            self._paused = False
            self.receive()
        self._end_if_done()

    def _on_large(self, _: Any) -> None:
        self.on_taken()
        if not self.over:
            self.receive()

    def _receive_or_pause(self, window: int) -> None:
        if self._ends:
            return
        if self._waiting < window:
            self.receive()
        else:
            self._paused = True

    def _end_if_done(self) -> None:
        if self._ends and not self._waiting:
            self.end(grpc.StatusCode.UNAVAILABLE, ENDS)
        elif self._last and not self._waiting:
            self.end()


class _Watch(Call):
    """A call that is told something now and then. No task waits for that, and no thread."""

    def __init__(self, front: Front, rpc: Rpc, peer: str, method: Method) -> None:
        super().__init__(front, rpc, peer, method)
        self._next: bytes | None = None
        self._sending = False
        self._telling = threading.Lock()
        self._leave: Callable[[], None] | None = None

    def on_message(self, message: bytes) -> None:
        assert self._method.watch
        try:
            self._leave = self._method.watch.begin(message, self._tell)
        except InvalidRequest as error:
            self.refuse(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def on_last(self) -> None:
        self.refuse(grpc.StatusCode.INVALID_ARGUMENT, "the call holds no request")

    def end_stream(self) -> None:
        self.end(grpc.StatusCode.UNAVAILABLE, ENDS)

    def _tell(self, answer: bytes) -> None:
        with self._telling:
            self._next = answer
            self._send_next()

    def _send_next(self) -> None:
        if self._next is not None and not self._sending:
            answer, self._next = self._next, None
            self._sending = self.send(answer, self._on_told)

    def _on_told(self, _: Any) -> None:
        with self._telling:
            self._sending = False
            self._send_next()

    def _side_ended(self) -> None:
        super()._side_ended()
        if self._leave and self not in self._front.calls:
            self._leave()
