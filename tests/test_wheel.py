"""A built wheel in an empty environment is a client: it finds the running service and gets the same rows."""

import subprocess
import sys
import venv
from pathlib import Path

import torch
from support.cluster import Up

from embedding_service import EmbeddingClient

ROOT = Path(__file__).parent.parent
LOOKUP = """
import sys, torch
from embedding_service import EmbeddingClient
with EmbeddingClient(sys.argv[1], timeout=60) as client:
    torch.save(client.lookup("fp32/ngram", torch.arange(64)), sys.argv[2])
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(each) for each in command], cwd="/", capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_installs_into_an_empty_environment_and_looks_rows_up(
    service: Up, client: EmbeddingClient, tmp_path: Path
) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    built = sorted((tmp_path / "dist").iterdir())
    assert [path.suffix for path in built] == [".whl", ".gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *built)
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty/bin/python"
    # The torch of this environment: a range would bring the newest one with its CUDA libraries.
    torch_here = f"torch=={torch.__version__.partition('+')[0]}"
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", built[0], torch_here)
    run(python, "-c", LOOKUP, service.address, tmp_path / "rows.pt")
    assert torch.equal(torch.load(tmp_path / "rows.pt"), client.lookup("fp32/ngram", torch.arange(64)))
