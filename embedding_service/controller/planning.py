"""Planning in a process of its own.

For 10,000 parts and 1,000 shards TorchRec takes 10 s and keeps Python's lock. In the controller's own process, shards
would not be heard all that time. They report every second, and would count as gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from embedding_service.machine import end_with_parent
from embedding_service.placement.demand import Node, PartDemand, Placement

log = logging.getLogger(__name__)

# 10,000 parts on 1,000 shards take 10 s.
PLAN_SECONDS = 120.0


class Planning:
    """A process that plans, one plan at a time. It ends with the thread that made it."""

    def __init__(self) -> None:
        self._closed = False
        self._turn = asyncio.Lock()
        self._start()

    async def plan(self, parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> Placement:
        """`placement.planner.plan`.

        Raises PlacementError, or another error of the planner. Raises RuntimeError if the process died twice or took
        over PLAN_SECONDS, and EOFError once closed.
        """
        async with self._turn:
            return await self._plan(parts, nodes, replicas)

    async def _plan(self, parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> Placement:
        for _ in range(2):
            asking = asyncio.ensure_future(asyncio.to_thread(_ask, self._pipe, (parts, nodes, replicas)))
            in_time, _ = await asyncio.wait([asking], timeout=PLAN_SECONDS)
            if not in_time:
                self._replace()  # which ends the asking
            try:
                answer = await asking
            except (EOFError, OSError):
                if self._closed:
                    raise EOFError from None
                if not in_time:
                    break
                log.warning("the process that plans has died: starting another")
                self._replace()
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise RuntimeError(
            f"the process that plans {len(parts)} parts on {len(nodes)} shards dies, or takes over {PLAN_SECONDS:g} s: "
            "give it memory and time"
        )

    def close(self) -> None:
        """End it. A caller that waits for a plan is told."""
        self._closed = True
        self._end()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._pipe = Connection(ours.detach())

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _replace(self) -> None:
        self._end()
        self._start()


def _ask(pipe: Connection, arguments: tuple[object, ...]) -> Placement | Exception:
    pipe.send(arguments)
    return pipe.recv()  # type: ignore[no-any-return]


def main(pipe: Connection) -> None:
    """Run a process that `Planning` started."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a group's signal is the controller's business
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    from embedding_service.placement.planner import plan  # takes seconds, while shards come

    try:
        while True:
            arguments = pipe.recv()
            try:
                answer: Placement | Exception = plan(*arguments)
            except Exception as error:  # any error: the caller that waits for the plan raises it
                answer = error
            pipe.send(answer)
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    from embedding_service.controller import planning  # under its name, which messages are pickled with

    planning.main(Connection(int(sys.argv[1])))
