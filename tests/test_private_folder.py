"""Folders that sockets lie in, those of killed processes included."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedding_service.errors import InvalidRequest
from embedding_service.private_folder import PrivateFolder, own_folder
from embedding_service.shard import server

PROGRAM = (
    "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
    "from embedding_service.private_folder import PrivateFolder\n"
    "folder = PrivateFolder(); (folder.path / 'main').touch(); print(folder.path, flush=True); sys.stdin.read()\n"
)


@contextmanager
def another_process_s_folder(temporary: Path) -> Iterator[Path]:
    """It lies there for as long as its process lives, which is then killed."""
    command = [sys.executable, "-c", PROGRAM, str(temporary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        yield Path(child.stdout.readline().strip())
        child.kill()


def test_folders_of_killed_processes_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = [tmp_path / "embedding-service", tmp_path / "embedding-sockets-file", tmp_path / "embedding-sockets-link"]
    kept[0].mkdir()
    kept[1].touch()
    kept[2].symlink_to(kept[0])
    with another_process_s_folder(tmp_path) as theirs:
        own = PrivateFolder()
        assert stat.S_IMODE(own.path.stat().st_mode) == 0o700
        assert sorted(tmp_path.iterdir()) == sorted([*kept, theirs, own.path])
        own.close()
        assert theirs.exists()
    assert sorted(tmp_path.iterdir()) == sorted([*kept, theirs])
    own = PrivateFolder()
    assert sorted(tmp_path.iterdir()) == sorted([*kept, own.path])
    own.close()
    own.close()
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_folder_of_a_known_name_is_this_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, link, shared, file = (tmp_path / name for name in ("own", "link", "shared", "file"))
    assert own_folder(own) and own_folder(own)
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    link.symlink_to(own)
    shared.mkdir()
    shared.chmod(0o770)
    file.touch()
    assert not any(map(own_folder, (link, shared, file)))
    monkeypatch.setattr(os, "geteuid", lambda: own.stat().st_uid + 1)
    assert not own_folder(own)


def test_a_shard_has_no_cache_that_others_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is told to: by default it lies at a name that others know."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setattr(server, "DEFAULT_CACHE", cache)
    options = server.ShardOptions(
        controller="127.0.0.1:1", store=f"simplecache::file://{tmp_path}", cache=cache, memory_limit=1 << 20
    )
    with pytest.raises(InvalidRequest, match=f"others may write to {cache}: give this user a folder with --cache"):
        server._Shard(options)
