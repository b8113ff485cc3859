"""The model at 1,000 shards and 10,000 workers. Every process has a core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.growth.model import Load, Model, requests_of

SHARDS, WORKERS = 1000, 10_000
# Lookups a second of a worker that decodes: a step of 30 ms or so.
STEPS = 30
# Name: heads, bytes of an int8 row, parts of 256 MiB.
GEOMETRIES = {"LongCat-Flash-Lite": (12, 260, 119), "Qwen3.8-Flash-Next": (16, 164, 196)}
# Prefills a second of a worker.
PREFILLS = 1
WORKLOADS = {"decode 1": (1, STEPS), "decode 8": (8, STEPS), "decode 64": (64, STEPS), "prefill 2048": (2048, PREFILLS)}


@dataclass
class Future:
    """One lookup of a workload, and 10,000 workers with it.

    `groups` is the number of shards that hold the rows a lookup may meet. Copies of those use all 1,000. Seconds are
    CPU seconds. `rate` is requests a second for each shard, and `cores` is what they take of it.
    """

    model: str
    workload: str
    groups: int
    requests: float
    client: float
    shards: float
    rate: float
    cores: float


def table(model: Model) -> list[Future]:
    """Every workload, with a model on 16 shards, on as many as it has parts by default, and on all 1,000."""
    return [
        _future(model, name, workload, groups)
        for name, (_, _, parts) in GEOMETRIES.items()
        for workload in WORKLOADS
        for groups in (16, parts, SHARDS)
    ]


def _future(model: Model, name: str, workload: str, groups: int) -> Future:
    heads, row_bytes, _ = GEOMETRIES[name]
    tokens, lookups = WORKLOADS[workload]
    requests = requests_of(head_shares(heads, groups), tokens, row_bytes)
    rows = tokens * heads
    load = Load(1, requests, rows, rows * row_bytes)
    client, shards = model.of_client(load), model.of_shards(load)
    asked = WORKERS * lookups / SHARDS
    return Future(name, workload, groups, requests, client, shards, asked * requests, asked * shards)


def head_shares(heads: int, shards: int) -> np.ndarray:
    """float64 [heads, shards]: rows in the order of their heads, dealt to shards in equal runs."""
    edges = np.arange(shards + 1) * heads / shards
    head = np.arange(heads)[:, None]
    return np.maximum(np.minimum(edges[1:], head + 1) - np.maximum(edges[:-1], head), 0)
