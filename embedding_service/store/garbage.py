"""What a store holds that nobody needs: versions that newer ones have replaced, and imports that were broken off."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from embedding_service.errors import InvalidRequest, StoreError
from embedding_service.store.draft import (
    IDLE_HOURS,
    Root,
    bases_under_way,
    idle_drafts,
    is_of_draft,
    remove_copies,
    remove_idle_draft,
    set_aside,
)
from embedding_service.store.store import MANIFEST_FILE, Catalogue, Store


@dataclass(frozen=True)
class Garbage:
    """Something that can go.

    Attributes:
        kind: "version", "draft" (of an import that is not running), or "rest" (of a removal that was cut off).
        name: model@version.
        location: Its folder.
        bytes: What it takes.
    """

    kind: str
    name: str
    location: str
    bytes: int


def find_garbage(store: Store, keep: int, pinned: Collection[Root] = (), drafts: bool = False) -> list[Garbage]:
    """List what can go.

    keep: the newest versions of each model that stay, 1 and more. So do their bases, those of versions under way, and
    what is `pinned`.
    drafts: unfinished imports that no process works on, too. They could be gone on with.
    Raises InvalidRequest for a `keep` below 1. Raises StoreError if a version cannot be read, since nobody can tell
    what it needs. Raises what the filesystem does.
    """
    if keep < 1:
        raise InvalidRequest(f"--keep must be 1 or more, got {keep}: the newest version of a model is what is served")
    catalogue = store.catalogue()
    if catalogue.problems:
        reasons = "; ".join(catalogue.problems.values())
        raise StoreError(f"nothing is removed, for what cannot be read may need it. Mend or remove that: {reasons}")
    needed = _needed(catalogue, keep, {*pinned, *bases_under_way(store)})
    found = [
        Garbage("version", manifest.full_name, store.location(model, manifest.version), manifest.own_bytes)
        for model, versions in catalogue.manifests.items()
        for manifest in versions
        if (model, manifest.version) not in needed
    ]
    if store.is_local:
        found += _hidden(store, "rest", ".removing", sorted(Path(store.root).glob("*/.*.removing")))
    if drafts:
        found += _hidden(store, "draft", ".importing", idle_drafts(store)) if store.is_local else _remote_drafts(store)
    return found


def _needed(catalogue: Catalogue, keep: int, pinned: Collection[Root]) -> set[Root]:
    """Model and version of each version that stays."""
    stays = [manifest for versions in catalogue.manifests.values() for manifest in versions[-keep:]]
    by_name = {(each.model, each.version): each for versions in catalogue.manifests.values() for each in versions}
    stays += [by_name[name] for name in pinned if name in by_name]
    # A base is a whole version, so there is one step to it.
    return {(each.model, each.version) for each in stays} | {each.root for each in stays}


def _hidden(store: Store, kind: str, ending: str, folders: list[Path]) -> Iterator[Garbage]:
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        name = f"{folder.parent.name}@{folder.name.removeprefix('.').removesuffix(ending)}"
        yield Garbage(kind, name, str(folder), size)


def _remote_drafts(store: Store) -> Iterator[Garbage]:
    """What imports into a remote store left, and nobody has written to for long. Folders with other files stay."""
    for model, version in store.unpublished():
        location = store.location(model, version)
        found = store.filesystem.find(location, detail=True)
        names = [name.rpartition(f"/{model}/{version}/")[2] for name in found]
        last = max(map(_written, found.values()), default=time.time())
        if all(map(is_of_draft, names)) and time.time() - last > IDLE_HOURS * 3600:
            yield Garbage("draft", f"{model}@{version}", location, sum(each["size"] for each in found.values()))


def _written(info: dict[str, Any]) -> float:
    """When a file was written, as its filesystem names that. One that says nothing may have been written now."""
    times = [info[key] for key in ("LastModified", "last_modified", "mtime", "created") if key in info]
    return next((each.timestamp() if isinstance(each, datetime) else float(each) for each in times), time.time())


def remove(store: Store, garbage: Garbage, pinned: Callable[[], Collection[Root]] = tuple) -> bool:
    """Remove it. A version leaves the store at once, before its files go. False if it stays, for it is in use by now.

    A service that serves it goes on until its clients have left it. Raises OSError, or what the filesystem does.

    pinned: says which versions must stay, as `find_garbage` takes them.
    """
    if garbage.kind == "draft":
        if store.is_local:
            return remove_idle_draft(Path(garbage.location))
        idle = any(each.location == garbage.location for each in _remote_drafts(store))
        if idle:
            remove_copies(store, garbage.location)
        return idle
    if garbage.kind == "rest":
        shutil.rmtree(garbage.location)
    elif store.is_local:
        folder = Path(garbage.location)
        going = set_aside(folder)
        if _is_needed(store, garbage, pinned, put_back=lambda: going.rename(folder)):
            return False
        shutil.rmtree(going)
    else:
        location = f"{garbage.location}/{MANIFEST_FILE}"
        manifest = store.filesystem.cat_file(location)
        store.filesystem.rm_file(location)
        if _is_needed(store, garbage, pinned, put_back=lambda: store.filesystem.pipe_file(location, manifest)):
            return False
        store.filesystem.rm(garbage.location, recursive=True)
    return True


def _is_needed(
    store: Store, garbage: Garbage, pinned: Callable[[], Collection[Root]], put_back: Callable[[], object]
) -> bool:
    """Whether somebody needs a version that was just hidden. It is put back then.

    Whoever publishes over it notes that first, and then looks whether it is there. So one of the two sees the other.
    """
    needed = True
    try:
        model, _, version = garbage.name.partition("@")
        # A version whose base is hidden is a problem of the catalogue.
        needed = (model, version) in {*bases_under_way(store), *pinned()} or bool(store.catalogue().problems)
    finally:
        if needed:
            put_back()
    return needed
