"""What every front has: its limits, what it is told, and the way to its calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from embedding_service.budget import Budget
from embedding_service.errors import InvalidRequest
from embedding_service.floods import Arrivals
from embedding_service.machine import room_for_connections, split_address
from embedding_service.methods import Method
from embedding_service.security.server import Security

log = logging.getLogger(__name__)

# Seconds that calls under way may take to end after SIGTERM. Then they are cut. Everything together stays under 5 s.
STOP_GRACE = 1.0
# Calls open at a time on a connection, each with its request in memory. Clients queue further ones.
CALLS = 256
# Calls of all connections that may wait for the thread that takes them.
WAITING_CALLS = 16384
# Answers up to this are made where the request came in: gathering 1,024 tokens takes about 2 ms.
AT_ONCE_BYTES = 8 << 20
# So are answers to requests up to this. Reading a larger one may take milliseconds, which are spent one at a time.
REQUEST_AT_ONCE_BYTES = 128 << 10
# Bytes of answers that one connection may leave unread before it must wait with its next large lookup. Two of the
# largest answers fit.
UNREAD_BYTES = 128 << 20
# Memory that a message takes: a request as it came, cut up, and as numbers; an answer here and in gRPC.
REQUEST_COPIES, ANSWER_COPIES = 3, 2
# Requests of one stream under way at a time, if each is answered by itself.
STREAM_WINDOW = 8
# Bytes of a call's headers. Beyond the first some calls are refused, beyond the second all are.
METADATA_BYTES, MOST_METADATA_BYTES = 8 << 10, 16 << 10
# A field counts for 32 at least. gRPC hands us more than that of clients that do not acknowledge the limits.
MOST_FIELDS = MOST_METADATA_BYTES // 32
# Bytes that gRPC takes from a connection at a time.
READ_BYTES = 64 << 10
# Seconds between the last answer and the end, for the answer to leave this machine.
LAST_ANSWER_SECONDS = 0.25
# Milliseconds that a connection with TLS lasts, and that its calls then have to end. An open one would survive whatever
# becomes of its authority.
AGE_MS, AGED_MS = 3_600_000, 60_000
# How often a front that ends looks whether its calls have ended.
ENDING_TICK = 0.01
# Bytes of a method's name that an error repeats.
SHOWN_BYTES = 100
# Metadata of a call that a process passes on, on a private address: whose call it is.
PEER = "embedding-peer"
# And the caller's identity, where there is a policy.
CALLER = "embedding-caller"

ENDS = "this server is ending: ask another one, or this address again in a moment"
MALFORMED = "the message is malformed: it is no valid protobuf of this method's request"
FAILED = "the server failed; its log says how"


@dataclass(frozen=True)
class Options:
    """What all fronts of a process have in common.

    Attributes:
        methods: By their path, as "/package.Service/Method".
        budget: The bytes under way.
        request_bytes: Larger messages are refused by gRPC itself, with RESOURCE_EXHAUSTED naming the limit.
        refused: Called for each call that was refused before a handler saw it, on any thread.
        died: Called with what ended a front that was not told to end, on the event loop.
        arrivals: Told of each call and message.
        security: Who may do what. None: plain text, and everybody may do everything.
    """

    methods: Mapping[bytes, Method]
    budget: Budget
    request_bytes: int
    refused: Callable[[], None] = lambda: None
    died: Callable[[BaseException], None] = lambda error: None
    arrivals: Arrivals = field(default_factory=Arrivals)
    security: Security | None = None
    # Reads large messages, one at a time: Python's lock is held for as long as protobuf takes.
    reading: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "reading"))


@dataclass(frozen=True)
class Kind:
    """What a port is for.

    Attributes:
        members: Members of the service alone. With TLS, a client has to have a certificate.
        apart: Another port is for members. This one does not answer what only they may ask.
        health_only: It answers health checks in plain text, and nothing else.
    """

    members: bool = False
    apart: bool = False
    health_only: bool = False

    def offers(self, method: Method, path: bytes) -> bool:
        """Whether the port answers a method."""
        if self.health_only:
            return path.startswith(b"/grpc.health.v1.Health/")
        return not (method.members and self.apart)


class Rpc(Protocol):
    """A call as a front hands it on: `grpc_core.ServerCall`, and what `public` makes of grpc's own.

    Each `tag` is called once, where the front's calls are answered. One message may be on its way each way at a time.

    Attributes:
        path: The method's, as "/package.Service/Method". Any bytes.
        peer: Whose connection it is.
        due: The client's deadline on time.time's clock. Far in the future without one.
        metadata: What the client sent with it.
    """

    path: bytes
    peer: str
    due: float
    metadata: Sequence[tuple[str, str | bytes]]

    def certificate(self) -> bytes | None:
        """The client's certificate, PEM, if the port asked for one."""

    def await_close(self, tag: Callable[[bool], None]) -> None:
        """Call the tag when the client's side has ended: True if the client gave up, or its deadline passed."""

    def receive(self, tag: Callable[[bytes | None], None]) -> None:
        """Ask for a message. None: no more will come."""

    def send(self, message: bytes, tag: Callable[[None], None]) -> None:
        """Send a message, from any thread. The tag is called when the connection took it."""

    def exchange(self, message: bytes, tag: Callable[[bytes | None], None]) -> None:
        """`send`, then `receive`."""

    def end(
        self,
        code: grpc.StatusCode,
        details: str,
        trailing: Iterable[tuple[str, str]],
        message: bytes | None,
        tag: Callable[[None], None],
    ) -> None:
        """Send the call's status, from any thread, after a last message if there is one."""


class Answered(Protocol):
    """A call, as its front sees it."""

    refused: bool

    def end_stream(self) -> None:
        """The process ends. Let go of a call that would not end by itself."""

    def look_again(self) -> None:
        """End the call if its caller may not make it any more. On any thread."""

    def fail(self) -> None:
        """End the call with the exception that is being handled."""


class Front(ABC):
    """A port where calls are answered. To be made on the event loop whose coroutines answer.

    Args:
        address: host:port to listen on, port 0 takes a free one; or unix:path.
        private: Only processes of this service can reach the address. They pass calls on, and their word on the peer
            counts.
        kind: What else is said of the port.

    Attributes:
        calls: Those that have not ended.
        unread: Bytes of answers that were not taken yet, by connection.
        ending: New calls are answered with UNAVAILABLE.
    """

    def __init__(self, address: str, options: Options, *, private: bool = False, kind: Kind | None = None) -> None:
        self.address = address
        self.options = options
        self.private = private
        self.kind = kind or Kind()
        self.security = None if self.kind.health_only else options.security
        self.loop = asyncio.get_running_loop()
        self.calls: set[Answered] = set()
        self.unread: Counter[str] = Counter()
        self.ending = False
        self._ends_since = self._busy = 0.0

    @abstractmethod
    async def start(self) -> None:
        """Listen. Raises InvalidRequest naming an address that cannot be had."""

    @abstractmethod
    async def stop(self) -> None:
        """Answer further calls with UNAVAILABLE, and let those under way end for STOP_GRACE seconds. Then hang up."""

    @property
    def has_tls(self) -> bool:
        """Whether its port speaks TLS."""
        return self.security is not None and not self.private

    def credentials(self) -> grpc.ServerCredentials | None:
        """Of TLS. None for plain text."""
        return self.security.credentials(self.kind.members) if self.security and self.has_tls else None

    def look_again(self) -> None:
        """End calls of those who may not make them any more. On any thread."""
        for call in list(self.calls):
            call.look_again()

    def to_loop(self, work: Callable[..., object], *arguments: Any) -> None:
        """Have work done on the event loop, unless that has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(work, *arguments)

    def tell(self, tag: Callable[[Any], None], outcome: Any) -> None:
        """Call a tag. What it raises ends its call."""
        try:
            tag(outcome)
        except Exception:
            call = getattr(tag, "__self__", None)
            if call in self.calls:
                call.fail()
            else:
                log.exception("a call failed")

    def begin_to_end(self) -> None:
        """Let go of calls that would not end by themselves. Where calls are answered, like `has_ended`."""
        self._ends_since = self._busy = time.monotonic()
        for call in list(self.calls):
            call.end_stream()

    def has_ended(self) -> bool:
        """Whether to cut connections: a moment after the last answer, at the latest after STOP_GRACE seconds."""
        now = time.monotonic()
        if any(not call.refused for call in list(self.calls)):
            self._busy = now
        return now > min(self._busy + LAST_ANSWER_SECONDS, self._ends_since + STOP_GRACE)


def channel_arguments(request_bytes: int, *, shared: bool, ages: bool) -> list[tuple[str, int]]:
    """Options of a port for gRPC.

    Args:
        request_bytes: Larger messages are refused.
        shared: Several processes listen on it, and the kernel spreads connections.
        ages: Connections end after AGE_MS.
    """
    return [
        *([("grpc.max_connection_age_ms", AGE_MS), ("grpc.max_connection_age_grace_ms", AGED_MS)] if ages else []),
        # Room for what a request holds besides its ids.
        ("grpc.max_receive_message_length", request_bytes + 65536),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", CALLS),
        # Beyond the first some are cancelled, whosever they are, beyond the second all.
        ("grpc.server.max_pending_requests", WAITING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * WAITING_CALLS),
        # The next ones are closed as they come.
        ("grpc.max_allowed_incoming_connections", room_for_connections()),
        ("grpc.so_reuseport", 1 if shared else 0),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MOST_METADATA_BYTES),
        # None. A few compressed bytes may become a thousand times as many, and ids hardly shrink by it.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Clients may ping while they wait (client/transport.py). And we find out about those cut off.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Of what came on a connection, so much is read and looked through before it is another one's turn.
        ("grpc.experimental.tcp_max_read_chunk_size", READ_BYTES),
    ]


def with_port(address: str, port: int) -> str:
    """An address with the port that was taken."""
    return address if address.startswith("unix:") else f"{split_address(address)[0]}:{port}"


def cannot_listen(address: str) -> InvalidRequest:
    """The error of an address that cannot be had."""
    return InvalidRequest(f"cannot listen on {address}: is another process there? Give another port")
