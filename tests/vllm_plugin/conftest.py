"""Small checkpoints, their tables in one running service, and vLLM engines in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.cluster import Up, up

from embedding_service.store.importing import import_checkpoint

HERE = Path(__file__).parent
# Interpreted kernels are slow, and slower yet beside others.
ENGINE_SECONDS = 540
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: `make vllm` runs this")


@dataclass
class SmallModel:
    """A checkpoint that the service has under a name of its own.

    whole: with its tables.
    tableless: the same tensors, names and shapes, but each value of the tables is NaN.
    table_bytes: of the tables.
    """

    name: str
    whole: Path
    tableless: Path
    table_bytes: int


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SmallModel]:
    """longcat, llama and qwen."""
    import small_models

    folder = tmp_path_factory.mktemp("vllm-models")
    checkpoints = {
        "longcat": small_models.longcat_checkpoint,
        "llama": small_models.llama_checkpoint,
        "qwen": small_models.qwen4_exp_checkpoint,
    }
    return {
        name: small_model(name, make(folder / name), folder / f"{name}-tableless") for name, make in checkpoints.items()
    }


def small_model(name: str, whole: Path, tableless: Path) -> SmallModel:
    """The checkpoint and its copy without tables."""
    tableless.mkdir()
    table_bytes = 0
    for file in whole.iterdir():
        if file.suffix != ".safetensors":
            (tableless / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for tensor_name, values in tensors.items():
            if ".embedders." in tensor_name or ".ple_embedding.ngram_embedding." in tensor_name:
                table_bytes += values.nbytes
                values.fill_(float("nan"))
        save_file(tensors, tableless / file.name, {"format": "pt"})
    return SmallModel(name, whole, tableless, table_bytes)


@pytest.fixture(scope="session")
def tables(models: dict[str, SmallModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`up` with two shards and the tables of all models as they are, in many parts."""
    folder = tmp_path_factory.mktemp("vllm-tables")
    for model in models.values():
        import_checkpoint(model.whole, str(folder / "store"), model.name, dtype="keep", part_bytes=4 << 20)
    with up(folder, folder / "store", 2) as running:
        yield running


Answers = dict[str, Any]


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


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts here to its end."""
    return subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ENGINE_SECONDS,
        check=False,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """Of a process that finds this tree's packages and the tests' support."""
    root = HERE.parent.parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
