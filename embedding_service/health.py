"""grpc.health.v1: what health checks are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedding_service.errors import InvalidRequest
from embedding_service.methods import Context, Tell, Watched

# Bytes of a request to watch a service. It is kept for as long as the call is open.
_REQUEST_BYTES = 256
# Watches that are told something before other work has a turn.
_TOLD_AT_A_TIME = 64

_Status = health_pb2.HealthCheckResponse.ServingStatus
_UNKNOWN, _SERVING, _NOT_SERVING = (
    health_pb2.HealthCheckResponse.ServingStatus.Value(name) for name in ("SERVICE_UNKNOWN", "SERVING", "NOT_SERVING")
)


class Health(health_pb2_grpc.HealthServicer, Watched):
    """The services that answer, and the watches to tell when that changes."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._watches: dict[str, set[Tell]] = {}
        self._lock = threading.Lock()
        self._ended = False

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """How a service is now. The event loop answers, so that a stuck one shows."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service is known here")
        return health_pb2.HealthCheckResponse(status=status)

    def begin(self, message: bytes, tell: Tell) -> Callable[[], None]:
        """A `Watch`: how a service is now, and again each time it changes."""
        if len(message) > _REQUEST_BYTES:
            raise InvalidRequest(f"a request to watch a service may have {_REQUEST_BYTES} bytes: give a shorter name")
        try:
            service = health_pb2.HealthCheckRequest.FromString(message).service
        except DecodeError:
            raise InvalidRequest("the message is malformed: it is no valid protobuf of this method's request") from None
        with self._lock:
            self._watches.setdefault(service, set()).add(tell)
            tell(_answer(self._statuses.get(service, _UNKNOWN)))
        return lambda: self._leave(service, tell)

    async def set(self, service: str, serving: bool) -> None:
        """Set how a service is from now on, unless `end` was called."""
        status = _SERVING if serving else _NOT_SERVING
        with self._lock:
            if self._ended or self._statuses.get(service) == status:
                return
            self._statuses[service] = status
            watches = list(self._watches.get(service, ()))
        for first in range(0, len(watches), _TOLD_AT_A_TIME):
            with self._lock:
                for tell in watches[first : first + _TOLD_AT_A_TIME]:
                    tell(_answer(self._statuses[service]))
            await asyncio.sleep(0)

    async def end(self) -> None:
        """Say that no service answers from now on."""
        for service in list(self._statuses):
            await self.set(service, False)
        self._ended = True

    def _leave(self, service: str, tell: Tell) -> None:
        with self._lock:
            watches = self._watches.get(service, set())
            watches.discard(tell)
            if not watches:
                self._watches.pop(service, None)


def _answer(status: int) -> bytes:
    return health_pb2.HealthCheckResponse(status=status).SerializeToString()  # type: ignore[arg-type]
