"""The spans of a lookup's calls (docs/tracing.md). A lookup that is not traced does not come here."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any, TypeVar

import grpc

from embedding_service import tracing
from embedding_service.client.calls import Call, Failure
from embedding_service.client.steps import Aside, Exchange, Steps
from embedding_service.machine import split_address
from embedding_service.tracing import Span
from embedding_service.wire.lookup_codec import EncodedLookup, with_traceparent

T = TypeVar("T")


def traced(steps: Steps[T], lookup: Span) -> Steps[T]:
    """The same steps, where each call for rows has a span under the lookup's and tells the shard of it.

    The lookup's span is told how often shards were asked again: because they failed, or because others might be faster.
    """
    this = _Rounds(lookup)
    outcome: Any = None
    try:
        while True:
            step = steps.send(outcome)
            if isinstance(step, Exchange) and step.calls and step.calls[0].shape is not None:
                spans, calls = this.begin(step.calls)
                outcome = this.watch(spans, (yield step._replace(calls=calls)))
            else:
                if not isinstance(step, Aside):
                    this.late = False
                outcome = yield step
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        steps.close()
        this.close()


class _Rounds:
    """Calls that are made at the same time are a round.

    Attributes:
        late: Whether all that failed in the last round had taken unusually long, and nothing was done since.
    """

    def __init__(self, lookup: Span) -> None:
        self._lookup = lookup
        self._rounds = self._hedges = 0
        self._open: list[Span | None] = []
        self.late = False

    def begin(self, calls: Sequence[Call]) -> tuple[list[Span | None], list[Call]]:
        """Spans of these calls, and the calls with them."""
        self._hedges += self.late
        self._rounds += 1
        spans = [self._begin(call) for call in calls]
        self._open = [*spans]
        return spans, [call if span is None else _with(call, span) for call, span in zip(calls, spans, strict=True)]

    def _begin(self, call: Call) -> Span | None:
        assert tracing.tracer is not None and call.shape is not None
        host, port = split_address(call.address)
        return tracing.tracer.asking(
            "Lookup",
            self._lookup,
            {
                "rpc.system.name": "grpc",
                "server.address": host,
                "server.port": port,
                "embedding.ids": call.shape.count,
                "embedding.bytes": call.shape.nbytes,
                "embedding.round": self._rounds,
                "embedding.hedge": self.late,
            },
        )

    def watch(self, spans: Sequence[Span | None], outcomes: Any) -> Any:
        """The same outcomes, which end the spans."""
        if isinstance(outcomes, Generator):
            return self._each(spans, outcomes)
        return list(self._each(spans, outcomes))

    def _each(self, spans: Sequence[Span | None], outcomes: Iterable[Any]) -> Generator[Any, None, None]:
        failures = []
        for span, outcome in zip(spans, outcomes, strict=True):
            if isinstance(outcome, Failure):
                failures.append(outcome.code)
            self.late = bool(failures) and all(code is grpc.StatusCode.DEADLINE_EXCEEDED for code in failures)
            if span is not None:
                if isinstance(outcome, Failure):
                    span.fail(f"{outcome.code.name}: {outcome.message}")
                span.end()
                self._open.remove(span)
            yield outcome

    def close(self) -> None:
        """Nobody waits for what is still under way."""
        for span in self._open:
            if span is not None:
                span.fail("given up")
                span.end()
        retries = max(self._rounds - 1, 0) - self._hedges
        self._lookup.note({"embedding.retries": retries, "embedding.hedges": self._hedges})


def _with(call: Call, span: Span) -> Call:
    assert isinstance(call.request, EncodedLookup)
    return call._replace(request=with_traceparent(call.request, span.traceparent))
