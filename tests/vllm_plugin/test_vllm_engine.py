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
from engines import HERE, Answers, environment, needs_vllm
from small_models import SmallModel
from support.cluster import Up, free_port, until

pytestmark = needs_vllm
EOS = 2
SHORT = [[5, 6, 7, 8, 9, 10], [1, 33, 44], [100, EOS, 101, 102, EOS, EOS, 103]]
# Five chunks of 16 tokens beside others' tokens; its first 64 are a whole number of cache blocks.
LONG = [*range(110, 150), EOS, *range(200, 239)]
ROUNDS = [[*SHORT, LONG], [[*LONG[:64], 9, 9, 9], SHORT[0], [*LONG, 7]]]
CHUNKED = {"max_num_batched_tokens": 16, "enable_prefix_caching": True, "block_size": 32}
CPU = {"enforce_eager": True}
# A model, its class where the plugin's own is not the one, and options of the engine.
ENGINES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Latent attention is neither chunked nor cached on a CPU. One with AMX takes bfloat16 only, unless it is told.
    "longcat": ("longcat", "", {"dtype": "float32", "attention_backend": "CPU_MLA", **CPU}),
    "llama": ("llama", "ngram_llama:NgramLlama", {"dtype": "float32", **CPU, **CHUNKED}),
    "qwen": ("qwen", "model_worker.vllm.qwen4_exp:Qwen4ExpForCausalLM", {"dtype": "bfloat16", **CPU, **CHUNKED}),
    # With CUDA graphs.
    "longcat-gpu": ("longcat", "", {"dtype": "bfloat16"}),
    "qwen-gpu": ("qwen", "", {"dtype": "bfloat16"}),
}


def service(address: str, model: str) -> dict[str, Any]:
    return {"additional_config": {"embedding_service": {"address": address, "model": model}}}


def own_tables(model: str) -> dict[str, Any]:
    """Options for a model that holds its tables."""
    # vLLM's default is to keep Qwen4-Exp's in the host's memory, mapped into a GPU's addresses.
    return {"engram_config": {"cpu_offload": False}} if model == "qwen" else {}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.gpu] if name.endswith("-gpu") else []) for name in ENGINES]
)
def test_answers_and_memory(
    engine: str, models: dict[str, SmallModel], tables: Up, generate: Callable[..., Answers]
) -> None:
    name, model_class, options = ENGINES[engine]
    model, job = models[name], {"class": model_class, "max_tokens": 6, "rounds": ROUNDS}
    here = generate(model=str(model.whole), options={**options, **own_tables(name)}, **job)
    there = generate(model=str(model.tableless), options={**options, **service(tables.address, name)}, **job)
    assert there["rounds"] == here["rounds"]
    if "enable_prefix_caching" in options:
        assert [answer["cached"] for answer in there["rounds"][1]] == [64, 0, 64]
    assert here["parameters"] - there["parameters"] >= model.table_bytes
    # The rest of an engine takes more or less memory from start to start.
    if model.table_bytes > 64 << 20:
        assert here["loaded"] - there["loaded"] > model.table_bytes / 2


# They repeat themselves, so that drafts are made, and break off, so that some are rejected.
REPEATING = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [90, 91, 92, 93, 90, 91, 94, 90, 91], SHORT[0]]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}


@pytest.mark.timeout(1200)
def test_drafts_change_no_token(models: dict[str, SmallModel], tables: Up, generate: Callable[..., Answers]) -> None:
    """The look-back of vLLM takes rejected drafts for text (0.32), so plain decoding is what it is compared to."""
    name, model_class, options = ENGINES["llama"]
    job = {"class": model_class, "max_tokens": 16, "rounds": [REPEATING], "model": str(models[name].tableless)}
    options = {**options, **service(tables.address, name)}
    plain = generate(options=options, **job)
    drafted = generate(options={**options, "speculative_config": DRAFTS}, **job)
    [expected], [answers] = plain["rounds"], drafted["rounds"]
    assert [answer["tokens"] for answer in answers] == [answer["tokens"] for answer in expected]
    assert drafted["accepted"] < drafted["drafted"]


@pytest.mark.timeout(1200)
def test_the_server(
    models: dict[str, SmallModel], tables: Up, tmp_path: Path, generate: Callable[..., Answers]
) -> None:
    """Two processes: the HTTP server's, and the engine's that it starts."""
    model = models["longcat"]
    log, port = tmp_path / "server.log", free_port()
    options = ["--host=127.0.0.1", f"--port={port}", "--enforce-eager", "--max-model-len=256", "--dtype=float32"]
    options.append("--attention-backend=CPU_MLA")
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
    _, model_class, engine_options = ENGINES["longcat"]
    here = generate(
        model=str(model.whole), options=engine_options, **{"class": model_class, "max_tokens": 6, "rounds": ROUNDS}
    )
    assert choice["token_ids"] == here["rounds"][0][0]["tokens"]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
        return json.load(answer)
