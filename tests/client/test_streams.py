"""Lookups on streams against a real shard: both ways to hold one, streams that have ended, answers that do not come."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import Cluster, Up, cluster, until

from embedding_service import EmbeddingClient
from embedding_service.client import streams
from embedding_service.client.calls import Call
from embedding_service.client.streams import Ended, Stream
from embedding_service.client.transport import GrpcTransport
from embedding_service.client.trips import Watchdog
from embedding_service.errors import DeadlineExceeded, Unavailable
from embedding_service.placement.routing import Routing
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub
from embedding_service.wire.lookup_codec import Shape, encode_lookup

pytestmark = pytest.mark.service

KINDS = [streams._PollingStream, streams._PublicStream]


def serving(status: control.Status) -> bool:
    return bool(status.models) and all(model.serving for model in status.models)


@pytest.fixture(scope="module")
def one_shard(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("one"), store) as running:
        running.start_shard("a")
        running.wait_until(serving, "serving")
        yield running


@pytest.fixture
def channel(one_shard: Cluster) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(one_shard.addresses["a"], [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


def request(channel: grpc.Channel, ids: list[int], model: str = "fp32@1") -> bytes:
    routing = Routing(EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest(), timeout=120))
    rows = len(longcat_table())
    return encode_lookup(model, "ngram", wire.ROW_ENCODING_STORED, *routing.age, np.array(ids), rows).streamed


def assert_ended(outcome: bytes | Ended, code: grpc.StatusCode, message: str) -> None:
    assert isinstance(outcome, Ended)
    assert outcome.code is code
    assert message in outcome.message


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_answers_in_turn_and_outlives_errors(
    channel: grpc.Channel, kind: Callable[[grpc.Channel], Stream]
) -> None:
    stream = kind(channel)
    for number in range(5):
        ids = [number, 2 * number + 1]
        stream.send(request(channel, ids))
        answer = wire.StreamLookupResponse.FromString(stream.receive())
        assert torch.equal(
            torch.frombuffer(bytearray(answer.rows.rows), dtype=torch.float32).view(2, -1), longcat_table()[ids]
        )
        stream.send(request(channel, ids, "gone@7"))
        assert wire.StreamLookupResponse.FromString(stream.receive()).error.code == grpc.StatusCode.ABORTED.value[0]
    stream.cancel(grpc.StatusCode.CANCELLED, "enough")
    assert_ended(stream.receive(), grpc.StatusCode.CANCELLED, "enough")


@pytest.mark.parametrize("kind", KINDS)
def test_the_watchdog_ends_a_stream_whose_answer_is_late(
    one_shard: Cluster, channel: grpc.Channel, kind: Callable[[grpc.Channel], Stream]
) -> None:
    stream, watchdog = kind(channel), Watchdog()
    stream.send(request(channel, [1]))
    assert not isinstance(stream.receive(), Ended)
    late = request(channel, [2])
    one_shard.processes["a"].popen.send_signal(signal.SIGSTOP)
    try:
        watchdog.watch({stream: time.monotonic() + 0.3})
        stream.send(late)
        assert_ended(stream.receive(), grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time")
    finally:
        one_shard.processes["a"].popen.send_signal(signal.SIGCONT)
        watchdog.close()


def test_the_watchdog_lets_those_be_that_were_answered(channel: grpc.Channel) -> None:
    stream, watchdog = streams.open_stream(channel), Watchdog()
    watchdog.watch({stream: time.monotonic() + 0.2})
    watchdog.forget([stream])
    time.sleep(0.4)
    stream.send(request(channel, [3]))
    assert not isinstance(stream.receive(), Ended)
    watchdog.close()
    stream.cancel(grpc.StatusCode.CANCELLED, "enough")


def test_an_exchange_that_is_given_up_leaves_no_stream_taken(one_shard: Cluster, channel: grpc.Channel) -> None:
    transport, address = GrpcTransport(), one_shard.addresses["a"]
    routing = Routing(EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest(), timeout=120))

    def call(row: int) -> Call:
        table = routing.model("fp32").table("ngram")
        shape = Shape(1, table.row_bytes, table.dim, wire.ROW_ENCODING_STORED, "1")
        ids = np.array([row])
        asked = encode_lookup("fp32@1", "ngram", wire.ROW_ENCODING_STORED, *routing.age, ids, table.rows)
        return Call(address, asked, 20.0, shape)

    for count in (3, 1):
        answers = transport.exchange_in_turn([call(row) for row in range(count)])
        first = next(answers)
        assert first.rows.view(np.float32).tolist() == longcat_table()[0].tolist()
        assert len(transport._pools[address]._taken) == count - 1
        answers.close()
        assert not transport._pools[address]._taken
    transport.close()


def test_where_grpcs_internals_differ_the_public_stream_is_used(service: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Stream] = []

    class Seen(streams._PublicStream):
        def __init__(self, channel: grpc.Channel) -> None:
            super().__init__(channel)
            opened.append(self)

    monkeypatch.setattr(streams.grpc_core, "why_public", lambda: "its internals differ")
    monkeypatch.setattr(streams, "_PublicStream", Seen)
    with EmbeddingClient(service.address, near=False) as client:
        ids = torch.tensor([0, 7, len(longcat_table()) - 1])
        assert torch.equal(client.lookup("fp32/ngram", ids), longcat_table()[ids])
        assert opened
    before = threading.active_count()
    until(lambda: threading.active_count() <= before, "its threads to end")


def test_streams_that_ended_while_idle_are_replaced_without_a_failure(store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, store) as running:
        running.start_shard("a", "--drain-seconds=0")
        running.wait_until(serving, "serving")
        with EmbeddingClient(running.addresses["a"], timeout=60) as client:
            ids = torch.tensor([5, 6])
            assert torch.equal(client.lookup("fp32/ngram", ids), longcat_table()[ids])
            for how in (signal.SIGKILL, signal.SIGTERM):
                running.processes["a"].end(how)
                running.start_shard("a", "--drain-seconds=0")
                running.wait_until(serving, "serving again")
                assert torch.equal(client.lookup("fp32/ngram", ids), longcat_table()[ids])
            running.processes["a"].end(signal.SIGKILL)
            with pytest.raises((Unavailable, DeadlineExceeded), match=r"fp32@1/ngram .*row 5"):
                client.lookup("fp32/ngram", ids, timeout=1.0)
