"""`embedding-service plan`, typed as a person types it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from embedding_service.cli import app
from embedding_service.errors import EmbeddingServiceError
from embedding_service.store import Store

# 1,024 rows of 264 bytes fill whole pages: 100 parts of 270,336 bytes.
TABLE = ("--rows", "102400", "--dim", "256", "--part-size", "264KiB")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def cells(result: Result) -> dict[str, list[str]]:
    """The table's rows by node."""
    rows = [line.strip("│ ").split("│") for line in result.output.splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def parts_held(result: Result) -> dict[str, int]:
    return {node: int(row[1]) for node, row in cells(result).items()}


def test_a_table_yet_to_be_made_is_spread_by_memory() -> None:
    result = run(*TABLE, "--nodes", "2x10MiB", "--nodes", "1x40MiB")
    assert result.exit_code == 0, result.output
    held = parts_held(result)
    assert list(held) == ["cpu-10MiB-0", "cpu-10MiB-1", "cpu-40MiB-0"]
    total = sum(held.values())
    assert all(
        abs(count - total * share) < 1 for count, share in zip(held.values(), (1 / 6, 1 / 6, 4 / 6), strict=True)
    )
    assert f"{total} parts of up to" in result.output


def test_copies_are_counted() -> None:
    once, twice = (sum(parts_held(run(*TABLE, "--nodes", "3x40MiB", "--replicas", n)).values()) for n in (1, 2))
    assert twice == 2 * once


def test_gpu_nodes_come_last_and_take_what_is_left() -> None:
    roomy = cells(run(*TABLE, "--nodes", "2x40MiB", "--nodes", "1x40MiB:cuda"))
    assert roomy["cuda-40MiB-0"][:2] == ["cuda", "0"]
    tight = parts_held(run(*TABLE, "--nodes", "2x10MiB", "--nodes", "1x40MiB:cuda"))
    assert tight["cuda-40MiB-0"] > 0
    assert tight["cpu-10MiB-0"] == tight["cpu-10MiB-1"] > 30


def test_a_further_node_of_a_kind_is_all_that_loads() -> None:
    result = run(*TABLE, "--nodes", "5x20MiB", "--from-nodes", "4x20MiB")
    moved = {node: row[-1] for node, row in cells(result).items()}
    assert [node for node, nbytes in moved.items() if nbytes != "0 B"] == ["cpu-20MiB-4"]
    share = float(re.search(r"moves \S+ MiB, ([\d.]+)% of what is held", result.output)[1])  # type: ignore[index]
    assert 17 <= share <= 24


def test_a_store_is_planned_with_all_its_models_or_with_one(store: Path) -> None:
    everything = sum(parts_held(run("--store", store, "--nodes", "3x1GiB")).values())
    expected = {
        name: sum(len(table.parts) for table in Store(store).manifest(name).tables) for name in ("int8", "fp32")
    }
    one = sum(parts_held(run("--store", store, "--model", "int8@1", "--nodes", "3x1GiB")).values())
    assert one == expected["int8"]
    assert everything > expected["int8"] + expected["fp32"]


@pytest.mark.slow
def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    result = run(*TABLE, "--nodes", "5x20MiB", "--from-nodes", "4x20MiB", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    refused = run(*TABLE, "--nodes", "5x20MiB", "--plot", tmp_path / "plan.docx")
    assert isinstance(refused.exception, EmbeddingServiceError)
    assert "cannot draw to" in str(refused.exception) and "png" in str(refused.exception)


def test_what_is_missing_is_said_and_would_do() -> None:
    def message(*nodes: object) -> str:
        result = run(*TABLE, *nodes)
        assert isinstance(result.exception, EmbeddingServiceError), result.output
        return str(result.exception)

    text = message("--nodes", "2x5MiB", "--nodes", "1x3MiB:cuda")
    missing = int(re.search(r"([\d,]+) bytes are missing", text)[1].replace(",", ""))  # type: ignore[index]
    cpu, cuda = map(int, re.search(r"fit with (\d+) more of 5.0 MiB \(cpu\), or (\d+) more of 3.0 MiB", text).groups())  # type: ignore[union-attr]
    assert cpu * 5 * 2**20 >= missing
    assert run(*TABLE, "--nodes", f"{2 + cpu}x5MiB", "--nodes", "1x3MiB:cuda").exit_code == 0
    assert run(*TABLE, "--nodes", f"{1 + cpu}x5MiB", "--nodes", "1x3MiB:cuda").exit_code == 1
    assert run(*TABLE, "--nodes", "2x5MiB", "--nodes", f"{1 + cuda}x3MiB:cuda").exit_code == 0
    assert message("--nodes", "2x40MiB", "--from-nodes", "2x1MiB").startswith("--from-nodes: holding ")
    small = message("--nodes", "900x100KiB")
    assert "smaller --part-size" in small and "more of" not in small


@pytest.mark.slow
def test_exit_code_and_one_line_for_people() -> None:
    command = [sys.executable, "-m", "embedding_service", "plan", *TABLE, "--nodes", "2x5MiB"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: --nodes: holding ") and "bytes are missing" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TABLE, "--nodes", "4"), "are no nodes"),
        ((*TABLE, "--nodes", "0x4GiB"), "are no nodes"),
        ((*TABLE, "--nodes", "4x0"), "are no nodes"),
        ((*TABLE, "--nodes", "4x1GiB:tpu"), "are no nodes"),
        ((*TABLE, "--nodes", "4xmuch"), "is no size"),
        ((*TABLE, "--nodes", "4x1GiB", "--store", "x"), "say either"),
        (("--rows", "5", "--nodes", "4x1GiB"), "say either"),
        (("--nodes", "4x1GiB"), "say either"),
        (TABLE, "Missing option"),
    ],
)
def test_wrong_usage_is_refused(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "absent", "--nodes", "1x1GiB"), "no model 'absent'"),
        (("--model", "int8@7", "--nodes", "1x1GiB"), "no version '7'"),
    ],
)
def test_an_unknown_model_is_refused(store: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in str(run("--store", store, *arguments).exception)


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    assert "no model in" in str(run("--store", tmp_path, "--nodes", "1x1GiB").exception)
    unknown = run("--rows", 5, "--dim", 4, "--dtype", "int5", "--nodes", "1x1GiB")
    assert "unknown dtype 'int5'" in str(unknown.exception)
