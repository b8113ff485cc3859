"""The redo log of a share: pushes as they came, in the order in which they were accepted.

A record is a header, then pieces. The header has the record's kind, its step, how many pieces there are with their
lengths, and a digest of all that follows. Whoever reads the log stops at the first record whose digest does not hold:
that one was being written when the process or its machine died.

The log is cut into files. A checkpoint begins a new one, and old ones go with the checkpoints that needed them.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import mmap
import os
import secrets
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from embedding_service.errors import Overloaded, Unavailable
from embedding_service.machine import sync_folder
from embedding_service.training.branch import replace

log = logging.getLogger(__name__)

PUSH, SESSION = 1, 2
_MAGIC = b"ESL1"
# Magic, kind, pieces, step, bytes of the body, digest of all but itself.
_HEAD = struct.Struct("<4sHHQQ16s")
NEVER, ALWAYS = -1.0, 0.0


class Record(NamedTuple):
    """What a record holds. `step`: of a push; of a session its number."""

    kind: int
    step: int
    pieces: Sequence[bytes | memoryview]


class Log:
    """A log in a folder of its own. One process may have it open.

    Args:
        folder: Made if it is not there.
        sync: Seconds from a record to fdatasync at most; ALWAYS: before it is accepted; NEVER.

    Attributes:
        identity: Another log has another one.
    """

    def __init__(self, folder: Path, sync: float) -> None:
        self.folder, self._sync = folder, sync
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"another process has the log {folder} open: wait until it has ended") from None
        name = folder / "identity"
        if not name.exists():
            replace(name, secrets.token_hex(8).encode())
        self.identity = name.read_text()
        self._file: int | None = None
        self._dirty, self._in_use = threading.Condition(), threading.Lock()
        self._written = self._synced = 0
        self._mark = self._durable = 0
        self._closed, self._failure = False, ""
        if sync > 0:
            threading.Thread(target=self._keep_synced, name="log-sync", daemon=True).start()

    def read(self) -> Iterator[Record]:
        """All whole records. What follows the last one is cut off."""
        for number, path in enumerate(files := self._files()):
            good, data = 0, _mapped(path)
            for record, end in _records(data):
                good = end
                yield record
            if good < len(data):
                with path.open("r+b") as file:
                    file.truncate(good)
                for later in files[number + 1 :]:
                    later.unlink()
                return

    def snapshot(self) -> Iterator[Record]:
        """All records as they are now, read when they are asked for, though the log goes on."""
        data = [_mapped(path) for path in self._files()]
        return (record for each in data for record, _ in _records(each))

    def clear(self, step: int) -> None:
        """Forget all, and go on after `step`."""
        self._close_file()
        for path in reversed(self._files()):
            path.unlink()
        self._open(self._path(step))

    def append(self, record: Record) -> None:
        """Write a record. Raises Overloaded if the disk does not take it: then nothing of it is there."""
        self.check()
        assert self._file is not None
        end = os.fstat(self._file).st_size
        try:
            _write(self._file, record)
            if self._sync == ALWAYS:
                _to_disk(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            if error.errno == errno.EIO:
                self._fail(error)
                self.check()
            raise Overloaded(
                f"the log {self.folder} takes no more ({error.strerror}): free space there. What was accepted is kept, "
                "rows are read and served on, and this push may be sent again"
            ) from error
        self._written += 1
        if self._sync > 0:
            with self._dirty:
                self._dirty.notify()

    @property
    def has_failed(self) -> bool:
        """See `check`."""
        return bool(self._failure)

    def check(self) -> None:
        """Raise Overloaded if the disk has failed. What the kernel could not write then, it may have forgotten."""
        if self._failure:
            raise Overloaded(self._failure)

    def _fail(self, error: OSError) -> None:
        self._failure = (
            f"the disk of the log {self.folder} has failed ({error.strerror}), and may not have the pushes after step "
            f"{self._durable}: start the shard again with another --log folder, then begin a new session. Rows are "
            "read and versions served on"
        )
        log.error("%s", self._failure)

    def ready(self, step: int) -> None:
        """All was read, up to `step`. What the process before left to the kernel comes to disk, too."""
        if self._file is None:
            self._open((self._files() or [self._path(0)])[-1])
        self.applied(step)
        with self._dirty:
            self._written += 1
            self._dirty.notify()

    def applied(self, step: int) -> None:
        """All pushes up to `step` were appended."""
        self._mark = step
        if self._sync <= 0:
            self._durable = step
        else:  # the record may have come to disk before this was said
            with self._dirty:
                self._dirty.notify()

    @property
    def durable(self) -> int:
        """The step up to which pushes are on disk: in the kernel's hands, if it never is told to write them."""
        return self._durable

    @property
    def first_step(self) -> int:
        """Pushes after this step are here. 0: all are."""
        return min((_first_step(path) for path in self._files()), default=0)

    def begin_file(self, step: int, records: Sequence[Record]) -> None:
        """Put what follows `step` into a new file, which begins with `records`.

        Raises Overloaded if the disk does not take it. Then all is as before.
        """
        self.check()
        path = self._path(step)
        if path.exists():  # a checkpoint of this step was begun before
            for record in records:
                self.append(record)
            return
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            for record in records:
                _write(file, record)
            sync_folder(self.folder)
            self._close_file()
        except OSError as error:
            os.close(file)
            path.unlink()
            if error.errno == errno.EIO:
                self._fail(error)
                self.check()
            raise Overloaded(f"the log {self.folder} takes no more ({error.strerror}): free space there") from error
        self._file = file

    def forget_before(self, step: int) -> None:
        """Remove files that hold nothing after `step`."""
        files = self._files()
        for path, following in itertools.pairwise(files):
            if _first_step(following) <= step:
                path.unlink()

    def rewrite(self, records: Sequence[Record]) -> None:
        """Have these records in place of all."""
        self._close_file()
        files = self._files()
        first = files[0] if files else self._path(0)
        new = first.with_suffix(".new")
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for record in records:
                _write(file, record)
            os.fsync(file)
        finally:
            os.close(file)
        for path in reversed(files[1:]):  # the last one first: what is left is a log that ends earlier
            path.unlink()
        new.replace(first)
        self._open(first)

    def close(self) -> None:
        """Write all to disk, and let another process have it."""
        with self._dirty:
            self._closed = True
            self._dirty.notify()
        self._close_file()
        self._lock.close()

    def _keep_synced(self) -> None:
        while True:
            with self._dirty:
                while (self._written, self._mark) == (self._synced, self._durable) and not self._closed:
                    self._dirty.wait()
                if self._closed:
                    return
                self._dirty.wait_for(lambda: self._closed, self._sync)
            written, mark = self._written, self._mark
            try:
                with self._in_use:  # `begin_file` closes files
                    if self._file is not None:
                        _to_disk(self._file)
            except OSError as error:
                self._fail(error)
                return
            self._synced, self._durable = written, mark

    def _open(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sync_folder(self.folder)

    def _close_file(self) -> None:
        with self._in_use:
            if self._file is not None:
                os.fdatasync(self._file)
                os.close(self._file)
                self._file = None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("log-*.records"))

    def _path(self, step: int) -> Path:
        return self.folder / f"log-{step:015}.records"


def _first_step(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _digest(head: tuple[bytes, int, int, int, int], body: Sequence[bytes | memoryview]) -> bytes:
    digest = xxhash.xxh3_128(_HEAD.pack(*head, bytes(16)))
    for each in body:
        digest.update(each)
    return digest.digest()


def _mapped(path: Path) -> bytes | mmap.mmap:
    """A file's bytes, not read yet: one may be larger than memory."""
    with path.open("rb") as file:
        empty = os.fstat(file.fileno()).st_size == 0
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _records(data: bytes | mmap.mmap) -> Iterator[tuple[Record, int]]:
    """Whole records with where each one ends."""
    view, at = memoryview(data), 0
    while at + _HEAD.size <= len(data):
        *head, digest = _HEAD.unpack_from(data, at)
        magic, kind, pieces, step, nbytes = head
        begin = at + _HEAD.size
        body = view[begin : begin + nbytes]
        whole = magic == _MAGIC and len(body) == nbytes and nbytes >= 8 * pieces
        if not whole or _digest((magic, kind, pieces, step, nbytes), [body]) != digest:
            return
        lengths = struct.unpack_from(f"<{pieces}Q", body)
        found, place = [], 8 * pieces
        for length in lengths:
            found.append(body[place : place + length])
            place += length
        at = begin + nbytes
        yield Record(kind, step, found), at


def _to_disk(file: int) -> None:
    """fdatasync, after which the kernel keeps nothing of it: nobody reads it soon, and what is written next takes its
    place. New memory for that costs many times the copy in a virtual machine, and pushes rows of files out."""
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _write(file: int, record: Record) -> None:
    body = [struct.pack(f"<{len(record.pieces)}Q", *map(len, record.pieces)), *record.pieces]
    head = (_MAGIC, record.kind, len(record.pieces), record.step, sum(map(len, body)))
    for buffer in (_HEAD.pack(*head, _digest(head, body)), *body):
        view = memoryview(buffer)
        while view:
            view = view[os.write(file, view) :]
