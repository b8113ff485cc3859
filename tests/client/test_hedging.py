"""A second owner is asked when the first takes long; the first good answer counts."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import serving, until

from embedding_service import EmbeddingClient
from embedding_service.client.hedging import LEAST, HedgingTransport
from embedding_service.client.transport import Call, Failure, Transport
from embedding_service.wire import embedding_pb2 as wire

REQUEST = wire.LookupRequest().SerializeToString()
GONE = Failure(grpc.StatusCode.UNAVAILABLE, "gone")


class Scripted(Transport):
    """Answers "fast" at once and leaves "slow" until the test answers it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.open: dict[str, Future[Any]] = {}

    def send(self, call: Call) -> Future[Any]:
        self.asked.append(call.address)
        future: Future[Any] = Future()
        if call.address == "fast":
            future.set_result("answer of fast")
        elif call.address == "gone":
            future.set_result(GONE)
        else:
            self.open[call.address] = future
        return future


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def hedging(scripted: Scripted) -> Iterator[HedgingTransport]:
    transport = HedgingTransport(scripted)
    yield transport
    transport.close()


def measure(hedging: HedgingTransport) -> None:
    for _ in range(LEAST):
        hedging.send(Call("fast", REQUEST, 1.0)).result(5)
    assert hedging.delay is not None


def call(first: str, second: str | None) -> Call:
    return Call(first, REQUEST, 1.0, Call(second, REQUEST, 1.0) if second else None)


def test_nothing_is_asked_twice_before_enough_was_measured(hedging: HedgingTransport, scripted: Scripted) -> None:
    future = hedging.send(call("slow", "fast"))
    scripted.open["slow"].set_result("late")
    assert future.result(5) == "late"
    assert scripted.asked == ["slow"]


def test_the_second_answers_for_a_slow_first(hedging: HedgingTransport, scripted: Scripted) -> None:
    measure(hedging)
    assert hedging.send(call("slow", "fast")).result(5) == "answer of fast"
    scripted.open["slow"].set_result("late, and ignored")


def test_a_quick_first_is_enough(hedging: HedgingTransport, scripted: Scripted) -> None:
    measure(hedging)
    assert hedging.send(call("fast", "never asked")).result(5) == "answer of fast"


def test_a_failure_counts_only_when_nobody_is_left(hedging: HedgingTransport, scripted: Scripted) -> None:
    measure(hedging)
    future = hedging.send(call("slow", "gone"))
    until(lambda: "gone" in scripted.asked, "the second to be asked")
    assert not future.done()
    scripted.open["slow"].set_result("the first after all")
    assert future.result(5) == "the first after all"
    assert hedging.send(call("gone", "fast")).result(5) in (GONE, "answer of fast")


@pytest.mark.service
def test_a_client_that_hedges_gets_the_same_rows(store: Path, tmp_path: Path) -> None:
    with serving(tmp_path, store, 3, replicas=2) as running, EmbeddingClient(running.address, hedge=True) as client:
        for seed in range(40):
            ids = torch.randint(0, len(longcat_table()), (200,), generator=torch.Generator().manual_seed(seed))
            assert torch.equal(client.lookup("fp32/ngram", ids), longcat_table()[ids])
        assert client._transport.delay is not None  # type: ignore[attr-defined]
