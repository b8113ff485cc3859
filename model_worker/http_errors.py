"""What an HTTP client is told when a request fails: OpenAI's error objects, from Ray Serve's proxy too.

`WholeAnswers` is an ASGI middleware of the proxy. Without it a client whose replica is gone reads the words "Internal
Server Error", or sees its stream cut. It tells why, so that clients retry, which OpenAI's do at 503.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Seconds after which a refused request may well succeed.
RETRY_AFTER = {"Retry-After": "1"}
_NO_REPLICA = "no replica of this worker takes requests now, for it starts or shuts down; try again later"
_REPLICA_LOST = (
    "the replica was gone before its answer was whole, for it died or its time to shut down was over; try again"
)
# Ray Serve's own paths, such as /-/healthz. What they answer is for Ray.
_OF_RAY = "/-/"


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def kind_of(status: int) -> str:
    """OpenAI's type of error for a status."""
    return "server_error" if status >= 500 else "invalid_request_error"


class WholeAnswers:
    """Gives each request an answer with an end, in OpenAI's form.

    - A replica that is gone before it answered: 503.
    - One that is gone in the middle of a stream of events: an event with the error is the last one.
    - Errors of Ray Serve itself, which are plain text: the same as JSON. If no application is there, 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["path"].startswith(_OF_RAY):
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        if answer.status is None:
            await _unavailable(_REPLICA_LOST)(scope, receive, send)
        elif answer.refused:
            await _of_serve(answer.status, b"".join(answer.told))(scope, receive, send)
        elif answer.streams and not answer.over:
            event = f"data: {json.dumps(_lost_body(_REPLICA_LOST))}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": False})


class _Answer:
    """What has been sent of an answer. One that Ray Serve refuses itself is kept back."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.streams = self.refused = self.over = False
        self.told: list[bytes] = []

    async def send(self, message: Message) -> None:
        """As ASGI has it."""
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self.status = message["status"]
            self.streams = kind.startswith("text/event-stream")
            self.refused = message["status"] >= 400 and kind.startswith("text/plain")
        else:
            self.over = not message.get("more_body", False)
        if not self.refused:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self.told.append(message.get("body", b""))


def _of_serve(status: int, told: bytes) -> JSONResponse:
    if status == 404:  # of its paths. The application's own 404 is JSON.
        return _unavailable(_NO_REPLICA)
    headers = RETRY_AFTER if status in (429, 503) else None
    return JSONResponse(error_body(told.decode(errors="replace"), kind_of(status)), status, headers)


def _unavailable(message: str) -> JSONResponse:
    return JSONResponse(_lost_body(message), 503, RETRY_AFTER)


def _lost_body(message: str) -> dict[str, Any]:
    return error_body(message, "server_error", "unavailable")
