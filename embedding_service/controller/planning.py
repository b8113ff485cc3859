"""Planning in a process of its own.

For 10,000 parts and 1,000 shards TorchRec takes 10 s and keeps Python's lock: in the controller's own process nobody
would be heard meanwhile, and shards that report every second would count as gone.
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

from embedding_service.errors import PlacementError
from embedding_service.machine import end_with_parent
from embedding_service.placement.demand import Node, PartDemand, Placement

log = logging.getLogger(__name__)


class Planning:
    """A process that plans, one plan at a time; it ends with the thread that made it."""

    def __init__(self) -> None:
        self._closed = False
        self._start()

    async def plan(self, parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> Placement:
        """`placement.planner.plan`.

        Raises PlacementError, also where the process died twice; EOFError once closed.
        """
        for _ in range(2):
            try:
                answer = await asyncio.to_thread(self._ask, parts, nodes, replicas)
            except (EOFError, OSError):
                if self._closed:
                    raise EOFError from None
                log.warning("the process that plans has died: starting another")
                self._end()
                self._start()
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise PlacementError(f"the process that plans {len(parts)} parts on {len(nodes)} shards dies: give it memory")

    def close(self) -> None:
        """End it; who waits for a plan is told."""
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

    def _ask(self, *arguments: object) -> Placement | Exception:
        self._pipe.send(arguments)
        return self._pipe.recv()  # type: ignore[no-any-return]


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
            except Exception as error:  # whatever it is, who waits for the plan raises it
                answer = error
            pipe.send(answer)
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    from embedding_service.controller import planning  # under its name, which messages are pickled with

    planning.main(Connection(int(sys.argv[1])))
