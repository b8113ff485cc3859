"""A version under way: locked, resumable, invisible until it is published.

Parts are written into a folder beside the versions, STORE/MODEL/.VERSION.importing. The folder's journal notes each
finished part. Publishing writes the manifest and renames the folder. A remote store has no rename. There the folder is
a temporary one on this machine, each finished part is copied to its final place, and the manifest follows last. A claim
beside the parts says whose they are: STORE/MODEL/VERSION/.claim. An import looks at it before each copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from embedding_service.errors import CorruptPart, ImportRefused, RemoteStoreError, StoreError
from embedding_service.machine import read_file, sync_folder, write_durably
from embedding_service.private_folder import own_folder
from embedding_service.store.manifest import ID_BYTES, Manifest, Overlay, Part, check_name
from embedding_service.store.overlays import verify_overlay
from embedding_service.store.parts import verify
from embedding_service.store.store import MANIFEST_FILE, Store, next_version
from embedding_service.tensorfile import PAGE_BYTES

_JOURNAL, _LOCK, _BASE, _CLAIM = "journal", "lock", "base.json", ".claim"
_OF_DRAFT = re.compile(r"[^/]+/(part|overlay)-\d+\.safetensors|\.claim")
# So long after its last write an import into a remote store counts as dead.
IDLE_HOURS = 24
# Model and version of a version.
Root = tuple[str, str]


class Claim(BaseModel):
    """What an import says in a remote store, while it runs, of the version that it makes.

    Attributes:
        owner: Sets it apart from any other import.
        host: The machine that it began on.
        began: When.
        fingerprint: Of the job.
        base: The version that it replaces rows of.
    """

    model_config = ConfigDict(extra="forbid")
    owner: str
    host: str
    began: str
    fingerprint: str
    base: tuple[str, str] | None = None


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
        there = self.store.has(self.model, self.version)
        return there and _lines(self._published / _JOURNAL)[:1] == [fingerprint]

    def take_back(self) -> bool:
        """Remove a manifest that this draft wrote in part. Nobody does in a local store."""
        return False

    @property
    def _published(self) -> Path:
        return self.folder.parent / self.version

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
                f"{manifest.full_name} is not published: somebody removed {gone[0]} while it was imported. Run the "
                "same import again"
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

    def resume(self, fingerprint: str, base: Root | None = None) -> None:
        """Claim the version, or go on with what this draft claimed. Raises ImportRefused if it is another's."""
        there = self._claim_there()
        if there and there != self._own_claim():
            raise self._not_ours(there)
        if not there or _lines(self.folder / _JOURNAL)[:1] != [fingerprint]:
            if there:
                remove_copies(self.store, self._location())
            # Without a claim, what the journal knows may have been replaced since.
            (self.folder / _JOURNAL).unlink(missing_ok=True)
            claim = _new_claim(fingerprint, base)
            write_durably(self.folder / _CLAIM, claim)
            self.store.filesystem.makedirs(self._location())
            if (there := self.store.filesystem.create(self._location(_CLAIM), claim)) != claim:
                raise self._not_ours(there)
        super().resume(fingerprint)

    def keep(self, part: Entry) -> None:
        """Copy the file to its final place. Here only the journal remembers it. Raises ImportRefused."""
        if isinstance(part, NoRows):
            return super().keep(part)
        self._check_ours()
        location = self._location(part.file)
        self.store.filesystem.makedirs(location.rpartition("/")[0])
        self.store.filesystem.put_file(str(self.folder / part.file), location)
        super().keep(part)
        (self.folder / part.file).unlink()
        return None

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest, which makes the version visible. Raises ImportRefused, and StoreError as a local one."""
        self._check_ours()
        self._check_whole(manifest)
        content = manifest.to_json().encode()
        if self.store.filesystem.create(self._location(MANIFEST_FILE), content) != content:
            raise _taken(self.store, self.model, self.version)
        self.clear_published()

    def clear_published(self) -> None:
        """Remove the folder here, then the claim. `has_published` says why."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.store.filesystem.rm_file(self._location(_CLAIM))

    def has_published(self, fingerprint: str) -> bool:
        """Whether an import of this fingerprint published the version and died before it had cleared up."""
        claim = _read_claim(self._claim_there())
        return claim is not None and claim.fingerprint == fingerprint and self.store.has(self.model, self.version)

    def take_back(self) -> bool:
        """Remove the manifest if this draft wrote it. Whether it did."""
        if not self._is_ours():
            return False
        self.store.filesystem.rm_file(self._location(MANIFEST_FILE))
        return True

    def abandon(self) -> None:
        """Leave no trace here, and none in the store of what is this draft's."""
        with contextlib.suppress(OSError):  # the store is away: `gc --drafts` finds it later
            if self._is_ours() and not self.store.has(self.model, self.version):
                remove_copies(self.store, self._location())
        super().abandon()

    def _make_folder(self) -> None:
        # Its name is known, so others could have made it, with links in it.
        if not own_folder(self.folder):
            raise ImportRefused(
                f"others may write to {self.folder}: remove it, or set TMPDIR to a folder of this user alone"
            )

    def _location(self, *names: str) -> str:
        return self.store.location(self.model, self.version, *names)

    def _own_claim(self) -> bytes | None:
        try:
            return read_file(self.folder / _CLAIM)
        except OSError:
            return None

    def _claim_there(self) -> bytes | None:
        return _claim_at(self.store, self.model, self.version)

    def _is_ours(self) -> bool:
        """Whether the version's claim is the one that this draft wrote."""
        claim = self._own_claim()
        return claim is not None and claim == self._claim_there()

    def _check_ours(self) -> None:
        """Raise ImportRefused if the version was published by now, or is claimed by another."""
        _refuse_taken(self.store, self.model, self.version)
        if not self._is_ours():
            raise self._not_ours(self._claim_there())

    def _not_ours(self, there: bytes | None) -> ImportRefused:
        what, claim = f"{self.model}@{self.version}", _read_claim(there)
        if there is None:
            return ImportRefused(f"somebody removed the claim of this import of {what}: run the same import again")
        who = f"{claim.host} since {claim.began}" if claim else "somebody unknown"
        return ImportRefused(
            f"{what} is being made by {who}: choose another --version. If that import is dead, remove "
            f"{self._location(_CLAIM)}. `gc --drafts` does so {IDLE_HOURS} hours after its last write"
        )

    def _kept_files(self) -> list[str]:
        found = self.store.filesystem.find(self._location())
        return [name.rpartition(f"/{self.model}/{self.version}/")[2] for name in found]

    def _disk_bytes(self, part_bytes: list[int]) -> int:
        return max(part_bytes, default=0)  # one at a time is on this machine

    def _is_whole(self, part: Part | Overlay) -> bool:
        # By its size. To check more it would have to be fetched, and shards do that before they serve it.
        location = self._location(part.file)
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
        if not draft.take_back():  # half of it, which is written again
            raise
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
    # A remote version without a manifest is one whose import died. A local one is something that we did not write.
    if store.has(model, version) or (store.is_local and Path(store.location(model, version)).exists()):
        raise _taken(store, model, version)


def _taken(store: Store, model: str, version: str) -> ImportRefused:
    newer = next_version(store.versions(model) or [version])
    return ImportRefused(
        f"name taken: {store.location(model, version)} is there already. Choose another --name, or add a version to it "
        f"with --version {newer}"
    )


def bases_under_way(store: Store) -> set[Root]:
    """The versions that versions under way replace rows of."""
    if not store.is_local:
        claims = (_read_claim(_claim_at(store, *each)) for each in store.unpublished())
        return {claim.base for claim in claims if claim and claim.base}
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


def remove_copies(store: Store, location: str) -> None:
    """Remove what an import left in a remote store. Its claim goes last, so that nobody begins there before."""
    files = [name for name in store.filesystem.find(location) if not name.endswith(f"/{_CLAIM}")]
    if files:
        store.filesystem.rm(files)
    with contextlib.suppress(FileNotFoundError):  # there was no claim, and no file is no folder
        store.filesystem.rm(location, recursive=True)


def is_of_draft(name: str) -> bool:
    """Whether a file of this name, within a version's folder, may be an import's that did not publish."""
    return _OF_DRAFT.fullmatch(name) is not None


def _new_claim(fingerprint: str, base: Root | None) -> bytes:
    began = datetime.now(UTC).isoformat(timespec="seconds")
    claim = Claim(
        owner=secrets.token_hex(16), host=socket.gethostname(), began=began, fingerprint=fingerprint, base=base
    )
    return claim.model_dump_json().encode()


def _claim_at(store: Store, model: str, version: str) -> bytes | None:
    try:
        return store.filesystem.cat_file(store.location(model, version, _CLAIM))  # type: ignore[no-any-return]
    except FileNotFoundError:
        return None


def _read_claim(content: bytes | None) -> Claim | None:
    try:
        return Claim.model_validate_json(content) if content else None
    except ValidationError:
        return None


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
