"""`python -m benchmarks.gpu` runs to its end, with host memory in place of a GPU's. Its figures mean nothing here."""

from functools import partial

import pytest
from rich.console import Console

from benchmarks import gpu

pytestmark = pytest.mark.slow


def test_all_tables_are_made_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BATCHES", (12,))
    monkeypatch.setattr(gpu, "seconds", partial(gpu.seconds, budget=0, rounds=1))
    console = Console(record=True, width=200)
    gpu.run("cpu", cached=False, part_bytes=1 << 20, parts=2, console=console)
    said = console.export_text()
    for dtype in ("fp16", "int8", "int4"):
        assert said.count(f"{dtype}: ") == 2  # index_select and FBGEMM's kernel
        assert said.count(f"│  {dtype} │") >= 3  # one line for each encoding
