"""What the controller does where it cannot place everything; in this process, with the process that plans."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from embedding_service.controller import placing, planning
from embedding_service.controller.events import Joined
from embedding_service.controller.server import Controller, ControllerOptions
from embedding_service.serving import cancel
from embedding_service.store.store import Store
from embedding_service.wire import control_pb2 as control


def decide(store: Path, memory: int, check: Callable[[Controller], Awaitable[None]]) -> None:
    """Run a controller of one shard until `check` returns."""

    async def use() -> None:
        controller = Controller(ControllerOptions(str(store), settle=0.0, lost_after=600.0), "127.0.0.1:9")
        report = control.ShardReport(shard_id="a", address="127.0.0.1:8", device="cpu", memory_limit=memory)
        controller._handle(Joined("stream", report))
        deciding = asyncio.create_task(controller.run())
        try:
            async with asyncio.timeout(120):
                await check(controller)
            assert not deciding.done()
        finally:
            await cancel([deciding])
            await controller.end_streams()

    asyncio.run(use())


async def placement_problem(controller: Controller, *words: str) -> None:
    while not all(word in controller.state.placing.problem for word in words):
        await asyncio.sleep(0.02)


def assigned(controller: Controller) -> set[str]:
    """Models that the shard was told to hold."""
    return {key.model for key in controller.state.fleet.shards["a"].assigned or ()}


@pytest.mark.slow
def test_a_planner_that_does_not_come_back_is_replaced_and_asked_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "REPLAN_SECONDS", 0.2)

    async def check(controller: Controller) -> None:
        monkeypatch.setattr(planning, "PLAN_SECONDS", 0.01)
        await placement_problem(controller, "planning failed, and is tried again", "give it memory and time")
        assert controller.state.routing and not controller.state.routing.models
        monkeypatch.setattr(planning, "PLAN_SECONDS", 120.0)
        controller.state._dirty = True
        while not assigned(controller):
            await asyncio.sleep(0.02)
            controller.state._dirty = True
        assert not controller.state.placing.problem

    decide(store, 1 << 30, check)


@pytest.mark.slow
def test_versions_that_do_not_fit_are_left_out_and_the_others_are_placed(store: Path) -> None:
    small = sorted(Store(store).newest(), key=lambda manifest: manifest.bytes)
    largest = small.pop()
    memory = sum(manifest.bytes for manifest in small)

    async def check(controller: Controller) -> None:
        await placement_problem(controller, f"not placed: {largest.model}@1: ", "are missing")
        while not assigned(controller):
            await asyncio.sleep(0.02)
        assert assigned(controller) == {manifest.model for manifest in small}

    decide(store, memory, check)
