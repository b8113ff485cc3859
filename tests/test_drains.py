"""A server that ends: calls that arrived are answered, later ones are UNAVAILABLE, and none is CANCELLED."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from support.chaos import chaos_store
from support.checkpoints import DIM
from support.cluster import cluster, until
from support.toy import TOY, Request, toy_server

from embedding_service.front import base
from embedding_service.wire import embedding_pb2 as wire

pytestmark = pytest.mark.service

CALLS = 64
OWN = [("grpc.use_local_subchannel_pool", 1)]


@contextmanager
def calls_under_way(address: str, path: str, message: bytes, size: int) -> Iterator[Counter[str]]:
    """A plain client of gRPC's C core: CALLS calls at a time, and how they end. Answers have `size` bytes."""
    ended: Counter[str] = Counter()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                ended["OK" if len(call(message, timeout=120)) >= size else "wrong"] += 1
            except grpc.RpcError as error:
                ended[error.code().name] += 1
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    time.sleep(0.02)

    with grpc.insecure_channel(address, OWN) as channel:
        call = channel.unary_unary(path)
        threads = [threading.Thread(target=ask) for _ in range(CALLS)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: ended["OK"] > 2 * CALLS, "answers")
            yield ended
        finally:
            over.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize("service", ["q", "z"], ids=["answered at once", "answered by a task"])
def test_no_call_is_cancelled_by_a_server_that_ends(service: str, tmp_path: Path) -> None:
    for number in range(8):
        with ExitStack() as stack:
            with toy_server(str(tmp_path / f"private-{number}")) as toy:
                message = Request(service=service).SerializeToString()
                ended = stack.enter_context(calls_under_way(toy.address, f"/{TOY}/Quick", message, 3))
            until(lambda: ended["UNAVAILABLE"] > CALLS, "the end")  # noqa: B023
        assert set(ended) == {"OK", "UNAVAILABLE"}


def test_what_arrived_is_answered_and_what_comes_later_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "STOP_GRACE", 120.0)
    over = threading.Event()
    with (
        toy_server(str(tmp_path / "private")) as toy,
        grpc.insecure_channel(toy.address, OWN) as channel,
        ExitStack() as stack,
    ):
        wait = channel.unary_unary(f"/{TOY}/Wait")
        arrived = [wait.future(Request(service=str(n)).SerializeToString(), timeout=120) for n in range(CALLS)]
        stream = channel.stream_stream(f"/{TOY}/Each")(iter(over.wait, True), timeout=120)
        stack.callback(over.set)
        until(lambda: toy.toy.waiting == CALLS, "calls under way")
        ending = threading.Thread(target=lambda: toy.run(toy.server.stop()))
        ending.start()
        quick = channel.unary_unary(f"/{TOY}/Quick")

        def refused() -> grpc.Future | None:
            call = quick.future(Request(service="q").SerializeToString(), timeout=60)
            return call if call.code() is grpc.StatusCode.UNAVAILABLE else None

        assert "this server is ending" in until(refused, "the end to begin").details()
        toy.run(toy.toy.let_go())
        assert [Request.FromString(call.result()).service for call in arrived] == [str(n) for n in range(CALLS)]
        assert stream.code() is grpc.StatusCode.UNAVAILABLE
        ending.join()


def test_no_call_is_cancelled_by_shards_that_drain(tmp_path: Path) -> None:
    lookup = wire.LookupRequest(model="m", table="ngram", ids=range(0, 19000, 500)).SerializeToString()
    with cluster(tmp_path, chaos_store(tmp_path), "--replicas=2", "--expect-shards=3", "--grace=1") as running:
        for name in "abc":
            running.start_shard(name)
        until(lambda: running.is_whole(2), "two copies")
        for name in "ab":
            process = running.processes[name]
            with calls_under_way(
                running.addresses[name], "/embedding.v1.EmbeddingService/Lookup", lookup, 38 * 4 * DIM
            ) as ended:
                assert process.end() == 0
                until(lambda: ended["UNAVAILABLE"] > CALLS, "the end")
            assert "INFO drained" in process.output()
            assert set(ended) == {"OK", "UNAVAILABLE"}
            running.start_shard(name)
            until(lambda: running.is_whole(2), "two copies")
