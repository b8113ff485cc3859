"""Names and messages of others in what commands print and servers log: shown as they are, never obeyed."""

import io
import logging
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import zeros
from typer.testing import CliRunner

from embedding_service import cli
from embedding_service.commands import query
from embedding_service.commands.console import PlainConsole
from embedding_service.commands.up import awaited
from embedding_service.commands.waiting import Waiting
from embedding_service.errors import StoreError
from embedding_service.foreign import LineFormatter, printable, shown
from embedding_service.serving import log, log_to_stderr
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire

NASTY = "a[/x][bold]:smile:\x1b[31m\r\nb\u202e\u2028\x9b\ud800"
SHOWN = r"a[/x][bold]:smile:\x1b[31m\r\nb\u202e\u2028\x9b\ud800"


@given(st.text())
def test_s10_what_is_printable_stays_on_its_line(text: str) -> None:
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


def test_a_value_in_an_error_is_short() -> None:
    assert shown(NASTY.encode("utf-8", "surrogatepass")).isprintable()
    for value in ("x" * 10**6, [1] * 10**6, [[[[[[[[1]]]]]]]], {str(key): key for key in range(1000)}, 10**4000):
        assert len(shown(value)) < 600


def nasty_status() -> control.Status:
    text = NASTY.replace("\ud800", "")  # protobuf takes no surrogates
    table = wire.TableInfo(name=text, rows=1, dim=1, dtype="int8")
    model = wire.ModelInfo(name=text, version="1", family=text, tables=[table])
    return control.Status(
        shards=[control.ShardStatus(shard_id=text, address=text, tier=text, device=text)],
        models=[control.ModelStatus(model=model, parts=1)],
        problems=[control.Problem(message=text)],
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_status_shows_markup_and_escapes(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closing tag in a message ended it with a traceback."""
    output = io.StringIO()
    console = PlainConsole(file=output, force_terminal=terminal, color_system=None, width=400)
    monkeypatch.setattr("embedding_service.commands.console.wide_console", lambda: console)
    monkeypatch.setattr("embedding_service.client.status.get_status", lambda address: nasty_status())
    with pytest.raises(typer.Exit):
        query.status("localhost:1")
    text = output.getvalue()
    assert text.replace("\n", "").isprintable()
    assert text.count(SHOWN.replace(r"\ud800", "")) == 8
    assert [line for line in text.splitlines() if line.startswith("problem: a[/x]")]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_up_waits_for_is_shown_the_same_way(terminal: bool) -> None:
    output = io.StringIO()
    console = PlainConsole(file=output, force_terminal=terminal, color_system=None, width=400)
    with Waiting(console) as waiting:
        waiting.say(awaited(nasty_status(), 1))
    assert r"not yet shard-0" in output.getvalue()
    nasty = nasty_status()
    nasty.shards[0].shard_id = "shard-0"
    with Waiting(console) as waiting:
        waiting.say(awaited(nasty, 1))
    assert r"1 of 1 shards registered, 0 of 1 parts loaded; not served yet: a[/x]" in output.getvalue()
    assert "\x1b[31m" not in output.getvalue() and "\u202e" not in output.getvalue()


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise StoreError(NASTY)

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"error: {SHOWN}\n"


def test_names_in_a_safetensors_file(tmp_path: Path) -> None:
    name = NASTY.replace("\ud800", "")
    save_file({name: zeros(2, 2), "flat": zeros(2)}, tmp_path / "x.safetensors")
    options = ["import", str(tmp_path / "x.safetensors"), f"--store={tmp_path}", "--name=x"]
    for tensor in ("nope", "flat", f"{name}=ta[/x]ble", f"{name}=t"):
        done = CliRunner().invoke(cli.app, [*options, f"--generic={tensor}"])
        text = done.output + printable(str(done.exception or ""))
        assert "\x1b" not in text and "\u202e" not in text
    assert done.exit_code == 0


@pytest.mark.parametrize("argument", ["--part-size=[/x]\x1b[31m", "--dtype=[/x]", "--version=[/x]", "--[/x]"])
def test_wrong_arguments_are_shown_too(tmp_path: Path, argument: str) -> None:
    done = CliRunner().invoke(cli.app, ["import", str(tmp_path), f"--store={tmp_path}", "--name=x", argument])
    assert done.exit_code in (1, 2)
    assert not done.exception or isinstance(done.exception, (SystemExit, StoreError, ValueError))


def test_no_message_forges_a_line_of_a_log() -> None:
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.info("shard %s joined", "x\nERROR forged\x1b[2J")
    try:
        raise ValueError("first\nERROR forged\x1b[2J")
    except ValueError:
        logger.exception("failed: %s", "y\r")
    lines = output.getvalue().splitlines()
    assert lines[0] == r"INFO shard x\nERROR forged\x1b[2J joined"
    assert lines[1] == r"ERROR failed: y\r"
    assert all(line.startswith("  ") for line in lines[2:]) and "Traceback" in lines[2]
    assert "\x1b" not in output.getvalue()


def test_servers_log_that_way(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = logging.getLogger().handlers[:]
    try:
        log_to_stderr("shard")
        log.info("registered %s", "x\nforged")
        assert r"registered x\nforged" in capsys.readouterr().err
    finally:
        logging.getLogger().handlers[:] = handlers
