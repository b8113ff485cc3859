"""A server that scales and keeps rows: replicas come and go, finish what they run, and the shards notice nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.cluster import Up, until
from test_serve import PROMPT, Server

pytestmark = [pytest.mark.service, pytest.mark.heavy]

# Seconds that a long answer takes: more than it takes until a replica goes that is not needed.
LONG_SECONDS = 30.0
LONGEST, MEASURED = 20_000, 200


@pytest.fixture(scope="module")
def server(model_folder: Path, tables: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One or two replicas, scaled within seconds, of a model with room for long answers. On IPv6, which works too."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("long") / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2 * LONGEST}
    (folder / "config.json").write_text(json.dumps(config))
    scaling = ("--max-replicas=2", "--max-batch=4", "--upscale-delay=1", "--downscale-delay=12", "--drain-seconds=250")
    options = (*scaling, "--cache-bytes=1MiB", "--no-near")
    running = Server(folder.parent / "log", folder, tables.address, *options, host="::1")
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.end()


def replicas(server: Server) -> set[int]:
    """The processes of replicas."""
    found = set()
    for process in server.family():
        try:
            if "ServeReplica" in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def load(server: Server, users: int) -> Iterator[None]:
    """`users` users who ask, one request after the other."""
    enough = threading.Event()

    def user() -> None:
        while not enough.is_set():
            body = {"model": "small", "prompt": PROMPT, "max_tokens": 50}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=240).status_code == 200

    with ThreadPoolExecutor(users) as pool:
        asking = [pool.submit(user) for _ in range(users)]
        try:
            yield
        finally:
            enough.set()
        for each in asking:
            each.result()


def answer_of(server: Server, tokens: int) -> dict[str, Any]:
    """The answer to PROMPT that many tokens long."""
    body = {"model": "small", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == tokens
    return answer.json()


def tokens_of_long_answer(server: Server) -> int:
    """As many as this machine makes in LONG_SECONDS."""
    began = time.monotonic()
    answer_of(server, MEASURED)
    return min(LONGEST, int(LONG_SECONDS * MEASURED / (time.monotonic() - began)))


def busy(server: Server) -> set[str]:
    """Replicas that run something, by the metrics: calls prefer the replicas that do not."""
    return {
        sample.labels["replica"]
        for family in text_string_to_metric_families(httpx.get(server.metrics_url(), timeout=60).text)
        for sample in family.samples
        if sample.name == "ray_model_worker_batch_requests" and sample.value
    }


def test_rows_that_are_cached_are_not_asked_for(server: Server, tables: Up) -> None:
    """Its counts are told and exported; while the service is away they still answer, and its health is not theirs."""

    def ask() -> str:
        return str(answer_of(server, 12)["choices"][0]["text"])

    def exported() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(server.metrics_url(), timeout=60).text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    assert f"ready at http://[::1]:{server.port}/v1" in server.log.read_text()
    first, before = ask(), server.info()
    assert ask() == first
    after = server.info()
    assert after["cache_hits"] > before["cache_hits"]
    assert after["cache_misses"] >= before["cache_misses"] > 0
    told = {f"ray_model_worker_{name}_total": after[name] for name in ("cache_hits", "cache_misses")}
    until(lambda: told.items() <= exported().items(), "the counts")
    assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200
    tables.end()
    try:
        assert ask() == first
        assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 503
    finally:
        tables.restart()
    until(lambda: httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200, "health")


@pytest.mark.timeout(600)
def test_replicas_come_with_the_load_and_go_when_it_is_over(server: Server, tables: Up) -> None:
    shards = {process.pid for process in tables.family()}
    assert len(replicas(server)) == 1
    tokens = tokens_of_long_answer(server)
    with load(server, users=16):
        until(lambda: len({server.info()["pid"] for _ in range(10)}) == 2, "a second replica to answer")
    both = replicas(server)
    assert len(both) == 2
    until(lambda: not busy(server), "the load to be over")
    with ThreadPoolExecutor(2) as pool:
        answers: list[Future[dict[str, Any]]] = []
        for number in (1, 2):
            answers.append(pool.submit(answer_of, server, tokens))
            until(lambda number=number: len(busy(server)) == number, f"{number} replicas to be busy")  # type: ignore[misc]
        # One replica could hold both: the other goes, and no new request reaches it.
        until(lambda: len({server.info()["pid"] for _ in range(20)}) == 1, "new requests to go to one replica")
        assert [answer.done() for answer in answers] == [False, False]
        assert replicas(server) == both
        for answer in answers:
            answer.result()
    until(lambda: len(replicas(server)) == 1, "the second replica to go")
    assert {process.pid for process in tables.family()} == shards


def test_a_replica_that_is_killed_is_told_to_those_that_it_answered(server: Server) -> None:
    body = {"model": "small", "prompt": PROMPT, "max_tokens": LONGEST, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(httpx.post, url, json=body, timeout=240)
        streamed = pool.submit(httpx.post, url, json={**body, "stream": True}, timeout=240)
        until(lambda: sum(server.info()[name] for name in ("running", "waiting")) == 2, "both to run")
        for each in replicas(server):
            os.kill(each, signal.SIGKILL)
        assert (whole.result().status_code, whole.result().headers["Retry-After"]) == (503, "1")
        last = streamed.result().text.rstrip().split("\n\n")[-1]
        for told in (whole.result().text, last.removeprefix("data: ")):
            assert "the replica was gone" in json.loads(told)["error"]["message"]
    until(lambda: httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200, "another replica")
    assert answer_of(server, 12)
