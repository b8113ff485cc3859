"""Trainers of Ray Train against shards of this process, as examples/train/ray_train.py has them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.training import InThread

from embedding_service import EmbeddingClient
from embedding_service.store.importing import import_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples/train/ray_train.py"


@pytest.mark.service
@pytest.mark.heavy
def test_workers_of_ray_train_learn_with_the_tables_outside_of_them(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="ray.train needs pyarrow and pandas: pip install 'ray[train]'")
    save_file({"t": torch.randn(512, 16)}, tmp_path / "rows.safetensors")
    import_checkpoint(tmp_path / "rows.safetensors", tmp_path / "store", "m", dtype="fp32", generic={"t": "t"})
    shards = InThread(tmp_path / "store", tmp_path / "logs", ["s0", "s1"])
    try:
        command = [sys.executable, str(EXAMPLE), shards.addresses["s0"], "m@ray/t", "--steps=40"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        said = re.search(r"step 40 in session 1: loss ([\d.]+),", done.stdout)
        assert said and float(said[1]) < 1.0, done.stdout[-3000:]  # 2.08 says nothing of eight classes
        with EmbeddingClient(shards.addresses["s1"], timeout=60) as client, client.train("m@ray") as session:
            assert (session.begun_at, session.number) == (40, 2)
    finally:
        shards.close()
