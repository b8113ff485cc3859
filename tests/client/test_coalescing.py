"""Lookups of many tasks at once: fewer requests than lookups, and to everybody their own rows and their own end."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from support.checkpoints import DIM, longcat_table
from support.cluster import Up

from embedding_service import EmbeddingClient, errors
from embedding_service.client import coalescing
from embedding_service.client.calls import Call, Failure
from embedding_service.client.coalescing import Coalescer
from embedding_service.formats import get_format
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import Answer, Shape, encode_lookup

ROWS = len(longcat_table())


class Shard:
    """Answers a call with its ids as rows of 8 bytes, or as `fail` says."""

    def __init__(self) -> None:
        self.asked: list[Call] = []
        self.fail: dict[int, Failure] = {}

    def send(self, call: Call) -> Future[Any]:
        self.asked.append(call)
        ids = np.frombuffer(wire.LookupRequest.FromString(call.request.message()).ids_int64, "<i8")
        answered: Future[Any] = Future()
        answered.set_result(self.fail.get(len(ids)) or Answer(ids.view(np.uint8), "1"))
        return answered


def call(ids: list[int], timeout: float = 10.0, address: str = "h:0", table: str = "t") -> Call:
    request = encode_lookup("m@1", table, wire.ROW_ENCODING_STORED, 1, 1, np.array(ids), 1 << 40)
    return Call(address, request, timeout, Shape(len(ids), 8, 2, wire.ROW_ENCODING_STORED, "1"))


def ids_of(answer: Answer) -> list[int]:
    return answer.rows.view(np.int64).tolist()


async def together(coalescer: Coalescer, *calls: Call) -> list[Any]:
    return [answers[0] for answers in await asyncio.gather(*(coalescer.exchange([each]) for each in calls))]


def test_calls_of_one_turn_travel_together() -> None:
    shard = Shard()
    answers = asyncio.run(together(Coalescer(shard.send), call([1, 2]), call([7]), call([2, 3, 4])))
    assert [ids_of(answer) for answer in answers] == [[1, 2], [7], [2, 3, 4]]
    assert len(shard.asked) == 1


@pytest.mark.parametrize("other", [{"address": "h:1"}, {"table": "u"}, {"timeout": 5.0}])
def test_only_what_differs_in_its_rows_alone_is_joined(other: dict[str, Any]) -> None:
    shard = Shard()
    answers = asyncio.run(together(Coalescer(shard.send), call([1]), call([2], **other), call([3], timeout=9.95)))
    assert [ids_of(answer) for answer in answers] == [[1], [2], [3]]
    assert [each.timeout for each in shard.asked] == [9.95, other.get("timeout", 10.0)]


def test_a_joined_request_is_bounded_and_large_ones_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalescing, "SMALL", 3 * 8)
    monkeypatch.setattr(coalescing, "FULL", 5 * 8)
    shard = Shard()
    calls = [call([number, number + 100]) for number in range(7)] + [call([1, 2, 3, 4])]
    answers = asyncio.run(together(Coalescer(shard.send), *calls))
    assert [ids_of(answer) for answer in answers] == [*([number, number + 100] for number in range(7)), [1, 2, 3, 4]]
    assert sorted(each.shape.count for each in shard.asked if each.shape) == [2, 4, 4, 4, 4]


def test_a_failure_is_everybodys_who_travelled() -> None:
    shard = Shard()
    gone = shard.fail[3] = Failure(grpc.StatusCode.UNAVAILABLE, "gone")
    assert asyncio.run(together(Coalescer(shard.send), call([1]), call([2, 3]))) == [gone, gone]


def test_what_is_over_a_services_limit_together_goes_alone() -> None:
    shard = Shard()
    limit = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "limit of 2")
    shard.fail = {5: limit, 3: limit}
    answers = asyncio.run(together(Coalescer(shard.send), call([1, 2]), call([3, 4, 5])))
    assert ids_of(answers[0]) == [1, 2]
    assert answers[1] == limit


def test_what_cannot_be_sent_is_raised_to_all() -> None:
    def closed(call: Call) -> Future[Any]:
        raise errors.Unavailable("this client is closed")

    async def ask() -> list[Any]:
        coalescer = Coalescer(closed)
        return await asyncio.gather(*(coalescer.exchange([call([n])]) for n in range(3)), return_exceptions=True)

    assert [str(error) for error in asyncio.run(ask())] == ["this client is closed"] * 3


def expected(model: str, ids: torch.Tensor) -> torch.Tensor:
    row_format = get_format(model)
    return row_format.decode(row_format.encode(longcat_table()[ids]), DIM)


def test_many_tasks_of_a_real_service_get_their_rows_in_few_requests(
    service: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Call] = []

    async def ask(client: EmbeddingClient, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        asked = [
            (model, torch.randint(0, ROWS, (12,), generator=random)) for model in ("fp32", "int8") for _ in range(60)
        ]
        tasks = [asyncio.create_task(client.lookup_async(f"{model}/ngram", ids)) for model, ids in asked]
        wrong = asyncio.create_task(client.lookup_async("fp32/ngram", torch.tensor([3, ROWS])))
        tasks[5].cancel()
        rows = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(rows[5], asyncio.CancelledError)
        for (model, ids), found in zip(asked, rows, strict=True):
            if found is not rows[5]:
                assert isinstance(found, torch.Tensor)
                assert torch.equal(found, expected(model, ids))
        with pytest.raises(errors.OutOfRange, match=str(ROWS)):
            await wrong

    with EmbeddingClient(service.address, near=False) as client:
        client.lookup("fp32/ngram", torch.tensor([0]))
        send = client._transport.send
        monkeypatch.setattr(client._transport.together, "_send", lambda call: sent.append(call) or send(call))  # type: ignore[func-returns-value]
        asyncio.run(ask(client, 1))
        # Of two tables, to no more shards than there are, and a second request where one was full.
        assert len(sent) <= 2 * len({call.address for call in sent}) * 2
        with ThreadPoolExecutor(4) as threads:  # each with a loop of its own
            list(threads.map(lambda seed: asyncio.run(ask(client, seed)), range(8)))
