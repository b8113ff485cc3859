"""Commands and code in the texts: commands have the options that they are shown with, and the tutorial runs."""

import ast
import importlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support.checkpoints import longcat_table
from support.cluster import Members, until
from support.docs import ROOT, TEXTS, Block, blocks, commands
from typer.testing import CliRunner

import model_worker.cli
from embedding_service import EmbeddingClient, NgramHasher, cli
from embedding_service.store.importing import import_checkpoint

APPS = {"embedding-service": cli.app, "model-worker": model_worker.cli.app}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("text", TEXTS, ids=named)
def test_commands_have_the_options_that_they_are_shown_with(text: Path) -> None:
    for block in blocks(text):
        for words in commands(block.code) if block.language == "sh" else ():
            check(words)
    for inline in re.findall(r"`((?:embedding-service|model-worker) [^`]+)`", text.read_text()):
        check(inline.split())


def check(words: list[str]) -> None:
    """Fail if a command, an option, a target or a path is not there."""
    program, *arguments = words
    if program in APPS:
        command: Any = typer.main.get_command(APPS[program])
        while hasattr(command, "commands"):
            assert arguments and arguments[0] in command.commands, words
            command = command.commands[arguments.pop(0)]
        options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        shown = {word.partition("=")[0] for word in arguments if word.startswith("--") and " " not in word}
        assert shown <= options | {"--help"}, words
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets, words
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), words
    elif program == "kubectl":
        paths = [word for word in arguments if word.startswith("k8s/")]
        assert all((ROOT / path).exists() for path in paths), words


def test_a_wrong_command_would_be_found() -> None:
    for words in (["embedding-service", "imports"], ["embedding-service", "up", "--shard", "2"], ["make", "quik"]):
        with pytest.raises(AssertionError):
            check(words)


@pytest.mark.parametrize("text", TEXTS, ids=named)
def test_python_in_texts_is_python(text: Path) -> None:
    for block in blocks(text):
        if block.language == "python" and not block.code.startswith(" "):  # a line of a file, see test_extending.py
            ast.parse(block.code)


# A service that the texts' code runs on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorial")


@pytest.fixture(scope="module")
def running(checkpoint: Path, folder: Path) -> Iterator[Members]:
    """What the tutorial's `up` starts, beside a checkpoint that is named as in the README."""
    (folder / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        import_checkpoint(checkpoint, "store", "NAME", dtype="fp32")
        tutorial = blocks(ROOT / "docs/first-lookup.md")
        [python, shell] = tutorial[1:3]
        exec(python.code, {})
        run(shell, "")
        members = Members(folder, Path("store").absolute(), 2, 2, None)
        members.restart()
        try:
            yield members
        finally:
            members.end()


def run(block: Block, address: str) -> None:
    """Run the commands of a block at an address. Comments after a command are what it prints."""
    expected, printed = [], []
    for line in block.code.splitlines():
        if line.startswith("#"):
            expected.append(line.removeprefix("#").split())
            continue
        [(program, command, *arguments)] = commands(line)
        where = {"lookup": ["--address", address], "status": [address]}.get(command, [])
        result = CliRunner().invoke(APPS[program], [command, *arguments, *where])
        assert result.exit_code == 0, f"{line}: {result.output}"
        printed += [words.split() for words in result.stdout.splitlines()]
    assert all(words in printed for words in expected), printed


@pytest.mark.service
def test_the_tutorial_runs_as_it_is(running: Members, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    _set_up, _table, _imported, up, shell, python, change, publish, back = blocks(ROOT / "docs/first-lookup.md")
    assert list(commands(up.code)) == [
        ["embedding-service", "up", *["--store", "store", "--shards", "2", "--replicas", "2"]]
    ]
    run(shell, running.address)
    exec(python.code.replace("localhost:7070", running.address), {})
    exec(change.code, {})
    with EmbeddingClient(running.address, timeout=60) as client:
        run(publish, running.address)
        until(lambda: not client.lookup("first/rows", torch.tensor([5])).any(), "the rows of version 2")
        run(back, running.address)
        until(lambda: client.lookup("first/rows", torch.tensor([5])).any(), "the rows of version 3")


@pytest.mark.service
def test_the_readme_looks_rows_up(running: Members, checkpoint: Path) -> None:
    [code] = [block.code for block in blocks(ROOT / "README.md") if block.language == "python"]
    names: dict[str, Any] = {}
    exec(code.replace("localhost:7070", running.address).replace("CHECKPOINT", str(checkpoint)), names)
    assert isinstance(names["embedding"], torch.nn.Module)
    assert NgramHasher.from_config(checkpoint).num_heads


@pytest.mark.service
def test_a_table_is_trained_as_the_page_says(running: Members) -> None:
    """The loop of docs/training.md, with a model of one layer."""
    code = next(block.code for block in blocks(ROOT / "docs/training.md") if block.language == "python")
    for old, new in (("localhost:7070", running.address), ("model@", "first@"), ("@tuning/ngram", "@tuning/rows")):
        code = code.replace(old, new)
    code = code.replace('version="2"', 'version="9"')
    model = torch.nn.Linear(4, 1)
    names: dict[str, Any] = {
        "model": model,
        "batches": [(torch.tensor([3, 5, 3]), torch.zeros(3, 1))] * 2,
        "loss_of": torch.nn.functional.mse_loss,
        "dense_optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }
    with EmbeddingClient(running.address, timeout=60) as client:
        before = client.lookup("first/rows", torch.tensor([3, 4]))
        exec(code, names)
        after = client.lookup("first@9/rows", torch.tensor([3, 4]))
    assert not torch.allclose(before[0], after[0], atol=0.01)
    assert torch.allclose(before[1], after[1], atol=0.1)  # as int8


@pytest.mark.service
def test_lookups_go_on_when_the_tutorials_shard_is_killed(running: Members) -> None:
    """The last of this file: the shard stays dead."""
    running.processes["shard-0"].end(signal.SIGKILL)
    with EmbeddingClient(running.address, timeout=60) as client:
        assert torch.equal(client.lookup("NAME/ngram", torch.arange(999)), longcat_table()[:999])
