"""What the command line and the HTTP app say when something is not as it must be."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from small_model import write_tokenizer

from model_worker import cli
from model_worker.http_app import build_app
from model_worker.worker import Worker, WorkerConfig


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of `model-worker` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["model-worker", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, model_worker.cli; print({'torch', 'ray', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_not_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, embeddings: str
) -> None:
    code, error = run(monkeypatch, capsys, "serve", str(tmp_path), f"--embeddings={embeddings}")
    assert code == 1
    assert "config.json" in error
    assert error.count("\n") == 1


def test_an_unknown_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, embeddings: str
) -> None:
    code, error = run(
        monkeypatch, capsys, "serve", str(model_folder), f"--embeddings={embeddings}", "--name=small@2", "--port=18999"
    )
    assert code == 1
    assert "'small@2'" in error
    assert "small@1" in error


def test_no_service(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    code, error = run(monkeypatch, capsys, "serve", str(model_folder), "--embeddings=127.0.0.1:1")
    assert code == 1
    assert "127.0.0.1:1" in error


def test_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = run(monkeypatch, capsys, "serve", str(model_folder), "--embeddings=x:1", f"--port={port}")
    assert code == 1
    assert f"127.0.0.1:{port}" in error


def test_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    arguments = ["serve", str(model_folder), "--embeddings=x:1", "--replicas=2", "--max-replicas=3"]
    assert run(monkeypatch, capsys, *arguments)[0] == 2


@pytest.mark.parametrize(
    ("wanted", "served", "expected"),
    [
        (None, [("one", "1")], ("one", "1")),
        (None, [("one", "1"), ("one", "2")], ("one", "2")),
        ("one", [("one", "9"), ("one", "10"), ("two", "1")], ("one", "10")),
        ("one@9", [("one", "9"), ("one", "10")], ("one", "9")),
    ],
)
def test_which_model_is_served(wanted: str | None, served: list[tuple[str, str]], expected: tuple[str, str]) -> None:
    assert cli._pick(wanted, served) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template: use /v1/completions"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_chat_needs_a_template_that_takes_it(
    model_folder: Path, embeddings: str, tmp_path: Path, template: str | None, message: str
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()
    write_tokenizer(folder, template)
    worker = Worker(WorkerConfig(str(folder), embeddings, "small", "1", max_batch=1, max_queue=1))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(worker))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            body = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
            return await client.post("/v1/chat/completions", json=body)

    try:
        answer = asyncio.run(ask())
    finally:
        worker.close()
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages"
