"""How far a reader has to walk to follow one lookup through the client: which functions run, and in which files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import Up

import embedding_service
from embedding_service import EmbeddingClient

PACKAGE = str(Path(embedding_service.__file__).parent)
MOST_CHANGES = 20


def walk(action: Callable[[], object]) -> list[tuple[str, str]]:
    """(file, function) of each entry into a function of this package on the calling thread, resumed ones too."""
    entries: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            entries.append((code.co_filename.removeprefix(PACKAGE)[1:], code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return entries


def stretches(entries: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Entries that follow each other in one file, as one."""
    return [(file, [name for _, name in each]) for file, each in groupby(entries, key=lambda entry: entry[0])]


def ids_of_two_shards(client: EmbeddingClient) -> torch.Tensor:
    """int64 [10]: five rows each of two shards."""
    routing = client._router.current
    assert routing is not None
    table = routing.model("int8").table("ngram")
    first = {int(shard): part for part, shard in reversed(list(enumerate(table.owners[:, 0])))}
    parts = [part for _, part in sorted(first.items())][:2]
    return torch.cat([part * table.rows_per_part + torch.arange(5) for part in parts])


def test_a_lookup_changes_file_at_most_20_times(service: Up, capsys: pytest.CaptureFixture[str]) -> None:
    with EmbeddingClient(service.address, timeout=30) as client:
        client.lookup("int8/ngram", torch.arange(len(longcat_table())))
        ids = ids_of_two_shards(client)
        expected = client.lookup("int8/ngram", ids)
        rows: list[torch.Tensor] = []
        entries = walk(lambda: rows.append(client.lookup("int8/ngram", ids)))
        assert torch.equal(rows[0], expected)
    way = stretches(entries)
    files = {file for file, _ in way}
    told = "\n".join(f"{file:32} {', '.join(names)}" for file, names in way)
    with capsys.disabled():
        print(f"\n{len(entries)} entries, {len(files)} files, {len(way) - 1} changes of file\n{told}")
    assert len(way) - 1 <= MOST_CHANGES, told
