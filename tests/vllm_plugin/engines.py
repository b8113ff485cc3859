"""vLLM in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Interpreted kernels are slow, and slower yet beside others.
ENGINE_SECONDS = 540
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: `make vllm` runs this")
Answers = dict[str, Any]


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
