"""`embedding-service import` and `split`, typed as a person types them."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedding_service import cli
from embedding_service.commands import store as store_commands
from embedding_service.errors import InvalidRequest, OutOfRange
from embedding_service.formats import FORMATS
from embedding_service.store import Store

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "embedding_service"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


def test_import_says_what_it_did_and_refuses_to_do_it_twice(checkpoint: Path, tmp_path: Path) -> None:
    options = ("import", checkpoint, "--store", tmp_path, "--name", "tiny")
    result = run(*options, "--dtype", "int4", "--part-size", "64KiB")
    assert result.returncode == 0, result.stderr
    table = Store(tmp_path).manifest("tiny").tables[0]
    assert table.dtype == "int4"
    assert f"tiny@1: {table.rows:,} rows of {table.dim} as int4" in result.stdout
    assert f"out in {len(table.parts)} parts" in result.stdout
    assert len(result.stdout.splitlines()) == 1
    again = run(*options)
    assert again.returncode == 1
    assert again.stdout == ""
    assert len(again.stderr.splitlines()) == 1
    assert again.stderr.startswith("error: name taken: ")
    assert "--version 2" in again.stderr
    assert run(*options, "--version", "2").returncode == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--dtype", "int5"], 1, f"error: unknown dtype 'int5'; known: {', '.join(FORMATS)}, keep"),
        (["--version", "a/b"], 1, "error: 'a/b' cannot be a name"),
        (["--part-size", "1KiB"], 1, "too small"),
        (["--part-size", "much"], 2, "'much' is no size"),
        (["--part-size", "9" * 400], 2, "is too large"),
        (["--part-size", "9" * 30], 1, "error: --part-size is too large: a part has at most"),
        (["--surprise"], 2, "No such option"),
        (["--generic", "a=b", "--generic", "a=c"], 2, "names tensor 'a' twice"),
    ],
)
def test_wrong_options_end_in_one_clear_line(
    checkpoint: Path, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    result = run("import", checkpoint, "--store", tmp_path, "--name", "tiny", *options)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert Store(tmp_path).models() == []


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for command in (
        ("import", tmp_path, "--store", tmp_path / "s", "--name", "x"),
        ("split", tmp_path, tmp_path / "o"),
    ):
        result = run(*command)
        assert result.returncode == 1
        assert result.stderr == f"error: {tmp_path} is not a checkpoint: it has no config.json\n"


def test_split_then_import_of_the_tables(checkpoint: Path, tmp_path: Path) -> None:
    result = run("split", checkpoint, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path}/out/dense for workers, {tmp_path}/out/tables for import" in result.stdout
    assert run("import", tmp_path / "out" / "tables", "--store", tmp_path / "s", "--name", "tiny").returncode == 0
    assert Store(tmp_path / "s").models() == ["tiny"]


def test_a_terminal_gets_a_bar(checkpoint: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    options = ["import", str(checkpoint), "--store", str(tmp_path), "--name", "tiny"]
    with subprocess.Popen([*COMMAND, *options], stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while chunk := read_or_nothing(ours):
            seen += chunk
    os.close(ours)
    assert process.returncode == 0, seen
    assert b"importing" in seen and "━".encode() in seen and b"/s" in seen


def read_or_nothing(descriptor: int) -> bytes:
    """What a terminal shows next; nothing once its other end is closed."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def test_elsewhere_progress_is_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_commands.Progress, "LINE_SECONDS", 0.0)
    with store_commands.Progress("importing") as progress:
        progress(1 << 20, 4 << 20)
    assert "importing: 1.0 MiB of 4.0 MiB, " in capsys.readouterr().err


def test_help_is_quick_because_nothing_heavy_is_loaded() -> None:
    heavy = ("torch", "fbgemm_gpu", "pydantic", "fsspec")
    code = f"import sys, embedding_service; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_any_matrices_are_imported_by_name(checkpoint: Path, tmp_path: Path) -> None:
    words, head = "model.embed_tokens.weight", "model.ngram_embeddings.embedders.0.weight"
    options = ("import", checkpoint, "--store", tmp_path, "--name", "any", "--dtype", "fp8")
    result = run(*options, "--generic", f"{words}=words", "--generic", head)
    assert result.returncode == 0, result.stderr
    manifest = Store(tmp_path).manifest("any")
    assert [(table.name, table.dtype) for table in manifest.tables] == [("words", "fp8"), (head, "fp8")]
    for table in manifest.tables:
        assert f"{table.rows:,} rows of {table.dim} as fp8 in {table.name}" in result.stdout
    wrong = run(*options, "--version", "2", "--generic", "nope")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ") and f"no tensor 'nope'; it has the matrices {words}" in wrong.stderr


def test_an_import_that_is_not_the_newest_says_so(checkpoint: Path, tmp_path: Path) -> None:
    options = ["import", str(checkpoint), f"--store={tmp_path}", "--name=tiny"]
    for version, note in [("v1", ""), ("2", "note: tiny@v1 stays the newest and is what is served"), ("v2", "")]:
        done = CliRunner().invoke(cli.app, [*options, f"--version={version}"])
        assert done.exit_code == 0, done.output
        assert done.stderr.startswith(note) and bool(done.stderr) == bool(note)
        assert not note or "give --version v2" in done.stderr
    assert Store(tmp_path).manifest("tiny").version == "v2"


@pytest.mark.parametrize("url", ["memory://x", "simplecache::memory://x", "dir::memory://x"])
def test_a_store_that_ends_with_the_command_is_refused(checkpoint: Path, url: str) -> None:
    """It said that all went well, and kept nothing."""
    done = CliRunner().invoke(cli.app, ["import", str(checkpoint), f"--store={url}", "--name=tiny"])
    assert isinstance(done.exception, InvalidRequest)
    assert str(done.exception) == f"{url} is gone when this command ends: give a folder, or a URL that others can read"
    done = CliRunner().invoke(cli.app, ["up", f"--store={url}"])
    assert "is in each process's own memory: give a folder" in str(done.exception)


@pytest.mark.parametrize("row_id", [10**19, 2**63, 10**400])
def test_an_id_of_twenty_digits(row_id: int) -> None:
    done = CliRunner().invoke(cli.app, ["lookup", "tiny/ngram", "1", str(row_id)])
    assert isinstance(done.exception, OutOfRange)
    assert str(done.exception).startswith(f"ids[1] is {row_id}: no table has as many rows")
