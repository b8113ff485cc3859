"""Says what a start waits for, while it waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from embedding_service.foreign import printable

# Called with what a start waits for.
Say = Callable[[str], object]


class Waiting:
    """A line that changes on a terminal. Elsewhere a line for each thing, said again about every REPEAT_SECONDS.

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
        self._line = self._said = ""
        self._lock = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> Waiting:
        if self._console.is_terminal:
            self._shown.start()
        else:
            self._over.clear()
            threading.Thread(target=self._repeat, name="waiting", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._shown.stop()
        self._over.set()

    def say(self, line: str) -> None:
        """This is what is waited for now."""
        with self._lock:
            self._line = printable(line)
            if self._console.is_terminal:
                self._shown.update(self._task, description=self._line)
            elif self._line != self._said and self._since_said() >= self._least_seconds:
                self._print()

    def _repeat(self) -> None:
        """Say again what takes long. Whoever loads a library or starts Ray cannot do so meanwhile."""
        while not self._over.wait(self.REPEAT_SECONDS):
            with self._lock:
                if self._line and self._since_said() >= self.REPEAT_SECONDS / 2:
                    self._print()

    def _since_said(self) -> float:
        return time.monotonic() - self._printed

    def _print(self) -> None:
        waited = time.monotonic() - self._started
        self._console.print(f"{self._name}{self._line} ({waited:.0f} s)", soft_wrap=True)
        self._said, self._printed = self._line, time.monotonic()
