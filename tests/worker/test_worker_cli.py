"""What the command line and the HTTP app say when something is not as it must be."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from small_model import write_tokenizer
from support.cluster import until

from embedding_service.client.client import ModelDescription
from embedding_service.commands.console import PlainConsole
from embedding_service.commands.waiting import Waiting
from model_worker import cli, serving, worker
from model_worker.http_app import build_app
from model_worker.worker import Worker, WorkerConfig

pytestmark = pytest.mark.slow


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of `model-worker` with these arguments, but for the lines that tell what it waits for."""
    monkeypatch.setattr(sys, "argv", ["model-worker", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().err.splitlines(keepends=True)
    return int(ended.value.code or 0), "".join(line for line in lines if not line.startswith("model-worker: "))


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, model_worker.cli; print({'torch', 'ray', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def config(**keys: Any) -> Callable[[Path], object]:
    """Changes a checkpoint's config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def write(name: str, content: bytes) -> Callable[[Path], object]:
    """Writes a file of a checkpoint."""
    return lambda folder: (folder / name).write_bytes(content)


def remove(pattern: str) -> Callable[[Path], object]:
    """Removes files of a checkpoint."""

    def unlink(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return unlink


DENSE = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("*"), "it has no config.json"),
        (remove("config.json"), "it has no config.json"),
        (write("config.json", b"[]"), "config.json is not a JSON object"),
        (remove("*token*"), "has no tokenizer.json: copy"),
        (remove("tokenizer.json"), "has no tokenizer.json: copy"),
        (write("tokenizer.json", b"{}"), "cannot read the tokenizer"),
        (write("tokenizer.json", b"\xff\n"), "cannot read the tokenizer"),
        (write("tokenizer_config.json", b"[1]"), "cannot read the tokenizer"),
        (config(quantization_config={"quant_method": "fp8"}), "is quantized"),
        (config(architectures=5), "is a checkpoint of 5; this worker serves"),
        (config(architectures=["Llama\nForCausalLM"]), "this worker serves"),
        (config(vocab_size="500"), "transformers refuses the config.json"),
        (config(eos_token_id=2**70), "eos_token_id of config.json"),
        (config(num_layers=10**9), "2,000,000,000 layers"),
        (config(n_routed_experts=10**9), "experts"),
        (write("model.safetensors.index.json", b'{"weight_map": null}'), "has no weight_map"),
        (write("generation_config.json", b"[]"), "generation_config.json is not a JSON object"),
        (write("generation_config.json", b'{"eos_token_id": [2, 500]}'), "generation_config.json holds 500"),
        (write("generation_config.json", b'{"watermarking_config": {"x": 1}}'), "cannot use generation_config.json"),
        (remove(DENSE), f"{DENSE}; fetch the checkpoint again"),
        (lambda folder: os.truncate(folder / DENSE, 1000), "fetch the checkpoint again"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    damage(folder)
    code, error = run(monkeypatch, capsys, "serve", str(folder), "--embeddings=127.0.0.1:1")
    assert code == 1
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not ray.is_initialized()


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
    monkeypatch.setattr(worker, "LOOKUP_TIMEOUT", 1.0)
    code, error = run(monkeypatch, capsys, "serve", str(model_folder), "--embeddings=127.0.0.1:1")
    assert code == 1
    assert "127.0.0.1:1" in error


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]"])
def test_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, host: str
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host.strip("[]"), 0), family=family) as taken:
        port = taken.getsockname()[1]
        arguments = ["serve", str(model_folder), "--embeddings=x:1", f"--host={host}", f"--port={port}"]
        code, error = run(monkeypatch, capsys, *arguments)
    assert code == 1
    shown = "[::1]" if ":" in host else host
    assert f"{shown}:{port} (Address already in use): give another --port" in error


def test_a_host_that_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    code, error = run(monkeypatch, capsys, "serve", str(model_folder), "--embeddings=x:1", "--host=192.0.2.1")
    assert code == 1
    assert "the host must be an address of this machine" in error


@pytest.mark.parametrize("option", ["--port=0", "--port=65536", "--port=70000", "--metrics-port=65536"])
def test_ports_that_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, option: str
) -> None:
    code, error = run(monkeypatch, capsys, "serve", str(model_folder), "--embeddings=x:1", option)
    assert code == 2
    assert option.partition("=")[0] in error


def test_it_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What takes long is said again, though the one who waits is busy."""
    monkeypatch.setattr(Waiting, "REPEAT_SECONDS", 600.0)
    with Waiting(PlainConsole(stderr=True), "model-worker") as progress:
        for line in ("checking /a [b]/c", "starting Ray", "starting Ray", "waiting\x1b[2J"):
            progress.say(line)
    lines = [line.rpartition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    waiting = "model-worker: waiting\\x1b[2J"
    assert lines == ["model-worker: checking /a [b]/c", "model-worker: starting Ray", waiting]
    monkeypatch.setattr(Waiting, "REPEAT_SECONDS", 0.05)
    with Waiting(PlainConsole(stderr=True), "model-worker") as progress:
        progress.say("waiting\x1b[2J")
        assert waiting in capsys.readouterr().err
        until(lambda: waiting in capsys.readouterr().err, "the line to be said again")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Traceback\n  File\nembedding_service.errors.StoreError: /c has no tensor 'x'\n", "/c has no tensor 'x'"),
        ("Traceback\n  File\nembedding_service.errors.NotFound: no model: 'a'", "no model: 'a'"),
        ("died\nMemoryError: of\x1b[0m", "MemoryError: of\\x1b[0m (the traceback is in the replica's log"),
    ],
)
def test_why_a_replica_does_not_start_is_one_line(message: str, reason: str) -> None:
    assert serving._reason(message).startswith(reason)


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
        (None, [("one", "1"), ("one+legal", "3")], ("one", "1")),
        ("one+legal", [("one", "1"), ("one+legal", "3")], ("one+legal", "3")),
    ],
)
def test_which_model_is_served(wanted: str | None, served: list[tuple[str, str]], expected: tuple[str, str]) -> None:
    picked = cli._pick(wanted, [ModelDescription(*each, "longcat", {}) for each in served])
    assert (picked.name, picked.version) == expected


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
    replica = Worker(WorkerConfig(folder, embeddings, name="small", version="1"))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(replica))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            body = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
            return await client.post("/v1/chat/completions", json=body)

    try:
        answer = asyncio.run(ask())
    finally:
        replica.close()
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages"
