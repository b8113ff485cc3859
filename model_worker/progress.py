"""Tells what a start waits for, while it waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from embedding_service.foreign import printable

# Called with what a start waits for.
Say = Callable[[str], object]


class StartProgress:
    """A line that changes on a terminal. Elsewhere a line for each thing, and again every REPEAT_SECONDS.

    It writes to stderr, within a `with`.
    """

    REPEAT_SECONDS = 10.0

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._shown = Progress(*columns, console=self._console, transient=True)
        self._task = self._shown.add_task("")
        self._started = self._printed = time.monotonic()
        self._said = ""

    def __enter__(self) -> StartProgress:
        if self._console.is_terminal:
            self._shown.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._shown.stop()

    def say(self, line: str) -> None:
        """This is what it waits for now."""
        line, now = printable(line), time.monotonic()
        if self._console.is_terminal:
            self._shown.update(self._task, description=line)
        elif line != self._said or now - self._printed >= self.REPEAT_SECONDS:
            self._console.print(f"model-worker: {line} ({now - self._started:.0f} s)")
            self._printed = now
        self._said = line
