"""The redo log of a share: pushes as they came, in the order in which they were accepted.

A record is a header, then pieces, each after its length. The header has the record's kind, its step, and a digest of
all. It is written last, so pieces may be written while others are on their way. Whoever reads the log stops at the
first record whose digest does not hold: that one was being written when the process or its machine died.

The log is cut into files. A checkpoint begins a new one, and old ones go with the checkpoints that needed them. A file
is whole on disk before the next one is there. So only the last one can be torn.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from embedding_service.errors import CorruptPart, Overloaded, StoreError, Unavailable
from embedding_service.machine import sync_folder
from embedding_service.training.branch import replace

log = logging.getLogger(__name__)

PUSH, SESSION = 1, 2
_MAGIC = b"ESL2"
# Magic, kind, step, bytes of the body, digest of the body and of all but itself.
_HEAD = struct.Struct("<4sIQQ16s")
_LENGTH = struct.Struct("<Q")
NEVER, ALWAYS = -1.0, 0.0


class Record(NamedTuple):
    """What a record holds. `step`: of a push; of a session its number."""

    kind: int
    step: int
    pieces: Sequence[bytes | memoryview]


class Draft:
    """A record that is written while its pieces come, behind all that are whole. It counts once `Log.append` ends it.

    Another one takes its place, and so does any other record. Then `append` writes it from the beginning.
    """

    def __init__(self, log: Log) -> None:
        self._log, self._begun = log, False
        self.writer: _Writer | None = None  # while it is the log's

    def add(self, piece: bytes | memoryview) -> None:
        """The next piece. On any thread, one at a time. What the disk does not take, `append` tells."""
        with self._log.writing:
            try:
                if not self._begun:
                    self._begun = True
                    self._log.begin_draft(self)
                if self.writer:
                    self.writer.add(piece)
            except OSError:
                self.writer = None


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
        self.writing = threading.Lock()  # held while files change
        self._file: int | None = None
        self._path, self._end = Path(), 0  # of that file, and of the whole records in it
        self._draft: Draft | None = None
        self._dirty, self._in_use = threading.Condition(), threading.Lock()
        self._written = self._synced = 0
        self._mark = self._durable = 0
        self._closed, self._failure = False, ""
        self._finish_rewriting()
        if sync > 0:
            threading.Thread(target=self._keep_synced, name="log-sync", daemon=True).start()

    def read(self, loaded: int = 0) -> Iterator[Record]:
        """All whole records. What follows the last one is cut off.

        Raises CorruptPart for a torn file that others go on after, and StoreError for a log that another release wrote
        in its own way. None of it is cut off then.

        loaded: The step of a checkpoint. Files that were needed only before it are set aside if they are corrupt.
        """
        files = self._mapped()
        for number, (path, data) in enumerate(files):
            found = bytes(data[: len(_MAGIC)])
            if found != _MAGIC and found[:-1] == _MAGIC[:-1]:
                raise StoreError(
                    f"{path} is a log of version {found[-1:]!r}, and this release reads {_MAGIC[-1:]!r}: start the "
                    f"shard with the release that wrote it, or remove {self.folder} to go back to the last checkpoint"
                )
            good = 0
            for record, end in _records(data):
                good = end
                yield record
            if good < len(data):
                self._repair(files, number, good, loaded)

    def _repair(self, files: list[tuple[Path, bytes | mmap.mmap]], number: int, good: int, loaded: int) -> None:
        """A file is whole up to `good` only: see `read`."""
        (path, _), later = files[number], files[number + 1 :]
        is_open = self._file is not None
        if later and _first_step(later[0][0]) <= loaded and not is_open:
            for each, _ in files[: number + 1]:  # the log goes back no further than to the next file
                each.rename(each.with_suffix(".corrupt"))
            log.warning(
                "%s is corrupt at byte %d. The checkpoint of step %d has all of it, so it and what was before are set "
                "aside as *.corrupt: remove them, and check the disk",
                path,
                good,
                loaded,
            )
        elif is_open or any(record.kind == PUSH for _, data in later for record, _ in _records(data)):
            raise CorruptPart(
                f"{path} is corrupt at byte {good:,}, and the log goes on after it, so nothing of it is cut off: put "
                f"a whole copy of the file there, or remove {self.folder} to go back to the last checkpoint"
            )
        else:  # the process died when it wrote this record
            with path.open("r+b") as file:
                file.truncate(good)

    def snapshot(self) -> Iterator[Record]:
        """All records as they are now, read when they are asked for, though the log goes on."""
        return (record for _, data in self._mapped() for record, _ in _records(data))

    def _mapped(self) -> list[tuple[Path, bytes | mmap.mmap]]:
        """Files and what they hold now, but for a draft."""
        with self.writing:
            return [(path, _mapped(path, self._end if path == self._path else None)) for path in self._files()]

    def clear(self, step: int) -> None:
        """Forget all, and go on after `step`."""
        with self.writing:
            self._close_file()
            for path in reversed(self._files()):
                path.unlink()
            self._open(self._path_of(step))

    def append(self, record: Record, draft: Draft | None = None) -> None:
        """Write a record. Raises Overloaded if the disk does not take it: then nothing of it is there.

        draft: Has the record's pieces.
        """
        self.check()
        with self.writing:
            self._append(record, draft)
        self._written += 1
        if self._sync > 0:
            with self._dirty:
                self._dirty.notify()

    def _append(self, record: Record, draft: Draft | None) -> None:
        assert self._file is not None
        try:
            if draft is None or draft.writer is None:
                self._cut()
                end = _write(self._file, self._end, record)
            else:
                end = draft.writer.finish(record)
            if self._sync == ALWAYS:
                _to_disk(self._file)
        except OSError as error:
            self._cut()
            kept = "What was accepted is kept, rows are read and served on, and this push may be sent again"
            raise self._refusal(error, f". {kept}") from error
        self._end = end
        self._set_draft(None)

    def begin_draft(self, draft: Draft) -> None:
        """Have its pieces written from here on. The caller holds `writing`."""
        if self._file is not None:
            self._cut()
            draft.writer = _Writer(self._file, self._end)
            self._set_draft(draft)

    def _set_draft(self, draft: Draft | None) -> None:
        if self._draft:
            self._draft.writer = None
        self._draft = draft

    def _cut(self) -> None:
        """Take away what is no whole record: what a client left of it could look like one."""
        assert self._file is not None
        self._set_draft(None)
        if os.fstat(self._file).st_size > self._end:
            os.ftruncate(self._file, self._end)

    @property
    def has_failed(self) -> bool:
        """See `check`."""
        return bool(self._failure)

    def check(self) -> None:
        """Raise Overloaded if the disk has failed. What the kernel could not write then, it may have forgotten."""
        if self._failure:
            raise Overloaded(self._failure)

    def _refusal(self, error: OSError, more: str = "") -> Overloaded:
        """What to raise for something that the disk did not take. See `check`, too."""
        if error.errno == errno.EIO:
            self._fail(error)
            return Overloaded(self._failure)
        return Overloaded(f"the log {self.folder} takes no more ({error.strerror}): free space there{more}")

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
            with self.writing:
                self._open((self._files() or [self._path_of(0)])[-1])
        self.applied(step)
        with self._dirty:
            self._written += 1
            self._dirty.notify()

    def applied(self, step: int) -> None:
        """All pushes up to `step` were appended, and none after it is there."""
        if step < self._mark:  # it went back
            with self._in_use:
                self._mark, self._durable = step, min(step, self._durable)
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
        path = self._path_of(step)
        if path.exists():  # a checkpoint of this step was begun before
            for record in records:
                self.append(record)
            return
        with self.writing:
            self._finish_file()
            file, end = self._write_new(path, records)
            self._close_file()
            self._file, self._path, self._end = file, path, end

    def _write_new(self, path: Path, records: Sequence[Record]) -> tuple[int, int]:
        """A new file with these records on disk, and where they end. Raises Overloaded. Then it is not there."""
        file = None
        try:
            file, end = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 0
            for record in records:
                end = _write(file, end, record)
            os.fsync(file)
            sync_folder(self.folder)
        except OSError as error:
            if file is not None:
                os.close(file)
            path.unlink(missing_ok=True)
            raise self._refusal(error) from error
        return file, end

    def forget_before(self, step: int) -> None:
        """Remove files that hold nothing after `step`."""
        files = self._files()
        for path, following in itertools.pairwise(files):
            if _first_step(following) <= step:
                path.unlink()

    def rewrite(self, records: Sequence[Record], before: Callable[[], object] = lambda: None) -> None:
        """Have these records in place of all. A process that dies in here leaves all that was there, or these.

        Raises Overloaded if the disk does not take them. Then all is as before.

        before: Done when they are on disk, before they count.
        """
        self.check()
        with self.writing:
            first = (self._files() or [self._path_of(0)])[0]
            new = first.with_suffix(".new")
            file, _ = self._write_new(new, records)
            os.close(file)
            try:
                before()
            except BaseException:
                new.unlink()
                raise
            try:
                new.replace(first.with_suffix(".whole"))
                self._close_file()
                self._finish_rewriting()
                self._open(first)
            except OSError as error:
                self._fail(error)
                raise Overloaded(self._failure) from error

    def _finish_rewriting(self) -> None:
        """Have what `rewrite` wrote in place of all, if it came so far. It may have died at any point of this."""
        for whole in self.folder.glob("log-*.whole"):
            sync_folder(self.folder)  # that name is on disk before others go
            first = whole.with_suffix(".records")
            for path in self._files():
                if path != first:
                    path.unlink()
            sync_folder(self.folder)  # and they are gone before it is an ordinary file
            whole.replace(first)
        for new in self.folder.glob("log-*.new"):
            new.unlink()

    def close(self) -> None:
        """Write all to disk, and let another process have it."""
        with self._dirty:
            self._closed = True
            self._dirty.notify()
        with self.writing:
            try:
                if self._file is not None:
                    self._finish_file()
            finally:
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
            try:
                with self._in_use:  # `begin_file` closes files, and `applied` goes back
                    written, mark = self._written, self._mark
                    if self._file is not None:
                        _to_disk(self._file)
                    self._synced, self._durable = written, mark
            except OSError as error:
                self._fail(error)
                return

    def _open(self, path: Path) -> None:
        self._file, self._path = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), path
        self._end = os.fstat(self._file).st_size
        sync_folder(self.folder)

    def _finish_file(self) -> None:
        """Bring it to disk, with whole records alone. Raises Overloaded."""
        assert self._file is not None
        try:
            self._cut()
            os.fdatasync(self._file)
        except OSError as error:
            raise self._refusal(error) from error

    def _close_file(self) -> None:
        self._set_draft(None)
        with self._in_use:
            if self._file is not None:
                os.close(self._file)
                self._file, self._path = None, Path()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("log-*.records"))

    def _path_of(self, step: int) -> Path:
        return self.folder / f"log-{step:015}.records"


def _first_step(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _mapped(path: Path, end: int | None) -> bytes | mmap.mmap:
    """A file's bytes, not read yet: one may be larger than memory."""
    with path.open("rb") as file:
        nbytes = os.fstat(file.fileno()).st_size if end is None else end
        return mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY) if nbytes else b""


def _records(data: bytes | mmap.mmap) -> Iterator[tuple[Record, int]]:
    """Whole records with where each one ends."""
    view, at = memoryview(data), 0
    while at + _HEAD.size <= len(data):
        magic, kind, step, nbytes, digest = _HEAD.unpack_from(data, at)
        begin = at + _HEAD.size
        body = view[begin : begin + nbytes]
        if magic != _MAGIC or len(body) != nbytes or _digest(xxhash.xxh3_128(body), kind, step, nbytes) != digest:
            return
        found, place = [], 0
        while place < nbytes:
            [length] = _LENGTH.unpack_from(body, place)
            place += _LENGTH.size
            found.append(body[place : place + length])
            place += length
        at = begin + nbytes
        yield Record(kind, step, found), at


def _digest(body: xxhash.xxh3_128, kind: int, step: int, nbytes: int) -> bytes:
    body.update(_HEAD.pack(_MAGIC, kind, step, nbytes, bytes(16)))
    return body.digest()


class _Writer:
    """A record on its way into a file, where nobody takes it for one before `finish`."""

    def __init__(self, file: int, at: int) -> None:
        self._file, self._at, self._end = file, at, at + _HEAD.size
        self._digest = xxhash.xxh3_128()

    def add(self, piece: bytes | memoryview) -> None:
        """The next piece."""
        for each in (_LENGTH.pack(len(piece)), piece):
            _write_at(self._file, self._end, each)
            self._digest.update(each)
            self._end += len(each)

    def finish(self, record: Record) -> int:
        """All pieces are here. Returns where the record ends."""
        nbytes = self._end - self._at - _HEAD.size
        digest = _digest(self._digest, record.kind, record.step, nbytes)
        _write_at(self._file, self._at, _HEAD.pack(_MAGIC, record.kind, record.step, nbytes, digest))
        return self._end


def _write(file: int, at: int, record: Record) -> int:
    """Write a whole record at a file's end. Returns where it ends."""
    writer = _Writer(file, at)
    for piece in record.pieces:
        writer.add(piece)
    return writer.finish(record)


def _write_at(file: int, at: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _to_disk(file: int) -> None:
    """fdatasync, after which the kernel keeps nothing of it: nobody reads it soon, and what is written next takes its
    place. New memory for that costs many times the copy in a virtual machine, and pushes rows of files out."""
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
