"""Answering lookups from rows that are held: what every process of a shard can do by itself."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from prometheus_client.core import Exemplar, HistogramMetricFamily

from embedding_service import tracing
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, QuotaExceeded, Redirect
from embedding_service.formats import get_format
from embedding_service.grpc_codes import code_of, pushback_ms
from embedding_service.methods import Method, Places
from embedding_service.placement.routing import Model, Table, check_ids
from embedding_service.rows.base import STORED, Bytes, Ids, TableRows
from embedding_service.security.identity import Caller
from embedding_service.serving import IDLE_STREAMS, RequestLimits, Server
from embedding_service.store.manifest import Table as StoredTable
from embedding_service.tracing import Attributes, Span
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lists import LookupAsked, read_lookup, read_streamed_lookup
from embedding_service.wire.lookup_codec import Shape, allocate, allocate_streamed

SERVICE = "embedding.v1.EmbeddingService"
MOVED = "rows that were asked for are not held here: get the routing again, or send epoch 0 to have them forwarded"
# A message of a `StreamLookup` as a call of its own. A shard's processes pass it on so to the main one.
ANSWER = f"{SERVICE}/Answer"

_ENCODINGS = {
    wire.ROW_ENCODING_UNSPECIFIED: "fp32",
    wire.ROW_ENCODING_FLOAT32: "fp32",
    wire.ROW_ENCODING_FLOAT16: "fp16",
    wire.ROW_ENCODING_BFLOAT16: "bf16",
    wire.ROW_ENCODING_STORED: STORED,
}
# Upper bounds of the histogram of answering times, in seconds.
_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

# The rows of (model, version, table), if any are held.
Tables = Callable[[str, str, str], TableRows | None]


@dataclass
class Counters:
    """What a process did since it started. `rows` and `row_bytes` are those of its answers, `seconds` is their time.

    `near_rows` are those that clients read in place, by what they said.
    `times` counts answers by the bucket of their time. The last bucket is beyond all bounds.
    `traced` has the last answer of each bucket that was traced.
    """

    lookups: int = 0
    rows: int = 0
    row_bytes: int = 0
    forwarded_rows: int = 0
    near_rows: int = 0
    errors: int = 0
    seconds: float = 0.0
    times: list[int] = field(default_factory=lambda: [0] * (len(_BUCKETS) + 1))
    traced: dict[int, Exemplar] = field(default_factory=dict)

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            self.lookups + other.lookups,
            self.rows + other.rows,
            self.row_bytes + other.row_bytes,
            self.forwarded_rows + other.forwarded_rows,
            self.near_rows + other.near_rows,
            self.errors + other.errors,
            self.seconds + other.seconds,
            [mine + theirs for mine, theirs in zip(self.times, other.times, strict=True)],
            {**self.traced, **other.traced},
        )

    def count(self, shape: Shape, seconds: float, span: Span | None = None) -> None:
        """Count an answer of this shape that took `seconds`."""
        self.lookups += 1
        self.rows += shape.count
        self.row_bytes += shape.nbytes
        self.seconds += seconds
        bucket = bisect.bisect_left(_BUCKETS, seconds)
        self.times[bucket] += 1
        if span is not None:
            self.traced[bucket] = Exemplar({"trace_id": span.trace_id, "span_id": span.span_id}, seconds, time.time())

    def histogram(self) -> HistogramMetricFamily:
        """Answering times for Prometheus."""
        below = np.cumsum(self.times).tolist()
        counts = zip([*map(str, _BUCKETS), "+Inf"], below, strict=True)
        return HistogramMetricFamily(
            "embedding_lookup_seconds",
            "Time to answer a lookup, forwarding included.",
            buckets=[
                (bound, count, self.traced[index]) if index in self.traced else (bound, count)
                for index, (bound, count) in enumerate(counts)
            ],
            sum_value=self.seconds,
        )


def time_within(times: Sequence[int], share: float) -> float:
    """The bound in seconds within which this share of answers came, by `Counters.times`. 0 without answers.

    What is beyond all bounds counts as twice the last one.
    """
    below = np.cumsum(times)
    if not below[-1]:
        return 0.0
    return (*_BUCKETS, 2 * _BUCKETS[-1])[int(np.searchsorted(below, share * below[-1]))]


class CheckedLookup(NamedTuple):
    """A request that was found to be right.

    `model` is None for a sender that routed it by itself. `held` is None if no part of the table is held.
    """

    ids: Ids
    encoding: str
    shape: Shape
    held: TableRows | None
    model: Model | None
    table: str


class HeldRows:
    """Answers lookups of senders that routed them here. Thread-safe."""

    def __init__(self, tables: Tables, limits: RequestLimits) -> None:
        self.counters = Counters()
        self._tables = tables
        self._limits = limits
        self._counting = threading.Lock()

    def answer(self, message: bytes, room: int, caller: Caller | None = None) -> bytes | None:
        """The serialized answer to a serialized `LookupRequest` whose rows are here and take at most `room` bytes.

        None for all others, wrong ones too. May be called from any thread. Raises QuotaExceeded.
        """
        try:
            return self._at_once(read_lookup(message), room, allocate, caller)
        except QuotaExceeded:
            raise
        except (EmbeddingServiceError, DecodeError):
            return None

    def answer_streamed(self, message: bytes, room: int, caller: Caller | None = None) -> bytes | None:
        """`answer` for a `StreamLookupRequest`."""
        try:
            request_id, lookup = read_streamed_lookup(message)
            return self._at_once(lookup, room, partial(allocate_streamed, request_id=request_id), caller)
        except QuotaExceeded as error:
            return wire.StreamLookupResponse(request_id=request_id, error=failure_of(error)).SerializeToString()
        except (EmbeddingServiceError, DecodeError):
            return None

    def _at_once(
        self,
        asked: LookupAsked,
        room: int,
        allocate: Callable[[Shape], tuple[bytes, Bytes]],
        caller: Caller | None,
    ) -> bytes | None:
        began = time.perf_counter()
        lookup = self._read(asked, caller)
        if lookup.held is None or lookup.shape.nbytes > room or not lookup.held.at_hand(lookup.ids):
            return None
        if caller:
            caller.spend(lookup.shape.count, lookup.shape.nbytes)
        message, rows = allocate(lookup.shape)
        try:
            lookup.held.gather(lookup.ids, lookup.encoding, rows)
        except EmbeddingServiceError:  # other shards have some of the rows, so this counts where they are gathered
            if caller:
                caller.give_back(lookup.shape.count, lookup.shape.nbytes)
            raise
        span = None
        if tracing.tracer is not None and (asked.request.traceparent or not asked.request.epoch):
            about = about_lookup(asked.request, lookup.shape)
            span = tracing.tracer.record("Lookup", asked.request.traceparent, began, about)
        self._count(lookup.shape, began, span)
        return message

    def _read(self, asked: LookupAsked, caller: Caller | None) -> CheckedLookup:
        """Check everything about a request. Raises Redirect when its sender routed it here and nothing is held.

        A model that the caller may not read is none here, in every answer.
        """
        request = asked.request
        encoding = encoding_of(request.encoding)
        count = _count_ids(asked)
        if request.epoch:
            name, _, version = request.model.partition("@")
            if not version:
                raise InvalidRequest(
                    f"a request with an epoch must name the version that was routed, as {name or 'NAME'}@VERSION, got "
                    f"{request.model!r}: take it from the routing, or send epoch 0 to have the newest version answer"
                )
            model, held = None, self._tables(name, version, request.table)
            if held is None or not (caller is None or caller.may_read(name, version)):
                raise Redirect(MOVED)
            table: Table | StoredTable = held.table
        else:
            model = self.known_model(request.model, caller)
            table, version = model.table(request.table), model.version
            held = self._tables(model.name, version, request.table)
        row_bytes = row_bytes_of(table.dtype, table.dim, encoding)
        self._limits.check_response(count, row_bytes)
        ids = _ids(asked)
        check_ids(ids, table.rows, f"{request.model}/{request.table}")
        shape = Shape(count, row_bytes, table.dim, request.encoding or wire.ROW_ENCODING_FLOAT32, version)
        return CheckedLookup(ids, encoding, shape, held, model, request.table)

    def known_model(self, name: str, caller: Caller | None) -> Model:
        """The model that a thin client's request names. Raises Redirect if it is unknown."""
        raise Redirect(MOVED)

    def offer_lookups(self, server: Server, lookup: Any, each: Any) -> None:
        """Answer `Lookup` and `StreamLookup`. These handlers of one message get what is not answered at once."""
        server.offer(f"{SERVICE}/Lookup", Method(lookup, at_once=self.answer))
        server.offer(
            f"{SERVICE}/StreamLookup",
            Method(each, at_once=self.answer_streamed, each=True, places=Places(*IDLE_STREAMS)),
        )

    def _count(self, shape: Shape, began: float, span: Span | None) -> None:
        with self._counting:
            self.counters.count(shape, time.perf_counter() - began, span)

    def _count_error(self) -> None:
        with self._counting:
            self.counters.errors += 1


def about_lookup(request: wire.LookupRequest, shape: Shape) -> Attributes:
    """What a span says of an answer."""
    return {
        "rpc.system.name": "grpc",
        "embedding.model": request.model,
        "embedding.table": request.table,
        "embedding.version": shape.version,
        "embedding.ids": shape.count,
        "embedding.bytes": shape.nbytes,
    }


def failure_of(error: EmbeddingServiceError) -> wire.LookupFailure:
    """An error as an answer on a stream."""
    code = code_of(error).value[0]
    return wire.LookupFailure(code=code, message=str(error), retry_after_ms=pushback_ms(error))


def encoding_of(encoding: int) -> str:
    """A wire encoding as `TableRows.gather` names it. Raises InvalidRequest for an unknown one."""
    if encoding not in _ENCODINGS:
        raise InvalidRequest(f"unknown row encoding {encoding}; known: {', '.join(wire.RowEncoding.keys())}")
    return _ENCODINGS[encoding]  # type: ignore[index]


def row_bytes_of(dtype: str, dim: int, encoding: str) -> int:
    """Bytes of a row of a `dtype` table in `encoding`."""
    return get_format(dtype if encoding == STORED else encoding).row_bytes(dim)


def _count_ids(asked: LookupAsked) -> int:
    """The number of ids in any of the fields, without reading them. Raises InvalidRequest if several hold ids."""
    counts = {
        "ids": len(asked.ids),
        "ids_int64": len(asked.request.ids_int64) // 8,
        "ids_uint32": len(asked.request.ids_uint32) // 4,
    }
    given = [name for name, count in counts.items() if count]
    if len(given) > 1:
        raise InvalidRequest(f"row ids in {' and '.join(given)}: give them in one field")
    return sum(counts.values())


def _ids(asked: LookupAsked) -> Ids:
    """The ids, int64 [n], from the field that holds them."""
    wide, narrow = asked.request.ids_int64, asked.request.ids_uint32
    if narrow:
        return _from_bytes("ids_uint32", narrow, "<u4")
    return _from_bytes("ids_int64", wide, "<i8") if wide else asked.ids.array()


def _from_bytes(field: str, data: bytes, dtype: str) -> Ids:
    width = np.dtype(dtype).itemsize
    if len(data) % width:
        raise InvalidRequest(
            f"{field} holds {len(data)} bytes, not a multiple of {width}: it must be little-endian, {width} bytes an id"
        )
    return np.frombuffer(data, dtype).astype(np.int64)  # a copy: torch wants memory it may write to
