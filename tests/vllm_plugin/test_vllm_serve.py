"""`model-worker serve --engine vllm`: vLLM under Ray Serve, asked over HTTP with the openai package."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from engines import HERE, Answers, environment, needs_vllm
from prometheus_client.parser import text_string_to_metric_families
from small_models import SmallModel
from support.cluster import Up, free_port, until
from test_vllm_engine import ENGINES, ROUNDS, SHORT

pytestmark = [needs_vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

START_SECONDS = 900
WORDS = "--dtype float32 --attention-backend CPU_MLA --enforce-eager --max-model-len 256"
SCALING = ("--max-replicas=2", "--max-batch=1", "--upscale-delay=1", "--downscale-delay=5", "--drain-seconds=300")
BODY: dict[str, Any] = {
    "model": "longcat",
    "prompt": SHORT[0],
    "max_tokens": 6,
    "temperature": 0,
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}


class Server:
    """The command in a process of its own. Kernels of its engines are interpreted."""

    def __init__(self, log: Path, model: SmallModel, embeddings: str) -> None:
        self.log, self.port = log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        here = environment()
        path = os.pathsep.join((str(HERE / "site"), str(HERE), here["PYTHONPATH"]))
        options = (f"--embeddings={embeddings}", f"--port={self.port}", "--name=longcat", *SCALING)
        with log.open("wb") as output:
            self.popen = psutil.Popen(
                [
                    *(sys.executable, "-m", "model_worker", "serve", str(model.tableless), *options),
                    *("--engine=vllm", f"--engine-args={WORDS}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=here | {"PYTHONPATH": path, "RAY_metrics_report_interval_ms": "1000"},
            )

    def wait_until_ready(self) -> None:
        def printed() -> bool:
            assert self.popen.poll() is None, self.log.read_text()[-8000:]
            return " ready at " in self.log.read_text()

        until(printed, "the server", START_SECONDS)

    def replicas(self) -> set[int]:
        """The processes of replicas."""
        found = set()
        for process in self.popen.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "ServeReplica" in " ".join(process.cmdline()):
                    found.add(process.pid)
        return found

    def info(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/v1/worker", timeout=300).raise_for_status().json()

    def exported(self) -> dict[str, float]:
        """The newest value of each metric, of any replica."""
        [address] = re.findall(r"metrics at (\S+)\)", self.log.read_text())
        families = text_string_to_metric_families(httpx.get(address, timeout=300).text)
        return {sample.name: sample.value for family in families for sample in family.samples}


@pytest.fixture(scope="module")
def server(models: dict[str, SmallModel], tables: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("vllm-serve") / "log", models["longcat"], tables.address)
    try:
        running.wait_until_ready()
        yield running
    finally:
        with suppress(psutil.NoSuchProcess):  # the last test ends it
            family = [running.popen, *running.popen.children(recursive=True)]
            running.popen.terminate()
            for process in psutil.wait_procs(family, timeout=60)[1]:
                process.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)


def test_answers_are_those_of_local_tables(
    client: openai.OpenAI, models: dict[str, SmallModel], generate: Callable[..., Answers]
) -> None:
    answer = client.completions.create(**BODY)
    _, model_class, options = ENGINES["longcat"]
    job = {"class": model_class, "max_tokens": 6, "rounds": ROUNDS}
    here = generate(model=str(models["longcat"].whole), options=options, **job)
    assert answer.choices[0].model_dump()["token_ids"] == here["rounds"][0][0]["tokens"]
    chunks = client.completions.create(stream=True, **BODY)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer.choices[0].text
    assert [model.id for model in client.models.list()] == ["longcat"]


def test_a_domain_is_none_of_its_models(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"longcat\+legal"):
        client.completions.create(**BODY | {"model": "longcat+legal"})


def test_counts_have_the_workers_names(server: Server) -> None:
    assert httpx.get(f"{server.url}/healthz", timeout=300).json() == {"status": "ok"}
    info = server.info()
    assert (info["model"], info["engine"]) == ("longcat@1", "vllm")
    assert info["requests"] >= 2
    assert info["generated_tokens"] >= 12
    names = ("requests_total", "prompt_tokens_total", "generated_tokens_total", "time_to_first_token_seconds_count")
    until(lambda: all(server.exported().get(f"ray_model_worker_{name}", 0) > 0 for name in names), "the metrics")
    # The engine's process has the client. Its counts come every few seconds.
    rows = ("near_rows", "wired_rows")
    until(lambda: sum(server.info().get(name, 0) for name in rows) > 0, "the counts of rows")


def test_replicas_come_with_the_load_and_go_when_it_is_over(server: Server, client: openai.OpenAI) -> None:
    assert len(server.replicas()) == 1
    enough = threading.Event()

    def user() -> None:
        while not enough.is_set():
            assert client.completions.create(**BODY).choices

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(user) for _ in range(4)]
        try:
            until(lambda: len({server.info()["pid"] for _ in range(6)}) == 2, "a second replica", START_SECONDS)
        finally:
            enough.set()
        for each in users:
            each.result()
    until(lambda: len(server.replicas()) == 1, "the second replica to go", START_SECONDS)
    assert client.completions.create(**BODY).choices


def test_a_signal_lets_requests_end(server: Server, client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: client.completions.create(**BODY | {"max_tokens": 40}))
        until(lambda: server.info()["running"] == 1, "the request to run", START_SECONDS)
        server.popen.send_signal(signal.SIGTERM)
        usage = answer.result().usage
        assert usage and usage.completion_tokens == 40
    assert server.popen.wait(START_SECONDS) == 0
