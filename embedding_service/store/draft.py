"""A version under way: locked, resumable, invisible until it is published.

Parts are written into a folder beside the versions, STORE/MODEL/.VERSION.importing. The folder's journal notes each
finished part. Publishing writes the manifest and renames the folder. A remote store has no rename. There the folder is
a temporary one on this machine, each finished part is copied to its final place, and the manifest follows last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from embedding_service.errors import CorruptPart, ImportRefused, RemoteStoreError, StoreError
from embedding_service.machine import sync_folder, write_durably
from embedding_service.private_folder import own_folder
from embedding_service.store.manifest import ID_BYTES, Manifest, Overlay, Part, check_name
from embedding_service.store.overlays import verify_overlay
from embedding_service.store.parts import verify
from embedding_service.store.store import MANIFEST_FILE, Store, next_version
from embedding_service.tensorfile import PAGE_BYTES

_JOURNAL, _LOCK, _BASE = "journal", "lock", "base.json"
# Model and version of a version.
Root = tuple[str, str]


class NoRows(BaseModel):
    """Of an overlay that is not there, for no row of its part differs from the base's."""

    model_config = ConfigDict(extra="forbid")
    file: str


# What a journal has a line of.
Entry = Part | Overlay | NoRows
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


class Draft:
    """A version of a local store under way. Get one from `open_draft`."""

    def __init__(self, store: Store, model: str, version: str, folder: Path) -> None:
        self.store, self.model, self.version, self.folder = store, model, version, folder
        self._finished: dict[str, Entry] = {}
        self._lock: FileIO | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock file of the folder. The lock dies with this process in any case. Raises ImportRefused."""
        try:
            self._make_folder()
            lock = (self.folder / _LOCK).open("wb", buffering=0)
        except OSError as error:
            raise ImportRefused(f"cannot write to {self.folder.parent}: {error.strerror}") from error
        with lock:
            if not _take(lock, self.folder / _LOCK):
                what = f"{self.model}@{self.version}"
                raise ImportRefused(
                    f"another import of {what} is running ({self.folder}): wait, or choose another --name"
                )
            self._lock = lock
            yield

    def resume(self, fingerprint: str, base: Root | None = None) -> None:
        """Take over what an earlier run with the same fingerprint finished, or begin from nothing.

        base: The whole version whose rows this one replaces. It is noted, so that `gc` leaves it.
        """
        if base:
            write_durably(self.folder / _BASE, json.dumps(base).encode())
        first, *lines = _lines(self.folder / _JOURNAL) or [""]
        if first == fingerprint:
            entries = [entry for entry in map(_read_entry, lines) if entry]
            self._finished = {each.file: each for each in entries if isinstance(each, NoRows) or self._is_whole(each)}
        else:
            self._clear()
        lines = [fingerprint, *(entry.model_dump_json() for entry in self._finished.values())]
        write_durably(self.folder / _JOURNAL, "".join(f"{line}\n" for line in lines).encode())

    def finished(self, file: str) -> Entry | None:
        """The entry of a file that is there already, or is known to be none."""
        return self._finished.get(file)

    def keep(self, part: Entry) -> None:
        """Note a file that was just written. If this import dies, the next one need not write it again."""
        self._finished[part.file] = part
        with (self.folder / _JOURNAL).open("a") as journal:
            journal.write(part.model_dump_json() + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def check_space(self, part_bytes: list[int]) -> None:
        """Raise ImportRefused unless the disk has room for the parts still to be written, given their bytes."""
        check_disk_space(self.folder, self._disk_bytes(part_bytes), "Free some, or choose a smaller --dtype")

    def publish(self, manifest: Manifest) -> None:
        """Make the version visible, all at once. Raises StoreError if something of it is gone."""
        self._check_whole(manifest)
        write_durably(self.folder / MANIFEST_FILE, manifest.to_json().encode())
        for table in manifest.tables:
            if (self.folder / table.name).exists():  # a table whose rows are all the base's has none
                sync_folder(self.folder / table.name)
        sync_folder(self.folder)
        self.folder.rename(self._published)
        sync_folder(self._published.parent)
        # Not before. In a folder without its lock another import could begin, and we would publish that.
        self.clear_published()

    def clear_published(self) -> None:
        """Remove this import's own files from the version, the journal last. `has_published` says why."""
        (self._published / _LOCK).unlink(missing_ok=True)
        (self._published / _BASE).unlink(missing_ok=True)
        (self._published / _JOURNAL).unlink(missing_ok=True)

    def has_published(self, fingerprint: str) -> bool:
        """Whether an import of this fingerprint published the version and died before it had cleared up."""
        return self.store.has(self.model, self.version) and any(
            _lines(journal)[:1] == [fingerprint] for journal in self._published_journals()
        )

    @property
    def _published(self) -> Path:
        return self.folder.parent / self.version

    def _published_journals(self) -> list[Path]:
        """Where the journal of a published version may be."""
        return [self._published / _JOURNAL]

    def abandon_if_empty(self) -> None:
        """Leave no trace if nothing was finished."""
        if self._has_folder() and len(_lines(self.folder / _JOURNAL)) < 2:
            self.abandon()

    def abandon(self) -> None:
        """Leave no trace: no later import can go on from here."""
        shutil.rmtree(self.folder)
        if self.store.is_local:
            with contextlib.suppress(OSError):  # not empty: the model has other versions
                self.folder.parent.rmdir()

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def _check_whole(self, manifest: Manifest) -> None:
        """Raise StoreError unless this import has its folder still, and every file of the version."""
        kept = set(self._kept_files())
        gone = [file for file in manifest.own_files if file not in kept] if self._has_folder() else [self.folder]
        if gone:
            raise StoreError(
                f"{manifest.full_name} is not published: somebody removed {gone[0]} while it was imported. Run the same "
                "import again"
            )

    def _kept_files(self) -> list[str]:
        """The files that are where the version will be published from, relative to its folder."""
        return [path.relative_to(self.folder).as_posix() for path in self.folder.glob("*/*")]

    def _has_folder(self) -> bool:
        """Whether the folder is the one that this import locked."""
        return self._lock is not None and _is_at(self._lock, self.folder / _LOCK)

    def _disk_bytes(self, part_bytes: list[int]) -> int:
        return sum(part_bytes)

    def _is_whole(self, part: Part | Overlay) -> bool:
        try:
            if isinstance(part, Overlay):
                verify_overlay(self.folder / part.file, part)
            else:
                verify(self.folder / part.file, part)
        except CorruptPart:
            return False
        return True

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)


class RemoteDraft(Draft):
    """A version of a remote store under way. It can be resumed on the same machine only."""

    def _make_folder(self) -> None:
        # Its name is known, so others could have made it, with links in it.
        if not own_folder(self.folder):
            raise ImportRefused(
                f"others may write to {self.folder}: remove it, or set TMPDIR to a folder of this user alone"
            )

    def keep(self, part: Entry) -> None:
        """Copy the file to its final place. Here only the journal remembers it."""
        if isinstance(part, NoRows):
            return super().keep(part)
        location = self.store.location(self.model, self.version, part.file)
        self.store.filesystem.makedirs(location.rpartition("/")[0])
        self.store.filesystem.put_file(str(self.folder / part.file), location)
        super().keep(part)
        (self.folder / part.file).unlink()
        return None

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest, which makes the version visible."""
        location = self.store.location(self.model, self.version, MANIFEST_FILE)
        self.store.filesystem.pipe_file(location, manifest.to_json().encode())
        self.clear_published()

    def clear_published(self) -> None:
        """Remove the folder, then the journal."""
        [inside, beside] = self._published_journals()
        if inside.exists():
            inside.replace(beside)
        shutil.rmtree(self.folder, ignore_errors=True)
        beside.unlink(missing_ok=True)

    def _published_journals(self) -> list[Path]:
        return [self.folder / _JOURNAL, self.folder.with_suffix(".published")]

    def _disk_bytes(self, part_bytes: list[int]) -> int:
        return max(part_bytes, default=0)  # one at a time is on this machine

    def _is_whole(self, part: Part | Overlay) -> bool:
        # By its size. To check more it would have to be fetched, and shards do that before they serve it.
        location = self.store.location(self.model, self.version, part.file)
        if not self.store.filesystem.exists(location):
            return False
        size = self.store.filesystem.size(location)
        if isinstance(part, Overlay):  # its rows begin on a page, behind the ids
            return size > part.bytes and (size - part.bytes + part.rows * ID_BYTES) % PAGE_BYTES == 0  # type: ignore[no-any-return]
        return size == PAGE_BYTES + part.bytes  # type: ignore[no-any-return]


def finish_published(store: Store, model: str, version: str, fingerprint: str) -> Manifest | None:
    """Clear up after an import of this fingerprint that published and then died. Returns the manifest, or None."""
    draft = _draft(store, check_name(model), check_name(version))
    if not draft.has_published(fingerprint):
        return None
    try:
        manifest = store.manifest(model, version)
    except StoreError:
        if store.is_local:
            raise
        store.filesystem.rm_file(store.location(model, version, MANIFEST_FILE))  # half of it: it is written again
        return None
    draft.clear_published()
    return manifest


@contextlib.contextmanager
def open_draft(store: Store, model: str, version: str) -> Iterator[Draft]:
    """Begin or go on with a version. Raises ImportRefused: the name is taken, or another import of it is running."""
    check_name(model)
    check_name(version)
    if not store.is_local:
        store.versions(model)  # raises without a bucket, before any part is made
    _refuse_taken(store, model, version)
    draft = _draft(store, model, version)
    with draft.locked():
        try:
            _refuse_taken(store, model, version)  # again: another may just have published it
            yield draft
        except BaseException:
            draft.abandon_if_empty()
            raise


def idle_drafts(store: Store) -> list[Path]:
    """The folders of versions under way in a local store that no process works on now."""
    found = []
    for folder in sorted(Path(store.root).glob("*/.*.importing")):
        try:
            with (folder / _LOCK).open("rb", buffering=0) as lock:
                if _take(lock, folder / _LOCK):
                    found.append(folder)
        except FileNotFoundError:  # just begun, or just published
            continue
    return found


def _draft(store: Store, model: str, version: str) -> Draft:
    if store.is_local:
        return Draft(store, model, version, Path(store.location(model, f".{version}.importing")))
    key = xxhash.xxh3_64_hexdigest(f"{store.url}/{model}/{version}".encode())
    return RemoteDraft(store, model, version, Path(tempfile.gettempdir()) / f"embedding-service-import-{key}")


def _refuse_taken(store: Store, model: str, version: str) -> None:
    location = store.location(model, version)
    # A remote version without a manifest is one whose import died. A local one is something that we did not write.
    if store.has(model, version) or (store.is_local and Path(location).exists()):
        newer = next_version(store.versions(model) or [version])
        raise ImportRefused(
            f"name taken: {location} is there already. Choose another --name, or add a version to it with "
            f"--version {newer}"
        )


def bases_under_way(store: Store) -> set[Root]:
    """The versions that versions under way replace rows of."""
    found = set()
    for path in Path(store.root).glob(f"*/.*.importing/{_BASE}"):
        with contextlib.suppress(FileNotFoundError):  # just published
            model, version = json.loads(path.read_bytes())
            found.add((model, version))
    return found


def remove_idle_draft(folder: Path) -> bool:
    """Remove a version under way in a local store. False if a process went on with it, and it stays."""
    try:
        with (folder / _LOCK).open("rb", buffering=0) as lock:
            if not _take(lock, folder / _LOCK):
                return False
            going = set_aside(folder)  # nobody can go on with it from here
    except FileNotFoundError:  # just published, or removed
        return False
    shutil.rmtree(going)
    return True


def set_aside(folder: Path) -> Path:
    """Rename a folder of a local store to one that is nothing but the rest of a removal. Returns that."""
    going = folder.with_name(f".{folder.name.strip('.')}.{secrets.token_hex(4)}.removing")
    folder.rename(going)
    return going


def _take(lock: FileIO, path: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # What we hold may be the lock of a folder that was published between our opening and locking it.
    return _is_at(lock, path)


def _is_at(lock: FileIO, path: Path) -> bool:
    """Whether an open file is the one at that path."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def check_disk_space(folder: Path, needed: int, remedy: str) -> None:
    """Raise ImportRefused unless `needed` bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ImportRefused(f"no disk space: {folder.parent} needs {needed:,} bytes, {free:,} are free. {remedy}")


def _lines(journal: Path) -> list[str]:
    try:
        return journal.read_text().splitlines()
    except FileNotFoundError:
        return []


def _read_entry(line: str) -> Entry | None:
    try:
        return _ENTRY.validate_json(line)
    except ValidationError:
        return None  # the line that was being written when the process died


@contextlib.contextmanager
def explained_write_errors(store: Store) -> Iterator[None]:
    """Say of a failure to write what it was, and what is kept."""
    try:
        yield
    except RemoteStoreError as error:
        raise StoreError(f"{error}. Finished parts are kept: run the same import again to go on") from error
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise StoreError(
            f"writing to {store.url} failed: {what}. Finished parts are kept: run the same import again to go on"
        ) from error
