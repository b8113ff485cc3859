"""The end of a server process: it is told by a signal, and is over in time, whatever hangs.

A platform kills a process that is late, and then nobody learns what kept it. So the process says that itself, and ends.
Nothing that was accepted is lost by it: that is with the kernel, or with other shards.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

log = logging.getLogger(__name__)

# Seconds to close everything, after a drain. Kubernetes gives 15 for it.
END_SECONDS = 10.0
# Seconds to say what hangs. Then the kernel ends the process, though somebody has Python's lock, or reads no log.
_LAST_WORDS = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Clock:
    """Ends this process when its time is over."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due, self._given = math.inf, 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    def end_within(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        due = time.monotonic() + seconds
        with self._changed:
            if due >= self._due:
                return
            if self._due == math.inf:
                threading.Thread(target=self._run, name="end", daemon=True).start()
            self._due, self._given, self._loop = due, seconds, loop
            self._changed.notify()
        signal.setitimer(signal.ITIMER_REAL, seconds + _LAST_WORDS)  # SIGALRM, which nobody handles

    def _run(self) -> None:
        with self._changed:
            while (left := self._due - time.monotonic()) > 0:
                self._changed.wait(left)
        assert self._loop
        log.critical("did not end within %g s and is ended. Still there: %s", self._given, what_runs(self._loop))
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        os._exit(1)


_clock = _Clock()


def end_within(seconds: float = END_SECONDS) -> None:
    """End this process after some seconds, if it has not ended by itself. It says what hangs then.

    To be called on its event loop. An earlier end that was asked for before stays.
    """
    _clock.end_within(seconds, asyncio.get_running_loop())


def told_to_end(seconds: float = END_SECONDS) -> asyncio.Event:
    """Set by each SIGTERM and SIGINT from now on. The process is over `seconds` after the first one at the latest.

    A thread hears the signals, so the clock runs though the event loop is stuck. To be called on the main thread.
    """
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    heard, woken = socket.socketpair()
    woken.setblocking(False)

    def listen() -> None:
        with heard, woken:  # the latter is open for as long as the process is
            while number := heard.recv(1):
                if number[0] in _SIGNALS:
                    _clock.end_within(seconds, loop)
                    with contextlib.suppress(RuntimeError):  # the loop has ended
                        loop.call_soon_threadsafe(told.set)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    for name in _SIGNALS:
        signal.signal(name, lambda *_: None)
    return told


def what_runs(loop: asyncio.AbstractEventLoop) -> str:
    """The tasks of a loop and where each waits, then the threads besides this one. May be called on any thread."""
    tasks = [_where(task) for task in _tasks(loop)]
    threads = [each.name for each in threading.enumerate() if each is not threading.current_thread()]
    return f"tasks {', '.join(sorted(tasks)) or 'none'}; threads {', '.join(sorted(threads))}"


def _tasks(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    with contextlib.suppress(RuntimeError):  # they change too fast, which shows that the loop is not stuck
        return asyncio.all_tasks(loop)
    return set()


def _where(task: asyncio.Task[Any]) -> str:
    """The functions that await each other, the innermost last."""
    names: list[str] = []
    awaited: Any = task.get_coro()
    while frame := getattr(awaited, "cr_frame", None):
        names.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        awaited = awaited.cr_await
    return " > ".join(names)
