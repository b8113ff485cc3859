"""Everything that may happen to a cluster with two copies, in a seeded random order, loses no lookup."""

from pathlib import Path

import pytest
from rich.console import Console
from support.chaos import chaos_store, run

pytestmark = [pytest.mark.service, pytest.mark.heavy]


def test_shards_and_controllers_come_go_die_and_hang_without_a_lookup_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(tmp_path, chaos_store(tmp_path), seed=1, seconds=25, console=Console())
    with capsys.disabled():
        Console(width=120).print("", outcome.table(), *outcome.notes(), sep="\n", markup=False)
    outcome.check()
    assert outcome.near_rows
    assert {"join", "drain", "kill", "hang", "controller killed"} == set(outcome.events)
