"""`publish`, `rollback`, `diff` and `import --base`, typed as a person types them."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import longcat_checkpoint
from support.overlays import rows_file
from typer.testing import CliRunner

from embedding_service.cli import app
from embedding_service.errors import InvalidRequest, NotFound
from embedding_service.store.store import Store


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    """A store with the model "int8" alone."""
    shutil.copytree(store / "int8", tmp_path / "store" / "int8", copy_function=os.link)
    return tmp_path / "store"


def said(*arguments: object) -> list[str]:
    """What a command prints, line by line."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_rows_are_published_compared_and_taken_back(own: Path, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "rows", np.array([5, 9]), 7)
    log = tmp_path / "audit.jsonl"
    [line] = said("publish", "--base", "int8@1", "--rows", file, "--store", own, "--audit", log)
    assert line.startswith("int8@2: 2 of ") and "rows in place of int8@1's" in line
    [line] = said("diff", "int8@1", "int8", "--store", own)
    assert line.startswith("ngram: 2 of ") and "in 1 parts (ids 5, 9); mean distance" in line
    [answer] = map(json.loads, said("diff", "int8@1", "int8@2", "--store", own, "--json"))
    assert (answer["tables"][0]["differ"], answer["tables"][0]["first_ids"]) == (2, [5, 9])
    [answer] = map(json.loads, said("rollback", "int8", "--store", own, "--audit", log, "--json"))
    assert (answer["version"], answer["restores"], answer["replaced_rows"]) == ("3", "1", 0)
    noted = [(line["action"], line["model"]) for line in map(json.loads, log.read_text().splitlines())]
    assert noted == [("publish", "int8@2"), ("rollback", "int8@3")]
    [line] = said("diff", "int8@1", "int8", "--store", own)
    assert line.startswith("ngram: none of ")
    line, note = said("publish", "--base", "int8@1", "--rows", file, "--store", own, "--version", "0")
    assert line.startswith("int8@0") and note.startswith("note: int8@3 stays the newest")
    [line] = said("rollback", "int8", "--store", own, "--to", "2")
    assert line.startswith("int8@4 with the rows of version 2: 2 of ")
    [line] = said("publish", "--base", "int8", "--rows", file, "--store", own, "--name", "int8+legal")
    assert line.startswith("int8+legal@1")
    with pytest.raises(NotFound, match="no model 'big'"):
        said("publish", "--base", "big", "--rows", file, "--store", own)
    with pytest.raises(InvalidRequest, match="is gone when this command ends"):
        said("rollback", "int8", "--store", "memory://x")


def test_differences_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    """They were written as NaN and Infinity, which are no JSON."""
    for version, value in (("1", 0.0), ("2", math.inf), ("3", math.nan)):
        save_file({"t": torch.full((4096, 16), value)}, tmp_path / "tables.safetensors")
        options = ("--name", "m", "--version", version, "--dtype", "keep", "--generic", "t")
        said("import", tmp_path / "tables.safetensors", "--store", tmp_path / "store", *options)

    def no_json(text: str) -> None:
        raise AssertionError(text)

    for newer in ("m@2", "m@3"):
        [line] = said("diff", "m@1", newer, "--store", tmp_path / "store", "--json")
        [table] = json.loads(line, parse_constant=no_json)["tables"]
        assert (table["differ"], table["distance"]) == (4096, None)


def test_an_import_over_a_base_says_how_many_rows_differ(own: Path, tmp_path: Path) -> None:
    same = longcat_checkpoint(tmp_path / "same")
    options = ("--store", own, "--name", "int8", "--base", "1")
    [line] = said("import", same, *options, "--version", "2")
    assert "int8@2: " in line and "; " in line and " 0 of " in line and "rows differ from int8@1, 0 B out" in line
    other = longcat_checkpoint(tmp_path / "other", tag=2)
    [line] = said("import", other, *options, "--version", "3")
    rows = Store(own).manifest("int8").tables[0].rows
    assert f"{rows:,} of {rows:,} rows differ" in line
