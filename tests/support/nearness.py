"""Clients whose rows are near. It needs no more of the package than they do."""

from __future__ import annotations

from collections.abc import Callable

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


def read_near(client: EmbeddingClient, look_up: Callable[[], None]) -> int:
    """How many near rows it read, at the first time that none travelled. A shard that misses its beat is not near."""

    def rows() -> int | None:
        before = client.statistics
        look_up()
        after = client.statistics
        return after.near_rows - before.near_rows if after.wired_rows == before.wired_rows else None

    return until(rows, f"near rows: {client.statistics.shards}")


def come_near(client: EmbeddingClient) -> EmbeddingClient:
    """The client, once all rows are near to it."""
    until(lambda: all_near(client), f"all rows to be near: {client.statistics.shards}")
    return client
