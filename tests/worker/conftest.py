"""One small model for all worker tests, fed by its own tables or by a running service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_model import write_checkpoint
from support.cluster import Up, serving
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


@pytest.fixture(scope="session")
def tables(model_store: Path, traced: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The service that serves the small model. A test may end it, and must restart it."""
    with serving(tmp_path_factory.mktemp("tables"), model_store, 2, memory=64 << 20, variables=traced) as running:
        yield running


@pytest.fixture(scope="session")
def embeddings(tables: Up) -> str:
    """The address of that service."""
    return tables.address


@pytest.fixture(scope="session")
def remote(embeddings: str) -> Iterator[EmbeddingClient]:
    """A client of that service."""
    with EmbeddingClient(embeddings, timeout=60) as client:
        yield client
