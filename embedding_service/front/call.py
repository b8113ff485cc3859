"""What the calls of a front have in common: their messages, their memory and their end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from embedding_service.budget import COUNTED_BYTES
from embedding_service.errors import EmbeddingServiceError, InvalidRequest
from embedding_service.front.base import (
    ANSWER_COPIES,
    AT_ONCE_BYTES,
    ENDS,
    FAILED,
    MALFORMED,
    REQUEST_AT_ONCE_BYTES,
    REQUEST_COPIES,
    UNREAD_BYTES,
    Front,
    Rpc,
)
from embedding_service.grpc_codes import code_of
from embedding_service.methods import Aborted, Context, Method
from embedding_service.security.identity import Caller
from embedding_service.security.quotas import Quota

log = logging.getLogger(__name__)


class Malformed(Exception):
    """A message that cannot be read."""


class Call:
    """A call of a client. Methods that begin with `on_`, and all tags, run where the front's calls are answered.

    That is the thread of a front that polls, and the event loop of a public one.
    """

    refused = False

    def __init__(self, front: Front, rpc: Rpc, peer: str, method: Method) -> None:
        self._front = front
        self._rpc = rpc
        self._peer = peer
        self._method = method
        self.caller: Caller | None = None
        self.quota: Quota | None = None
        self._unread = 0
        self._open = 2  # the client's side, and ours
        self._lock = threading.Lock()
        self._ended = False
        self.cancelled = False

    @property
    def over(self) -> bool:
        """Whether nothing may be sent any more."""
        return self.cancelled or self._ended

    def begin(self) -> None:
        """Wait for the first message, and for the end."""
        self._rpc.await_close(self._on_close)
        self.receive()

    def on_message(self, message: bytes) -> None:
        """The client sent one."""
        raise NotImplementedError

    def on_last(self) -> None:
        """The client sends no more."""

    def on_cancelled(self) -> None:
        """The client has gone, or its deadline has passed."""

    def end_stream(self) -> None:
        """The process ends. Let go of a call that would not end by itself."""

    def look_again(self) -> None:
        """See `Answered`."""
        security = self._front.security
        if self.caller is None or security is None:
            return
        try:
            self.caller = security.again(self.caller, self._method.rights, self._rpc.path)
        except EmbeddingServiceError as error:
            self.end(code_of(error), str(error))
            self.on_cancelled()

    def receive(self) -> None:
        """Wait for the next message."""
        self._rpc.receive(self._on_received)

    def send(self, message: bytes, tag: Callable[[None], None]) -> bool:
        """Start sending, from any thread, one message at a time. False if nothing may be sent any more."""
        with self._lock:
            if not self.over:
                self._rpc.send(message, tag)
            return not self.over

    def exchange(self, message: bytes) -> None:
        """Send, and wait for the next message: one event in place of two. Does nothing if the call is over."""
        with self._lock:
            if not self.over:
                self._rpc.exchange(message, self._on_received)

    async def sent(self, message: bytes, on_sent: Callable[[], None] = lambda: None) -> bool:
        """Send from the event loop. Returns once it was taken, or False if the client has gone."""
        taken = self._front.loop.create_future()

        def tag(_: None) -> None:
            on_sent()
            self._front.to_loop(settle, taken, None)

        if not self.send(message, tag):
            return False
        await taken
        return not self.over

    def end(
        self,
        code: grpc.StatusCode = grpc.StatusCode.OK,
        details: str = "",
        trailing: Iterable[tuple[str, str]] = (),
        message: bytes | None = None,
    ) -> None:
        """Send the call's end, after a last message if there is one, unless it has ended. From any thread."""
        with self._lock:
            if not self.over:
                self._ended = True
                self._rpc.end(code, details, trailing, message, self._on_ended)

    def refuse(self, code: grpc.StatusCode, details: str, trailing: Iterable[tuple[str, str]] = ()) -> None:
        """End a call that no handler has seen, or whose message none could."""
        if not self.over:
            self._front.options.refused()
            self.end(code, details, trailing)

    # Memory

    def room(self) -> int:
        """Bytes that an answer may have here and now. A client that does not read gets no more memory than its share.

        A larger answer waits for its turn on the event loop.
        """
        left = max(COUNTED_BYTES, self._front.options.budget.left // ANSWER_COPIES)
        return min(AT_ONCE_BYTES, UNREAD_BYTES - self._front.unread[self._peer], left)

    def admit(self, message: bytes) -> int | None:
        """Bytes that count for a message until it was answered. None if there are none left: the call is refused."""
        nbytes = REQUEST_COPIES * len(message) if len(message) >= COUNTED_BYTES else 0
        if nbytes and not self._front.options.budget.take(nbytes):
            self.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, self._front.options.budget.refusal(nbytes))
            return None
        return nbytes

    def count(self, nbytes: int) -> None:
        """`nbytes` more are unread. `on_taken` takes all of this call off again."""
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

    # Handlers

    def at_once(self, message: bytes) -> bytes | None:
        """The answer, if it may be made here."""
        if self._method.at_once is None or len(message) > REQUEST_AT_ONCE_BYTES:
            return None
        return self._method.at_once(message, self.room(), self.caller)

    async def read(self, message: bytes) -> Any:
        """What a message says. Raises Malformed."""
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
            raise Malformed(str(error)) from None
        except Exception:
            raise Malformed(MALFORMED) from None

    def written(self, answer: Any) -> bytes:
        """An answer's bytes."""
        serialize = self._method.handler.response_serializer
        return answer if serialize is None else serialize(answer)  # type: ignore[no-any-return]

    async def guarded(self, answering: Awaitable[None], context: Context) -> None:
        """Await it, and end the call with what it raised."""
        try:
            await answering
        except Aborted as aborted:
            self.end(aborted.code, aborted.details, context.trailing)
        except Malformed as malformed:
            self.refuse(grpc.StatusCode.INVALID_ARGUMENT, str(malformed))
        except asyncio.CancelledError:
            self.end(grpc.StatusCode.UNAVAILABLE, ENDS)  # unless it was the client who left
        except Exception:
            self.fail()

    def fail(self) -> None:
        """End the call with the exception that is being handled, which only the log tells."""
        log.exception("a call failed")
        self.end(grpc.StatusCode.INTERNAL, FAILED)

    # Events

    def _on_received(self, message: bytes | None) -> None:
        if message is not None:
            self._front.options.arrivals.count(self._peer, len(message))
        if self.over:
            self.on_taken()
        elif message is None:
            self.on_last()
        else:
            self.on_message(message)

    def _on_close(self, cancelled: bool) -> None:
        with self._lock:
            self.cancelled = cancelled
        if cancelled:
            self.on_cancelled()
        self._side_ended()

    def _on_ended(self, _: None) -> None:
        self._side_ended()

    def _side_ended(self) -> None:
        self._open -= 1
        if self in self._front.calls and (self.cancelled or not self._open):
            self.on_taken()
            self._front.calls.discard(self)
            if self._method.places:
                self._method.places.leave(host_of(self._peer))
            if self.quota:
                self.quota.leave()


def settle(future: asyncio.Future[Any], result: Any) -> None:
    """Give a future its result, unless it was given up."""
    if not future.done():
        future.set_result(result)


def host_of(peer: str) -> str:
    """The host of a connection, without its port."""
    return peer.rpartition(":")[0]
