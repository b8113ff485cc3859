"""Processes and tasks that do not want to end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from support.cluster import Process, free_port
from support.hanging import PIECE, PUSHES

from embedding_service import serving
from embedding_service.client.channels import open_channel_async
from embedding_service.errors import Unavailable
from embedding_service.serving import cancel
from embedding_service.training import branch
from embedding_service.training.log import Log
from embedding_service.wire import training_pb2 as wire
from embedding_service.wire.training_pb2_grpc import TrainingServiceStub

# What the last words of a process name, by where it hangs.
NAMED = {"loop": ("hang", "in wait"), "task": ("hang", "Event.wait"), "thread": ("asyncio_0", "shutdown_default")}


@pytest.mark.service
def test_a_process_that_hangs_at_its_end_says_where_and_loses_nothing_accepted(tmp_path: Path) -> None:
    running = {
        where: Process(tmp_path / f"{where}.log", where, str(tmp_path / where), module="support.hanging")
        for where in NAMED
    }
    for process in running.values():
        process.wait_for("waits")
    for where, process in running.items():
        assert process.end(signal.SIGTERM) == 1, process.output()
        assert "did not end within 1 s and is ended. Still there: tasks" in process.output()
        for name in NAMED[where]:
            assert name in process.output()
        log = Log(tmp_path / where, 3600)
        assert [(each.step, *map(bytes, each.pieces)) for each in log.read()] == [
            (step, PIECE) for step in range(1, PUSHES + 1)
        ]
        log.close()


async def _follow_nobody(address: str, endings: list[asyncio.Task[None]]) -> None:
    """As a copy does whose primary is gone: call it, and call it again. It is to end when the first call fails."""

    async def said() -> AsyncIterator[wire.FollowRequest]:
        yield wire.FollowRequest()

    task = asyncio.current_task()
    assert task
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async with open_channel_async(address, None) as channel:
                call = TrainingServiceStub(channel).Follow(said())
                if not endings:
                    call.add_done_callback(lambda _: endings.append(asyncio.create_task(cancel([task]))))
                async for _ in call:
                    raise AssertionError("nobody is there")
        await asyncio.sleep(0.01)


def test_a_task_ends_that_is_cancelled_while_its_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPC swallows every second cancellation of that moment."""
    monkeypatch.setattr(serving, "_CANCEL_AGAIN", 0.05)

    async def use() -> None:
        nobody = f"127.0.0.1:{free_port()}"
        for _ in range(20):
            endings: list[asyncio.Task[None]] = []
            following = asyncio.create_task(_follow_nobody(nobody, endings))
            await asyncio.wait([following], timeout=60)
            assert following.cancelled()
            await endings[0]

    asyncio.run(use())


def test_a_lock_that_a_process_hangs_in_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch, "_LOCK_SECONDS", 0.1)
    path = tmp_path / "seat.lock"
    with path.open("wb") as hung:
        fcntl.flock(hung, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match=r"has had .*seat.lock locked for 0.1 s: end the one that hangs"):
            branch.locked(path).__enter__()
    with branch.locked(path):
        pass
