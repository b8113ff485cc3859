"""Connections: which are kept, and which are closed when. Servers of this process answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from support.cluster import until

from embedding_service.client import transport as transports
from embedding_service.client.calls import Call
from embedding_service.client.transport import GrpcTransport
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import (
    EmbeddingServiceServicer,
    add_EmbeddingServiceServicer_to_server,
)

SLOW = 7


class _Shard(EmbeddingServiceServicer):
    """Says which routing it was asked for. Calls with the term `SLOW` wait until they may end."""

    def __init__(self) -> None:
        self.asked, self.may_end = threading.Semaphore(0), threading.Event()
        self.ended = threading.Semaphore(0)

    def GetRouting(self, request: wire.GetRoutingRequest, context: Any) -> wire.Routing:
        context.add_callback(self.ended.release)
        self.asked.release()
        if request.term == SLOW:
            self.may_end.wait(60)
        return wire.Routing(term=request.term)


@pytest.fixture
def shard() -> _Shard:
    return _Shard()


@pytest.fixture
def addresses(shard: _Shard) -> Iterator[list[str]]:
    """Two addresses, which are one server's."""
    server = grpc.server(ThreadPoolExecutor(8))
    add_EmbeddingServiceServicer_to_server(shard, server)
    ports = [server.add_insecure_port("127.0.0.1:0") for _ in range(2)]
    server.start()
    yield [f"127.0.0.1:{port}" for port in ports]
    shard.may_end.set()
    server.stop(None).wait()


def ask(address: str, term: int = 1) -> Call:
    return Call(address, wire.GetRoutingRequest(term=term), 60.0)


def test_calls_of_a_task_that_is_cancelled_end(
    addresses: list[str], shard: _Shard, caplog: pytest.LogCaptureFixture
) -> None:
    transport = GrpcTransport()

    async def use() -> None:
        task = asyncio.create_task(transport.together.exchange([ask(each, SLOW) for each in addresses]))
        for _ in addresses:
            assert await asyncio.to_thread(shard.asked.acquire, timeout=30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in addresses:  # both, though the task waited for one of them
            assert await asyncio.to_thread(shard.ended.acquire, timeout=30)
        [answer] = await transport.together.exchange([ask(addresses[0])])
        assert answer.term == 1

    asyncio.run(use())
    until(lambda: not transport._under_way, "the calls to end here too")
    transport.close()
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == []


def test_a_connection_to_who_is_named_no_more_ends_after_a_while_and_with_its_calls(
    addresses: list[str], shard: _Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before its calls have ended, and not where others make calls on it, or it is named again."""
    monkeypatch.setattr(transports, "_LOOK_SECONDS", 0.0)
    stays, goes = addresses
    named = set(addresses)
    transport = GrpcTransport(None, lambda: named)
    try:

        def answered(address: str) -> set[str]:
            """Who is connected to after a call was answered."""
            assert transport.send(ask(address)).result().term == 1
            return set(transport._channels)

        slow = transport.send(ask(goes, SLOW))
        assert shard.asked.acquire(timeout=60)
        named.discard(goes)
        assert answered(stays) == {stays, goes}  # a moment is not long
        monkeypatch.setattr(transports, "_GONE_SECONDS", -1.0)
        named.add(goes)
        assert answered(stays) == {stays, goes}
        named.discard(goes)
        assert answered(stays) == {stays}
        [left] = transport._outdated
        assert answered(goes) == {stays, goes}  # a call of before that goes there may still be made
        named.add(goes)
        assert answered(stays) == {stays, goes} and left in transport._outdated and not slow.done()
        shard.may_end.set()
        assert slow.result().term == SLOW
        assert answered(stays) == {stays, goes} and not transport._outdated
        with pytest.raises(ValueError, match="closed"):
            left.connections[1][0].unary_unary("/x")(b"", timeout=60)
        transport.channel(goes)
        named.discard(goes)
        assert answered(stays) == {stays, goes}
    finally:
        transport.close()
