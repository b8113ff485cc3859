"""Small checkpoints, their tables in one running service, and vLLM engines in processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_models
from engines import Answers, python
from small_models import SmallModel, small_model
from support.checkpoints import engram_checkpoint
from support.cluster import Up, serving

from embedding_service.store.importing import import_checkpoint


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SmallModel]:
    """longcat, llama and qwen."""
    folder = tmp_path_factory.mktemp("vllm-models")
    checkpoints = {
        "longcat": small_models.longcat_checkpoint,
        "llama": small_models.llama_checkpoint,
        "qwen": small_models.qwen4_exp_checkpoint,
    }
    return {
        name: small_model(name, make(folder / name), folder / f"{name}-tableless") for name, make in checkpoints.items()
    }


@pytest.fixture(scope="session")
def engram_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of DeepSeek-V4.1: config, tokenizer and tables that name themselves."""
    return engram_checkpoint(tmp_path_factory.mktemp("engram") / "engram")


@pytest.fixture(scope="session")
def tables(
    models: dict[str, SmallModel], engram_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Up]:
    """`up` with two shards and the tables of all models as they are, in many parts."""
    folder = tmp_path_factory.mktemp("vllm-tables")
    import_checkpoint(engram_folder, str(folder / "store"), "engram", dtype="keep")
    for model in models.values():
        import_checkpoint(model.whole, str(folder / "store"), model.name, dtype="keep", part_bytes=4 << 20)
    with serving(folder, folder / "store", 2) as running:
        yield running


@pytest.fixture(scope="session")
def generate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Answers]:
    """Run `engine.py`: a job -> what it generated, see there. The same job runs once."""
    folder, known = tmp_path_factory.mktemp("vllm-engines"), {}

    def run(**job: Any) -> Answers:
        key = json.dumps(job)
        if key not in known:
            (folder / "job.json").write_text(key)
            done = python("engine.py", str(folder / "job.json"), str(folder / "result.json"))
            assert done.returncode == 0, done.stdout[-8000:]
            known[key] = json.loads((folder / "result.json").read_text())
        return known[key]

    return run
