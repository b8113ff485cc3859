"""What clients connect to: a port and the thread that polls gRPC's queue for it.

grpc's servers for Python hand every message from a polling thread to a worker or an event loop, and the answer back;
for a small lookup that costs more than everything else together. Here the thread that polls answers what it can answer
at once. All else goes to a coroutine on the process's event loop, by one table of methods. A method that is not in the
table is refused, whatever bytes its name has.

This leads through grpc's internals, as `client/streams.py` does, and for the same reason. Nothing else in this package
touches those of servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc._cython import cygrpc

from embedding_service.budget import COUNTED_BYTES, Budget
from embedding_service.errors import InvalidRequest
from embedding_service.machine import hang_up, room_for_connections, split_address
from embedding_service.methods import Aborted, Context, Method

log = logging.getLogger(__name__)

# How long calls under way may take to end after SIGTERM; then they are cut. Everything together stays under 5 s.
STOP_GRACE = 1.0
# Calls open at a time on a connection, each with its request in memory; clients queue further ones.
CALLS = 256
# Answers up to this are made by the polling thread: gathering 1,024 tokens takes it about 2 ms.
AT_ONCE_BYTES = 8 << 20
# So are answers to requests up to this. Reading a larger one may take milliseconds, which are spent one at a time.
REQUEST_AT_ONCE_BYTES = 128 << 10
# Bytes of answers that one connection may leave unread before it must wait with its next large lookup. Two of the
# largest answers fit.
UNREAD_BYTES = 128 << 20
# Memory that a message takes: a request as it came, cut up, and as numbers; an answer here and in gRPC.
REQUEST_COPIES, ANSWER_COPIES = 3, 2
# Requests of one stream that are under way at a time, where each is answered by itself.
STREAM_WINDOW = 8
# Bytes of a call's headers: beyond the first some calls are refused, beyond the second all are.
METADATA_BYTES, MOST_METADATA_BYTES = 8 << 10, 16 << 10
# Between the last answer and the end: until it has left this machine.
LAST_ANSWER_SECONDS = 0.25
# How often the polling thread looks up from an idle queue.
TICK = 0.1
ENDING_TICK = 0.01
# Bytes of a method's name that an error repeats.
SHOWN_BYTES = 100
# What a process passes a call on to another one with, on a private address: whose call it is.
PEER = "embedding-peer"

_OK = grpc.StatusCode.OK.value[0]
_ENDS = "this server is ending: ask another one, or this address again in a moment"
_MALFORMED = "the message is malformed: it is no valid protobuf of this method's request"


@dataclass(frozen=True)
class Options:
    """What all fronts of a process have in common.

    Attributes:
        methods: By their path, as "/package.Service/Method".
        budget: Of bytes under way.
        request_bytes: Larger messages are refused by gRPC itself, with RESOURCE_EXHAUSTED naming the limit.
        refused: Told of each call that was refused before a handler saw it. Any thread.
        died: Told what ended a polling thread that was not told to end, on the event loop.
    """

    methods: Mapping[bytes, Method]
    budget: Budget
    request_bytes: int
    refused: Callable[[], None] = lambda: None
    died: Callable[[BaseException], None] = lambda error: None
    # Reads large messages, one at a time: Python's lock is held for as long as protobuf takes.
    reading: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "reading"))


class Front:
    """A port and the thread that serves it. To be made on the event loop whose coroutines answer.

    Args:
        address: host:port to listen on, port 0 takes a free one; or unix:path.
        shared: Several processes listen on this same port, and the kernel spreads connections over them.
        private: Only processes of this service can reach the address: they pass calls on and are believed whose.
    """

    def __init__(self, address: str, options: Options, *, shared: bool = False, private: bool = False) -> None:
        self.address = address
        self.options = options
        self.unread: Counter[str] = Counter()
        self.loop = asyncio.get_running_loop()
        self.calls: set[_Call] = set()
        self._private = private
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(_server_options(options.request_bytes, shared=shared)), False)
        self._server.register_completion_queue(self._queue)
        self._thread = threading.Thread(target=self._live, name="front", daemon=True)
        self._ending = self._shut = False
        self._end_at: float | None = None
        self._busy = 0.0

    def start(self) -> None:
        """Listen. Raises InvalidRequest naming an address that cannot be had."""
        self.address = _bind(self._server, self.address)
        self._server.start()
        self._server.request_call(self._queue, self._queue, self._take)
        self._thread.start()

    async def stop(self) -> None:
        """Answer further calls with UNAVAILABLE, and let those under way end for STOP_GRACE seconds; then hang up."""
        self._ending = True
        if self._thread.ident:
            await asyncio.to_thread(self._thread.join)

    def to_loop(self, work: Callable[..., object], *arguments: Any) -> None:
        """Have work done on the event loop, unless that has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(work, *arguments)

    def _live(self) -> None:
        try:
            self._run()
        except BaseException as error:
            log.critical("the thread that serves %s died", self.address, exc_info=True)
            self.to_loop(self.options.died, error)
            # A process that lives and serves nothing is worse than none, should its event loop be stuck too.
            time.sleep(3 * STOP_GRACE)
            os._exit(1)

    def _run(self) -> None:
        stopped = threading.Event()
        give_up = float("inf")
        while not (stopped.is_set() and not self.calls):
            event = self._queue.poll(time.time() + (ENDING_TICK if self._ending else TICK))
            if event.completion_type != cygrpc.CompletionType.queue_timeout:
                self._handle(event)
            # Before the next poll: a call that has ended must not be kept by its last event.
            event = None
            if self._ending and self._end_at is None:
                self._begin_to_end()
            if self._end_at is not None and not self._shut and time.monotonic() > self._end_time():
                self._shut = True
                # gRPC cancels the calls that it took in meanwhile, whose callers do not know that they may ask again.
                # They must not hear of that: for them the connection is closed, which is UNAVAILABLE.
                hang_up(self.address)
                self._server.shutdown(self._queue, lambda _: stopped.set())
                self._server.cancel_all_calls()
                give_up = time.monotonic() + STOP_GRACE
            if time.monotonic() > give_up:
                log.warning("%d calls do not end", len(self.calls))
                return
        self._server.destroy()
        self._queue.shutdown()
        while (event := self._queue.poll(None)).completion_type != cygrpc.CompletionType.queue_shutdown:
            self._handle(event)

    def _begin_to_end(self) -> None:
        self._end_at = self._busy = time.monotonic()
        for call in list(self.calls):
            call.end_stream()

    def _end_time(self) -> float:
        """When to cut connections: a moment after the last answer, for which calls have STOP_GRACE seconds."""
        assert self._end_at is not None
        if any(not isinstance(call, _Refused) for call in self.calls):
            self._busy = time.monotonic()
        return min(self._busy + LAST_ANSWER_SECONDS, self._end_at + STOP_GRACE)

    def _handle(self, event: Any) -> None:
        if isinstance(event, cygrpc.RequestCallEvent):
            self._ask_for_next(event)
        try:
            event.tag(event)
        except Exception:
            log.exception("a call failed")
            if isinstance(call := getattr(event.tag, "__self__", None), _Call):
                call.end(grpc.StatusCode.INTERNAL.value[0], "the server failed; its log says how")

    def _ask_for_next(self, event: Any) -> None:
        """A new call came, or the server is shut down. Raises where no further call would come."""
        if not self._shut:
            if not event.success:
                raise RuntimeError("gRPC gives no more calls")
            self._server.request_call(self._queue, self._queue, self._take)

    def _take(self, event: Any) -> None:
        """A new call."""
        if event.success and event.call is not None:
            call = self._call(event)
            self.calls.add(call)
            call.begin()

    def _call(self, event: Any) -> _Call:
        peer, path = self._peer(event), event.call_details.method
        if self._ending:
            return _Refused(self, event, peer, Method(), grpc.StatusCode.UNAVAILABLE, _ENDS)
        method = self.options.methods.get(path)
        if method is None or (method.private and not self._private):
            details = f"there is no method {path[:SHOWN_BYTES].decode(errors='backslashreplace')!r} here"
            return _Refused(self, event, peer, Method(), grpc.StatusCode.UNIMPLEMENTED, details)
        if method.places and (full := method.places.take(_host(peer))):
            return _Refused(self, event, peer, Method(), grpc.StatusCode.RESOURCE_EXHAUSTED, full)
        if method.watch:
            return _Watch(self, event, peer, method)
        if method.each:
            return _Each(self, event, peer, method)
        streams = method.handler.request_streaming or method.handler.response_streaming
        return (_Stream if streams else _Unary)(self, event, peer, method)

    def _peer(self, event: Any) -> str:
        if self._private:
            for key, value in event.invocation_metadata:
                if key == PEER:
                    return str(value)
        return event.call.peer().decode(errors="replace")  # type: ignore[no-any-return]


class _Call:
    """A call of a client. What begins with `on_`, and the tags of operations, run on the polling thread."""

    def __init__(self, front: Front, event: Any, peer: str, method: Method) -> None:
        self._front = front
        self._rpc = event.call
        self._peer = peer
        self._method = method
        self._due = event.call_details.deadline
        self._greeted = False
        self._unread = 0
        self._open = 2  # the client's side, and ours
        self._lock = threading.Lock()
        self._ended = False
        self.cancelled = False

    @property
    def over(self) -> bool:
        """Nothing may be sent any more."""
        return self.cancelled or self._ended

    def begin(self) -> None:
        """Wait for the first message, and for the end."""
        self._rpc.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), self._on_close)
        self.receive()

    def on_message(self, message: bytes) -> None:
        """The client sent one."""
        raise NotImplementedError

    def on_last(self) -> None:
        """The client sends no more."""

    def on_cancelled(self) -> None:
        """The client has gone, or its deadline has passed."""

    def end_stream(self) -> None:
        """The process ends: let go of a call that would not end by itself."""

    def receive(self) -> None:
        """Wait for the next message."""
        self._rpc.start_server_batch((cygrpc.ReceiveMessageOperation(0),), self._on_received)

    def start(self, tag: Callable[[Any], None], *operations: Any) -> bool:
        """Start sending, from any thread; False where nothing may be sent any more. One message at a time."""
        with self._lock:
            if self.over:
                return False
            self._rpc.start_server_batch((*self._opening(), *operations), tag)
            return True

    async def send(self, message: bytes, on_sent: Callable[[], None] = lambda: None) -> bool:
        """Send from the event loop: returns once it was taken, or False when the client has gone."""
        taken = self._front.loop.create_future()

        def tag(_: Any) -> None:
            on_sent()
            self._front.to_loop(_settle, taken, None)

        if not self.start(tag, cygrpc.SendMessageOperation(message, 0)):
            return False
        await taken
        return not self.over

    def end(self, code: int, details: str = "", trailing: Iterable[tuple[Any, Any]] = (), *operations: Any) -> None:
        """Send the call's end, after `operations`, unless it has ended."""
        with self._lock:
            if self.over:
                return
            self._ended = True
            status = cygrpc.SendStatusFromServerOperation(tuple(trailing), code, details.encode(), 0)
            self._rpc.start_server_batch((*self._opening(), *operations, status), self._on_ended)

    def refuse(self, code: grpc.StatusCode, details: str) -> None:
        """End a call that no handler has seen, or whose message none could."""
        if not self.over:
            self._front.options.refused()
            self.end(code.value[0], details)

    def room(self) -> int:
        """Bytes that an answer may have here and now: a client that does not read gets no more memory than its share.

        What is larger waits for its turn on the event loop.
        """
        left = max(COUNTED_BYTES, self._front.options.budget.left // ANSWER_COPIES)
        return min(AT_ONCE_BYTES, UNREAD_BYTES - self._front.unread[self._peer], left)

    def admit(self, message: bytes) -> int | None:
        """Bytes that count for a message until it was answered; None where there are none: the call is refused."""
        nbytes = REQUEST_COPIES * len(message) if len(message) >= COUNTED_BYTES else 0
        if nbytes and not self._front.options.budget.take(nbytes):
            self.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, self._front.options.budget.refusal(nbytes))
            return None
        return nbytes

    def at_once(self, message: bytes) -> bytes | None:
        """The answer where the polling thread may make it."""
        if self._method.at_once is None or len(message) > REQUEST_AT_ONCE_BYTES:
            return None
        return self._method.at_once(message, self.room())

    def count(self, nbytes: int) -> None:
        """So many more bytes are unread; `on_taken` takes all of this call off again."""
        if nbytes >= COUNTED_BYTES:
            self._unread += nbytes
            self._front.unread[self._peer] += nbytes
            self._front.options.budget.count(ANSWER_COPIES * nbytes)

    def on_taken(self) -> None:
        """The client's connection took what was sent."""
        if self._unread:
            unread = self._front.unread
            unread[self._peer] -= self._unread
            self._front.options.budget.give_back(ANSWER_COPIES * self._unread)
            self._unread = 0
            if not unread[self._peer]:
                del unread[self._peer]

    # For calls that a handler answers

    async def read(self, message: bytes) -> Any:
        """What a message says. Raises _Malformed."""
        deserialize = self._method.handler.request_deserializer
        if deserialize is None:
            return message
        try:
            if len(message) <= REQUEST_AT_ONCE_BYTES:
                return deserialize(message)
            return await self._front.loop.run_in_executor(self._front.options.reading, deserialize, message)
        except asyncio.CancelledError:
            raise
        except InvalidRequest as error:
            raise _Malformed(str(error)) from None
        except Exception:
            raise _Malformed(_MALFORMED) from None

    def written(self, answer: Any) -> bytes:
        """An answer's bytes."""
        serialize = self._method.handler.response_serializer
        return answer if serialize is None else serialize(answer)  # type: ignore[no-any-return]

    async def guarded(self, answering: Awaitable[None], context: Context) -> None:
        """Await it, and end the call with what it raised."""
        try:
            await answering
        except Aborted as aborted:
            self.end(aborted.code.value[0], aborted.details, context.trailing)
        except _Malformed as malformed:
            self.refuse(grpc.StatusCode.INVALID_ARGUMENT, str(malformed))
        except asyncio.CancelledError:
            self.end(grpc.StatusCode.UNAVAILABLE.value[0], _ENDS)  # unless it was the client who left
        except Exception:
            log.exception("a call failed")
            self.end(grpc.StatusCode.INTERNAL.value[0], "the server failed; its log says how")

    def _opening(self) -> tuple[Any, ...]:
        if self._greeted:
            return ()
        self._greeted = True
        return (cygrpc.SendInitialMetadataOperation((), 0),)

    def _on_received(self, event: Any) -> None:
        for operation in event.batch_operations:
            if operation.type() == cygrpc.OperationType.receive_message:
                message = operation.message()
                if self.over:
                    self.on_taken()
                elif message is None:
                    self.on_last()
                else:
                    self.on_message(message)

    def _on_close(self, event: Any) -> None:
        with self._lock:
            self.cancelled = bool(event.batch_operations[0].cancelled())
        if self.cancelled:
            self.on_cancelled()
        self._side_ended()

    def _on_ended(self, _: Any) -> None:
        self._side_ended()

    def _side_ended(self) -> None:
        self._open -= 1
        if self in self._front.calls and (self.cancelled or not self._open):
            self.on_taken()
            self._front.calls.discard(self)
            if self._method.places:
                self._method.places.leave(_host(self._peer))


class _Malformed(Exception):
    """A message that cannot be read."""


class _Refused(_Call):
    """A call that is answered with a status whatever it holds."""

    def __init__(
        self, front: Front, event: Any, peer: str, method: Method, code: grpc.StatusCode, details: str
    ) -> None:
        super().__init__(front, event, peer, method)
        self._status = code, details

    def begin(self) -> None:
        self._rpc.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), self._on_close)
        self.refuse(*self._status)


class _Unary(_Call):
    """A call with one message there and one back."""

    _task: asyncio.Task[None] | None = None
    _admitted = 0

    def on_message(self, message: bytes) -> None:
        answer = self.at_once(message)
        if answer is None:
            admitted = self.admit(message)
            if admitted is not None:
                self._admitted = admitted
                self._front.to_loop(self._begin_task, message)
            return
        self.count(len(answer))
        self.end(_OK, "", (), cygrpc.SendMessageOperation(answer, 0))

    def on_last(self) -> None:
        self.refuse(grpc.StatusCode.INVALID_ARGUMENT, "the call holds no request")

    def on_cancelled(self) -> None:
        self._front.to_loop(self._cancel)

    def _begin_task(self, message: bytes) -> None:
        if not self.cancelled:
            self._context = Context(self._peer, self._due)
            self._task = self._front.loop.create_task(self.guarded(self._answer(message), self._context))

    async def _answer(self, message: bytes) -> None:
        request = await self.read(message)
        answer = self.written(await self._method.handler.unary_unary(request, self._context))
        self.end(_OK, "", self._context.trailing, cygrpc.SendMessageOperation(answer, 0))

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


class _Stream(_Call):
    """A call of which a side streams, and the task that answers it."""

    _task: asyncio.Task[None] | None = None
    _received: asyncio.Future[bytes | None] | None = None

    def begin(self) -> None:
        self._rpc.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), self._on_close)
        self._front.to_loop(self._begin_task)

    def on_message(self, message: bytes) -> None:
        self._front.to_loop(_settle, self._received, message)

    def on_last(self) -> None:
        self._front.to_loop(_settle, self._received, None)

    def on_cancelled(self) -> None:
        self._front.to_loop(self._cancel)

    def end_stream(self) -> None:
        self._front.to_loop(self._cancel)

    def _begin_task(self) -> None:
        if not self.cancelled:
            self._context = Context(self._peer, self._due)
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
                    if not await self.send(self.written(answer)):
                        break
            self.end(_OK, "", context.trailing)
        else:
            answer = self.written(await handler.stream_unary(request, context))
            self.end(_OK, "", context.trailing, cygrpc.SendMessageOperation(answer, 0))

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
            except _Malformed as malformed:  # a handler may read in a task of its own
                self.refuse(grpc.StatusCode.INVALID_ARGUMENT, str(malformed))

    def _on_received(self, event: Any) -> None:
        if self.over:
            self.on_last()
        else:
            super()._on_received(event)

    def _cancel(self) -> None:
        if self._task:
            self._task.cancel()


class _Each(_Call):
    """A stream of messages that are answered one by one. What can be at once is; the others by tasks, a window."""

    def __init__(self, front: Front, event: Any, peer: str, method: Method) -> None:
        super().__init__(front, event, peer, method)
        self._waiting = 0
        self._paused = self._last = self._ends = False
        # Of tasks: gRPC takes one message at a time.
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
            self.start(self._on_received, cygrpc.SendMessageOperation(answer, 0), cygrpc.ReceiveMessageOperation(0))
        else:
            self.count(len(answer))
            self.start(self._on_large, cygrpc.SendMessageOperation(answer, 0))

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
        context = Context(self._peer, self._due)
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
                self.end(aborted.code.value[0], aborted.details, context.trailing)
            return
        async with self._turn:
            await self.send(answer, self._on_answered)

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
            self.end(grpc.StatusCode.UNAVAILABLE.value[0], _ENDS)
        elif self._last and not self._waiting:
            self.end(_OK)


class _Watch(_Call):
    """A call that is told something now and then: no task waits for that, and no thread."""

    def __init__(self, front: Front, event: Any, peer: str, method: Method) -> None:
        super().__init__(front, event, peer, method)
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
        self.end(grpc.StatusCode.UNAVAILABLE.value[0], _ENDS)

    def _tell(self, answer: bytes) -> None:
        with self._telling:
            self._next = answer
            self._send_next()

    def _send_next(self) -> None:
        if self._next is not None and not self._sending:
            answer, self._next = self._next, None
            self._sending = self.start(self._on_told, cygrpc.SendMessageOperation(answer, 0))

    def _on_told(self, _: Any) -> None:
        with self._telling:
            self._sending = False
            self._send_next()

    def _side_ended(self) -> None:
        super()._side_ended()
        if self._leave and self not in self._front.calls:
            self._leave()


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _host(peer: str) -> str:
    """Of a connection, without its port."""
    return peer.rpartition(":")[0]


def _server_options(request_bytes: int, *, shared: bool) -> list[tuple[str, int]]:
    return [
        # Room for what a request holds besides its ids.
        ("grpc.max_receive_message_length", request_bytes + 65536),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", CALLS),
        # The next ones are closed as they come.
        ("grpc.max_allowed_incoming_connections", room_for_connections()),
        ("grpc.so_reuseport", 1 if shared else 0),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MOST_METADATA_BYTES),
        # None: a few compressed bytes may be a thousand times as many, and ids hardly get fewer by it.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Clients may ping while they wait (client/transport.py); and we find out about those cut off.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def _bind(server: Any, address: str) -> str:
    """Listen: the address with the port that was taken."""
    host = "" if address.startswith("unix:") else split_address(address)[0]
    try:
        bound = server.add_http2_port(address.encode())
    except RuntimeError:
        bound = 0
    if not bound:
        raise InvalidRequest(f"cannot listen on {address}: is another process there? Give another port")
    return f"{host}:{bound}" if host else address
