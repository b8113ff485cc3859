"""WSGI applications on a port of their own: with TLS where a process has it, and for callers that have a right."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client.exposition import ThreadingWSGIServer

from embedding_service.errors import EmbeddingServiceError, InvalidRequest, PermissionDenied, Unauthenticated
from embedding_service.machine import join_address
from embedding_service.security.server import Security

# Seconds that a client has for its handshake and its request.
REQUEST_SECONDS = 10
# Connections at a time, each with a thread. A further one takes the place of the oldest of the host that has most.
MOST_CONNECTIONS = 64

App = Callable[[dict[str, Any], Callable[..., Any]], Any]


class WebServer:
    """Answers by an application, on threads of its own.

    Args:
        host: Address to listen on.
        port: Where.
        app: A WSGI application. It is called on a thread for each request.
        option: The command's option that gives the port, for the error.
        security: With it, the port speaks TLS. None: plain text.

    Raises:
        InvalidRequest: it cannot listen there.
    """

    def __init__(self, host: str, port: int, app: App, option: str, security: Security | None = None) -> None:
        host = host.strip("[]")
        try:
            [(family, *_), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

            class Listening(_Server):
                address_family = family

            self._server = make_server(host, port, app, Listening, _Handler)
        except OSError as error:
            raise InvalidRequest(
                f"cannot listen on {join_address(host, port)} ({error.strerror}): give another {option}"
            ) from error
        self._server.security = security
        self._thread = threading.Thread(target=self._server.serve_forever, name=option, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingWSGIServer):
    """With TLS, each connection's handshake is on its own thread: one that says nothing keeps nobody."""

    security: Security | None = None
    request_queue_size = MOST_CONNECTIONS  # that wait to be taken: of five a burst would lose some

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._open: dict[Any, str] = {}
        self._counting = threading.Lock()

    def get_request(self) -> tuple[Any, Any]:
        """See the base class."""
        connection, address = super().get_request()
        if self.security is None:
            return connection, address
        try:
            context = self.security.context()
            return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address
        except OSError:
            connection.close()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """See the base class."""
        with self._counting:
            if len(self._open) >= MOST_CONNECTIONS:
                [(host, _)] = Counter(self._open.values()).most_common(1)
                oldest = next(each for each, its in self._open.items() if its == host)
                del self._open[oldest]
                with suppress(OSError):
                    socket.socket.shutdown(oldest, socket.SHUT_RDWR)  # TLS's own would take it from its thread
            self._open[request] = str(client_address[0])
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """See the base class."""
        with self._counting:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nobody is told of a client that speaks no TLS, or goes."""


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def admit(security: Security | None, rights: tuple[str, ...], environ: dict[str, Any]) -> None:
    """Raise Unauthenticated or PermissionDenied for a request that shows none of the rights."""
    if security:
        bearer, peer = environ.get("HTTP_AUTHORIZATION"), str(environ.get("REMOTE_ADDR", ""))
        security.admit(rights, str(environ.get("PATH_INFO", "")).encode(), bearer=bearer, peer=peer)


def refusal(error: EmbeddingServiceError) -> tuple[str, list[tuple[str, str]]]:
    """The HTTP status and headers for a caller that `admit` refused."""
    if isinstance(error, PermissionDenied):
        return "403 Forbidden", []
    assert isinstance(error, Unauthenticated)
    return "401 Unauthorized", [("WWW-Authenticate", "Bearer")]
