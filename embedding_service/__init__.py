"""A distributed parameter service for the giant n-gram embedding tables of language models.

The names below are the client side. It needs only grpcio, protobuf, numpy and torch. The classes load when they are
first used. Errors and `__version__` load nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embedding_service.errors import (
    BadTensorFile,
    CorruptPart,
    DeadlineExceeded,
    EmbeddingServiceError,
    ImportRefused,
    InvalidRequest,
    LostUpdates,
    NoGradients,
    NoRoom,
    NotFound,
    OutOfRange,
    OutOfTurn,
    Overloaded,
    PermissionDenied,
    PlacementError,
    ProtocolError,
    QuotaExceeded,
    Redirect,
    RemoteStoreError,
    RequestError,
    RequestTooLarge,
    ServiceError,
    SessionEnded,
    StoreError,
    Unauthenticated,
    Unavailable,
    UnencodableRow,
)

if TYPE_CHECKING:
    from embedding_service.client.client import EmbeddingClient
    from embedding_service.client.optimizers import SGD, Adagrad, RowwiseAdagrad, RowwiseAdam
    from embedding_service.client.remote import RemoteEmbedding
    from embedding_service.client.training import Session
    from embedding_service.ngram import NgramHasher

__all__ = [
    "SGD",
    "Adagrad",
    "BadTensorFile",
    "CorruptPart",
    "DeadlineExceeded",
    "EmbeddingClient",
    "EmbeddingServiceError",
    "ImportRefused",
    "InvalidRequest",
    "LostUpdates",
    "NgramHasher",
    "NoGradients",
    "NoRoom",
    "NotFound",
    "OutOfRange",
    "OutOfTurn",
    "Overloaded",
    "PermissionDenied",
    "PlacementError",
    "ProtocolError",
    "QuotaExceeded",
    "Redirect",
    "RemoteEmbedding",
    "RemoteStoreError",
    "RequestError",
    "RequestTooLarge",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "ServiceError",
    "Session",
    "SessionEnded",
    "StoreError",
    "Unauthenticated",
    "Unavailable",
    "UnencodableRow",
]
_HOMES = {
    **dict.fromkeys(("SGD", "Adagrad", "RowwiseAdagrad", "RowwiseAdam"), "embedding_service.client.optimizers"),
    "Session": "embedding_service.client.training",
    "EmbeddingClient": "embedding_service.client.client",
    "NgramHasher": "embedding_service.ngram",
    "RemoteEmbedding": "embedding_service.client.remote",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # read late: it costs a look into the installed packages
        from importlib.metadata import version

        return version("embedding-service")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
