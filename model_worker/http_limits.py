"""What an HTTP client may take of a worker: bytes, time and connections.

Rules
- A request reaches the application when its body is whole. It takes no place before that.
- Headers come within HEAD_SECONDS, and a body within BODY_SECONDS after them. Otherwise the answer is 408.
- Headers and trailers of a request are bounded, also while the request before it is under way.
- A client that reads nothing for UNREAD_SECONDS is cut off.
- If all connections are taken, a new one replaces the one that waits longest for a whole request. A handshake of TLS
  counts as waiting, and has HEAD_SECONDS.

`WholeBodies` is an ASGI middleware. Ray Serve's proxy holds the connections. It calls `guard_proxy` when it starts
(PROXY_ENVIRONMENT tells it to) and so gets all limits, and `WholeAnswers`. It imports this file, so nothing heavy may
be imported here.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import ssl
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from model_worker.http_errors import RETRY_AFTER, WholeAnswers, error_body, kind_of

# A prompt of a million tokens is about half of this.
MAX_BODY_BYTES = 8 * 2**20
# Of all requests together, from their first byte to the end of their answer.
MAX_HELD_BYTES = 256 * 2**20
# Of the headers of a request, and of its trailers.
MAX_HEAD_BYTES = 64 * 2**10
# Of a refused body. A client that still sends it has its answer already.
_MAX_REFUSED_BYTES = 2 * MAX_BODY_BYTES
MAX_CONNECTIONS = 1024
HEAD_SECONDS = 10.0
BODY_SECONDS = 20.0
UNREAD_SECONDS = 60.0
# With these a client tells Ray Serve to wait less for an answer, or to work on when the client has gone.
_SERVE_HEADERS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}

PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:guard_proxy"}
"""For the processes of Ray Serve's proxies."""


class _Refused(Exception):
    """The request is refused before it is whole."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.body, self.headers = status, error_body(message, kind, code), headers


class WholeBodies:
    """Gives the application requests with whole bodies, in one message each.

    A body over MAX_BODY_BYTES gets 413: at once if its length is told, else as soon as it is seen. A body that is not
    whole after `seconds` gets 408. When all requests hold more than `held_bytes`, the next one gets 429.
    """

    def __init__(self, app: ASGIApp, seconds: float = BODY_SECONDS, held_bytes: int = MAX_HELD_BYTES) -> None:
        self._app = app
        self._seconds = seconds
        self._most = held_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        pieces: list[bytes] = []
        try:
            if await self._whole(pieces, scope, receive, send):
                scope = {**scope, "headers": [each for each in scope["headers"] if _passed_on(*each)]}
                await self._app(scope, _whole_then(b"".join(pieces), receive), send)
        finally:
            self._held -= sum(map(len, pieces))

    async def _whole(self, pieces: list[bytes], scope: Scope, receive: Receive, send: Send) -> bool:
        """Gather the body. False: the client was refused, or went away."""
        try:
            async with asyncio.timeout(self._seconds):
                return await self._gather(pieces, scope, receive)
        except TimeoutError:
            told = f"the body was not whole after {self._seconds:g} s: send it faster, or send less"
            refused = _Refused(408, told, code="request_timeout", headers={"Connection": "close"})
        except _Refused as error:
            refused = error
        await JSONResponse(refused.body, refused.status, refused.headers)(scope, receive, send)
        return False

    async def _gather(self, pieces: list[bytes], scope: Scope, receive: Receive) -> bool:
        """Append the body's pieces, counted as held. False: the client went away before the end."""
        if _told_length(scope) > MAX_BODY_BYTES:
            raise _too_large()
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            piece = message.get("body", b"")
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise _too_large()
            if self._held + len(piece) > self._most:
                told = f"this server holds {self._held >> 20} MiB of requests already; try again later"
                raise _Refused(429, told, "rate_limit_error", "server_busy", RETRY_AFTER)
            pieces.append(piece)
            self._held += len(piece)
            more = message.get("more_body", False)
        return True


def _passed_on(name: bytes, value: bytes) -> bool:
    """Whether a header is passed on. One that steers Ray Serve is not, nor one that is no UTF-8: Serve decodes all."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return name not in _SERVE_HEADERS


def _told_length(scope: Scope) -> int:
    told = Headers(scope=scope).get("content-length", "")
    # Python refuses to read numbers of thousands of digits.
    return int(told[:20]) if told.isdecimal() else 0


def _too_large() -> _Refused:
    return _Refused(413, f"the body is over {MAX_BODY_BYTES >> 20} MiB, the most this server takes: send less")


def _whole_then(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_whole() -> Message:
        return first.pop() if first else await receive()

    return receive_whole


class _Config(uvicorn.Config):
    """uvicorn's configuration. With TLS, a certificate that is replaced counts from the next connection on."""

    def load(self) -> None:
        """As uvicorn has it. Handshakes are made by `_Handshake`, so uvicorn's server has to make none."""
        super().load()
        if self.ssl:
            self._stamp = self._files()
            self._newest, self.ssl = self.ssl, None
            self.http_protocol_class = _Handshake  # type: ignore[assignment]

    def context(self) -> ssl.SSLContext:
        """For a handshake that begins."""
        stamp = self._files()
        if stamp != self._stamp:
            self._stamp = stamp
            with suppress(OSError):  # which a pair is that does not match: another one will come
                again = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                again.load_cert_chain(str(self.ssl_certfile), self.ssl_keyfile)
                self._newest = again
        return self._newest

    def _files(self) -> list[tuple[int, int, int]]:
        found = []
        for path in (self.ssl_certfile, self.ssl_keyfile):
            with suppress(OSError):
                about = os.stat(str(path))  # noqa: PTH116
                found.append((about.st_mtime_ns, about.st_size, about.st_ino))
        return found


class GuardedHttp(HttpToolsProtocol):
    """uvicorn's protocol of one HTTP connection, with the limits that uvicorn does not have.

    The parser of httptools keeps headers and trailers of any size, also those of the next request while one is under
    way. So they are counted as it tells them. Bytes of which it tells nothing yet count too.
    """

    most = MAX_CONNECTIONS
    # Connections without a whole request, the one that waits longest first.
    _waiting: dict[GuardedHttp | _Handshake, None] = {}  # noqa: RUF012 (one for all)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """As asyncio has it."""
        super().connection_made(transport)
        self._head_bytes = self._untold_bytes = self._refused_bytes = 0
        self._head_timer: TimerHandle | None = None
        self._unread_timer: TimerHandle | None = None
        self.make_room(self)
        if not transport.is_closing():
            self._wait_for_request()

    def connection_lost(self, error: Exception | None) -> None:
        """As asyncio has it."""
        self._stop_timing()
        self._waiting.pop(self, None)
        self.resume_writing()
        self._stop_watching()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""
        self._untold_bytes += len(data)
        answering = self._under_way or self._in_refused_body
        super().data_received(data)
        if self.transport.is_closing():
            self._watch()
            return
        if self._head_bytes + self._untold_bytes > MAX_HEAD_BYTES:
            told = f"the headers are over {MAX_HEAD_BYTES >> 10} KiB, the most this server takes: send fewer"
            self._close(None if answering else (431, told))
            return
        if self._under_way:
            self._stop_timing()
            if not self.cycle.more_body:
                self._waiting.pop(self, None)
            return
        self._wait_for_request()
        if self._in_refused_body:
            self._refused_bytes += len(data)
            if self._refused_bytes > _MAX_REFUSED_BYTES:
                self._close(None)

    def on_message_begin(self) -> None:
        """As httptools has it."""
        super().on_message_begin()
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """As httptools has it."""
        super().on_url(url)
        self._head_bytes += len(url)
        self._untold_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """As httptools has it. Trailers come here too."""
        super().on_header(name, value)
        self._head_bytes += len(b"%s: %s\r\n" % (name, value))
        self._untold_bytes = 0

    def on_body(self, body: bytes) -> None:
        """As httptools has it."""
        super().on_body(body)
        self._untold_bytes = 0

    def on_message_complete(self) -> None:
        """As httptools has it."""
        super().on_message_complete()
        self._untold_bytes = 0

    def on_response_complete(self) -> None:
        """As uvicorn has it."""
        super().on_response_complete()
        self._watch()
        if not self._under_way:
            self._waiting[self] = None

    def pause_writing(self) -> None:
        """As asyncio has it."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """As asyncio has it. The rest of an answer may still be unread."""
        super().resume_writing()
        self._watch()

    def _watch(self) -> None:
        """From now on the client has UNREAD_SECONDS to take what is written. asyncio alone would wait for ever."""
        self._stop_watching()
        if self.transport.get_write_buffer_size():
            self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self._cut_off)

    def _stop_watching(self) -> None:
        if self._unread_timer:
            self._unread_timer.cancel()

    def _cut_off(self) -> None:
        still_answered = self._under_way and not self.flow.write_paused and not self.transport.is_closing()
        if self.transport.get_write_buffer_size() and not still_answered:
            self.transport.abort()

    @property
    def _under_way(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _in_refused_body(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete and self.cycle.more_body

    def _wait_for_request(self) -> None:
        self._waiting.setdefault(self)
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_timing(self) -> None:
        self._refused_bytes = 0
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        told = f"no request came within {HEAD_SECONDS:g} s of the connection: send its headers faster"
        begun = self._head_bytes or self._untold_bytes
        self._close((408, told) if begun and self.cycle is None else None)

    @classmethod
    def make_room(cls, new: GuardedHttp | _Handshake) -> None:
        """If there are too many, close the one that waits longest for its whole request, or else this new one."""
        if len(new.connections) <= cls.most:
            return
        longest = next(iter(cls._waiting), None)
        if longest is not None:
            longest._close(None)
        else:
            new._close((503, f"all {cls.most} connections of this server are taken; try again later"))

    def _close(self, answer: tuple[int, str] | None) -> None:
        self._stop_timing()
        self._waiting.pop(self, None)
        if self.transport.is_closing():
            self.transport.abort()  # it only waits for its client to read
            return
        if answer:
            self.transport.write(_response(*answer))
        self.transport.close()
        self._watch()


class _Handshake(asyncio.Protocol):
    """A connection before it speaks HTTP. asyncio would count it when its handshake is over, and wait a minute."""

    def __init__(self, config: _Config, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        self.connections = server_state.connections
        self._config = config
        self._http = GuardedHttp(config=config, server_state=server_state, app_state=app_state, _loop=_loop)
        self._early: list[bytes] = []

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """As asyncio has it."""
        self._transport = transport
        self.connections.add(self)
        GuardedHttp.make_room(self)
        if not transport.is_closing():
            GuardedHttp._waiting[self] = None
            self._task = asyncio.get_running_loop().create_task(self._shake_hands())

    async def _shake_hands(self) -> None:
        loop, context, transport = asyncio.get_running_loop(), self._config.context(), self._transport
        shaking = loop.create_task(
            loop.start_tls(transport, self, context, server_side=True, ssl_handshake_timeout=HEAD_SECONDS)
        )
        try:
            while transport.get_protocol() is self and not shaking.done():
                await asyncio.sleep(0)
            await asyncio.sleep(0)  # TLS is told of its connection, and waits for data
            if not shaking.done():
                self._hand_on(transport.get_protocol())
            speaking = await shaking
        except (OSError, RuntimeError):  # no TLS, or not in time, or it was closed before it began
            self._transport.abort()
            return
        finally:
            self._leave()
        if speaking is None or speaking.is_closing():
            return
        speaking.set_protocol(self._http)
        self._http.connection_made(speaking)
        for data in self._early:
            self._http.data_received(data)

    def data_received(self, data: bytes) -> None:
        """What came before TLS began, and then what came with the handshake's end."""
        self._early.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        """As asyncio has it."""
        self._leave()

    def _hand_on(self, tls: Any) -> None:
        """What came before TLS began is TLS's, an asyncio.BufferedProtocol."""
        data, self._early = b"".join(self._early), []
        while data:
            room = memoryview(tls.get_buffer(len(data)))
            room[: len(data)] = data[: len(room)]
            tls.buffer_updated(min(len(data), len(room)))
            data = data[len(room) :]

    def shutdown(self) -> None:
        """As uvicorn has it: the server ends."""
        self._close(None)

    def _leave(self) -> None:
        self.connections.discard(self)
        GuardedHttp._waiting.pop(self, None)

    def _close(self, answer: tuple[int, str] | None) -> None:
        """Hang up. An answer cannot be told before the handshake."""
        self._leave()
        self._transport.abort()


def _response(status: int, message: str) -> bytes:
    """An answer on a connection where no request is known."""
    body = json.dumps(error_body(message, kind_of(status))).encode()
    head = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def guard_proxy() -> list[Middleware]:
    """Set the limits, in a process of Ray Serve's proxy, before it makes its HTTP server.

    Returns the middlewares it is to use.
    """
    GuardedHttp.most = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    guarded: Callable[..., uvicorn.Config] = partial(_Config, http=GuardedHttp, ws="none")
    # Serve has no options for this.
    uvicorn.Config = guarded  # type: ignore[assignment, misc]
    return [Middleware(WholeBodies), Middleware(WholeAnswers)]
