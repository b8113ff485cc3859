"""What is never done with bytes of others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Modules whose reading of bytes may run them, and calls that may.
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "torch.load", "torch.jit.load", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load"}


def runs_bytes(text: str) -> Iterator[str]:
    """What a module does of that kind."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            yield ast.unparse(node)


@pytest.mark.slow
def test_s10_nothing_is_unpickled_or_run() -> None:
    for package in ("embedding_service", "model_worker"):
        for file in sorted((ROOT / package).rglob("*.py")):
            assert not [*runs_bytes(file.read_text())], file


@pytest.mark.parametrize("text", ["import pickle", "from dill import x", "torch.load(f)", "def f():\n    eval(x)"])
def test_s10_what_would_run_bytes_is_seen(text: str) -> None:
    assert [*runs_bytes(text)]
