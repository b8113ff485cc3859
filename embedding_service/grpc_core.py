"""gRPC's core by way of grpc's private module `cygrpc`. Nothing else in this service touches private names of grpc.

Two things are faster this way, and grpc's public API has neither (BENCHMARKS.md has the figures):

- A server's calls are answered by the thread that polls for them (`front.polling`). grpc's own servers hand each call
  to a worker thread or to an event loop, and its answer back.
- A lookup's stream is polled by the thread that waits for its answer (`client.streams`). grpc's public stream hands
  each answer from a thread of its own to the thread that waits.

Private names may change with any release. `why_public` tries all of them once in a process, before the first use.
Where one is gone or behaves otherwise, grpc's public API serves: `front.public` and the public stream. A lookup then
takes longer (BENCHMARKS.md). The variable EMBEDDING_SERVICE_GRPC=public asks for that. `python -m
embedding_service.grpc_core` says whether the core of this grpcio can be used.

| private name | what for |
| --- | --- |
| `cygrpc.Server`, `CompletionQueue` | a server's port, and the queue of what happens there |
| `cygrpc.RequestCallEvent`, `CompletionType` | tell a new call, an idle queue and the queue's end from the rest |
| `Call.start_server_batch`, `Call.peer` of an event | send and receive; whose connection it is |
| `cygrpc.auth_context`, `grpc.ServerCredentials._credentials` | a client's certificate; a port with TLS |
| `grpc.Channel._channel.segregated_call` | a call with a completion queue of its own, polled by its user |
| `cygrpc.Send...Operation`, `Receive...Operation`, `OperationType` | what is sent and received |
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc

from embedding_service.errors import InvalidRequest

try:
    from grpc._cython import cygrpc
except ImportError:  # `why_public` names it
    cygrpc = None

log = logging.getLogger(__name__)

VARIABLE, PUBLIC = "EMBEDDING_SERVICE_GRPC", "public"
# Seconds that each step of the trial may take. All of them together take a few milliseconds.
PATIENCE = 5.0


@functools.cache
def why_public() -> str:
    """Why grpc's public API has to serve in this process, in one line; empty where its core can be used.

    The log says so once. Raises InvalidRequest where the variable has a value that means nothing.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", PUBLIC):
        raise InvalidRequest(f"{VARIABLE} must be {PUBLIC!r} or not set, got {asked!r}")
    why = f"{VARIABLE} is {PUBLIC}" if asked else differs()
    if why:
        log.log(
            logging.INFO if asked else logging.WARNING, "calls go by grpc's public API, which takes longer: %s", why
        )
    else:
        log.info("calls go by the core of grpcio %s", grpc.__version__)
    return why


def differs() -> str:
    """What of grpc's core is not as it is used here, in one line; empty where all of it is."""
    try:
        _try_everything()
    except Exception as error:
        return f"private names of grpc {grpc.__version__} differ: {type(error).__name__}: {error}"
    return ""


class ClientCall:
    """A call of a client, whose messages are bytes. The thread that waits for an answer polls for it.

    `cancel` may be called from any thread, the rest from one at a time.

    Args:
        channel: A channel for threads.
        method: Its path, as "/package.Service/Method".
        due: On time.time's clock; None: never.
        ended: Makes what `receive` returns of a call that has ended, from its status code and details.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        method: bytes,
        due: float | None = None,
        ended: Callable[[int, str], Any] = lambda code, details: (code, details),
    ) -> None:
        begin = (
            ((cygrpc.SendInitialMetadataOperation(None, 0),), None),
            ((cygrpc.ReceiveStatusOnClientOperation(0),), None),
            ((cygrpc.ReceiveInitialMetadataOperation(0),), None),
        )
        segregated_call = channel._channel.segregated_call  # type: ignore[attr-defined]
        self._call = segregated_call(0, method, None, due, None, None, begin, None)
        self._message_kind = cygrpc.OperationType.receive_message
        self._status_kind = cygrpc.OperationType.receive_status_on_client
        self._make_end, self._end = ended, None

    def exchange(self, message: bytes) -> bool:
        """Send a message and ask for one; False where the call has ended."""
        if self._end is not None:
            return False
        operations = (cygrpc.SendMessageOperation(message, 0), cygrpc.ReceiveMessageOperation(0))
        if self._call.operate(operations, None):
            return True
        self._end = self._make_end(0, "")
        return False

    def receive(self) -> Any:
        """Wait for the message that was asked for: bytes, or what `ended` makes where the call has ended."""
        while self._end is None:
            for operation in self._call.next_event().batch_operations:
                kind = operation.type()
                if kind == self._message_kind and (message := operation.message()) is not None:
                    return message  # type: ignore[no-any-return]
                if kind == self._status_kind:
                    self._end = self._make_end(operation.code(), _text(operation.details()))
        return self._end

    def cancel(self, code: grpc.StatusCode, message: str) -> None:
        """End the call; `receive` returns this status."""
        self._call.cancel(code.value[0], message)


class Event(NamedTuple):
    """What happened at a port: `tag`, which was given for it, is to be called with `outcome`."""

    tag: Callable[[Any], None]
    outcome: Any


class ServerCall:
    """A call that came to a port.

    Each `tag` is called once, by the thread that polls the port. One message may be on its way each way at a time.

    Attributes:
        path: The method's, as "/package.Service/Method". Any bytes.
        peer: Whose connection it is.
        due: The client's deadline on time.time's clock. Far in the future without one.
        metadata: What the client sent with it.
    """

    __slots__ = ("_call", "_greeted", "due", "metadata", "path", "peer")

    def __init__(self, event: Any) -> None:
        self._call = event.call
        self._greeted = False
        self.path: bytes = event.call_details.method
        self.due: float = event.call_details.deadline
        self.peer: str = event.call.peer().decode(errors="replace")
        self.metadata: Sequence[tuple[str, str | bytes]] = event.invocation_metadata

    def certificate(self) -> bytes | None:
        """The client's certificate, PEM, if the port asked for one. It takes tens of microseconds."""
        found = (cygrpc.auth_context(self._call) or {}).get(b"x509_pem_cert")
        return bytes(found[0]) if found else None

    def await_close(self, tag: Callable[[bool], None]) -> None:
        """Call the tag when the client's side has ended: True if the client gave up, or its deadline passed."""
        self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), (tag, _cancelled))

    def receive(self, tag: Callable[[bytes | None], None]) -> None:
        """Ask for a message. None: no more will come."""
        self._call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), (tag, _received))

    def send(self, message: bytes, tag: Callable[[None], None]) -> None:
        """Send a message; the tag is called when the connection took it."""
        self._call.start_server_batch((*self._greeting(), cygrpc.SendMessageOperation(message, 0)), (tag, _nothing))

    def exchange(self, message: bytes, tag: Callable[[bytes | None], None]) -> None:
        """`send`, then `receive`: one event in place of two, when both are done."""
        operations = (cygrpc.SendMessageOperation(message, 0), cygrpc.ReceiveMessageOperation(0))
        self._call.start_server_batch((*self._greeting(), *operations), (tag, _received))

    def end(
        self,
        code: grpc.StatusCode,
        details: str,
        trailing: Iterable[tuple[str, str]],
        message: bytes | None,
        tag: Callable[[None], None],
    ) -> None:
        """Send the call's status, after a last message if there is one."""
        last = () if message is None else (cygrpc.SendMessageOperation(message, 0),)
        status = cygrpc.SendStatusFromServerOperation(tuple(trailing), code.value[0], details.encode(), 0)
        self._call.start_server_batch((*self._greeting(), *last, status), (tag, _nothing))

    def _greeting(self) -> tuple[Any, ...]:
        """A call's first answer begins with its header."""
        if self._greeted:
            return ()
        self._greeted = True
        return (cygrpc.SendInitialMetadataOperation((), 0),)


class Port:
    """A server at an address. One thread polls for what happens there.

    Args:
        options: gRPC's channel arguments.
    """

    def __init__(self, options: Iterable[tuple[str, int]]) -> None:
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options), False)
        self._server.register_completion_queue(self._queue)

    def bind(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen there: the port that was taken, 1 for a socket's path; 0 where that cannot be.

        `credentials`: of TLS. None: plain text.
        """
        more = () if credentials is None else (credentials._credentials,)
        try:
            return int(self._server.add_http2_port(address.encode(), *more))
        except RuntimeError:
            return 0

    def start(self) -> None:
        """Let connections come."""
        self._server.start()

    def next_call(self, tag: Callable[[ServerCall | None], None]) -> None:
        """Ask for one more call; None: no more will come."""
        self._server.request_call(self._queue, self._queue, (tag, _call_of))

    def poll(self, until: float) -> Event | None:
        """Wait for what happens next, until then on time.time's clock."""
        event = self._queue.poll(until)
        return None if event.completion_type == cygrpc.CompletionType.queue_timeout else _read(event)

    def shut_down(self, tag: Callable[[None], None]) -> None:
        """Take no more calls and cut those that are open; the tag is called when all of them have ended."""
        self._server.shutdown(self._queue, (tag, _nothing))
        self._server.cancel_all_calls()

    def destroy(self) -> Iterator[Event]:
        """Give everything back, after `shut_down`: what was still in the queue."""
        self._server.destroy()
        self._queue.shutdown()
        while (event := self._queue.poll(None)).completion_type != cygrpc.CompletionType.queue_shutdown:
            yield _read(event)


def _read(event: Any) -> Event:
    tag, outcome_of = event.tag
    return Event(tag, outcome_of(event))


def _call_of(event: Any) -> ServerCall | None:
    if not isinstance(event, cygrpc.RequestCallEvent) or not event.success or event.call is None:
        return None
    return ServerCall(event)


def _cancelled(event: Any) -> bool:
    return bool(event.batch_operations[0].cancelled())


def _received(event: Any) -> bytes | None:
    return event.batch_operations[-1].message()  # type: ignore[no-any-return]


def _nothing(_: Any) -> None:
    """A tag's outcome where only the time says something."""


def _text(details: bytes | str | None) -> str:
    return details.decode(errors="replace") if isinstance(details, bytes) else details or ""


def _try_everything() -> None:
    """Make one call here, from this process to itself, with everything that is used. Raises what went wrong."""
    if cygrpc is None:
        raise ImportError("there is no grpc._cython.cygrpc")
    _check("TLS", hasattr(grpc.local_server_credentials(), "_credentials"), True)
    # A socket without a file or a port, where there are such.
    inside = f"unix-abstract:embedding-service-{os.getpid()}-{os.urandom(8).hex()}" if sys.platform == "linux" else ""
    port = Port([("grpc.max_concurrent_streams", 1)])
    bound = port.bind(inside or "127.0.0.1:0")
    _check("the port that was taken", bound > 0, True)
    port.start()
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    try:
        with grpc.insecure_channel(inside or f"127.0.0.1:{bound}", options) as channel:
            _try_a_call(port, channel)
    finally:
        port.shut_down(_ignored)
    _check("the end", _next(port), None)
    _check("what is left after the end", list(port.destroy()), [])


def _try_a_call(port: Port, channel: grpc.Channel) -> None:
    _check("an idle port", port.poll(time.time()), None)
    port.next_call(_ignored)
    theirs = ClientCall(channel, _TRIAL, time.time() + PATIENCE)
    _check("a sent message", theirs.exchange(b"1"), True)
    ours = _next(port)
    if not isinstance(ours, ServerCall):
        raise TypeError(f"a new call is {ours!r}")
    _check("its path", ours.path, _TRIAL)
    _check("its deadline", 0 < ours.due - time.time() < 2 * PATIENCE, True)
    _check("its peer", isinstance(ours.peer, str), True)
    _check("its certificate", ours.certificate(), None)
    _check("its metadata", all(len(pair) == 2 for pair in ours.metadata), True)
    ours.await_close(_ignored)
    ours.receive(_ignored)
    _check("a received message", _next(port), b"1")
    ours.exchange(b"2", _ignored)
    _check("an answer", theirs.receive(), b"2")
    theirs.exchange(b"3")
    _check("the next message", _next(port), b"3")
    ours.send(b"4", _ignored)
    _check("a taken message", _next(port), None)
    _check("the next answer", theirs.receive(), b"4")
    theirs.exchange(b"5")
    ours.receive(_ignored)
    _check("the last message", _next(port), b"5")
    ours.end(grpc.StatusCode.ABORTED, "6", (("7", "8"),), b"9", _ignored)
    # A status may overtake the answer before it.
    _check("the status", (10, "6") in (theirs.receive(), theirs.receive()), True)
    _check("a call that has ended", theirs.exchange(b"10"), False)
    theirs.cancel(grpc.StatusCode.CANCELLED, "too late")
    _check("a call's two ends", {_next(port), _next(port)}, {None, False})


_TRIAL = b"/trial/\xff"


def _next(port: Port) -> Any:
    event = port.poll(time.time() + PATIENCE)
    if event is None:
        raise TimeoutError("a port's queue says nothing")
    return event.outcome


def _check(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{what} is {found!r}, not {expected!r}")


def _ignored(_: object) -> None:
    """A tag that nobody calls."""


if __name__ == "__main__":
    found = differs()
    print(found or f"the core of grpcio {grpc.__version__} can be used")
    sys.exit(bool(found))
