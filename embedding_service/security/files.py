"""Files that others replace while this process runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from embedding_service.errors import InvalidRequest

T = TypeVar("T")

# Seconds within which files are replaced that belong together, and those between two looks at them.
REPLACED_SECONDS, PAUSE = 2.0, 0.02
Stamp = tuple[tuple[int, int, int] | None, ...]


class Unmatched(InvalidRequest):
    """Files that belong together do not match. They are being replaced one by one, perhaps."""


def stamp_of(paths: Sequence[Path]) -> Stamp:
    """What changes when a file is replaced, also by a link to another folder, as Kubernetes does it."""
    return tuple(_stamp(path) for path in paths)


def read(path: Path) -> bytes:
    """A file's content. Raises InvalidRequest naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        about = os.stat(path)  # noqa: PTH116 - this is looked at often
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


class Reloaded(Generic[T]):
    """What files say, read again after they changed. Files that are not right leave what was there before.

    Thread-safe.

    Args:
        paths: The files.
        read: Reads them. Whatever it raises is handed to `complain` if something was read before. At first it is
            raised, and Unmatched only if that lasts.
        complain: Told once of each state of the files that could not be read.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], T], complain: Callable[[Exception], None] = lambda error: None
    ) -> None:
        self._paths, self._read, self._complain = paths, read, complain
        self._lock = threading.Lock()
        self._stamp = stamp_of(paths)
        self._now = _matched(read)

    @property
    def now(self) -> T:
        """What was read last."""
        return self._now

    def look(self) -> bool:
        """Read the files if they changed. Returns whether there is something new."""
        stamp = stamp_of(self._paths)
        if stamp == self._stamp:
            return False
        with self._lock:
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            try:
                self._now = self._read()
            except Exception as error:
                self._complain(error)
                return False
            return True


def _matched(read: Callable[[], T]) -> T:
    """What is read, once the files match. Waits for that, for a while."""
    end = time.monotonic() + REPLACED_SECONDS
    while True:
        try:
            return read()
        except Unmatched:
            if time.monotonic() > end:
                raise
        time.sleep(PAUSE)
