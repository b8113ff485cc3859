"""docs/families.md: a family that is added as the page says works from import to lookup."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.service

ROOT = Path(__file__).parent.parent
STEP = re.compile(r"^\d\. `(embedding_service/\S+\.py)`.*?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

USE = """
import sys, torch
from pathlib import Path
from support.cluster import up
from embedding_service import EmbeddingClient, NgramHasher
from embedding_service.store.importing import import_checkpoint

folder = Path(sys.argv[1])
import_checkpoint(folder / "checkpoint", folder / "store", "toy", dtype="keep", part_bytes=1 << 16)
tokens = torch.tensor([[7, 3, 96, 0], [-1, 5, 5, 1]])
ids = NgramHasher.from_config(folder / "checkpoint").row_ids(tokens)
with up(folder, folder / "store", 2) as running, EmbeddingClient(running.address, timeout=30) as client:
    rows = client.lookup_ngrams("toy", tokens)
torch.save({"ids": ids, "rows": rows}, folder / "result.pt")
"""


def with_the_family_added(folder: Path) -> None:
    """A copy of the package in which the page's steps were done: new files made, lines added to those there are."""
    shutil.copytree(
        ROOT / "embedding_service", folder / "embedding_service", ignore=shutil.ignore_patterns("__pycache__")
    )
    steps = STEP.findall((ROOT / "docs" / "families.md").read_text())
    assert [Path(file).name for file, _ in steps] == ["pairs.py", "__init__.py", "pairs.py", "__init__.py"]
    for file, code in steps:
        assert (folder / file).exists() == file.endswith("__init__.py")
        with (folder / file).open("a") as target:
            target.write(code)


def test_a_family_added_as_documented_is_imported_hashed_and_served(tmp_path: Path) -> None:
    with_the_family_added(tmp_path)
    table = torch.randn(9000, 16, generator=torch.Generator().manual_seed(0))
    (tmp_path / "checkpoint").mkdir()
    config = {"model_type": "pairs", "vocab_size": 97, "pair_rows": 9000, "hidden_size": 16}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    save_file({"pairs.weight": table, "dense": torch.ones(3)}, tmp_path / "checkpoint" / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt")
    expected = [[7, 3 + 31 * 7, 96 + 31 * 3, 31 * 96], [0, 5, 5 + 31 * 5, 1 + 31 * 5]]
    assert result["ids"][:, :, 0, 0].tolist() == expected
    assert torch.equal(result["rows"][:, :, 0, 0], table[torch.tensor(expected)])
