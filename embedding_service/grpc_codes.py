"""This package's errors as gRPC statuses, and back."""

from __future__ import annotations

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


def error_of(code: grpc.StatusCode, message: str) -> errors.EmbeddingServiceError:
    """The error a client raises for a status; ProtocolError for one that this service never sends."""
    if code in _ERRORS:
        return _ERRORS[code](message)
    return errors.ProtocolError(f"{code.name}: {message}")
