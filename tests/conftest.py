"""Fixtures for the whole tree: one imported store and one running service that many tests only read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import cluster
from support.checkpoints import DIM, longcat_checkpoint
from support.cluster import Up, dead_proxies, serving

from embedding_service import EmbeddingClient, grpc_core
from embedding_service.formats import FORMATS, get_format
from embedding_service.store.importing import import_checkpoint
from embedding_service.tensorfile import PAGE_BYTES

if TYPE_CHECKING:
    from support.collector import Collector

# No test asserts a duration. `make fuzz` draws more inputs, and does not stop when that takes long.
settings.register_profile("untimed", deadline=None)
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", 100)), suppress_health_check=[*HealthCheck]
)
settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "untimed")

# Fixtures that start processes of the service.
SERVICES = {"service", "tables", "families", "rec_service", "one_shard"}


# What `make quick` selects, and how a file says that all its tests are left out then.
QUICK = "not service and not slow"
LEFT_OUT = re.compile(r"^pytestmark = .*\bmark\.(service|slow)\b", re.MULTILINE)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show how a test failed that passed when it was run once more: it has a fault that wants mending."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"failed once: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file for `make quick` that has no test for it: Ray, transformers and the like take seconds."""
    if config.option.markexpr != QUICK or not collection_path.name.startswith("test_"):
        return None
    return True if LEFT_OUT.search(collection_path.read_text()) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses a running service; skip what needs a GPU where there is none; begin with what takes longest.

    Files of short tests come last: with them the workers end at about the same time.
    """
    for item in items:
        if not SERVICES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.service)
        if item.get_closest_marker("timeout"):  # what has a time-out of its own takes long
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        skip(items, "gpu", "needs a CUDA device; there is none here")
    if grpc_core.why_public():
        skip(items, "polling", f"needs gRPC's core: {grpc_core.why_public()}")
    heavy, service = ({item.path for item in items if item.get_closest_marker(mark)} for mark in ("heavy", "service"))
    items.sort(key=lambda item: (item.path not in heavy, item.path not in service))


def skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let processes of the service start in a test, or in the fixtures made for it, only if it says so."""
    cluster.may_start = item.get_closest_marker("service") is not None


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LongCat checkpoint whose rows name themselves."""
    return longcat_checkpoint(tmp_path_factory.mktemp("checkpoints") / "longcat")


@pytest.fixture(scope="session")
def store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with that checkpoint in every format, each a model of that name, in many small parts."""
    folder = tmp_path_factory.mktemp("store")
    for dtype in FORMATS:
        row_bytes = get_format(dtype).row_bytes(DIM)
        import_checkpoint(checkpoint, folder, dtype, dtype=dtype, part_bytes=max(64 << 10, lcm(row_bytes, PAGE_BYTES)))
    return folder


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector | None]:
    """Where the spans of processes go that trace. None in an environment without OpenTelemetry."""
    try:
        from support.collector import Collector
    except ImportError:
        yield None
        return
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="session")
def traced(collector: Collector | None) -> dict[str, str]:
    """What processes need to trace the requests that a test's own span comes with."""
    return collector.variables("parentbased_always_off") if collector else {}


@pytest.fixture(scope="session")
def service(store: Path, traced: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Three shards over `store`, for tests that change nothing. Its proxies answer nobody.

    It traces the requests that a test's own span comes with.
    """
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            dead_proxies(environment)
            running = stack.enter_context(serving(tmp_path_factory.mktemp("service"), store, 3, variables=traced))
        yield running


@pytest.fixture(scope="session")
def client(service: Up) -> Iterator[EmbeddingClient]:
    """A client of `service`."""
    with EmbeddingClient(service.address, timeout=60) as client:
        yield client
