"""Says what a start waits for, while it waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from embedding_service.foreign import printable

# Called with what a start waits for.
Say = Callable[[str], object]


class Waiting:
    """A line that changes on a terminal. Elsewhere a line for each thing, and again every REPEAT_SECONDS.

    Used in a `with`.

    Args:
        console: Where it is said.
        name: Begins each line where there is no terminal.
        least_seconds: Between two such lines. What comes sooner is not said.
    """

    REPEAT_SECONDS = 10.0

    def __init__(self, console: Console, name: str = "", least_seconds: float = 0.0) -> None:
        self._console = console
        self._name = f"{name}: " if name else ""
        self._least_seconds = least_seconds
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._shown = Progress(*columns, console=console, transient=True)
        self._task = self._shown.add_task("")
        self._started = time.monotonic()
        self._printed = float("-inf")
        self._said = ""

    def __enter__(self) -> Waiting:
        if self._console.is_terminal:
            self._shown.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._shown.stop()

    def say(self, line: str) -> None:
        """This is what is waited for now."""
        line = printable(line)
        if self._console.is_terminal:
            self._shown.update(self._task, description=line)
        elif self._is_due(line):
            self._console.print(f"{self._name}{line} ({time.monotonic() - self._started:.0f} s)", soft_wrap=True)
            self._said, self._printed = line, time.monotonic()

    def _is_due(self, line: str) -> bool:
        since = time.monotonic() - self._printed
        return since >= (self.REPEAT_SECONDS if line == self._said else self._least_seconds)
