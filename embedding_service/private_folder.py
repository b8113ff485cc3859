"""Folders of this user among the temporary files, where others could have made them first."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

_PREFIX = "embedding-sockets-"


def own_folder(path: Path) -> bool:
    """Make a folder of a known name, unless it is there. Whether it is this user's, and nobody else may write to it."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
    found = path.lstat()
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not others_write


class PrivateFolder:
    """A new folder in the one for temporary files. Those that killed processes left there are removed.

    A process holds a lock on its own, which the kernel takes away with it.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        _remove_left()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._lock = _locked(self.path)
            # Another process may have taken it for one that was left, until it was locked.
            if self._lock is not None and self.path.exists():
                return
            self.close()

    def close(self) -> None:
        """Remove it, with what lies in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_left() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if (lock := _locked(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _locked(path: Path) -> int | None:
    """A folder of this user that nobody else has locked, open and locked; None for all others."""
    file = None
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if os.fstat(file).st_uid == os.geteuid():
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
    if file is not None:
        os.close(file)
    return None
