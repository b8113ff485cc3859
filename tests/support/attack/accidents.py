"""What happens to a store: folders and manifests that are none, files that stall, the whole of it away for a while."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from support.attack.window import Window

# The controller looks every 2 s.
SCAN = 3.0


def accidents(window: Window) -> None:
    """Two groups, one after the other, each until the controller sees it. It starts again during the first."""
    makers = window.values.sample(_ACCIDENTS, len(_ACCIDENTS))
    together, last = makers[: len(makers) // 2], makers[len(makers) // 2 :]
    for number, some in enumerate((together, last)):
        made = []
        for make in some:
            made += make(window.store, window)
            window.ended[make.__name__.strip("_").replace("_", " ")] += 1
        window.rest(SCAN)
        if number == 0:
            print("restart controller", flush=True)
            window.rest(2 * SCAN)
        for path in made:
            _remove(path)


def store_away(window: Window) -> None:
    """The store's folder is not there, or is empty, as where a disk was unmounted; then it is back."""
    away = window.store.with_name("away")
    for empty in window.values.sample([False, True], 2):
        window.store.rename(away)
        if empty:
            window.store.mkdir()
        window.ended["away, an empty folder" if empty else "away"] += 1
        window.rest(SCAN)
        if empty:
            window.store.rmdir()
        away.rename(window.store)
        window.rest(1)


def _odd_folders(store: Path, window: Window) -> list[Path]:
    names = [b"old models", b"..x", b"a@b", b"\xff\xfe", b"m\n1", b"[red]", b"m" * 200]
    paths = [Path(os.fsdecode(name)) for name in window.values.sample(names, 4)]
    made = [store / path for path in paths]
    for path in made:
        (path / "1").mkdir(parents=True)
    (store / "m" / "not a version").mkdir()
    (store / "lost+found").mkdir()
    (store / "a file").write_bytes(window.values.randbytes(100))
    return [*made, store / "m" / "not a version", store / "lost+found", store / "a file"]


def _manifest_of(name: str, change: Callable[[dict], None]) -> Callable[[Path, Window], list[Path]]:
    """Another model, whose manifest is that of "m" but for a change."""

    def make(store: Path, window: Window) -> list[Path]:
        manifest = json.loads((store / "m/1/manifest.json").read_text())
        manifest["model"] = name
        change(manifest)
        (store / name / "1").mkdir(parents=True)
        (store / name / "1/manifest.json").write_text(json.dumps(manifest))
        return [store / name]

    make.__name__ = name
    return make


def _raw_manifest(name: str, content: bytes) -> Callable[[Path, Window], list[Path]]:
    def make(store: Path, window: Window) -> list[Path]:
        (store / name / "1").mkdir(parents=True)
        (store / name / "1/manifest.json").write_bytes(content)
        return [store / name]

    make.__name__ = name
    return make


def _fifo(store: Path, window: Window) -> list[Path]:
    (store / "stalling/1").mkdir(parents=True)
    os.mkfifo(store / "stalling/1/manifest.json")
    return [store / "stalling"]


def _copied_folders(store: Path, window: Window) -> list[Path]:
    shutil.copytree(store / "m", store / "copy", symlinks=True)
    shutil.copytree(store / "m/1", store / "m/2", symlinks=True)
    return [store / "copy", store / "m/2"]


def _set_rows(manifest: dict) -> None:
    manifest["tables"][0]["rows"] = 1 << 62


def _set_dim(manifest: dict) -> None:
    manifest["tables"][0]["dim"] = 1 << 33


def _set_part_file(manifest: dict) -> None:
    manifest["tables"][0]["parts"][0]["file"] = "../../../../../../tmp/attack-must-not-write"


def _same_tables(manifest: dict) -> None:
    manifest["tables"] *= 2


_ACCIDENTS: list[Callable[[Path, Window], list[Path]]] = [
    _odd_folders,
    _fifo,
    _copied_folders,
    _manifest_of("manyrows", _set_rows),
    _manifest_of("widerows", _set_dim),
    _manifest_of("outside", _set_part_file),
    _manifest_of("twice", _same_tables),
    _raw_manifest("notext", b'{"model": "\xff\xfe"}'),
    _raw_manifest("nojson", b"{"),
    _raw_manifest("list", b"[]"),
    _raw_manifest("deep", b"[" * 100_000),
    _raw_manifest("empty", b""),
]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
