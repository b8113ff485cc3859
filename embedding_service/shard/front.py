"""What clients connect to: lookups of rows that are held are answered by the thread that polls, all else is passed on.

grpc's servers for Python hand every message from a polling thread to a worker or an event loop, and the answer back;
for a small lookup that costs more than everything else together. Here the thread that polls answers. What it cannot
answer at once (rows of other shards, rows that are not held, answers that are very large, every other method) goes
to the back, an ordinary asyncio server of the same process, as the bytes it came in.

This leads through grpc's internals, as `client/streams.py` does, and for the same reason.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc._cython import cygrpc

from embedding_service.serving import STOP_GRACE, RequestLimits, bind, server_options
from embedding_service.shard.held import HeldRows
from embedding_service.shard.service import ANSWER, COUNTED_BYTES, PEER, SERVICE, UNREAD_BYTES

log = logging.getLogger(__name__)

# Answers up to this are made by the polling thread: gathering 1,024 tokens takes it about 2 ms.
AT_ONCE_BYTES = 8 << 20
# Requests of one stream that are under way at the back at a time.
STREAM_WINDOW = 8
# Threads at most, and calls that may be under way at the back.
BACK_CALLS = 1 << 12
# Seconds.
FAR_FUTURE = 1e9
# How often the polling thread looks up from an idle queue.
TICK = 0.1

_STREAM = f"/{SERVICE}/StreamLookup"
_LOOKUP = f"/{SERVICE}/Lookup"
# Methods with one message there and one back; others are passed on as streams, which takes more threads.
_UNARY = (
    *(f"/{SERVICE}/{name}" for name in ("LookupNgrams", "ListModels", "GetRouting")),
    "/grpc.health.v1.Health/Check",
)
_OK = grpc.StatusCode.OK.value[0]


class Front:
    """A port and the thread that serves it.

    Args:
        address: host:port to listen on; port 0 takes a free one.
        back: Target of the server that everything else is passed on to.
        rows: Answers lookups of what is held.
        limits: Larger requests are refused by gRPC itself, with RESOURCE_EXHAUSTED naming the limit.
        shared: Several processes listen on this same port, and the kernel spreads connections over them.
    """

    def __init__(self, address: str, back: str, rows: HeldRows, limits: RequestLimits, *, shared: bool = False) -> None:
        self.address = address
        self.rows = rows
        self.unread: Counter[str] = Counter()
        # Threads that wait until a client took what the back answered; they are kept for the next ones.
        self.threads = ThreadPoolExecutor(BACK_CALLS, "passed-on")
        self.back = grpc.insecure_channel(
            back,
            [
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.calls: set[_Call] = set()
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(server_options(limits, shared=shared)), False)
        self._server.register_completion_queue(self._queue)
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)
        self._ending = False
        self._ended_by = float("inf")

    def start(self) -> None:
        """Listen. Raises InvalidRequest naming an address that cannot be had."""
        self.address = bind(lambda address: int(self._server.add_http2_port(address.encode())), self.address)
        self._server.start()
        self._server.request_call(self._queue, self._queue, self._take)
        self._thread.start()

    def stop(self) -> None:
        """Take no more calls, end streams, let calls under way end for STOP_GRACE seconds, then cut them."""
        self._ending = True
        self._thread.join()
        self.back.close()
        self.threads.shutdown()

    def _run(self) -> None:
        stopped = threading.Event()
        stopping, give_up = False, float("inf")
        while not (stopped.is_set() and not self.calls):
            event = self._queue.poll(time.time() + TICK)
            if event.completion_type != cygrpc.CompletionType.queue_timeout:
                try:
                    event.tag(event)
                except Exception:
                    log.exception("a call failed")
                    if isinstance(call := getattr(event.tag, "__self__", None), _Call):
                        call.end(grpc.StatusCode.INTERNAL.value[0], "the shard failed; its log says how")
            # Before the next poll: a call that has ended must not be kept by its last event.
            event = None
            if self._ending and not stopping:
                stopping = True
                self._ended_by = time.monotonic() + STOP_GRACE
                self._server.shutdown(self._queue, lambda _: stopped.set())
                for call in list(self.calls):
                    call.end_stream()
            if time.monotonic() > self._ended_by:
                self._ended_by = float("inf")
                self._server.cancel_all_calls()
                give_up = time.monotonic() + STOP_GRACE
            if time.monotonic() > give_up:
                log.warning("%d calls do not end", len(self.calls))
                return
        self._server.destroy()
        self._queue.shutdown()
        while (event := self._queue.poll(None)).completion_type != cygrpc.CompletionType.queue_shutdown:
            event.tag(event)  # threads may wait for it

    def _take(self, event: Any) -> None:
        """A new call; asked for once more until the server is shut down."""
        if not event.success or event.call is None:
            return
        if not self._ending:
            self._server.request_call(self._queue, self._queue, self._take)
        call = _CALLS.get(event.call_details.method, _PassedStream)(self, event)
        self.calls.add(call)
        call.begin()


class _Call:
    """A call of a client. All methods but `send` and `end` run on the polling thread."""

    def __init__(self, front: Front, event: Any) -> None:
        self._front = front
        self._rpc = event.call
        self._method = event.call_details.method.decode()
        self._peer = event.call.peer()
        self._due = event.call_details.deadline
        # Of threads that bring answers from the back: one sends at a time, and waits until its answer was taken.
        self._turn = threading.Lock()
        self._sent = threading.Semaphore(0)
        self._greeted = False
        self._unread = 0
        self._asked: set[Any] = set()
        self._open = 2  # the client's side, and ours
        self._end_taken = threading.Lock()
        self.cancelled = False

    @property
    def over(self) -> bool:
        """Nothing may be sent any more."""
        return self.cancelled or self._end_taken.locked()

    def begin(self) -> None:
        """Wait for the first message, and for the end."""
        self._rpc.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), self._on_close)
        self.receive()

    def on_message(self, message: bytes) -> None:
        """The client sent one."""
        raise NotImplementedError

    def on_last(self) -> None:
        """The client sends no more."""

    def end_stream(self) -> None:
        """The process ends: let go of a call that would not end by itself."""

    def receive(self) -> None:
        """Wait for the next message."""
        self._rpc.start_server_batch((cygrpc.ReceiveMessageOperation(0),), self._on_received)

    def send(self, message: bytes) -> bool:
        """Send from another thread: returns once it was taken, or False when the client has gone."""
        with self._turn:
            if self.over:
                return False
            self._rpc.start_server_batch((*self._opening(), cygrpc.SendMessageOperation(message, 0)), self._on_sent)
            self._sent.acquire()
        return not self.over

    def end(self, code: int, details: str = "", trailing: Any = (), *operations: Any) -> None:
        """Send the call's end, after `operations`, unless it has ended."""
        if self.cancelled or not self._end_taken.acquire(blocking=False):
            return
        status = cygrpc.SendStatusFromServerOperation(trailing, code, details.encode(), 0)
        self._rpc.start_server_batch((*self._opening(), *operations, status), self._on_ended)

    def room(self) -> int:
        """Bytes that an answer may have here and now: a client that does not read gets no more memory than its share.

        What is larger waits for its turn at the back.
        """
        return min(AT_ONCE_BYTES, UNREAD_BYTES - self._front.unread[self._peer])

    def count(self, nbytes: int) -> None:
        """So many more bytes are unread; `on_taken` takes all of this call off again."""
        if nbytes >= COUNTED_BYTES:
            self._unread += nbytes
            self._front.unread[self._peer] += nbytes

    def on_taken(self) -> None:
        """The client's connection took what was sent."""
        if self._unread:
            unread = self._front.unread
            unread[self._peer] -= self._unread
            self._unread = 0
            if not unread[self._peer]:
                del unread[self._peer]

    def remaining(self) -> float | None:
        """Seconds until the client's deadline; None without one, which grpc says as one in the far future."""
        seconds = self._due - time.time()
        return None if seconds > FAR_FUTURE else max(seconds, 0.001)

    def pass_on(self, method: str, message: bytes, done: Callable[[Any], None]) -> None:
        """Ask the back; `done` is called with the call that has ended, on a thread that must not wait."""
        asked = self._front.back.unary_unary(method).future(message, self.remaining(), ((PEER, self._peer),))
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)
        asked.add_done_callback(done)

    def in_thread(self, work: Callable[..., object], *arguments: Any) -> None:
        """Have work done that waits."""
        self._front.threads.submit(_logged, work, *arguments)

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

    def _on_sent(self, _: Any) -> None:
        self._sent.release()

    def _on_close(self, event: Any) -> None:
        self.cancelled = bool(event.batch_operations[0].cancelled())
        if self.cancelled:
            for asked in list(self._asked):
                asked.cancel()
        self._side_ended()

    def _on_ended(self, _: Any) -> None:
        self._side_ended()

    def _side_ended(self) -> None:
        self._open -= 1
        if self.cancelled or not self._open:
            self.on_taken()
            self._front.calls.discard(self)


class _LookupStream(_Call):
    """`StreamLookup`. What can be answered at once is; a window of the others is under way at a time."""

    def __init__(self, front: Front, event: Any) -> None:
        super().__init__(front, event)
        self._waiting = 0
        self._paused = self._last = False

    def on_message(self, message: bytes) -> None:
        self.on_taken()
        answer = None if self._waiting else self._front.rows.answer_streamed(message, self.room())
        if answer is None:
            self._waiting += 1
            self.pass_on(ANSWER, message, self._on_answered)
            self._receive_or_pause()
        elif len(answer) < COUNTED_BYTES:
            # Comes back when the answer was taken and the next message is there: one event in place of two.
            operations = (*self._opening(), cygrpc.SendMessageOperation(answer, 0), cygrpc.ReceiveMessageOperation(0))
            self._rpc.start_server_batch(operations, self._on_received)
        else:
            self.count(len(answer))
            self._rpc.start_server_batch((*self._opening(), cygrpc.SendMessageOperation(answer, 0)), self._on_large)

    def on_last(self) -> None:
        self.on_taken()
        self._last = True
        self._end_if_done()

    def end_stream(self) -> None:
        self._last = True
        self._end_if_done()

    def _on_answered(self, asked: Any) -> None:
        if self.cancelled:
            return
        if asked.code() is grpc.StatusCode.OK:
            self.in_thread(self.send, asked.result())
        else:
            self.in_thread(self._end_in_turn, asked.code().value[0], asked.details() or "")

    def _end_in_turn(self, code: int, details: str) -> None:
        with self._turn:
            self.end(code, details)

    def _on_large(self, _: Any) -> None:
        self.on_taken()
        if not self.over:
            self.receive()

    def _on_sent(self, event: Any) -> None:
        self._waiting -= 1
        super()._on_sent(event)
        if self._paused and not self.over:
            self._paused = False
            self.receive()
        self._end_if_done()

    def _receive_or_pause(self) -> None:
        if self._waiting < STREAM_WINDOW:
            self.receive()
        else:
            self._paused = True

    def _end_if_done(self) -> None:
        if self._last and not self._waiting:
            self.end(_OK)


class _PassedUnary(_Call):
    """A call with one message there and one back."""

    def on_message(self, message: bytes) -> None:
        self.pass_on(self._method, message, self._finish)

    def on_last(self) -> None:
        self.end(grpc.StatusCode.INVALID_ARGUMENT.value[0], "the call holds no request")

    def _finish(self, asked: Any) -> None:
        if self.cancelled:
            return
        answer = (cygrpc.SendMessageOperation(asked.result(), 0),) if asked.code() is grpc.StatusCode.OK else ()
        self.end(asked.code().value[0], asked.details() or "", _metadata(asked.trailing_metadata()), *answer)


class _Lookup(_PassedUnary):
    """`Lookup`."""

    def on_message(self, message: bytes) -> None:
        answer = self._front.rows.answer(message, self.room())
        if answer is None:
            super().on_message(message)
            return
        self.count(len(answer))
        self.end(_OK, "", (), cygrpc.SendMessageOperation(answer, 0))

    def _on_ended(self, event: Any) -> None:
        self.on_taken()
        super()._on_ended(event)


class _PassedStream(_Call):
    """Any other call: messages both ways until the back ends it."""

    def begin(self) -> None:
        self._paused = False
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = self._front.back.stream_stream(self._method)
        self._upstream = method(iter(self._messages.get, None), self.remaining())
        self.in_thread(self._bring_back)
        super().begin()

    def on_message(self, message: bytes) -> None:
        self._messages.put(message)
        self._paused = self._messages.qsize() > STREAM_WINDOW
        if not self._paused:
            self.receive()

    def on_last(self) -> None:
        self._messages.put(None)

    def end_stream(self) -> None:
        self._upstream.cancel()

    def _on_sent(self, event: Any) -> None:
        super()._on_sent(event)
        if self._paused:
            self._paused = False
            self.receive()

    def _bring_back(self) -> None:
        try:
            for answer in self._upstream:
                if not self.send(answer):
                    break
        except grpc.RpcError:
            pass
        self._upstream.cancel()
        self._messages.put(None)
        rpc = self._upstream
        self.end(rpc.code().value[0], rpc.details() or "", _metadata(rpc.trailing_metadata()))

    def _on_close(self, event: Any) -> None:
        super()._on_close(event)
        self._upstream.cancel()


_CALLS: dict[bytes, type[_Call]] = {
    _STREAM.encode(): _LookupStream,
    _LOOKUP.encode(): _Lookup,
    **{method.encode(): _PassedUnary for method in _UNARY},
}


def _metadata(trailing: Any) -> tuple[Any, ...]:
    return tuple((key, value) for key, value in trailing or ())


def _logged(work: Callable[..., object], *arguments: Any) -> None:
    try:
        work(*arguments)
    except Exception:
        log.exception("a call that was passed on failed")
