"""vLLM as a replica's engine: what the worker adds to it. It needs no vLLM here (tests/vllm_plugin runs the whole)."""

from __future__ import annotations

import asyncio
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from support.security import write_policy

from embedding_service.errors import InvalidRequest
from model_worker import vllm
from model_worker.cli import engine_words
from model_worker.keys import Admission, Keys
from model_worker.vllm.admission import OneModel, Placed, Places
from model_worker.vllm.replica import EngineCounts, table_settings
from model_worker.worker import WorkerConfig

pytestmark = pytest.mark.slow


def test_without_vllm_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("model_worker.cli.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=r"needs vLLM.*pip install 'embedding-service\[worker,vllm\]'"):
        engine_words(config())


def test_words_for_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_worker.cli.find_spec", lambda name: SimpleNamespace())
    words = ["--dtype", "float32", "--hf-overrides", '{"a": 1}']
    assert engine_words(config(engine_args="--dtype float32 --hf-overrides '{\"a\": 1}'")) == words
    with pytest.raises(InvalidRequest, match="not a command line"):
        engine_words(config(engine_args="'--dtype"))
    with pytest.raises(InvalidRequest, match="say --engine vllm"):
        engine_words(replace(config(engine_args="--dtype float32"), engine="embedded"))


def test_a_checkpoint_that_the_plugin_does_not_serve(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(InvalidRequest, match=r"LlamaForCausalLM.*--engine vllm this worker serves.*DeepseekV41"):
        vllm.check(tmp_path)


def config(**more: Any) -> WorkerConfig:
    return WorkerConfig(Path("/checkpoint"), "localhost:7070", name="model", version="3", engine="vllm", **more)


def test_what_the_plugin_is_told() -> None:
    address = {"address": "localhost:7070"}
    assert table_settings(config()) == {**address, "model": "model", "near": True}
    more = {"near": False, "topology": "zone-a", "cache_bytes": "1MiB"}
    told = table_settings(config(pinned=True, imported_as="model@1", **more))
    assert told == {**address, "model": "model@3", "checkpoint": "model@1", **more, "cache_bytes": 1 << 20}


def test_an_engines_counts_are_the_workers() -> None:
    first_tokens: list[float] = []
    counted = EngineCounts(SimpleNamespace(first_token=first_tokens.append))  # type: ignore[arg-type]
    scheduler = SimpleNamespace(num_running_reqs=2, num_waiting_reqs=3, num_skipped_waiting_reqs=1)
    step = SimpleNamespace(num_prompt_tokens=40, num_generation_tokens=2, time_to_first_tokens_iter=[0.5, 0.25])
    counted.record(scheduler, step)
    counted.record(None, SimpleNamespace(num_prompt_tokens=0, num_generation_tokens=2, time_to_first_tokens_iter=[]))
    counted.record(SimpleNamespace(num_running_reqs=1, num_waiting_reqs=0, num_skipped_waiting_reqs=0), None)
    expected = {"requests": 2, "running": 1, "waiting": 0, "prompt_tokens": 40, "generated_tokens": 4}
    assert counted.counts == expected
    assert first_tokens == [0.5, 0.25]


def test_more_requests_than_places_get_429() -> None:
    async def run() -> None:
        go, begun = asyncio.Event(), asyncio.Semaphore(0)

        async def work(request: Request) -> Response:
            if request.method == "POST":
                begun.release()
                await go.wait()
            return PlainTextResponse("done")

        places = Places(2)
        app = Starlette(routes=[Route("/v1/completions", work, methods=["GET", "POST"])])
        app.add_middleware(Placed, places=places)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as http:
            running = [asyncio.ensure_future(http.post("/v1/completions")) for _ in range(2)]
            for _ in running:
                await begun.acquire()
            refused = await http.post("/v1/completions")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "server_busy")
            assert refused.headers["Retry-After"]
            assert (await http.get("/v1/completions")).status_code == 200
            go.set()
            assert [(await each).status_code for each in running] == [200, 200]
            assert (await http.post("/v1/completions")).status_code == 200
        assert (places.taken, places.refused) == (0, 1)

    asyncio.run(run())


def test_s8_a_key_opens_the_model_and_admin_the_rest(tmp_path: Path) -> None:
    identities: dict[str, Any] = {
        "reader": {"tokens": ["reader-key"], "read": ["model"]},
        "other": {"tokens": ["other-key"], "read": ["another"]},
        "counted": {"tokens": ["counted-key"], "read": ["model"], "tokens_per_second": 5},
        "boss": {"tokens": ["boss-key"], "rights": ["admin"], "read": ["model"]},
        "watcher": {"tokens": ["watcher-key"], "rights": ["metrics"]},
    }
    keys = Keys(write_policy(tmp_path, identities))
    app = Starlette(routes=[Route("/{path:path}", lambda request: PlainTextResponse("in"), methods=["GET", "POST"])])
    app.add_middleware(OneModel, name="model", version="3")
    app.add_middleware(Admission, keys=keys)
    try:
        with TestClient(app) as http:

            def asked(key: str | None, path: str) -> int:
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                return http.post(path, headers=headers).status_code

            model, rest = "/v1/chat/completions", "/metrics"
            assert [asked(None, path) for path in (model, rest, "/healthz")] == [401, 401, 200]
            assert [asked("reader-key", path) for path in (model, rest)] == [200, 403]
            assert [asked("other-key", path) for path in (model, rest)] == [403, 403]
            assert [asked("counted-key", path) for path in (model, rest)] == [403, 403]
            assert [asked("watcher-key", path) for path in (model, rest, "/v1/worker")] == [403, 403, 200]
            assert [asked("boss-key", path) for path in (model, rest)] == [200, 200]
    finally:
        keys.close()
