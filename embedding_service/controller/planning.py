"""Planning in a process of its own.

For 10,000 parts and 1,000 shards TorchRec takes 10 s and keeps Python's lock: in the controller's own process nobody
would be heard meanwhile, and shards that report every second would count as gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

from embedding_service.errors import PlacementError
from embedding_service.machine import end_with_parent
from embedding_service.placement.demand import Node, PartDemand, Placement

log = logging.getLogger(__name__)


class Planning:
    """A process that plans, one plan at a time; it ends with this one."""

    def __init__(self) -> None:
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
                self._start()
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise PlacementError(f"the process that plans {len(parts)} parts on {len(nodes)} shards dies: give it memory")

    def close(self) -> None:
        """End it; who waits for a plan is told."""
        self._closed = True
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        """On the thread that lives as long as this process: the kernel ends ours when its starter ends."""
        context = get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_run, args=(there,), daemon=True)
        self._process.start()
        there.close()
        self._closed = False

    def _ask(self, *arguments: object) -> Placement | Exception:
        self._pipe.send(arguments)
        return self._pipe.recv()  # type: ignore[no-any-return]


def _run(pipe: Connection) -> None:
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the controller
    from embedding_service.placement.planner import plan  # takes seconds, while shards come

    with contextlib.suppress(EOFError):
        while True:
            arguments = pipe.recv()
            try:
                answer: Placement | Exception = plan(*arguments)
            except Exception as error:  # whatever it is, who waits for the plan raises it
                answer = error
            pipe.send(answer)
