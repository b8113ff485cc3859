"""Some classes of attack, for a moment each, on a running service: neighbours get their rows and everybody stays.

`make attack` runs all of them, with other values and for longer.
"""

from pathlib import Path

import pytest
from rich.console import Console
from support.attack.__main__ import run

pytestmark = [pytest.mark.service, pytest.mark.heavy]

CLASSES = ("odd method paths", "malformed protobuf", "forged reports")


def test_attacks_cost_no_lookup_and_no_member(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(tmp_path, CLASSES, seed=1, seconds=250, console=Console(), longest=2)
    with capsys.disabled():
        Console(width=160).print("", outcome.table())
    outcome.check()
