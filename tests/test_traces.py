"""Traces of requests, read from the collector that the processes of a running service send them to."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import Up, until
from support.shards import PER_PART, Shards, routing

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
from support.collector import Collector, Span, tracing_here

from embedding_service import EmbeddingClient, tracing
from embedding_service.client.channels import open_channel
from embedding_service.client.router import Router
from embedding_service.client.traced import traced
from embedding_service.client.wants import StoredRows, Want
from embedding_service.placement.routing import Model, Routing
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import embedding_pb2_grpc

ROWS = len(longcat_table())
IDS = torch.arange(0, ROWS, 7)


@pytest.fixture
def here(collector: Collector) -> Iterator[None]:
    with tracing_here(collector):
        yield


@pytest.fixture
def traced_client(here: None, service: Up) -> Iterator[EmbeddingClient]:
    with EmbeddingClient(service.address, timeout=60, near=False) as client:
        yield client


def trace_of(collector: Collector, work: Callable[[], object], spans: int) -> dict[str, Span]:
    """The spans of what `work` does, under one span of the test's own."""
    with tracing.answering("test", "") as span:
        assert span is not None
        work()
    return collector.whole(span.trace_id, spans)


def children(trace: dict[str, Span], parent: Span) -> list[Span]:
    return [span for span in trace.values() if span.parent == parent.id]


def only(spans: list[Span]) -> Span:
    [span] = spans
    return span


def first(trace: dict[str, Span]) -> Span:
    return only([span for span in trace.values() if not span.parent])


def check_way(trace: dict[str, Span], ids: int) -> None:
    """A client's lookup over all three shards: each of its calls has a span here, and one at the shard under it."""
    lookup = only(children(trace, first(trace)))
    assert (lookup.name, lookup.kind, lookup.service) == ("lookup", "INTERNAL", "embedding-client")
    assert lookup.attributes["embedding.retries"] == lookup.attributes["embedding.hedges"] == 0
    assert (lookup.attributes["embedding.rows.near"], lookup.attributes["embedding.rows.wired"]) == (0, ids)
    calls = children(trace, lookup)
    assert {call.kind for call in calls} == {"CLIENT"}
    answers = [only(children(trace, call)) for call in calls]
    assert {(answer.kind, answer.service, answer.name) for answer in answers} == {
        ("SERVER", "embedding-shard", "Lookup")
    }
    assert {answer.instance for answer in answers} == {"shard-0", "shard-1", "shard-2"}
    for each in (calls, answers):
        assert sum(span.attributes["embedding.ids"] for span in each) == ids
        assert len({span.attributes["embedding.bytes"] // span.attributes["embedding.ids"] for span in each}) == 1
    for call, answer in zip(calls, answers, strict=True):
        assert call.attributes["embedding.bytes"] == answer.attributes["embedding.bytes"]
        assert answer.nanoseconds <= call.nanoseconds <= lookup.nanoseconds


@pytest.mark.service
def test_a_lookup_is_followed_from_the_client_to_each_shard(
    traced_client: EmbeddingClient, collector: Collector
) -> None:
    """On streams of a thread, which shards answer at once, and in unary calls of an event loop."""

    def check(rows: Any) -> None:
        assert torch.equal(rows, longcat_table()[IDS])

    check_way(trace_of(collector, lambda: check(traced_client.lookup("fp32/ngram", IDS)), 8), len(IDS))
    check_way(
        trace_of(collector, lambda: check(asyncio.run(traced_client.lookup_async("fp32/ngram", IDS))), 8), len(IDS)
    )
    check_way(trace_of(collector, lambda: check(traced_client.prefetch("fp32/ngram", IDS).result()), 8), len(IDS))


def near_of(client: EmbeddingClient) -> int:
    """Rows of one more lookup that were read in place."""
    before = client.statistics.near_rows
    client.lookup("fp32/ngram", IDS)
    return client.statistics.near_rows - before


@pytest.mark.service
def test_rows_that_are_read_in_place_are_told_from_the_others(here: None, service: Up, collector: Collector) -> None:
    with EmbeddingClient(service.address, timeout=60) as client:
        until(lambda: near_of(client) == len(IDS), "a near lookup")
        trace = trace_of(collector, lambda: client.lookup("fp32/ngram", IDS), 2)
    about = only(children(trace, first(trace))).attributes
    assert (about["embedding.rows.near"], about["embedding.rows.wired"]) == (len(IDS), 0)


@pytest.mark.service
@pytest.mark.parametrize("how", ["stream", "unary", "metadata"])
def test_a_shard_that_forwards_tells_whom_it_asked(here: None, service: Up, collector: Collector, how: str) -> None:
    """A thin client says its span in the request, or in a unary call's metadata as other languages' libraries do."""
    request = wire.LookupRequest(model="fp32", table="ngram", ids=IDS.tolist())

    def ask(channel: grpc.Channel, traceparent: str) -> wire.LookupResponse:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        if how == "metadata":
            return stub.Lookup(request, metadata=[(tracing.TRACEPARENT, traceparent)])
        request.traceparent = traceparent
        if how == "unary":
            return stub.Lookup(request)
        [answer] = stub.StreamLookup(iter([wire.StreamLookupRequest(request_id=5, lookup=request)]))
        return answer.rows

    with tracing.answering("test", "") as span, open_channel(service.address, None) as channel:
        assert span is not None
        answer = ask(channel, span.traceparent)
    assert np.array_equal(np.frombuffer(answer.rows, "<f4").reshape(len(IDS), -1), longcat_table()[IDS].numpy())
    trace = collector.whole(span.trace_id, 6)
    door = only(children(trace, first(trace)))
    assert (door.kind, door.service, door.attributes["embedding.ids"]) == ("SERVER", "embedding-shard", len(IDS))
    calls = children(trace, door)
    answers = [only(children(trace, call)) for call in calls]
    assert {call.service for call in calls} == {"embedding-shard"}
    assert {door.instance} | {answer.instance for answer in answers} == {"shard-0", "shard-1", "shard-2"}
    forwarded = sum(answer.attributes["embedding.ids"] for answer in answers)
    assert 0 < forwarded == door.attributes["embedding.forwarded_ids"] < len(IDS)


@pytest.mark.service
def test_errors_are_told_and_nobody_traces_for_who_does_not(here: None, service: Up, collector: Collector) -> None:
    with open_channel(service.address, None) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        with tracing.answering("test", "") as span:
            assert span is not None
            with pytest.raises(grpc.RpcError):
                stub.Lookup(wire.LookupRequest(model="fp32", table="no", ids=[1], traceparent=span.traceparent))
        failed = only(children(trace := collector.whole(span.trace_id, 2), first(trace)))
        assert "no table 'no'" in failed.failed
        before = collector.traces()
        other = "00-" + "c" * 32 + "-" + "d" * 16
        for traceparent in ("", f"{other}-00", f"{other}-0", f"00-{'0' * 32}-{'0' * 16}-01", "nonsense", "x" * 9000):
            answer = stub.Lookup(wire.LookupRequest(model="fp32", table="ngram", ids=[5], traceparent=traceparent))
            assert len(answer.rows) == 4 * answer.dim
        with tracing.answering("test", "") as last:
            assert last is not None
            stub.Lookup(wire.LookupRequest(model="fp32", table="ngram", ids=[5], traceparent=last.traceparent))
        # What the same shard made before it comes with it.
        until(lambda: len(collector.of(last.trace_id)) >= 2, "the last lookup's spans")
    assert collector.traces() - before == {last.trace_id}


def test_what_is_asked_again_is_told_from_what_is_asked_of_another(here: None, collector: Collector) -> None:
    """Shards without a network: one hangs, and one is gone."""
    shards = Shards(routing([[0, 1], [1, 2], [2, 0], [0, 1]]))
    router = Router(["h:0"], Routing(shards.now))

    def fetch(ids: list[int]) -> None:
        def wants_of(model: Model) -> list[Want]:
            return [Want(model.table("t"), np.array(ids), wire.ROW_ENCODING_STORED, 8, StoredRows(len(ids), 8))]

        span = tracing.inside("lookup")
        assert span is not None
        with span:
            shards.run(traced(router.fetch("m", wants_of, router._clock() + 60), span))

    def rounds(trace: dict[str, Span]) -> tuple[Span, list[Span]]:
        lookup = only(children(trace, first(trace)))
        return lookup, sorted(children(trace, lookup), key=lambda call: call.attributes["embedding.round"])

    for owner, sibling in ((1, 2), (2, 1)):
        shards.hanging = {f"h:{owner}"}
        fetched: list[Span] = []
        while not fetched or fetched[-1].attributes["embedding.round"] == 1:  # until its turn to be asked comes
            with tracing.answering("test", "") as span:
                fetch([PER_PART])
            assert span is not None
            tracing.tracer._provider.force_flush()  # type: ignore[union-attr, attr-defined]
            lookup, fetched = rounds({each.id: each for each in collector.of(span.trace_id)})
        late, again = fetched
        assert (lookup.attributes["embedding.hedges"], lookup.attributes["embedding.retries"]) == (1, 0)
        assert "DEADLINE_EXCEEDED" in late.failed and not again.failed
        assert (late.attributes["server.port"], again.attributes["server.port"]) == (owner, sibling)
        assert (late.attributes["embedding.hedge"], again.attributes["embedding.hedge"]) == (False, True)
        shards.hanging = set()
        router = Router(["h:0"], Routing(shards.now))
    shards.now = routing([[0], [0], [0], [0]], epoch=2)
    trace = trace_of(collector, lambda: fetch([PER_PART]), 4)
    lookup, fetched = rounds(trace)
    assert (lookup.attributes["embedding.hedges"], lookup.attributes["embedding.retries"]) == (0, 1)
    assert "ABORTED" in fetched[0].failed and not fetched[1].attributes["embedding.hedge"]


@pytest.mark.parametrize(
    ("name", "argument", "first", "below"),
    [
        ("always_on", "", True, (True, True)),
        ("always_off", "", False, (False, False)),
        ("traceidratio", "0.5", None, (True, False)),
        ("parentbased_always_on", "", True, (False, True)),
        ("parentbased_always_off", "", False, (False, True)),
        ("parentbased_traceidratio", "0", False, (False, True)),
        ("parentbased_traceidratio", "", True, (False, True)),
    ],
)
def test_samplers_are_opentelemetrys(name: str, argument: str, first: bool | None, below: tuple[bool, bool]) -> None:
    """Of a span that begins a trace, of one under a span that is not recorded, and of one under one that is."""
    from opentelemetry.trace import SpanContext, TraceFlags

    sampler = tracing.Sampler(name, argument)
    taken = {sampler.takes(None) for _ in range(200)}
    assert taken == ({True, False} if first is None else {first})
    low, high = SpanContext(1, 1, True, TraceFlags(0)), SpanContext((1 << 64) - 1, 1, True, TraceFlags(1))
    assert (sampler.takes(low), sampler.takes(high)) == below


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"OTEL_TRACES_SAMPLER": "some"}, "OTEL_TRACES_SAMPLER must be always_on, always_off, traceidratio .* 'some'"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, "must be a number from 0 to 1"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER must be otlp or none, got 'zipkin'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, r"must be http/protobuf \(port 4318\), got 'grpc'"),
        ({"OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ""),
    ],
)
def test_variables_that_ask_for_no_traces_start_none(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracing, "_warned", set())
    with caplog.at_level("WARNING"):
        tracing.start("embedding-client")
        tracing.start("embedding-client")
    assert tracing.tracer is None
    assert len(caplog.messages) == bool(told)
    assert re.search(told, caplog.text)


def test_a_program_s_own_provider_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sampler decides, and it is the program's to end."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    tracing.start("embedding-client")
    try:
        with provider.get_tracer("program").start_as_current_span("request"), tracing.inside("lookup") or pytest.fail():
            pass
    finally:
        tracing.stop()
    lookup, request = kept.get_finished_spans()
    assert (lookup.name, request.name) == ("lookup", "request")
    assert lookup.parent is not None and lookup.parent.span_id == request.context.span_id
