"""Every error this package raises on purpose, as one tree.

    EmbeddingServiceError
        RequestError            the request itself is wrong; sending it again will not help
            InvalidRequest      malformed: wrong dtype, truncated bytes, unknown option
                UnencodableRow  a row that its format cannot hold
            NotFound            no such model, version or table
            OutOfRange          a row id outside its table
            RequestTooLarge     over a limit of the service
            Unauthenticated     nobody known sent it: no token, or one that does not count
            PermissionDenied    its sender has no right to it
            SessionEnded        another trainer began after this one
        ServiceError            the service could not answer now; the same request may succeed later
            Unavailable         no owner of the rows can be reached
            DeadlineExceeded    the answer did not come in time
            Overloaded          the service has no memory for the request at the moment
                QuotaExceeded   its sender has used up what the policy gives it
            Redirect            the rows are held elsewhere now
            OutOfTurn           a push of a step that is not the next one
            LostUpdates         updates of a branch that were accepted are gone
            ProtocolError       the client does not understand the peer's answer
        StoreError              a checkpoint or store on disk
            ImportRefused       the checkpoint cannot be imported as asked
            BadTensorFile       not a whole safetensors file
            CorruptPart         a part whose bytes do not match its checksum
            RemoteStoreError    a store in object storage does not answer, or refuses
        PlacementError          the parts do not fit the shards
        NoRoom                  this process or its GPU has no memory for rows
        NoGradients             a remote module was asked to be trained

Each message names the input at fault and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence


class EmbeddingServiceError(Exception):
    """Base of every error this package raises on purpose."""


class RequestError(EmbeddingServiceError):
    """The request itself is wrong. Sending it again will not help."""


class InvalidRequest(RequestError, ValueError):
    """Malformed: wrong dtype or shape, truncated id bytes, an unknown option (gRPC INVALID_ARGUMENT)."""


class UnencodableRow(InvalidRequest):
    """A row whose values the format cannot hold. `row` is its index in the tensor given to `encode`."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} {reason}")
        self.row = row
        self.reason = reason


class NotFound(RequestError, LookupError):
    """No such model, version or table. The message lists the known ones (gRPC NOT_FOUND)."""


class OutOfRange(RequestError, IndexError):
    """A row id outside its table. The message gives the first bad position, its id, the bound (gRPC OUT_OF_RANGE)."""


class RequestTooLarge(RequestError):
    """Over a limit of the service. The message gives the limit (gRPC RESOURCE_EXHAUSTED)."""


class Unauthenticated(RequestError):
    """Nobody known sent it. The message says what is missing or does not count (gRPC UNAUTHENTICATED)."""


class PermissionDenied(RequestError, PermissionError):
    """Its sender has no right to it. The message names the right (gRPC PERMISSION_DENIED)."""


class SessionEnded(RequestError):
    """A later session of the branch began: this trainer's pushes are refused for good (gRPC FAILED_PRECONDITION)."""


class ServiceError(EmbeddingServiceError):
    """The service could not answer now. The same request may succeed later."""


class Unavailable(ServiceError, ConnectionError):
    """No owner of the rows can be reached. The message names rows and shards (gRPC UNAVAILABLE)."""


class DeadlineExceeded(ServiceError, TimeoutError):
    """The answer did not come within the call's deadline (gRPC DEADLINE_EXCEEDED)."""


class Overloaded(ServiceError):
    """The service has no memory for the request at the moment. The message says how much (gRPC RESOURCE_EXHAUSTED)."""


class QuotaExceeded(Overloaded):
    """Its sender has used up what the policy gives it. `seconds`: after which it may ask again."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Redirect(ServiceError):
    """A shard no longer holds rows that were routed to it. Get the routing again (gRPC ABORTED)."""


class OutOfTurn(ServiceError):
    """A push of a step that is not the next one. The message names the one that is expected (gRPC ABORTED)."""


class LostUpdates(ServiceError):
    """Updates that were accepted are gone, with the disk that had them.

    Attributes:
        parts: As TABLE/PART.
        steps: The first and the last one that is lost.
    """

    def __init__(self, message: str, parts: Sequence[str] = (), steps: tuple[int, int] = (0, 0)) -> None:
        super().__init__(message)
        self.parts, self.steps = list(parts), steps


class ProtocolError(ServiceError):
    """The client does not understand the peer's answer."""


class StoreError(EmbeddingServiceError):
    """A checkpoint or a store on disk is not as it must be."""


class ImportRefused(StoreError):
    """The checkpoint cannot be imported as asked. Nothing was changed in the store."""


class BadTensorFile(StoreError):
    """Not a whole safetensors file. The message says which and why."""


class CorruptPart(StoreError):
    """A part whose bytes do not match the manifest's checksum. It is never served."""


class RemoteStoreError(StoreError, OSError):
    """A store in object storage does not answer, or refuses. The message names the store, the reason, the remedy."""


class PlacementError(EmbeddingServiceError):
    """The parts do not fit the shards. The message gives the bytes needed and the bytes there are."""


class NoRoom(EmbeddingServiceError, MemoryError):
    """This process or its GPU has no memory for rows. The message gives the bytes needed."""


class NoGradients(EmbeddingServiceError, RuntimeError):
    """A remote module was asked for gradients: the service's rows cannot be trained."""
