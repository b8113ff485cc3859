"""Answering lookups: held rows from the shard's memory, the others from its peers."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import NoReturn

import grpc
import numpy as np
import torch

from embedding_service import tracing
from embedding_service.budget import COUNTED_BYTES, Budget
from embedding_service.client.router import Router
from embedding_service.client.steps import run_async
from embedding_service.client.traced import traced
from embedding_service.client.transport import GrpcTransport
from embedding_service.client.wants import StoredRows, Want
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, NotFound, Redirect
from embedding_service.front import UNREAD_BYTES
from embedding_service.methods import Context, Method
from embedding_service.placement.routing import Hashers, Model, Routing, check_ids
from embedding_service.rows.base import Bytes, Ids, TableRows
from embedding_service.security.identity import Caller
from embedding_service.serving import RequestLimits, RoutingService, Server, abort
from embedding_service.shard.held import (
    ANSWER,
    MOVED,
    SERVICE,
    CheckedLookup,
    HeldRows,
    about_lookup,
    encoding_of,
    failure_of,
    row_bytes_of,
)
from embedding_service.shard.holdings import Holdings
from embedding_service.tracing import Attributes, Span
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lists import (
    LookupAsked,
    NgramsAsked,
    Numbers,
    StreamedLookupAsked,
    read_lookup,
    read_ngrams_lookup,
    read_streamed_lookup,
)
from embedding_service.wire.lookup_codec import Shape, allocate, allocate_streamed

# Seconds. Forwarding must end for a caller without a deadline, too.
FORWARD_TIMEOUT = 10.0
# Gathering this many bytes takes about as long as a hand-over to another thread. More would hold up other calls.
INLINE_BYTES = 256 << 10
# Memory that an answer takes while it is made and sent. Fetched rows also lie in another shard's answer and in a sink.
# Rows of n-grams lie in one table's, in those of all, in protobuf and in gRPC.
LOOKUP_COPIES, NGRAM_COPIES = 3, 5
# Bytes of a row id, as it came and as others want it.
ID_BYTES = 24


class Unread:
    """Bytes of answers that were not taken yet, by connection.

    A client that asks and never reads fills the memory of its own allowance and no more. Its next large lookups wait
    before their answers are made. All clients together fill the process's budget, and what is over that is refused.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._bytes: Counter[str] = Counter()
        self._taken = asyncio.Event()

    async def add(self, context: Context, nbytes: int, ids: int, copies: int = LOOKUP_COPIES) -> None:
        """Wait until the connection's unread answers are few enough, then count this one until its call has ended.

        Raises Overloaded if the process has no memory for `copies` copies of it and for its row ids.
        """
        if nbytes < COUNTED_BYTES:
            return
        peer = context.peer()
        while self._bytes[peer] + nbytes > UNREAD_BYTES:
            self._taken.clear()
            await self._taken.wait()
        needed = copies * nbytes + ID_BYTES * ids
        self._budget.promise(needed)
        self._bytes[peer] += nbytes
        context.add_done_callback(lambda _: self._remove(peer, nbytes, needed))

    def _remove(self, peer: str, nbytes: int, needed: int) -> None:
        self._budget.give_back(needed)
        self._bytes[peer] -= nbytes
        if not self._bytes[peer]:
            del self._bytes[peer]
        self._taken.set()


# Waits until an answer of this many bytes, for this many ids, may be made.
Room = Callable[[int, int], Awaitable[None]]


class LookupService(HeldRows, RoutingService):
    """EmbeddingService of a shard. Everything about a request is checked before any work is done for it."""

    def __init__(
        self, holdings: Holdings, router: Router, transport: GrpcTransport, limits: RequestLimits, budget: Budget
    ) -> None:
        HeldRows.__init__(self, holdings.table, limits)
        RoutingService.__init__(self)
        self._router = router
        self._transport = transport
        self._hashers = Hashers()
        self._unread = Unread(budget)

    def add_to(self, server: Server) -> None:
        """Offer the service, as the generated code would; answers with rows come serialized (`wire.lookup_codec`)."""
        unary = grpc.unary_unary_rpc_method_handler
        each = unary(self.Answer, read_streamed_lookup)
        self.offer_lookups(server, unary(self.Lookup, read_lookup), each)
        server.offer(ANSWER, Method(each, private=True))
        methods = {
            "LookupNgrams": unary(self.LookupNgrams, read_ngrams_lookup, wire.LookupNgramsResponse.SerializeToString),
            "ListModels": unary(
                self.ListModels, wire.ListModelsRequest.FromString, wire.ListModelsResponse.SerializeToString
            ),
            "GetRouting": unary(self.GetRouting, wire.GetRoutingRequest.FromString, wire.Routing.SerializeToString),
        }
        server.add_registered_method_handlers(SERVICE, methods)

    def current_routing(self) -> Routing | None:
        """The routing that the controller last sent."""
        return self._router.current

    def known_model(self, name: str, caller: Caller | None) -> Model:
        """A served model. Raises Unavailable, NotFound."""
        return self.visible_routing(caller).model(name)

    async def Lookup(self, request: LookupAsked, context: Context) -> bytes:
        """Rows of one table: a serialized `LookupResponse`."""
        began = time.perf_counter()
        with _span(request.request, context) as span:
            try:
                lookup = await self._check(request, context.caller)
                _tell(span, request.request, lookup.shape)
                await self._unread.add(context, lookup.shape.nbytes, lookup.shape.count)
                message, rows = allocate(lookup.shape)
                await self._fill(rows, lookup, _deadline(context))
            except Redirect:
                await self._send_away(context)
            except EmbeddingServiceError as error:
                self._count_error()
                await abort(context, error)
        self._count(lookup.shape, began, span)
        return message

    async def Answer(self, request: StreamedLookupAsked, context: Context) -> bytes:
        """Answer a message of a `StreamLookup`: a serialized `StreamLookupResponse`, with rows or an error."""
        began = time.perf_counter()
        with _span(request.lookup.request, context) as span:
            try:
                lookup = await self._check(request.lookup, context.caller)
                _tell(span, request.lookup.request, lookup.shape)
                await self._unread.add(context, lookup.shape.nbytes, lookup.shape.count)
                message, rows = allocate_streamed(lookup.shape, request.request_id)
                await self._fill(rows, lookup, _deadline(context))
            except Redirect:
                failure = self._redirect()
            except EmbeddingServiceError as error:
                self._count_error()
                failure = failure_of(error)
            else:
                self._count(lookup.shape, began, span)
                return message
            if span is not None:
                span.fail(failure.message)
        return wire.StreamLookupResponse(request_id=request.request_id, error=failure).SerializeToString()

    async def LookupNgrams(self, request: NgramsAsked, context: Context) -> wire.LookupNgramsResponse:
        """Token ids in, rows out."""
        began, room = time.perf_counter(), partial(self._unread.add, context, copies=NGRAM_COPIES)
        about: Attributes = {"embedding.model": request.request.model, "embedding.tokens": len(request.token_ids)}
        with tracing.answering("LookupNgrams", context.traceparent, about) as span:
            try:
                answer = await self._lookup_ngrams(request, context.caller, _deadline(context), room)
            except EmbeddingServiceError as error:
                self._count_error()
                await abort(context, error)
        count = answer.batch * answer.length * answer.tables * answer.heads
        self._count(Shape(count, answer.row_bytes, answer.dim, answer.encoding, answer.version), began, span)
        return answer

    async def _check(self, request: LookupAsked, caller: Caller | None) -> CheckedLookup:
        """`_read`, on a thread if that takes long. Raises QuotaExceeded, too."""
        long = request.ids.is_long
        lookup = await asyncio.to_thread(self._read, request, caller) if long else self._read(request, caller)
        if caller:
            caller.spend(lookup.shape.count, lookup.shape.nbytes)
        return lookup

    async def _fill(self, rows: Bytes, lookup: CheckedLookup, deadline: float) -> None:
        """Write the rows, uint8 [n, row_bytes]. Raises Redirect for a sender that routed them here in vain."""
        if lookup.model is not None:
            await self._any_rows(rows, lookup, deadline)
            return
        assert lookup.held is not None
        try:
            await self._gather(lookup.held, lookup.ids, lookup.encoding, rows)
        except NotFound as error:
            raise Redirect(MOVED) from error

    async def _any_rows(self, rows: Bytes, lookup: CheckedLookup, deadline: float) -> None:
        """Rows for a thin client, from here and from the owners of the others."""
        ids, held = lookup.ids, lookup.held
        mine = held.holds(ids) if held else np.zeros(len(ids), np.bool_)
        try:
            if held and mine.all():
                await self._gather(held, ids, lookup.encoding, rows)
            elif held and mine.any():
                rows[mine] = await self._gather(held, ids[mine], lookup.encoding)
        except NotFound:  # dropped since we looked: the new owner of the part has it
            mine[:] = False
        if not mine.all():
            rows[~mine] = await self._forward(lookup, ids[~mine], deadline)

    async def _forward(self, lookup: CheckedLookup, ids: Ids, deadline: float) -> Bytes:
        self.counters.forwarded_rows += len(ids)
        assert lookup.model is not None
        shape = lookup.shape
        sink = StoredRows(len(ids), shape.row_bytes)

        def wants_of(model: Model) -> list[Want]:
            return [Want(model.table(lookup.table), ids, shape.encoding, shape.row_bytes, sink)]

        steps = self._router.fetch(lookup.model.full_name, wants_of, deadline)
        if (span := tracing.current()) is None:
            await run_async(steps, self._transport)
            return sink.rows
        span.note({"embedding.forwarded_ids": len(ids)})
        with closing(traced(steps, span)) as steps:
            await run_async(steps, self._transport)
        return sink.rows

    async def _gather(self, held: TableRows, ids: Ids, encoding: str, out: Bytes | None = None) -> Bytes:
        if len(ids) * held.table.row_bytes <= INLINE_BYTES and held.at_hand(ids):
            return held.gather(ids, encoding, out)
        return await asyncio.to_thread(_gather_anywhere, held, ids, encoding, out)

    async def _lookup_ngrams(
        self, asked: NgramsAsked, caller: Caller | None, deadline: float, room: Room
    ) -> wire.LookupNgramsResponse:
        request = asked.request
        encoding = encoding_of(request.encoding)
        model = self.known_model(request.model, caller)
        hasher = self._hashers.of(model, self._router.current)
        batch = request.batch or 1
        tables = [model.table(table.name) for table in hasher.tables]
        row_bytes = row_bytes_of(tables[0].dtype, tables[0].dim, encoding)
        self._limits.check_response(len(asked.token_ids) * hasher.num_tables * hasher.num_heads, row_bytes)
        lengths = _length("token_ids", asked.token_ids, batch), _length("context", asked.context, batch)
        shape = (batch, lengths[0], hasher.num_tables, hasher.num_heads)
        if caller:
            caller.spend(math.prod(shape), math.prod(shape) * row_bytes)
        await room(math.prod(shape) * row_bytes, math.prod(shape) + len(asked.token_ids) + len(asked.context))
        rows = np.empty((*shape, row_bytes), np.uint8)
        if len(asked.token_ids):  # without tokens nothing is made, for any batch
            tokens, context = _token_matrix(asked.token_ids, batch), _token_matrix(asked.context, batch)
            row_ids = hasher.row_ids(tokens, context)
        for index, table in enumerate(tables if len(asked.token_ids) else ()):
            ids = row_ids[:, :, index].reshape(-1).numpy()
            check_ids(ids, table.rows, f"{model.full_name}/{table.name}")
            wanted = Shape(len(ids), row_bytes, table.dim, request.encoding, model.version)
            held = self._tables(model.name, model.version, table.name)
            found = np.empty((len(ids), row_bytes), np.uint8)
            await self._any_rows(found, CheckedLookup(ids, encoding, wanted, held, model, table.name), deadline)
            rows[:, :, index] = found.reshape(batch, shape[1], hasher.num_heads, row_bytes)
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

    def _age(self) -> tuple[int, int]:
        routing = self._router.current
        return routing.age if routing else (0, 0)

    def _redirect(self) -> wire.LookupFailure:
        """`_send_away` on a stream."""
        term, epoch = self._age()
        return wire.LookupFailure(code=grpc.StatusCode.ABORTED.value[0], message=MOVED, term=term, epoch=epoch)

    async def _send_away(self, context: Context) -> NoReturn:
        term, epoch = self._age()
        context.set_trailing_metadata((("embedding-term", str(term)), ("embedding-epoch", str(epoch))))
        await context.abort(grpc.StatusCode.ABORTED, MOVED)
        raise AssertionError("unreachable: abort raises")


def _gather_anywhere(held: TableRows, ids: Ids, encoding: str, out: Bytes | None) -> Bytes:
    """Gather on a thread that may wait for a disk."""
    held.read_ahead(ids)
    return held.gather(ids, encoding, out)


def _span(request: wire.LookupRequest, context: Context) -> AbstractContextManager[Span | None]:
    """The span of a lookup. A client that routed it itself says where it is traced: nobody else decides that."""
    caller = request.traceparent or context.traceparent
    return tracing.answering("Lookup", caller) if caller or not request.epoch else nullcontext()


def _tell(span: Span | None, request: wire.LookupRequest, shape: Shape) -> None:
    if span is not None:
        span.note(about_lookup(request, shape))


def _deadline(context: Context) -> float:
    remaining = context.time_remaining()
    return time.monotonic() + (FORWARD_TIMEOUT if remaining is None else remaining)


def _length(field: str, tokens: Numbers, batch: int) -> int:
    if len(tokens) % batch:
        raise InvalidRequest(f"{field} holds {len(tokens)} tokens, not a multiple of the batch of {batch}")
    return len(tokens) // batch


def _token_matrix(tokens: Numbers, batch: int) -> torch.Tensor:
    # Numbers of a field of type int32 are cut to that, as protobuf does.
    flat = torch.from_numpy(tokens.array().astype(np.int32).astype(np.int64))
    return flat.view(batch, -1) if len(flat) else flat.view(batch, 0)
