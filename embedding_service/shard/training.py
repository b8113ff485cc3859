"""TrainingService: a shard's shares of branches, over gRPC."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
import numpy as np
import torch
from google.protobuf.message import DecodeError

from embedding_service.budget import Budget
from embedding_service.client.gradients import DTYPES, GRADIENTS, IDS, ROWS, data_of
from embedding_service.client.router import Router
from embedding_service.errors import (
    EmbeddingServiceError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from embedding_service.methods import Context
from embedding_service.security.audit import Audit
from embedding_service.security.certificates import speaks_for
from embedding_service.security.identity import Caller
from embedding_service.serving import RequestLimits, Server, abort
from embedding_service.shard.push_room import PushRoom
from embedding_service.shard.service import Unread
from embedding_service.shard.shares import Shares
from embedding_service.store.store import Store
from embedding_service.training.branch import (
    Branch,
    branch_folder,
    create_branch,
    next_session,
    read_address,
    read_branch,
    split_name,
)
from embedding_service.training.publishing import publish_branch
from embedding_service.training.seats import read_seats
from embedding_service.training.share import Share
from embedding_service.wire import large
from embedding_service.wire import training_pb2 as wire

log = logging.getLogger(__name__)

SERVICE = "embedding.v1.TrainingService"
# A push in memory: its pieces, and what is read from them. And of each piece, however small, the objects that hold it.
_PUSH_COPIES, _PIECE_BYTES = 3, 1024
# Seconds until the next piece of a push. Then it is given up, for others may wait for its memory.
_SILENCE = 30.0
T = TypeVar("T")


class TrainingService:
    """What trainers ask of the shares that this shard leads.

    Args:
        shard: Its id.
        audit: Where to note who trains and publishes.
    """

    def __init__(
        self,
        store: Store,
        shard: str,
        router: Router,
        limits: RequestLimits,
        budget: Budget,
        shares: Shares,
        audit: Audit | None = None,
    ) -> None:
        self._store, self._shard, self._router, self._shares = store, shard, router, shares
        self._limits, self._room, self._unread = limits, PushRoom(budget), Unread(budget)
        self._audit = audit or Audit(None)

    def add_to(self, server: Server) -> None:
        """Offer the service. Pieces of pushes stay the bytes that they came in."""
        unary = grpc.unary_unary_rpc_method_handler
        server.add_registered_method_handlers(
            SERVICE,
            {
                "Open": unary(self.Open, wire.OpenRequest.FromString, wire.OpenResponse.SerializeToString),
                "Begin": unary(self.Begin, wire.BeginRequest.FromString, wire.BeginResponse.SerializeToString),
                "Push": grpc.stream_unary_rpc_method_handler(self.Push, None, wire.PushResponse.SerializeToString),
                "Read": unary(self.Read, wire.ReadRequest.FromString, None),
                "Checkpoint": unary(
                    self.Checkpoint, wire.CheckpointRequest.FromString, wire.CheckpointResponse.SerializeToString
                ),
                "Publish": unary(self.Publish, wire.PublishRequest.FromString, wire.PublishResponse.SerializeToString),
                "Follow": grpc.stream_stream_rpc_method_handler(
                    self.Follow, wire.FollowRequest.FromString, wire.Followed.SerializeToString
                ),
            },
        )

    # Methods

    async def Open(self, request: wire.OpenRequest, context: Context) -> wire.OpenResponse:
        """See the proto."""
        return await self._answered(context, self._open(request, context))

    async def Begin(self, request: wire.BeginRequest, context: Context) -> wire.BeginResponse:
        """See the proto."""
        return await self._answered(context, self._begin(request, context))

    async def Push(self, requests: AsyncIterator[bytes], context: Context) -> wire.PushResponse:
        """See the proto."""
        return await self._answered(context, self._push(requests, context))

    async def Read(self, request: wire.ReadRequest, context: Context) -> bytes:
        """See the proto."""
        return await self._answered(context, self._read(request, context))

    async def Checkpoint(self, request: wire.CheckpointRequest, context: Context) -> wire.CheckpointResponse:
        """See the proto."""
        return await self._answered(context, self._checkpoint(request, context))

    async def Publish(self, request: wire.PublishRequest, context: Context) -> wire.PublishResponse:
        """See the proto."""
        return await self._answered(context, self._publish(request, context))

    async def Follow(
        self, requests: AsyncIterator[wire.FollowRequest], context: Context
    ) -> AsyncIterator[wire.Followed]:
        """See the proto."""
        try:
            async with aclosing(self._shares.follow(self._followers(requests, context))) as changes:
                async for change in changes:
                    yield change
        except EmbeddingServiceError as error:
            await abort(context, error)

    @staticmethod
    async def _answered(context: Context, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except EmbeddingServiceError as error:
            await abort(context, _told(error, context.caller))

    async def _open(self, request: wire.OpenRequest, context: Context) -> wire.OpenResponse:
        self._check_right(context, "train", request.branch)
        try:
            branch = await asyncio.to_thread(read_branch, self._store, request.branch)
        except NotFound:
            if not request.new_session:
                raise
            branch = await asyncio.to_thread(self._create, request)
        if request.HasField("optimizer") and request.optimizer != branch.optimizer.message:
            raise InvalidRequest(
                f"{branch.full_name} learns by {branch.optimizer.kind} with {_numbers(branch.optimizer.message)}, "
                f"not by {request.optimizer.kind} with {_numbers(request.optimizer)}: leave the optimizer out, or "
                "begin another branch"
            )
        folder = branch_folder(self._store, branch.model, branch.name)
        session = await asyncio.to_thread(next_session, folder) if request.new_session else 0
        return await asyncio.to_thread(self._describe, branch, folder, session)

    def _create(self, request: wire.OpenRequest) -> Branch:
        routing = self._router.current
        if routing is None or not routing.shard_ids:
            raise Unavailable("no routing yet, so nobody knows which shards a new branch may have: ask again")
        model, _ = split_name(request.branch)
        base = self._store.manifest(model, request.base or None)
        served = routing.by_name.get(base.full_name)
        owners = {
            name: [routing.shard_ids[column] if column >= 0 else "" for column in table.owners[:, 0].tolist()]
            for name, table in (served.tables.items() if served else ())
        }
        return create_branch(self._store, request.branch, request, owners, sorted(routing.shard_ids))

    def _describe(self, branch: Branch, folder: Path, session: int) -> wire.OpenResponse:
        index = {share: number for number, share in enumerate(branch.shares)}
        routing = self._router.current
        known = dict(zip(routing.shard_ids, routing.addresses, strict=True)) if routing else {}
        known[self._shard] = self._shares.address
        leads = {share: seat.primary for share, seat in read_seats(folder, branch).items()}
        return wire.OpenResponse(
            session=session,
            base=branch.base,
            optimizer=branch.optimizer.message,
            family=branch.family,
            hash_params=json.dumps(branch.hash_params),
            tables=[
                wire.BranchTable(
                    name=table.name,
                    rows=table.rows,
                    dim=table.dim,
                    rows_per_part=table.rows_per_part,
                    shares=[index[share] for share in table.shares],
                )
                for table in branch.tables
            ],
            shares=[
                wire.BranchShare(name=share, shard=shard, address=read_address(folder, shard) or known.get(shard, ""))
                for share, shard in leads.items()
            ],
        )

    async def _begin(self, request: wire.BeginRequest, context: Context) -> wire.BeginResponse:
        self._check_right(context, "train", request.branch)
        opened = await self._shares.leading(request.branch, request.share)
        if not request.session:
            raise InvalidRequest("session must be 1 or more: Open gives numbers")
        await opened.on(opened.share.begin, request.session, request.workers)
        if context.caller:
            self._audit.note("train", context.caller.name, model=request.branch, session=str(request.session))
        if request.rewind:
            await opened.on(opened.share.rewind, request.at_step)
        opened.wake()
        await self._shares.copied(opened)
        share = opened.share
        return wire.BeginResponse(
            applied_step=share.applied,
            durable_step=share.durable,
            accepted_steps=share.accepted,
            timeline=share.timeline,
        )

    async def _push(self, requests: AsyncIterator[bytes], context: Context) -> wire.PushResponse:
        reading: asyncio.Task[None] | None = None
        with self._room.enter() as take:
            try:
                while (piece := await _next_piece(requests)) is not None:
                    if reading is None:
                        name, share_name = _addressed(piece)
                        self._check_right(context, "train", name)
                        opened = await self._shares.leading(name, share_name)
                        reader = opened.share.reader()
                    else:
                        await reading
                    await take(_PUSH_COPIES * len(piece) + _PIECE_BYTES)
                    reading = asyncio.create_task(asyncio.to_thread(reader.add, piece))  # while the next one travels
                if reading is None:
                    raise InvalidRequest("the push holds no piece")
                await reading
                push = reader.end()
                await opened.on(opened.share.admit, push)
                # The step is done while copies are sent the push, and the answer travels.
                opened.later(_advance, opened.share)
                await self._shares.copied(opened)
            finally:
                if reading:
                    await asyncio.gather(reading, return_exceptions=True)
        share = opened.share
        return wire.PushResponse(accepted_step=push.step, applied_step=share.applied, durable_step=share.durable)

    async def _read(self, request: wire.ReadRequest, context: Context) -> bytes:
        self._check_right(context, "train", request.branch)
        opened = await self._shares.leading(request.branch, request.share)
        dtype = DTYPES.get(request.encoding)
        if dtype is None:
            raise InvalidRequest(f"rows of a branch come as FLOAT32, FLOAT16 or BFLOAT16, not {request.encoding}")
        if len(request.ids) % 8:
            raise InvalidRequest(f"ids hold {len(request.ids)} bytes, not a multiple of 8: send little-endian int64")
        ids = np.frombuffer(request.ids, "<i8").astype(np.int64)
        width = max((each.table.dim for each in opened.share.tables.values()), default=1) * dtype.itemsize
        self._limits.check_response(len(ids), width)

        def reached() -> bool:
            opened.check_leads()
            opened.share.check_has(request.session, request.worker, request.at_least_step)
            return opened.share.applied >= request.at_least_step

        await opened.until(reached)
        await self._unread.add(context, len(ids) * width, len(ids))
        return await asyncio.to_thread(_rows, opened.share, request.table, ids, dtype)

    async def _checkpoint(self, request: wire.CheckpointRequest, context: Context) -> wire.CheckpointResponse:
        self._check_right(context, "train", request.branch, "publish")
        opened = await self._shares.leading(request.branch, request.share)
        opened.share.check_has(request.session, request.worker, request.step)
        await opened.on(opened.share.want_checkpoint, request.step)

        def written() -> bool:
            opened.check_leads()
            return opened.share.has_checkpoint(request.step)

        await opened.until(written)
        return wire.CheckpointResponse(step=request.step)

    async def _publish(self, request: wire.PublishRequest, context: Context) -> wire.PublishResponse:
        self._check_right(context, "publish", request.branch)
        branch = await asyncio.to_thread(read_branch, self._store, request.branch)
        work = partial(
            publish_branch,
            self._store,
            branch,
            request.step,
            version=request.version or None,
            dtype=request.dtype or None,
            base=request.base or None,
        )
        manifest = await asyncio.to_thread(work)
        if context.caller:
            self._audit.note("publish", context.caller.name, model=manifest.full_name, branch=request.branch)
        rows = manifest.replaced_rows if manifest.base else sum(table.rows for table in manifest.tables)
        return wire.PublishResponse(version=manifest.version, rows=rows)

    async def _followers(
        self, requests: AsyncIterator[wire.FollowRequest], context: Context
    ) -> AsyncIterator[wire.FollowRequest]:
        """What a copy says. What it has counts, so it has to show the certificate of the shard that it speaks for."""
        caller = context.caller
        async for request in requests:
            if caller and request.shard and not speaks_for(caller.credential.names, request.shard):
                self._deny(context, caller, request.branch, f"follow as {request.shard}: its certificate is another's")
            yield request

    def _check_right(self, context: Context, right: str, name: str, other: str = "") -> None:
        """Raise PermissionDenied unless the caller has a right for a branch, where there is a policy."""
        caller = context.caller
        if caller and not any(caller.rights.may(each, name) for each in (right, other) if each):
            self._deny(context, caller, name, f"{right} {name}: the policy does not give it")

    def _deny(self, context: Context, caller: Caller, name: str, what: str) -> NoReturn:
        why = f"{caller.name} has no right to {what}"
        self._audit.note("denied", caller.name, model=name, peer=context.peer(), why=why)
        raise PermissionDenied(why)


def _told(error: EmbeddingServiceError, caller: Caller | None) -> EmbeddingServiceError:
    """An error without the list of what there is, unless all of that is the caller's to know."""
    if not isinstance(error, NotFound) or caller is None or "*" in (*caller.rights.train, *caller.rights.publish):
        return error
    return NotFound(str(error).partition("; ")[0])


def _rows(share: Share, table: str, ids: np.ndarray[Any, np.dtype[np.int64]], dtype: torch.dtype) -> bytes:
    rows, step = share.rows(table, ids)
    rows = rows.to(dtype)
    message, [place] = large.write(wire.ReadResponse(step=step), {ROWS: rows.nbytes})
    place[:] = data_of(rows)
    return message


def _advance(share: Share) -> None:
    try:
        share.advance()
    except Exception:  # the next push tries again, and so does who opens the log
        log.exception("%s cannot do step %d", share.branch.full_name, share.applied + 1)


async def _next_piece(requests: AsyncIterator[bytes]) -> bytes | None:
    """None after the last one. Raises Unavailable if it does not come."""
    try:
        async with asyncio.timeout(_SILENCE):
            return await anext(requests, None)
    except TimeoutError:
        raise Unavailable(f"the next piece of the push did not come for {_SILENCE:g} s: send the push again") from None


def _addressed(piece: bytes) -> tuple[str, str]:
    """The branch and the share that a push is for."""
    try:
        first, _ = large.read(wire.PushPiece, piece, IDS, GRADIENTS)
        return first.branch, first.share
    except DecodeError:
        raise InvalidRequest("a piece of the push is malformed: it is no PushPiece") from None


def _numbers(optimizer: wire.Optimizer) -> str:
    return f"eps {optimizer.eps:g}, betas {optimizer.beta1:g} and {optimizer.beta2:g}"
