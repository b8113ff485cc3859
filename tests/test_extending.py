"""docs/families.md and docs/extending.md: a family, a row format and a tier that are added as the pages say, work."""

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
END_OF_REGISTRY = "    },\n)\n"

USE = """
import sys, torch
from pathlib import Path
from support.cluster import up
from embedding_service import EmbeddingClient, NgramHasher

from embedding_service.store.importing import import_checkpoint

folder = Path(sys.argv[1])
for name, dtype in (("toy", "keep"), ("narrow", "e5m2")):
    import_checkpoint(folder / "checkpoint", folder / "store", name, dtype=dtype, part_bytes=1 << 16)
tokens = torch.tensor([[7, 3, 96, 0], [-1, 5, 5, 1]])
ids = NgramHasher.from_config(folder / "checkpoint").row_ids(tokens)
with up(folder, folder / "store", 2, "--tier=heap") as running, EmbeddingClient(running.address, timeout=60) as client:
    rows, narrow = (client.lookup_ngrams(name, tokens) for name in ("toy", "narrow"))
    tiers = {shard.tier for shard in running.status().shards}
torch.save({"ids": ids, "rows": rows, "narrow": narrow, "tiers": tiers}, folder / "result.pt")
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which the pages' steps were done: files were made, lines entered in registries."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(
        ROOT / "embedding_service", folder / "embedding_service", ignore=shutil.ignore_patterns("__pycache__")
    )
    pages = [(ROOT / f"docs/{page}.md").read_text() for page in ("families", "extending")]
    steps = [step for page in pages for step in STEP.findall(page)]
    assert [Path(file).name for file, _ in steps[1::2]] == ["__init__.py"] * 4
    for file, code in steps:
        path = folder / file
        if path.exists():
            text = path.read_text()
            assert text.count(END_OF_REGISTRY) == 1
            path.write_text(text.replace(END_OF_REGISTRY, code + END_OF_REGISTRY))
        else:
            path.write_text(code)
    return folder


def run_in(extended: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=extended,
        env={**os.environ, "PYTHONPATH": f"{extended}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_family_a_format_and_a_tier_work_from_import_to_lookup(extended: Path) -> None:
    table = torch.randn(9000, 16, generator=torch.Generator().manual_seed(0))
    (extended / "checkpoint").mkdir()
    config = {"model_type": "pairs", "vocab_size": 97, "pair_rows": 9000, "hidden_size": 16}
    (extended / "checkpoint" / "config.json").write_text(json.dumps(config))
    save_file({"pairs.weight": table, "dense": torch.ones(3)}, extended / "checkpoint" / "model.safetensors")
    run_in(extended, "-c", USE, str(extended))
    result = torch.load(extended / "result.pt")
    expected = [[7, 3 + 31 * 7, 96 + 31 * 3, 31 * 96], [0, 5, 5 + 31 * 5, 1 + 31 * 5]]
    assert result["ids"][:, :, 0, 0].tolist() == expected
    rows = table[torch.tensor(expected)]
    assert torch.equal(result["rows"][:, :, 0, 0], rows)
    assert torch.equal(result["narrow"][:, :, 0, 0], rows.to(torch.float8_e5m2).float())
    assert result["tiers"] == {"heap"}


def test_the_contracts_test_what_was_registered(extended: Path) -> None:
    chosen = "e5m2 and (heap or ram or not tables) or heap and int8"
    suites = [str(ROOT / "tests" / suite) for suite in ("rows/test_tables.py", "formats/test_contract.py")]
    settings = ["-c", str(ROOT / "pyproject.toml"), "-o", f"pythonpath={ROOT / 'tests'}", "-p", "no:cacheprovider"]
    run_in(extended, "-m", "pytest", *settings, "-k", chosen, *suites)
