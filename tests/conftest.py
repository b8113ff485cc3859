"""Fixtures for the whole tree: one imported store and one running service that many tests only read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.checkpoints import longcat_checkpoint
from support.cluster import Up, dead_proxies, serving

from embedding_service import EmbeddingClient, grpc_core
from embedding_service.store.importing import import_checkpoint

DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the running service; skip what needs a GPU where there is none."""
    for item in items:
        if "service" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.service)
    if not torch.cuda.is_available():
        skip(items, "gpu", "needs a CUDA device; there is none here")
    if grpc_core.why_public():
        skip(items, "polling", f"needs gRPC's core: {grpc_core.why_public()}")


def skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LongCat checkpoint whose rows name themselves."""
    return longcat_checkpoint(tmp_path_factory.mktemp("checkpoints") / "longcat")


@pytest.fixture(scope="session")
def store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with that checkpoint in every dtype (models fp32, fp16, bf16, int8, int4), in many small parts."""
    folder = tmp_path_factory.mktemp("store")
    for dtype in DTYPES:
        import_checkpoint(checkpoint, str(folder), dtype, dtype=dtype, part_bytes=64 << 10)
    return folder


@pytest.fixture(scope="session")
def service(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Three shards over `store`, for tests that change nothing. Its proxies answer nobody."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            dead_proxies(environment)
            running = stack.enter_context(serving(tmp_path_factory.mktemp("service"), store, 3))
        yield running


@pytest.fixture(scope="session")
def client(service: Up) -> Iterator[EmbeddingClient]:
    """A client of `service`."""
    with EmbeddingClient(service.address, timeout=30) as client:
        yield client
