"""A distributed parameter service for the giant n-gram embedding tables of language models.

The names below are the client side; they load when first used, and need only grpcio, protobuf, numpy and torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embedding_service.polling import load_grpc

if TYPE_CHECKING:
    from embedding_service.client.client import EmbeddingClient
    from embedding_service.client.remote import RemoteEmbedding
    from embedding_service.ngram import NgramHasher

__all__ = ["EmbeddingClient", "NgramHasher", "RemoteEmbedding"]
_HOMES = {
    "EmbeddingClient": "embedding_service.client.client",
    "NgramHasher": "embedding_service.ngram",
    "RemoteEmbedding": "embedding_service.client.remote",
}


load_grpc()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
