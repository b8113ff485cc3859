"""A copy's side: it has what its share's primary has, for as long as it follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator

from embedding_service.client.channels import open_channel_async
from embedding_service.errors import StoreError
from embedding_service.security.access import Access
from embedding_service.shard.copies import NAMES
from embedding_service.shard.opened import Opened
from embedding_service.training.share import Change
from embedding_service.wire import training_pb2 as wire
from embedding_service.wire.training_pb2_grpc import TrainingServiceStub


async def follow_once(opened: Opened, shard: str, address: str, access: Access | None) -> None:
    """Do what the primary at an address did and does, until it says no more.

    shard: Who follows. Raises AioRpcError, and what shows that the copy cannot have the same rows.
    """
    said = opened.said = asyncio.Queue()
    first = _has(opened)
    first.branch, first.share, first.shard = opened.branch.full_name, opened.name, shard
    first.log = opened.share.log_identity
    said.put_nowait(first)

    async def say() -> AsyncIterator[wire.FollowRequest]:
        while (request := await said.get()) is not None:
            yield request

    try:
        async with open_channel_async(address, access) as channel:
            await _do_all(opened, TrainingServiceStub(channel).Follow(say()))
    finally:
        said.put_nowait(None)


def _has(opened: Opened) -> wire.FollowRequest:
    return wire.FollowRequest(position=opened.position, run=opened.run)


async def _do_all(opened: Opened, messages: AsyncIterable[wire.Followed]) -> None:
    """Do what the primary did, and say so, while it tells."""
    pieces: list[bytes] = []
    run = opened.run
    async for message in messages:
        pieces.append(message.piece)
        if not message.last:
            continue
        if message.kind == wire.Followed.KIND_START:
            run, opened.run, opened.position, opened.loaded = message.run, 0, 0, False
            await opened.on(opened.share.restart, message.step)
        elif message.kind == wire.Followed.KIND_CAUGHT_UP:
            opened.run, opened.loaded = run, True
        elif message.kind in NAMES:
            await opened.on(opened.share.do, Change(NAMES[message.kind], message.step, pieces))  # type: ignore[arg-type]
        else:
            raise StoreError(f"a change came of kind {message.kind}, which is not known here")
        pieces = []
        if opened.run:
            opened.position = message.position
            opened.said.put_nowait(_has(opened))
