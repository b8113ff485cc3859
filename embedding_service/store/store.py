"""A store: a folder, or any fsspec URL, of models, each in versions, each whole or not there at all.

STORE/MODEL/VERSION/manifest.json is written last: a version without one does not exist.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from pathlib import Path

import fsspec
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem

from embedding_service.errors import NotFound, StoreError
from embedding_service.store.manifest import Manifest, Part, check_name
from embedding_service.store.parts import verify

MANIFEST_FILE = "manifest.json"


class Store:
    """Reads what is published in the store at `url`, a local path or an fsspec URL (s3://..., memory://...)."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        try:
            filesystem, self.root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package is missing
            raise StoreError(f"{self.url} is no store that can be opened: {error}") from error
        self.is_local = isinstance(filesystem, LocalFileSystem)
        # Parts are cached here, whole or not at all; a cache of fsspec's shows a file while it is written.
        self.filesystem = filesystem.fs if isinstance(filesystem, CachingFileSystem) else filesystem

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def models(self) -> list[str]:
        """Names of the models that have a version, sorted."""
        return [name for name in self._folders(self.root) if self.versions(name)]

    def versions(self, model: str) -> list[str]:
        """Published versions of a model, oldest first (2 before 10); empty for a model that is not there."""
        folder = self.location(check_name(model))
        return [version for version in self._folders(folder) if self.has(model, version)]

    def has(self, model: str, version: str) -> bool:
        """Whether that version is published."""
        return self.filesystem.exists(self.location(model, version, MANIFEST_FILE))

    def manifest(self, model: str, version: str | None = None) -> Manifest:
        """Return a version's manifest, the newest version's for None. Raises NotFound naming what there is."""
        versions = self.versions(model)
        if not versions:
            raise NotFound(f"no model {model!r} in {self.url}; it has: {', '.join(self.models()) or 'none'}")
        version = version or versions[-1]
        if version not in versions:
            raise NotFound(f"model {model!r} in {self.url} has no version {version!r}; it has: {', '.join(versions)}")
        location = self.location(model, version, MANIFEST_FILE)
        return Manifest.from_json(self.filesystem.cat_file(location).decode(), location)

    def location(self, *names: str) -> str:
        """Where something lies, in the filesystem's own terms: a path for a local store."""
        return "/".join([self.root.rstrip("/"), *names])

    def part_path(self, manifest: Manifest, part: Part) -> Path:
        """Path of a part in a local store; nothing is read. For remote stores see `fetch_part`."""
        return Path(self.location(manifest.model, manifest.version, part.file))

    def fetch_part(self, manifest: Manifest, part: Part, cache: Path) -> Path:
        """Return a local path of the part: its own in a local store, else a verified copy below `cache`.

        A copy that is there already is trusted: it took its name only after its checksum held, and whoever loads it
        checks it again. Raises CorruptPart, StoreError where the disk of `cache` is full, or the filesystem's own
        OSError.
        """
        if self.is_local:
            return self.part_path(manifest, part)
        path = cache / manifest.model / manifest.version / part.file
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._copy(manifest, part, path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise StoreError(
                    f"no room on the disk of {cache} for {part.file} of {part.bytes:,} bytes: make room there, or give "
                    "the shard another --cache"
                ) from error
        return path

    def _copy(self, manifest: Manifest, part: Part, path: Path) -> None:
        """Bring a part here; it takes its name once its checksum held, and what was copied in vain goes away."""
        # Of this thread alone: another may be fetching the same part.
        partial = path.with_suffix(f".partial-{os.getpid()}-{threading.get_ident()}")
        try:
            self.filesystem.get_file(self.location(manifest.model, manifest.version, part.file), str(partial))
            verify(partial, part)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def _folders(self, location: str) -> list[str]:
        """Names of the folders in one, in natural order, without hidden ones."""
        try:
            entries = self.filesystem.ls(location, detail=True)
        except FileNotFoundError:
            return []
        names = [Path(entry["name"]).name for entry in entries if entry["type"] == "directory"]
        return sorted((name for name in names if not name.startswith(".")), key=natural_order)


def natural_order(name: str) -> list[tuple[str, int]]:
    """Sort key that counts numbers as numbers: "2" before "10", "v9" before "v10"."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
