"""What a browser asks: files that anybody may have, and answers in JSON for who may see the service.

The page changes nothing in the service.
"""

from __future__ import annotations

import ipaddress
import json
import threading
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, Protocol

from embedding_service.errors import (
    EmbeddingServiceError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    PlacementError,
    RequestError,
    ServiceError,
    Unauthenticated,
)
from embedding_service.foreign import shown
from embedding_service.security.server import Security
from embedding_service.web import admit, refusal

# Bytes of a question.
MOST_BYTES = 64 << 10
# Questions that are answered at a time.
MOST_AT_ONCE = 8
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/icon.svg": "icon.svg"}
# Nothing comes from elsewhere, nothing frames the page, and no text of others becomes a script.
_HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]
_STATUS = {
    NotFound: "404 Not Found",
    PlacementError: "409 Conflict",
    ServiceError: "503 Service Unavailable",
    RequestError: "400 Bad Request",
}
# Who may see everything that the controller knows, and who may ask for rows (`methods.RIGHTS`).
SEE, READ = ("admin", "member"), ("read",)

Answer = dict[str, Any]


class Sources(Protocol):
    """What the page shows. Methods are called on threads of the port. They raise EmbeddingServiceError."""

    def overview(self) -> Answer:
        """Shards, models, branches, problems."""

    def parts(self) -> Answer:
        """Where every part is."""

    def lookup(self, question: Mapping[str, Any], bearer: str | None) -> Answer:
        """Rows of a table, for who shows this in the header `Authorization`."""

    def ngrams(self, question: Mapping[str, Any], bearer: str | None) -> Answer:
        """Rows of tokens."""

    def what_if(self, question: Mapping[str, Any]) -> Answer:
        """What other shards would hold."""


class PageApp:
    """A WSGI application.

    Args:
        sources: What it shows.
        host: The host that it listens on. In plain text, requests for other names are refused: a page of somebody
            else's could have its own name lead here.
        security: Who may see it. None: everybody who reaches the port.
    """

    def __init__(self, sources: Sources, host: str, security: Security | None = None) -> None:
        self._security = security
        self._host = host.strip("[]")
        self._places = threading.Semaphore(MOST_AT_ONCE)
        folder = files("embedding_service.page") / "static"
        self._files = {path: (folder / name).read_bytes() for path, name in _FILES.items()}
        self._gets: dict[str, Callable[[], Answer]] = {
            "/api/overview": sources.overview,
            "/api/parts": sources.parts,
        }
        self._posts: dict[str, tuple[tuple[str, ...], Callable[[Any, str | None], Answer]]] = {
            "/api/lookup": (READ, sources.lookup),
            "/api/ngrams": (READ, sources.ngrams),
            "/api/what-if": (SEE, lambda question, _: sources.what_if(question)),
        }

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """Answer a request."""
        path = str(environ.get("PATH_INFO", ""))
        if path in self._files and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            kind = _TYPES[_FILES[path].rpartition(".")[2]]
            # Looked at again each time, so that a newer service has a newer page.
            more = [("Content-Type", f"{kind}; charset=utf-8"), ("Cache-Control", "no-cache")]
            return _send(start_response, "200 OK", more, self._files[path])
        try:
            headers: list[tuple[str, str]] = []
            status, answer = "200 OK", self._answer(path, environ)
        except (Unauthenticated, PermissionDenied) as error:
            (status, headers), answer = refusal(error), {"error": str(error)}
        except EmbeddingServiceError as error:
            status = next((each for kind, each in _STATUS.items() if isinstance(error, kind)), "502 Bad Gateway")
            answer = {"error": str(error)}
        more = [("Content-Type", "application/json"), ("Cache-Control", "no-store"), *headers]
        return _send(start_response, status, more, json.dumps(answer, separators=(",", ":")).encode())

    def _answer(self, path: str, environ: dict[str, Any]) -> Answer:
        self._check_host(str(environ.get("HTTP_HOST", "")))
        bearer = environ.get("HTTP_AUTHORIZATION")
        if get := self._gets.get(path):
            rights: tuple[str, ...] = SEE
        elif path in self._posts:
            rights, post = self._posts[path]
        else:
            raise NotFound(f"no page at {shown(path)}")
        admit(self._security, rights, environ)
        if not self._places.acquire(blocking=False):
            raise Overloaded(f"{MOST_AT_ONCE} questions are being answered: ask again in a moment")
        try:
            return get() if get else post(_question(environ), bearer if self._security else None)
        finally:
            self._places.release()

    def _check_host(self, given: str) -> None:
        """Raise PermissionDenied for a name that may be anybody's. With TLS the certificate names the host."""
        host = given.rpartition(":")[0] if given.rpartition("]")[2].count(":") else given
        host = host.strip("[]")
        if self._security or host in ("localhost", self._host):
            return
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise PermissionDenied(
                f"the page answers to addresses and to localhost, not to {shown(host)}: forward a port to it"
            ) from None


def _question(environ: dict[str, Any]) -> Mapping[str, Any]:
    """The JSON object of a request. Raises InvalidRequest."""
    if environ["REQUEST_METHOD"] != "POST" or "application/json" not in environ.get("CONTENT_TYPE", ""):
        raise InvalidRequest("a question is a POST of application/json")
    length = environ.get("CONTENT_LENGTH") or ""
    if not length.isdecimal() or int(length) > MOST_BYTES:
        raise InvalidRequest(f"a question has a Content-Length of at most {MOST_BYTES:,} bytes")
    try:
        question = json.loads(environ["wsgi.input"].read(int(length)))
    except (ValueError, RecursionError):
        raise InvalidRequest("the question is no JSON") from None
    if not isinstance(question, dict):
        raise InvalidRequest("the question must be a JSON object")
    return question


def _send(start_response: Callable[..., Any], status: str, headers: list[tuple[str, str]], body: bytes) -> list[bytes]:
    start_response(status, [*headers, *_HEADERS, ("Content-Length", str(len(body)))])
    return [body]
