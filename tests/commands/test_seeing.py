"""What a person and a script see of a cluster: `--json`, examples, `top`, `doctor`."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from support.checkpoints import longcat_table
from support.cluster import START_SECONDS, Up, free_port, until
from typer.testing import CliRunner

from embedding_service.cli import EXAMPLES, app
from embedding_service.security.access import TLS_VARIABLE, TOKEN_FILE_VARIABLE
from embedding_service.security.authority import prepare_folder

# They serve, or show one view after another.
NO_ANSWER = {"up", "controller", "shard", "top"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options set variables for this process. They are as before after each test."""
    for name in (TLS_VARIABLE, TOKEN_FILE_VARIABLE):
        monkeypatch.setenv(name, "")


def answer_of(*arguments: object, code: int = 0) -> dict[str, Any]:
    """What a command prints with --json."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def commands_of(group: click.Group, before: tuple[str, ...] = ()) -> dict[str, click.Command]:
    """All of them, by the words that call them."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands_of(command, (*before, name))  # type: ignore[arg-type]
        else:
            found[" ".join((*before, name))] = command
    return found


COMMANDS = commands_of(typer.main.get_command(app))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - NO_ANSWER))
def test_each_command_that_prints_has_json(name: str) -> None:
    assert any("--json" in option.opts for option in COMMANDS[name].params)


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_each_example_is_one(line: str) -> None:
    name, *arguments = line.split()
    COMMANDS[name].make_context(name, arguments)  # raises for what cannot be
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"})
    assert f"embedding-service {line}" in result.output


def test_shells_complete() -> None:
    asked = {"_EMBEDDING_SERVICE_COMPLETE": "complete_bash", "COMP_WORDS": "embedding-service do", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], env=asked, prog_name="embedding-service")
    assert "doctor" in result.output.split()


def test_what_is_served_as_json(service: Up) -> None:
    status = answer_of("status", service.address)
    assert [shard["shard_id"] for shard in status["shards"]] == ["shard-0", "shard-1", "shard-2"]
    assert status["problems"] == [] and isinstance(status["term"], int)
    models = answer_of("models", service.address)["models"]
    assert {model["name"] for model in models} >= {"fp32", "int8"}
    rows = answer_of("lookup", "fp32/ngram", 130, 5, "--address", service.address)["rows"]
    assert [row["id"] for row in rows] == [130, 5]
    assert rows[0]["values"] == longcat_table()[130].tolist()


def test_stores_as_json(checkpoint: Path, tmp_path: Path) -> None:
    made = answer_of("import", checkpoint, "--store", tmp_path / "store", "--name", "m", "--dtype", "int8")
    assert (made["model"], made["version"], made["base"]) == ("m", "1", None)
    assert made["tables"] == [{"name": "ngram", "rows": len(longcat_table()), "dim": 16, "dtype": "int8"}]
    parted = answer_of("split", checkpoint, tmp_path / "parted")
    assert Path(parted["tables"]).is_dir() and Path(parted["dense"]).is_dir()


def test_policies_as_json(tmp_path: Path) -> None:
    token = answer_of("policy", "token")
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[identities.team]\ntokens = ["{token["digest"]}"]\nread = ["m*"]\n')
    asked = ("policy", "check", "--policy", policy, "--who", "team", "--may", "read", "--model")
    assert answer_of(*asked, "m1") == {"allowed": True, "identity": "team", "granted": ["m*"]}
    assert answer_of(*asked, "x", code=1) == {"allowed": False, "identity": "team", "granted": ["m*"]}


def findings_of(*arguments: object, code: int = 0) -> dict[str, list[dict[str, str]]]:
    """What the doctor found, by its checks."""
    found: dict[str, list[dict[str, str]]] = {}
    for each in answer_of("doctor", *arguments, code=code)["findings"]:
        found.setdefault(each["check"], []).append(each)
        assert each["state"] == "good" or each["remedy"]
    return found


def test_the_doctor_finds_a_set_up_right(service: Up, store: Path) -> None:
    found = findings_of("--store", store, "--address", service.address)
    assert found["service"][0]["found"].startswith("3 shards serve ")
    assert found["store"][0]["found"].startswith("8 models of ")
    assert {each["state"] for name in ("python", "packages", "service") for each in found[name]} == {"good"}
    assert found["tls"][0]["found"].startswith("plain text")


def test_the_doctor_says_what_is_wrong_and_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = free_port()
    prepare_folder(tmp_path / "secrets", ["localhost"], ["controller"])
    client = tmp_path / "secrets/client"
    (client / "token").chmod(0o644)
    monkeypatch.setenv(TLS_VARIABLE, str(client))
    found = findings_of("--store", tmp_path / "none", "--address", f"127.0.0.1:{nobody}", code=1)
    assert str(nobody) in found["service"][0]["found"] and "can be reached" in found["service"][0]["remedy"]
    assert "mounted" in found["store"][0]["remedy"]
    assert found["secrets"] == [
        {
            "check": "secrets",
            "state": "bad",
            "found": f"others may read {client / 'token'}",
            "remedy": f"chmod 600 {client / 'token'}",
        }
    ]
    (client / "ca.crt").write_text("no certificate")
    assert "PEM" in findings_of(code=1)["tls"][0]["remedy"]
    monkeypatch.setenv(TLS_VARIABLE, str(tmp_path / "secrets/nothing"))
    assert "up --secure" in findings_of(code=1)["tls"][0]["remedy"]


def test_the_doctor_knows_who_has_the_port(service: Up) -> None:
    port = service.address.partition(":")[2]
    [found] = findings_of("--port", port)["port"]
    assert found["remedy"].endswith(f"doctor --address localhost:{port}")


def test_top_follows_the_cluster_until_it_is_ended(service: Up) -> None:
    master, slave = pty.openpty()
    # In the background a shell has a command ignore Ctrl-C, and what that starts does so too.
    heeding = ["env", "--default-signal=INT"]
    command = [*heeding, sys.executable, "-m", "embedding_service", "top", service.address, "--every=0.2"]
    top = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": "150"})
    os.close(slave)
    shown = bytearray()

    def views() -> int:
        while select.select([master], [], [], 0)[0]:
            try:
                shown.extend(os.read(master, 1 << 16))
            except OSError:  # it has ended
                break
        return shown.count(b"all is served")

    try:
        until(lambda: views() >= 3, "three views")
        top.send_signal(signal.SIGINT)
        until(lambda: views() and top.poll() == 0, "its end")
    finally:
        top.kill()
        top.wait(START_SECONDS)
        os.close(master)
    for text in (b"shard-0", b"cpu ram", b"int8@1", b"rows/s wired"):
        assert text in shown
