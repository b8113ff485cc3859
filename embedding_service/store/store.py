"""A store: a folder, or any fsspec URL, of models in versions. Each version is whole or not there at all.

STORE/MODEL/VERSION/manifest.json is written last. A version without one does not exist.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from embedding_service.errors import InvalidRequest, NotFound, StoreError
from embedding_service.foreign import one_line, printable
from embedding_service.store.manifest import Manifest, Overlay, Part, Table, check_name
from embedding_service.store.overlays import read_overlay
from embedding_service.store.parts import verify
from embedding_service.store.remote import RemoteFiles, explained, extra_of, patience, unopened

MANIFEST_FILE = "manifest.json"
# A part takes about 200 bytes of it, and a tokenizer some 100 KiB.
MOST_MANIFEST_BYTES = 256 << 20
# Folders that a filesystem makes at its root. They are no models.
_NO_MODELS = ("lost+found",)


@dataclass(frozen=True)
class Catalogue:
    """What one look at a store found, version by version. A fault of one hides no other.

    Attributes:
        manifests: For each model the versions that can be read, oldest first. Never an empty list.
        problems: Why something is skipped, in one line, by (model, version). Version "" stands for the model's folder.
        is_empty: There is no folder that could be a model's. An unmounted filesystem looks like that.
    """

    manifests: dict[str, list[Manifest]] = field(default_factory=dict)
    problems: dict[tuple[str, str], str] = field(default_factory=dict)
    is_empty: bool = False

    def cannot_tell(self, model: str, version: str) -> bool:
        """Whether that version may be there, and could not be read."""
        return (model, version) in self.problems or (model, "") in self.problems


class Store:
    """Reads what is published in the store at `url`, a local path or an fsspec URL (s3://..., memory://...).

    Attributes:
        answered: When it last said what is there, by the monotonic clock. 0 before it did.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        if not self.url:
            raise InvalidRequest("a store needs a name: give a folder, or an fsspec URL")
        with explained(self.url):
            filesystem, self.root = _opened(self.url)
        self.is_local = isinstance(filesystem, LocalFileSystem)
        # Parts are cached here, whole or not at all. fsspec's own cache shows a file while it is written.
        if isinstance(filesystem, CachingFileSystem):
            filesystem = filesystem.fs
        self.is_private = _in_this_process(filesystem)
        self.filesystem = filesystem if self.is_local else RemoteFiles(filesystem, self.url)
        self.answered = 0.0

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def models(self) -> list[str]:
        """Names of the models that have a version which can be read, sorted."""
        return [manifest.model for manifest in self.newest()]

    def newest(self) -> list[Manifest]:
        """For each model the newest version that can be read. None for a store that is not there."""
        try:
            return [versions[-1] for versions in self.catalogue().manifests.values()]
        except FileNotFoundError:
            return []

    def catalogue(self, known: Catalogue | None = None) -> Catalogue:
        """Everything that is published. What is skipped is named: odd names, what cannot be read, copies of others.

        Manifests of `known` that are still in their place are taken from there: published ones do not change.

        Raises OSError, or what the filesystem of a remote store raises, if the store itself cannot be read.
        """
        self.filesystem.invalidate_cache()  # remote ones remember what they listed
        have = {(each.model, each.version): each for each in chain(*known.manifests.values())} if known else {}
        models = [name for name in self._folders(self.root) if name not in _NO_MODELS]
        read = Catalogue(is_empty=not models)
        for model in models:
            with _naming(read, model, "", self.location(model)):
                check_name(model)
                for version in self._folders(self.location(model)):
                    with _naming(read, model, version, self.location(model, version)):
                        check_name(version)
                        manifest = self._read_manifest(model, version, have.get((model, version)))
                        if manifest:
                            read.manifests.setdefault(model, []).append(manifest)
        return self._with_bases(read)

    def _with_bases(self, read: Catalogue) -> Catalogue:
        """What was read, without versions whose base is not there. Nothing is asked about bases that were read."""
        found = Catalogue(problems=read.problems, is_empty=read.is_empty)
        there = {(each.model, each.version) for each in chain(*read.manifests.values())}
        for manifest in chain(*read.manifests.values()):
            with _naming(found, manifest.model, manifest.version, self.location(manifest.model, manifest.version)):
                if manifest.root not in there:
                    self._check_base(manifest)
                found.manifests.setdefault(manifest.model, []).append(manifest)
        return found

    def _check_base(self, manifest: Manifest) -> None:
        """Raise StoreError if the version that it replaces rows of is not there."""
        if manifest.base and not self.has(*manifest.root):
            raise StoreError(
                f"its base {'@'.join(manifest.root)} is not there: bring it back, or publish a whole version"
            )

    def versions(self, model: str) -> list[str]:
        """Published versions of a model, oldest first (2 before 10). Empty for a model that is not there."""
        folder = self.location(check_name(model))
        try:
            return [version for version in self._folders(folder) if self.has(model, version)]
        except FileNotFoundError:
            return []

    def has(self, model: str, version: str) -> bool:
        """Whether that version is published."""
        has = self.filesystem.exists(self.location(model, version, MANIFEST_FILE))
        self.answered = time.monotonic()
        return has

    def manifest(self, model: str, version: str | None = None) -> Manifest:
        """Return a version's manifest, the newest version's for None. Raises NotFound naming what there is."""
        versions = self.versions(model)
        if not versions:
            raise NotFound(f"no model {model!r} in {self.url}; it has: {', '.join(self.models()) or 'none'}")
        version = version or versions[-1]
        if version not in versions:
            raise NotFound(f"model {model!r} in {self.url} has no version {version!r}; it has: {', '.join(versions)}")
        manifest = self._read_manifest(model, version)
        if manifest is None:
            raise NotFound(f"model {model!r} in {self.url} has no version {version!r} any more")
        self._check_base(manifest)
        return manifest

    def unpublished(self) -> Iterator[tuple[str, str]]:
        """(model, version) of each folder of a version without a manifest. In a remote store an import made it."""
        for model in self._folders(self.root):
            for version in self._folders(self.location(model)):
                if not self.has(model, version):
                    yield model, version

    def location(self, *names: str) -> str:
        """Where something lies, in the filesystem's own terms: a path for a local store."""
        return "/".join([self.root.rstrip("/"), *names])

    def part_path(self, manifest: Manifest, part: Part) -> Path:
        """Path of a part in a local store. Nothing is read. For remote stores see `fetch_part`."""
        return Path(self.location(*manifest.root, part.file))

    def fetch_part(self, manifest: Manifest, part: Part, cache: Path) -> Path:
        """Return a local path of the part: its own in a local store, else a verified copy below `cache`.

        A copy that is there already is trusted. It took its name only after its checksum held, and loading it checks it
        again. Raises CorruptPart. Raises StoreError if the disk of `cache` is full or a link leads out of it. Raises
        the filesystem's own OSError.
        """
        return self._fetch(manifest.root, part, cache, lambda path: verify(path, part))

    def fetch_overlay(self, manifest: Manifest, table: Table, overlay: Overlay, cache: Path) -> Path:
        """`fetch_part` for the rows that a version replaces in a part."""
        name = (manifest.model, manifest.version)
        return self._fetch(name, overlay, cache, lambda path: read_overlay(path, table, overlay))

    def _fetch(
        self, version: tuple[str, str], file: Part | Overlay, cache: Path, check: Callable[[Path], object]
    ) -> Path:
        if self.is_local:
            return Path(self.location(*version, file.file))
        path = _below(cache, *version, file.file)
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._copy(self.location(*version, file.file), path, check)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise StoreError(
                    f"no room on the disk of {cache} for {file.file} of {file.bytes:,} bytes: make room there, or give "
                    "the shard another --cache"
                ) from error
        return path

    def _copy(self, location: str, path: Path, check: Callable[[Path], object]) -> None:
        """Bring a file here. It takes its name once `check` passed, and a failed copy goes away."""
        # A file of this thread alone. Another thread may be fetching the same one.
        descriptor, name = tempfile.mkstemp(prefix=f"{path.stem}.partial-", dir=path.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            try:
                self.filesystem.get_file(location, str(partial))
            except FileNotFoundError as error:
                raise StoreError(f"{location} is not there: the version has lost it, so import it again") from error
            check(partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def _read_manifest(self, model: str, version: str, known: Manifest | None = None) -> Manifest | None:
        """A version's manifest, or `known` if there is one. None if there is no such file. Raises StoreError."""
        location = self.location(model, version, MANIFEST_FILE)
        try:
            info = self.filesystem.info(location)
        except FileNotFoundError:
            self.answered = time.monotonic()
            return None
        self.answered = time.monotonic()
        size = info["size"] or 0
        if info["type"] != "file" or size > MOST_MANIFEST_BYTES:  # a pipe would never end
            raise StoreError(f"{location} is no manifest, which is a file of at most {MOST_MANIFEST_BYTES:,} bytes")
        if known:
            return known
        text = self.filesystem.cat_file(location)
        self.answered = time.monotonic()
        manifest = Manifest.from_json(text, location)
        if (manifest.model, manifest.version) != (model, version):
            raise StoreError(
                f"{location} is the manifest of {manifest.model}@{manifest.version}: a copied or renamed folder is not "
                "served; import under the name that you want, and remove this folder"
            )
        return manifest

    def _folders(self, location: str) -> list[str]:
        """Names of the folders in one, in natural order, without hidden ones."""
        try:
            entries = self.filesystem.ls(location, detail=True)
        except FileNotFoundError:
            if isinstance(self.filesystem, RemoteFiles):
                self.filesystem.check_bucket(self.root)
            raise FileNotFoundError(f"nothing is at {location}: import into it, or correct the store's URL") from None
        self.answered = time.monotonic()
        if any(entry["name"] == location and entry["type"] == "file" for entry in entries):
            raise NotADirectoryError(f"{location} is a file, and a store is a folder: correct the store's URL")
        names = [Path(entry["name"]).name for entry in entries if entry["type"] == "directory"]
        return sorted((name for name in names if not name.startswith(".")), key=natural_order)


def _opened(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL, and the place there."""
    try:
        return fsspec.core.url_to_fs(url, **patience(url))  # type: ignore[no-any-return]
    except ImportError as error:
        remedy = f": pip install 'embedding-service[{extra}]'" if (extra := extra_of(url)) else ""
        raise StoreError(f"{url} is no store that can be opened: {one_line(error)}{remedy}") from error
    except ValueError as error:  # an unknown scheme
        raise unopened(url, error) from error


def _in_this_process(filesystem: AbstractFileSystem) -> bool:
    """Whether it is in this process's memory, where no other process sees it."""
    while inner := getattr(filesystem, "fs", None):
        filesystem = inner
    return isinstance(filesystem, MemoryFileSystem)


@contextmanager
def _naming(found: Catalogue, model: str, version: str, location: str) -> Iterator[None]:
    """A failure in a folder is that folder's problem alone. Filesystems raise what their libraries do."""
    try:
        yield
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        found.problems[model, version] = f"{printable(location)} is skipped: {reason}"


def _below(cache: Path, *names: str) -> Path:
    """A path in the cache. Raises StoreError if a link there leads out of it. Nothing is written elsewhere."""
    path = cache.joinpath(*names)
    try:
        inside = path.resolve().is_relative_to(cache.resolve())
    except (OSError, RuntimeError):  # links in a circle
        inside = False
    if not inside:
        raise StoreError(f"{path} leads out of the cache {cache}: remove the link there, or give another --cache")
    return path


def next_version(versions: list[str]) -> str:
    """A name for a version that is newer than all of these, which are in their order: "v9" gives "v10"."""
    newest = versions[-1] if versions else "1"
    text, number = re.fullmatch(r"(.*?)(\d*)", newest).groups()  # type: ignore[union-attr]
    return f"{text}{int(number or 1) + 1}"


def natural_order(name: str) -> tuple[list[tuple[str, int]], str]:
    """Sort key that counts numbers as numbers: "2" before "10", "v9" before "v10". No two names have the same."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)], name
