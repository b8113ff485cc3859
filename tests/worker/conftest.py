"""One small model for all worker tests, fed by its own tables or by a running service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from small_model import write_checkpoint
from support.cluster import Process, free_port
from transformers import LongcatFlashForCausalLM, PreTrainedTokenizerFast

from embedding_service import EmbeddingClient
from embedding_service.store.importing import import_checkpoint
from model_worker import attach
from model_worker.longcat import LocalTables, load_model

# Several tests and processes share the cores: more threads would wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint, in float32."""
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(model_folder: Path) -> LongcatFlashForCausalLM:
    """The small model with its tables in this process."""
    loaded = load_model(model_folder)
    attach(loaded, LocalTables(model_folder), "local")
    return loaded


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerFast:
    """The small model's tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def model_store(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's tables in a store, in float32 and in many parts, so that every shard holds some."""
    folder = tmp_path_factory.mktemp("model-store")
    import_checkpoint(model_folder, str(folder), "small", dtype="fp32", part_bytes=16 << 10)
    return folder


class Tables:
    """`up` with two shards over the small model's store, at one address over restarts."""

    def __init__(self, folder: Path, store: Path) -> None:
        self._log = folder / "up.log"
        self._store = store
        self.address = f"127.0.0.1:{free_port()}"
        self.start()

    def start(self) -> None:
        """Start it; returns when it serves."""
        port = self.address.rpartition(":")[2]
        self._log.unlink(missing_ok=True)
        options = [f"--store={self._store}", "--shards=2", "--memory=64MiB", f"--port={port}"]
        self._process = Process(self._log, "up", *options)
        self._process.wait_for("ready: ")

    def stop(self) -> None:
        """End it."""
        self._process.end()

    def family(self) -> list[psutil.Process]:
        """Its processes: `up`, the controller and the shards."""
        first = psutil.Process(self._process.popen.pid)
        return [first, *first.children(recursive=True)]


@pytest.fixture(scope="session")
def tables(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tables]:
    """The service that serves the small model. A test may stop it, and must start it again."""
    running = Tables(tmp_path_factory.mktemp("tables"), model_store)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def embeddings(tables: Tables) -> str:
    """The address of that service."""
    return tables.address


@pytest.fixture(scope="session")
def remote(embeddings: str) -> Iterator[EmbeddingClient]:
    """A client of that service."""
    with EmbeddingClient(embeddings, timeout=30) as client:
        yield client
