"""Pushes that are under way together: none is refused for the others, and no two wait for each other."""

from __future__ import annotations

import asyncio

import pytest

from embedding_service.budget import Budget
from embedding_service.errors import Overloaded
from embedding_service.shard.push_room import PushRoom


async def settled() -> None:
    """Whatever can go on has."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_pushes_that_hold_half_each_end_one_after_the_other() -> None:
    async def run() -> None:
        budget = Budget(400)
        room = PushRoom(budget)
        with room.enter() as take_late, room.enter() as take_first:
            await take_first(50)
            await take_late(50)
            late = asyncio.ensure_future(take_late(50))
            await settled()
            assert not late.done() and budget.left == 300
            for _ in range(20):
                await take_first(50)
            await settled()
            assert not late.done() and budget.left == 300  # requests and answers keep the rest
            with room.enter() as take_last:
                last = asyncio.ensure_future(take_last(1))
                await settled()
                assert not last.done()
                last.cancel()
            late.cancel()
            await asyncio.gather(late, last, return_exceptions=True)
        assert budget.left == budget.most

    asyncio.run(run())


def test_pushes_go_on_in_their_order_as_those_before_end() -> None:
    async def run() -> None:
        budget, done = Budget(400), list[int]()
        room = PushRoom(budget)

        async def push(number: int) -> None:
            with room.enter() as take:
                for _ in range(3):
                    await take(60)
                done.append(number)

        await asyncio.gather(*(push(number) for number in range(5)))
        assert done == [0, 1, 2, 3, 4] and budget.left == budget.most

    asyncio.run(run())


def test_a_push_alone_is_bounded_by_the_machine() -> None:
    async def run() -> None:
        budget = Budget(400)
        room = PushRoom(budget)
        with room.enter() as take:
            await take(10_000)
            with pytest.raises(Overloaded, match=r"needs 1,125,899,906,842,624 bytes of memory, and .* are free: send"):
                await take(1 << 50)
        assert budget.left == budget.most

    asyncio.run(run())
