"""Telling how far a long copy is."""

from __future__ import annotations

from collections.abc import Callable

# Called with (bytes of the checkpoint done, of all), after each chunk.
Progress = Callable[[int, int], None]


class Meter:
    """Adds up bytes done and tells `progress`, if there is one."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, done: int) -> None:
        """Count `done` more bytes."""
        self._done += done
        if self._progress:
            self._progress(self._done, self._total)
