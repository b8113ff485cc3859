"""A worker's requests in traces (docs/tracing.md)."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedding_service import tracing

# Those that generate. Nobody wants a trace of each health check.
_PATHS = ("/v1/completions", "/v1/chat/completions")


class Traced:
    """ASGI middleware: a span from a request's head to the last byte of its answer, current while it is answered.

    The header `traceparent` says whose it is under.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["path"] not in _PATHS:
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        headers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
        about = {"http.request.method": method, "http.route": path}
        with tracing.answering(f"{method} {path}", tracing.traceparent_of(headers), about) as span:

            async def told(message: Message) -> None:
                if span is not None and message["type"] == "http.response.start":
                    span.note({"http.response.status_code": message["status"]})
                    if message["status"] >= 500:
                        span.fail(str(message["status"]))
                await send(message)

            await self._app(scope, receive, told)
