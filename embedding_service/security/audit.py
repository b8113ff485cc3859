"""Who published, trained, rolled back, drained, and who was denied: one JSON object a line, in a file.

Lines hold names and reasons, and no token and no row. Processes may share a file: each line is written at once. A file
that is full is kept under its name and ".1", in the place of the one before.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from embedding_service.foreign import printable

log = logging.getLogger(__name__)

Action = Literal["publish", "rollback", "gc", "train", "drain", "serve", "denied"]
# Bytes of a file, and characters of a value.
MOST_BYTES, MOST_CHARACTERS = 16 << 20, 300
# Seconds to wait for another process that writes, and between two tries. Servers note lines on their event loops, so
# it is waited once for a process that does not go on.
LOCK_SECONDS, TRY_SECONDS = 0.05, 0.001
# Lines a second of one action. Those that are left out are counted in the next one.
MOST_LINES = 100


class Audit:
    """Writes lines. Thread-safe. A file that cannot be written to is said once, and stops nothing.

    Args:
        path: The file. None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._lines: dict[str, tuple[int, int, int]] = {}
        self._said = ""
        self._wait = LOCK_SECONDS

    def note(self, action: Action, who: str, **about: str) -> None:
        """Write what happened.

        Args:
            action: What was done.
            who: The identity, or "nobody".
            about: Such as model, method, peer, why. Never a token, and no rows.
        """
        if self._path is None:
            return
        with self._lock:
            left_out = self._left_out(action)
            if left_out is None:
                return
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            told = {"time": now, "action": action, "who": who, **about}
            line: dict[str, str | int] = {name: printable(value)[:MOST_CHARACTERS] for name, value in told.items()}
            if left_out:
                line["left_out"] = left_out
            try:
                locked = _append(self._path, json.dumps(line, ensure_ascii=False).encode() + b"\n", self._wait)
                self._wait = LOCK_SECONDS if locked else 0.0
                self._said = ""
            except OSError as error:
                why = f"the audit {self._path} cannot be written: {error.strerror}"
                if why != self._said:
                    log.error("%s", why)
                    self._said = why

    def _left_out(self, action: str) -> int | None:
        """How many lines of an action were left out before this one. None: this one is, too."""
        second = int(time.monotonic())
        since, written, left_out = self._lines.get(action, (second, 0, 0))
        if since != second:
            written = 0
        if written >= MOST_LINES:
            self._lines[action] = second, written, left_out + 1
            return None
        self._lines[action] = second, written + 1, 0
        return left_out


def this_user() -> str:
    """Who runs this command."""
    try:
        return f"user {getpass.getuser()}"
    except (KeyError, OSError):  # a container may run as nobody that it knows
        return f"user {os.getuid()}"


def _append(path: Path, line: bytes, wait: float) -> bool:
    """Returns whether other processes let us have the file for ourselves. Lines come whole and last without it, too."""
    while True:
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab", buffering=0) as file:  # noqa: PTH123
            locked = _lock(file.fileno(), wait)
            about = os.fstat(file.fileno())
            if locked and (not about.st_nlink or not path.exists() or path.stat().st_ino != about.st_ino):
                continue  # another process has put it aside since
            if locked and about.st_size and about.st_size + len(line) > MOST_BYTES:
                path.replace(path.with_name(path.name + ".1"))
                continue
            file.write(line)
            return locked


def _lock(file: int, wait: float) -> bool:
    give_up = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(TRY_SECONDS)
        else:
            return True
