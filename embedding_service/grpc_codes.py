"""This package's errors as gRPC statuses, and back."""

from __future__ import annotations

import math

import grpc

from embedding_service import errors

_CODES: dict[type[errors.EmbeddingServiceError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.RequestTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.SessionEnded: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OutOfTurn: grpc.StatusCode.ABORTED,
    errors.Redirect: grpc.StatusCode.ABORTED,
}
_ERRORS = {code: error for error, code in _CODES.items()}


def code_of(error: errors.EmbeddingServiceError) -> grpc.StatusCode:
    """The status a server ends a call with for this error."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


# Milliseconds to wait before a call is made again. gRPC's own retries know it too.
PUSHBACK = "grpc-retry-pushback-ms"


def pushback_ms(error: errors.EmbeddingServiceError) -> int:
    """Milliseconds after which the request may be sent again. 0: nobody knows."""
    return math.ceil(1000 * error.seconds) if isinstance(error, errors.QuotaExceeded) else 0


def trailing_of(error: errors.EmbeddingServiceError) -> tuple[tuple[str, str], ...]:
    """The metadata that a server ends a call with for this error."""
    milliseconds = pushback_ms(error)
    return ((PUSHBACK, str(milliseconds)),) if milliseconds else ()


def error_of(code: grpc.StatusCode, message: str) -> errors.EmbeddingServiceError:
    """The error a client raises for a status; ProtocolError for one that this service never sends."""
    if code in _ERRORS:
        return _ERRORS[code](message)
    return errors.ProtocolError(f"{code.name}: {message}")
