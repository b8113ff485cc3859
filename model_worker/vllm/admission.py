"""Who and how many may ask a replica of vLLM: ASGI middlewares in front of vLLM's server."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from embedding_service.errors import PermissionDenied
from model_worker.http_errors import RETRY_AFTER, error_body
from model_worker.keys import CALLER, refusal

# They ask vLLM's engine for work. All else is little.
_WORKS = "POST"
_FOR_USERS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/models"})


class Places:
    """Requests that may run or wait at once.

    most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self.refused = 0


class Placed:
    """Gives each request a place until its answer has ended. Without one it gets 429."""

    def __init__(self, app: ASGIApp, places: Places) -> None:
        self._app, self._places = app, places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        places = self._places
        if scope["type"] != "http" or scope["method"] != _WORKS:
            await self._app(scope, receive, send)
            return
        if places.taken >= places.most:
            places.refused += 1
            told = f"all {places.most} places of this server are taken; try again later"
            body = error_body(told, "rate_limit_error", "server_busy")
            await JSONResponse(body, 429, RETRY_AFTER)(scope, receive, send)
            return
        places.taken += 1
        try:
            await self._app(scope, receive, send)
        finally:
            places.taken -= 1


class OneModel:
    """Lets in who may read the one model that there is. What else vLLM's server answers needs the right `admin`.

    It comes after `keys.Admission`. vLLM's answers do not say whose they are. So a quota of tokens cannot be kept, and
    whoever has one is refused.
    """

    def __init__(self, app: ASGIApp, name: str, version: str) -> None:
        self._app, self._name, self._version = app, name, version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        caller = scope.get(CALLER)
        if caller is not None:
            try:
                if (path := scope["path"]) not in _FOR_USERS:
                    caller.require(("admin", "metrics") if path == "/v1/worker" else ("admin",), f"ask for {path}")
                elif not caller.may_read(self._name, self._version):
                    raise PermissionDenied(f"{caller.name} has no right to use the model that is served here")
                elif caller.rights.tokens_per_second:
                    raise PermissionDenied(
                        f"{caller.name} has a quota of tokens, which --engine vllm cannot count: use one of calls"
                    )
            except PermissionDenied as error:
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
