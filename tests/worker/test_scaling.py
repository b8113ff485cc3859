"""Ray Serve scales the replicas with the load; a replica that goes finishes what it runs; the shards notice nothing."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.cluster import Up, until
from test_serve import PROMPT, Server

pytestmark = [pytest.mark.service, pytest.mark.heavy]

LONG = 9000


@pytest.fixture
def server(model_folder: Path, tables: Up, tmp_path: Path) -> Iterator[Server]:
    """One or two replicas, scaled within seconds, of a model with room for long answers."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2 * LONG}
    (folder / "config.json").write_text(json.dumps(config))
    options = ["--max-replicas=2", "--max-batch=4", "--upscale-delay=1", "--downscale-delay=12", "--drain-seconds=200"]
    running = Server(tmp_path / "log", folder, tables.address, *options)
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


def long_answer(server: Server) -> int:
    """The tokens of a long answer."""
    body = {"model": "small", "prompt": PROMPT, "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=240)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    return answer.json()["usage"]["completion_tokens"]


def busy(server: Server) -> set[str]:
    """Replicas that run something, by the metrics: calls prefer the replicas that do not."""
    return {
        sample.labels["replica"]
        for family in text_string_to_metric_families(httpx.get(server.metrics_url(), timeout=60).text)
        for sample in family.samples
        if sample.name == "ray_model_worker_batch_requests" and sample.value
    }


@pytest.mark.timeout(600)
def test_replicas_come_with_the_load_and_go_when_it_is_over(server: Server, tables: Up) -> None:
    shards = {process.pid for process in tables.family()}
    assert len(replicas(server)) == 1
    with load(server, users=16):
        until(lambda: len({server.info()["pid"] for _ in range(10)}) == 2, "a second replica to answer")
    both = replicas(server)
    assert len(both) == 2
    until(lambda: not busy(server), "the load to be over")

    with ThreadPoolExecutor(2) as pool:
        answers: list[Future[int]] = []
        for number in (1, 2):
            answers.append(pool.submit(long_answer, server))
            until(lambda number=number: len(busy(server)) == number, f"{number} replicas to be busy")  # type: ignore[misc]
        # One replica could hold both: the other goes, and no new request reaches it.
        until(lambda: len({server.info()["pid"] for _ in range(20)}) == 1, "new requests to go to one replica")
        assert [answer.done() for answer in answers] == [False, False]
        assert replicas(server) == both
        assert [answer.result() for answer in answers] == [LONG, LONG]
    until(lambda: len(replicas(server)) == 1, "the second replica to go")
    assert {process.pid for process in tables.family()} == shards
