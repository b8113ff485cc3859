"""A server process that hangs at its end: `python -m support.hanging WHERE LOG` accepts pushes, then waits for SIGTERM.

WHERE: "loop": the event loop is stuck. "task": one awaits what never comes. "thread": the loop waits for its threads.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

from embedding_service import ending
from embedding_service.serving import run_process
from embedding_service.training.log import PUSH, Log, Record

PUSHES, PIECE = 20, b"what a trainer was told is accepted"


async def hang(where: str) -> None:
    """Until SIGTERM, and then for good."""
    told = ending.told_to_end(1)
    print("waits", flush=True)
    if where == "loop":
        threading.Event().wait()
    await told.wait()
    if where == "task":
        await asyncio.Event().wait()
    running = asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
    running.add_done_callback(lambda _: None)


def main(where: str, folder: Path) -> None:
    """See the module."""
    log = Log(folder, 3600)
    log.ready(0)
    for step in range(1, PUSHES + 1):
        log.append(Record(PUSH, step, [PIECE]))
    run_process("hanging", lambda: hang(where))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
