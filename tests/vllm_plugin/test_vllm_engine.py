"""vLLM with its tables in the service generates what it generates with its own, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, Answers, SmallModel, environment, needs_vllm
from support.cluster import Up, free_port, until

pytestmark = needs_vllm
EOS = 2
SHORT = [[5, 6, 7, 8, 9, 10], [1, 33, 44], [100, EOS, 101, 102, EOS, EOS, 103]]
# Five chunks of 16 tokens beside others' tokens; its first 64 are a whole number of cache blocks.
LONG = [*range(110, 150), EOS, *range(200, 239)]
ROUNDS = [[*SHORT, LONG], [[*LONG[:64], 9, 9, 9], SHORT[0], [*LONG, 7]]]
CHUNKED = {"max_num_batched_tokens": 16, "enable_prefix_caching": True, "block_size": 32}
ENGINES: dict[str, dict[str, Any]] = {
    # Latent attention is neither chunked nor cached on a CPU.
    "longcat": {"class": "", "options": {"dtype": "float32"}},
    "llama": {"class": "ngram_llama:NgramLlama", "options": {"dtype": "float32", **CHUNKED}},
    "qwen": {"class": "model_worker.vllm.qwen4_exp:Qwen4ExpForCausalLM", "options": {"dtype": "bfloat16", **CHUNKED}},
}


def service(address: str, model: str) -> dict[str, Any]:
    return {"additional_config": {"embedding_service": {"address": address, "model": model}}}


def job(model: SmallModel, **options: Any) -> dict[str, Any]:
    """Of `generate`, with the model's own tables."""
    engine = ENGINES[model.name]
    # vLLM's default is to keep Qwen4-Exp's tables in the host's memory, mapped into a GPU's addresses.
    own = {"engram_config": {"cpu_offload": False}} if model.name == "qwen" else {}
    options = {**engine["options"], **(options or own)}
    return {"class": engine["class"], "options": options, "max_tokens": 6, "rounds": ROUNDS}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ENGINES)
def test_answers_and_memory(
    name: str, models: dict[str, SmallModel], tables: Up, generate: Callable[..., Answers]
) -> None:
    model = models[name]
    here = generate(model=str(model.whole), **job(model))
    there = generate(model=str(model.tableless), **job(model, **service(tables.address, name)))
    assert there["rounds"] == here["rounds"]
    if ENGINES[name]["options"].get("enable_prefix_caching"):
        assert [answer["cached"] for answer in there["rounds"][1]] == [64, 0, 64]
    assert here["parameters"] - there["parameters"] >= model.table_bytes
    # The rest of an engine takes more or less memory from start to start.
    if model.table_bytes > 64 << 20:
        assert here["loaded"] - there["loaded"] > model.table_bytes / 2


@pytest.mark.timeout(1200)
def test_the_server(
    models: dict[str, SmallModel], tables: Up, tmp_path: Path, generate: Callable[..., Answers]
) -> None:
    """Two processes: the HTTP server's, and the engine's that it starts."""
    model = models["longcat"]
    log, port = tmp_path / "server.log", free_port()
    options = ["--host=127.0.0.1", f"--port={port}", "--enforce-eager", "--max-model-len=256", "--dtype=float32"]
    settings = service(tables.address, "longcat")["additional_config"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                sys.executable,
                str(HERE / "serve.py"),
                f"--model={model.tableless}",
                "--served-model-name=longcat",
                f"--additional-config={json.dumps(settings)}",
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
    try:

        def ready() -> bool:
            assert server.poll() is None, log.read_text()[-8000:]
            return "Application startup complete" in log.read_text()

        until(ready, "the server", 540)
        request = {"prompt": SHORT[0], "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        [choice] = post(f"http://127.0.0.1:{port}/v1/completions", {"model": "longcat", **request})["choices"]
    finally:
        server.terminate()
        server.wait(60)
    here = generate(model=str(model.whole), **job(model))
    assert choice["token_ids"] == here["rounds"][0][0]["tokens"]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
        return json.load(answer)
