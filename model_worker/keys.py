"""Whose an HTTP request is, and what its sender may do: the service's policy, for API keys.

A key comes as OpenAI's clients send it, `Authorization: Bearer KEY`. It is a token of the policy, opaque or a JSON web
token. `read` of the model is the right to use it.
"""

from __future__ import annotations

import math
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from embedding_service.errors import PermissionDenied, QuotaExceeded, Unauthenticated
from embedding_service.security.guard import Guard
from embedding_service.security.identity import Caller
from model_worker.http_errors import error_body

# Where a request's caller is, in its scope.
CALLER = "caller"
# Probes have no key.
_OPEN = frozenset({"/healthz"})
_MISSING = "you gave no API key: send it in the header Authorization, as 'Bearer KEY'"


class Keys:
    """The policy of a replica.

    Args:
        policy: The policy file. It is read again when it changes.

    Raises:
        InvalidRequest: It cannot be read or is not right.
    """

    def __init__(self, policy: Path) -> None:
        self._guard = Guard(policy)
        self._guard.watch(lambda: None)

    def caller(self, authorization: str | None) -> Caller:
        """Whose a request is. Raises Unauthenticated."""
        if authorization is None:
            raise Unauthenticated(_MISSING)
        return self._guard.caller(authorization)

    def close(self) -> None:
        """Look at the file no more."""
        self._guard.close()


class NotAllowed(Exception):
    """A request that is not answered, because of whose it is. `why` says the reason."""

    def __init__(self, why: PermissionDenied | QuotaExceeded) -> None:
        super().__init__(str(why))
        self.why = why


def require(caller: Caller | None, rights: tuple[str, ...], what: str) -> None:
    """Raise NotAllowed unless the caller has one of these rights. Without a policy everybody has all."""
    try:
        if caller:
            caller.require(rights, what)
    except PermissionDenied as error:
        raise NotAllowed(error) from None


def spend(caller: Caller | None, tokens: int) -> None:
    """Take tokens from the caller's quota. Raises NotAllowed."""
    try:
        if caller and caller.quota:
            caller.quota.spend(tokens=tokens)
    except QuotaExceeded as error:
        raise NotAllowed(error) from None


def give_back(caller: Caller | None, tokens: int) -> None:
    """What was spent was not had."""
    if caller and caller.quota:
        caller.quota.give_back(tokens=tokens)


class Admission:
    """An ASGI middleware that lets in who has a key, as many requests at once as the policy says."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        try:
            caller = self._keys.caller(Headers(scope=scope).get("authorization"))
            if caller.quota:
                caller.quota.enter()
        except (Unauthenticated, QuotaExceeded) as error:
            await refusal(error)(scope, receive, send)
            return
        try:
            await self._app({**scope, CALLER: caller}, receive, send)
        finally:
            if caller.quota:
                caller.quota.leave()


def refusal(error: Unauthenticated | PermissionDenied | QuotaExceeded) -> JSONResponse:
    """The answer to a request that is not let in, in OpenAI's shape."""
    match error:
        case Unauthenticated():
            body = error_body(str(error), "invalid_request_error", "invalid_api_key")
            return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        case PermissionDenied():
            return JSONResponse(error_body(str(error), "invalid_request_error", "permission_denied"), 403)
        case QuotaExceeded():
            body = error_body(str(error), "rate_limit_error", "rate_limit_exceeded")
            return JSONResponse(body, 429, {"Retry-After": str(math.ceil(error.seconds))})
