"""The process that plans."""

import asyncio

import psutil
import pytest

from embedding_service.controller.planning import Planning
from embedding_service.errors import PlacementError
from embedding_service.placement.demand import Node, PartDemand
from embedding_service.placement.parts import PartKey

PARTS = [PartDemand(PartKey("m", "1", "t", index), 1000, 260) for index in range(4)]
NODES = [Node("a", 1 << 20), Node("b", 1 << 20)]


@pytest.mark.slow
def test_it_plans_says_what_does_not_fit_and_is_replaced_when_it_dies() -> None:
    others = set(psutil.Process().children())

    def processes() -> list[psutil.Process]:
        return [process for process in psutil.Process().children() if process not in others]

    async def use(planning: Planning) -> None:
        before = await planning.plan(PARTS, NODES, 1)
        assert {len(parts) for parts in before.parts_of.values()} == {2}
        with pytest.raises(PlacementError, match="2 replicas of every part need 2 shards, there are 1"):
            await planning.plan(PARTS, NODES[:1], 2)
        [process] = processes()
        process.suspend()  # a plan that takes its time
        asking = asyncio.create_task(planning.plan(PARTS, NODES, 1))
        for _ in range(5):
            await asyncio.sleep(0.01)  # the loop goes on, and with it all that shards say
        assert not asking.done()
        process.resume()
        assert await asking == before
        process.kill()
        assert await planning.plan(PARTS, NODES, 1) == before

    planning = Planning()
    try:
        asyncio.run(use(planning))
    finally:
        planning.close()
    assert not processes()
