"""A share is killed in the middle of what it does to files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_t7_t8_a_share_killed_at_any_operation_on_a_file_comes_back_where_it_was(tmp_path: Path) -> None:
    """Some of the operations here, and those of going back. `python -m support.crashes FOLDER` tries each."""
    command = [sys.executable, "-m", "support.crashes", str(tmp_path), "29"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = re.search(r"killed (\d+) times", done.stdout)
    assert killed and int(killed[1]) >= 20, done.stdout
    assert "replace in log:Log.rewrite" in done.stdout and "unlink in log:Log._finish_rewriting" in done.stdout
