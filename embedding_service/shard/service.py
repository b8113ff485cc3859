"""Answering lookups: what the shard holds from its memory, the rest from its peers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import grpc
import numpy as np
import torch
from prometheus_client import Histogram

from embedding_service.client.router import Router, Want, run_async
from embedding_service.client.transport import Transport
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, NotFound
from embedding_service.formats import get_format
from embedding_service.ngram import NgramHasher
from embedding_service.placement.routing import Model, Routing, check_ids
from embedding_service.rows.base import STORED, Bytes, Ids, TableRows
from embedding_service.serving import RequestLimits, RoutingService, abort, cancel
from embedding_service.shard.holdings import Holdings
from embedding_service.status import code_of
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceServicer

_ENCODINGS = {
    wire.ROW_ENCODING_UNSPECIFIED: "fp32",
    wire.ROW_ENCODING_FLOAT32: "fp32",
    wire.ROW_ENCODING_FLOAT16: "fp16",
    wire.ROW_ENCODING_BFLOAT16: "bf16",
    wire.ROW_ENCODING_STORED: STORED,
}
# For a caller that set no deadline, forwarding must still end.
FORWARD_TIMEOUT = 10.0
# Gathering so many bytes takes about as long as handing it to another thread costs; more would hold up other calls.
INLINE_BYTES = 256 << 10
# Requests of one stream that are worked on at a time.
STREAM_WINDOW = 8
# Bytes of answers that one connection may leave unread before it must wait with its next large lookup. It takes up to
# four times as much memory: numpy, protobuf (twice) and gRPC each hold a copy. Two of the largest answers fit.
UNREAD_BYTES = 128 << 20
# Answers below this are not counted: they are bounded by the calls that a connection may have open.
COUNTED_BYTES = 64 << 10


@dataclass
class Counters:
    """What a shard did since it started. `rows` and `row_bytes` are those it answered with."""

    lookups: int = 0
    rows: int = 0
    row_bytes: int = 0
    forwarded_rows: int = 0
    errors: int = 0


_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class _Unread:
    """Answers that their askers have not taken yet, in bytes, by connection.

    A client that asks and never reads fills the memory of its own allowance and no more: its next large lookups wait,
    before their answers are made.
    """

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._taken = asyncio.Event()

    async def add(self, context: grpc.aio.ServicerContext, nbytes: int) -> None:
        """Wait until the connection's unread answers are few enough, then count this one until its call has ended."""
        if nbytes < COUNTED_BYTES:
            return
        peer = context.peer()
        while self._bytes[peer] + nbytes > UNREAD_BYTES:
            self._taken.clear()
            await self._taken.wait()
        self._bytes[peer] += nbytes
        context.add_done_callback(lambda _: self._remove(peer, nbytes))

    def _remove(self, peer: str, nbytes: int) -> None:
        self._bytes[peer] -= nbytes
        if not self._bytes[peer]:
            del self._bytes[peer]
        self._taken.set()


# Waits until an answer of so many bytes may be made.
Room = Callable[[int], Awaitable[None]]


async def _window_bounds(nbytes: int) -> None:
    """The room of a stream's lookups, of which STREAM_WINDOW are made before one must have been taken."""


class Redirect(Exception):
    """The sender routed by itself, and rows it asks for are not held here."""


class LookupService(RoutingService, EmbeddingServiceServicer):
    """EmbeddingService of a shard. Everything about a request is checked before any work is done for it."""

    def __init__(self, holdings: Holdings, router: Router, transport: Transport, limits: RequestLimits) -> None:
        self.counters = Counters()
        self.seconds = Histogram(
            "embedding_lookup_seconds", "Time to answer a lookup, forwarding included.", buckets=_BUCKETS, registry=None
        )
        self._holdings = holdings
        self._router = router
        self._transport = transport
        self._limits = limits
        self._hashers: dict[str, NgramHasher] = {}
        self._unread = _Unread()
        self._streams: set[asyncio.Queue[asyncio.Task[wire.StreamLookupResponse] | None]] = set()

    def current_routing(self) -> Routing | None:
        """The routing that the controller last sent."""
        return self._router.current

    def end_streams(self) -> None:
        """Let go of open streams: their senders open new ones elsewhere."""
        for answers in self._streams:
            answers.put_nowait(None)

    async def Lookup(self, request: wire.LookupRequest, context: grpc.aio.ServicerContext) -> wire.LookupResponse:
        """Rows of one table."""
        try:
            with self.seconds.time():
                return await self._lookup(request, _deadline(context), partial(self._unread.add, context))
        except Redirect:
            await self._send_away(context)
        except EmbeddingServiceError as error:
            self.counters.errors += 1
            await abort(context, error)

    async def StreamLookup(
        self, requests: AsyncIterator[wire.StreamLookupRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[wire.StreamLookupResponse]:
        """Many lookups on one stream, a window of them at a time; each is answered when it is ready."""
        answers: asyncio.Queue[asyncio.Task[wire.StreamLookupResponse] | None] = asyncio.Queue()
        self._streams.add(answers)
        window = asyncio.Semaphore(STREAM_WINDOW)
        working: set[asyncio.Task[wire.StreamLookupResponse]] = set()

        async def read() -> None:
            try:
                async for request in requests:
                    await window.acquire()
                    task = asyncio.create_task(self._stream_answer(request, _deadline(context)))
                    working.add(task)
                    task.add_done_callback(answers.put_nowait)
                await asyncio.gather(*working, return_exceptions=True)
            finally:
                answers.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (done := await answers.get()) is not None:
                working.discard(done)
                yield done.result()  # waits for a reader that is slow
                window.release()
        finally:
            self._streams.discard(answers)
            await cancel([reader, *working])

    async def LookupNgrams(
        self, request: wire.LookupNgramsRequest, context: grpc.aio.ServicerContext
    ) -> wire.LookupNgramsResponse:
        """Token ids in, rows out."""
        try:
            with self.seconds.time():
                return await self._lookup_ngrams(request, _deadline(context), partial(self._unread.add, context))
        except EmbeddingServiceError as error:
            self.counters.errors += 1
            await abort(context, error)

    async def _stream_answer(self, request: wire.StreamLookupRequest, deadline: float) -> wire.StreamLookupResponse:
        answer = wire.StreamLookupResponse(request_id=request.request_id)
        try:
            with self.seconds.time():
                answer.rows.CopyFrom(await self._lookup(request.lookup, deadline, _window_bounds))
        except Redirect:
            term, epoch = self._age()
            answer.error.CopyFrom(
                wire.LookupFailure(code=grpc.StatusCode.ABORTED.value[0], message=_MOVED, term=term, epoch=epoch)
            )
        except EmbeddingServiceError as error:
            self.counters.errors += 1
            answer.error.CopyFrom(wire.LookupFailure(code=code_of(error).value[0], message=str(error)))
        return answer

    async def _lookup(self, request: wire.LookupRequest, deadline: float, room: Room) -> wire.LookupResponse:
        encoding = _encoding(request.encoding)
        ids = _ids(request)
        if request.epoch:
            name, _, version = request.model.partition("@")
            held = self._holdings.table(name, version, request.table)
            if held is None:
                raise Redirect
            check_ids(ids, held.table.rows, f"{request.model}/{request.table}")
            dim = held.table.dim
            await self._admit(len(ids), _row_bytes(held.table.dtype, dim, encoding), room)
            rows = await self._own_rows(held, ids, encoding)
        else:
            model = self.known_routing().model(request.model)
            table = model.table(request.table)
            version, dim = model.version, table.dim
            check_ids(ids, table.rows, f"{model.full_name}/{table.name}")
            await self._admit(len(ids), _row_bytes(table.dtype, dim, encoding), room)
            rows = await self._any_rows(model, request.table, ids, encoding, request.encoding, deadline)
        self._count(rows)
        return wire.LookupResponse(
            rows=rows.tobytes(),
            row_bytes=rows.shape[1],
            dim=dim,
            encoding=request.encoding or wire.ROW_ENCODING_FLOAT32,
            version=version,
        )

    async def _admit(self, ids: int, row_bytes: int, room: Room) -> None:
        """Check the answer's size and wait for room for it."""
        self._limits.check_response(ids, row_bytes)
        await room(ids * row_bytes)

    async def _own_rows(self, held: TableRows, ids: Ids, encoding: str) -> Bytes:
        """For a sender that routed by itself: rows from here or none at all."""
        try:
            return await self._gather(held, ids, encoding)
        except NotFound as error:
            raise Redirect from error

    async def _any_rows(
        self, model: Model, table_name: str, ids: Ids, encoding: str, wire_encoding: int, deadline: float
    ) -> Bytes:
        """For a thin client: rows from here and from whoever holds the others."""
        table = model.table(table_name)
        row_bytes = _row_bytes(table.dtype, table.dim, encoding)
        held = self._holdings.table(model.name, model.version, table_name)
        mine = held.holds(ids) if held else np.zeros(len(ids), np.bool_)
        rows = np.empty((len(ids), row_bytes), np.uint8)
        if held and mine.any():
            try:
                rows[mine] = await self._gather(held, ids[mine], encoding)
            except NotFound:  # dropped since we looked: whoever took the part over has it
                mine[:] = False
        if not mine.all():
            rows[~mine] = await self._forward(model, table_name, ids[~mine], wire_encoding, row_bytes, deadline)
        return rows

    async def _forward(
        self, model: Model, table: str, ids: Ids, encoding: int, row_bytes: int, deadline: float
    ) -> Bytes:
        self.counters.forwarded_rows += len(ids)

        def wants_of(model: Model) -> list[Want]:
            return [Want(model.table(table), ids, encoding, row_bytes)]

        _, rows = await run_async(self._router.fetch(model.full_name, wants_of, deadline), self._transport)
        return rows[0]

    async def _gather(self, held: TableRows, ids: Ids, encoding: str) -> Bytes:
        if len(ids) * held.table.row_bytes <= INLINE_BYTES:
            return held.gather(ids, encoding)
        return await asyncio.to_thread(held.gather, ids, encoding)

    async def _lookup_ngrams(
        self, request: wire.LookupNgramsRequest, deadline: float, room: Room
    ) -> wire.LookupNgramsResponse:
        encoding = _encoding(request.encoding)
        model = self.known_routing().model(request.model)
        hasher = self._hasher(model)
        batch = request.batch or 1
        tokens = _token_matrix("token_ids", request.token_ids, batch)
        context = _token_matrix("context", request.context, batch)
        shape = (batch, tokens.shape[1], hasher.num_tables, hasher.num_heads)
        tables = [model.table(table.name) for table in hasher.tables]
        row_bytes = _row_bytes(tables[0].dtype, tables[0].dim, encoding)
        await self._admit(int(np.prod(shape)), row_bytes, room)
        row_ids = hasher.row_ids(tokens, context)
        rows = np.empty((*shape, row_bytes), np.uint8)
        for index, table in enumerate(tables):
            ids = row_ids[:, :, index].reshape(-1).numpy()
            check_ids(ids, table.rows, f"{model.full_name}/{table.name}")
            found = await self._any_rows(model, table.name, ids, encoding, request.encoding, deadline)
            rows[:, :, index] = found.reshape(batch, shape[1], hasher.num_heads, row_bytes)
        self._count(rows.reshape(-1, row_bytes))
        return wire.LookupNgramsResponse(
            rows=rows.tobytes(),
            batch=shape[0],
            length=shape[1],
            tables=shape[2],
            heads=shape[3],
            dim=tables[0].dim,
            row_bytes=row_bytes,
            encoding=request.encoding or wire.ROW_ENCODING_FLOAT32,
            version=model.version,
        )

    def _hasher(self, model: Model) -> NgramHasher:
        if model.full_name not in self._hashers:
            self._hashers[model.full_name] = model.hasher()
        return self._hashers[model.full_name]

    def _count(self, rows: Bytes) -> None:
        self.counters.lookups += 1
        self.counters.rows += len(rows)
        self.counters.row_bytes += rows.nbytes

    def _age(self) -> tuple[int, int]:
        routing = self._router.current
        return routing.age if routing else (0, 0)

    async def _send_away(self, context: grpc.aio.ServicerContext) -> NoReturn:
        term, epoch = self._age()
        context.set_trailing_metadata((("embedding-term", str(term)), ("embedding-epoch", str(epoch))))
        await context.abort(grpc.StatusCode.ABORTED, _MOVED)
        raise AssertionError("unreachable: abort raises")


_MOVED = "rows that were asked for are not held here: get the routing again, or send epoch 0 to have them forwarded"


def _deadline(context: grpc.aio.ServicerContext) -> float:
    remaining = context.time_remaining()
    return time.monotonic() + (FORWARD_TIMEOUT if remaining is None else remaining)


def _encoding(encoding: int) -> str:
    if encoding not in _ENCODINGS:
        raise InvalidRequest(f"unknown row encoding {encoding}; known: {', '.join(wire.RowEncoding.keys())}")
    return _ENCODINGS[encoding]  # type: ignore[index]


def _row_bytes(dtype: str, dim: int, encoding: str) -> int:
    return get_format(dtype if encoding == STORED else encoding).row_bytes(dim)


def _ids(request: wire.LookupRequest) -> Ids:
    """int64 [n] from whichever field holds them."""
    given = [name for name in ("ids", "ids_int64", "ids_uint32") if getattr(request, name)]
    if len(given) > 1:
        raise InvalidRequest(f"row ids in {' and '.join(given)}: give them in one field")
    if request.ids_int64:
        return _from_bytes("ids_int64", request.ids_int64, "<i8")
    if request.ids_uint32:
        return _from_bytes("ids_uint32", request.ids_uint32, "<u4")
    return np.array(request.ids, np.int64)


def _from_bytes(field: str, data: bytes, dtype: str) -> Ids:
    width = np.dtype(dtype).itemsize
    if len(data) % width:
        raise InvalidRequest(
            f"{field} holds {len(data)} bytes, not a multiple of {width}: it must be little-endian, {width} bytes an id"
        )
    return np.frombuffer(data, dtype).astype(np.int64)  # a copy: torch wants memory it may write to


def _token_matrix(field: str, tokens: object, batch: int) -> torch.Tensor:
    flat = torch.from_numpy(np.array(tokens, np.int64))
    if len(flat) % batch:
        raise InvalidRequest(f"{field} holds {len(flat)} tokens, not a multiple of the batch of {batch}")
    return flat.view(batch, -1) if len(flat) else flat.view(batch, 0)
