"""Clients whose rows are near. It needs no more of the package than they do."""

from __future__ import annotations

import torch

from embedding_service import EmbeddingClient
from support.cluster import until


def all_near(client: EmbeddingClient) -> bool:
    """Whether looking up all tables whole needed no wire."""
    before = client.statistics.wired_rows
    for model in client.models():
        for table, (rows, *_) in model.tables.items():
            client.lookup(f"{model.name}/{table}", torch.arange(rows))
    return client.statistics.wired_rows == before


def come_near(client: EmbeddingClient) -> EmbeddingClient:
    """The client, once all rows are near to it."""
    until(lambda: all_near(client), f"all rows to be near: {client.statistics.shards}", seconds=30)
    return client
