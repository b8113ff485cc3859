"""A certificate and its key are two files, so for a moment they may be of two certificates."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.security import POLICY, write_policy

from embedding_service.errors import InvalidRequest
from embedding_service.security import files
from embedding_service.security.access import Access
from embedding_service.security.authority import Authority, write_private
from embedding_service.security.certificates import current_pair, names_in
from embedding_service.security.server import Files, Security


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create()
    for name in ("now", "next"):
        made.issue(tmp_path / name, [f"{name}.example", "localhost"])
    return made


def copied(folder: Path, file: str) -> None:
    """One file of the next pair is there, the other one is not yet."""
    write_private(folder / "now" / file, (folder / "next" / file).read_bytes())


@pytest.mark.parametrize("order", [("tls.crt", "tls.key"), ("tls.key", "tls.crt")])
def test_s2_a_pair_that_is_half_replaced_leaves_what_was_there_before(
    authority: Authority, tmp_path: Path, order: tuple[str, str]
) -> None:
    pair = tmp_path / "now" / "tls.crt", tmp_path / "now" / "tls.key"
    access = Access(tmp_path / "now" / "ca.crt", *pair)
    before = current_pair(*pair)
    assert "now.example" in names_in(before.certificate)
    copied(tmp_path, order[0])
    assert current_pair(*pair) == before
    assert access.credentials() and access.prove("localhost")
    copied(tmp_path, order[1])
    after = current_pair(*pair)
    assert "next.example" in names_in(after.certificate) and after.key != before.key


def test_s2_who_starts_while_a_pair_is_replaced_waits_for_the_other_file(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "now"
    copied(tmp_path, "tls.crt")
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: copied(tmp_path, "tls.key"))
    monkeypatch.setattr(files, "time", clock)
    policy = write_policy(tmp_path, POLICY)
    security = Security(Files(own / "tls.crt", own / "tls.key", own / "ca.crt", policy))
    assert security.context() and security.credentials(members=True)
    assert "next.example" in names_in(current_pair(own / "tls.crt", own / "tls.key").certificate)


def test_s2_a_pair_that_never_matches_is_named(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "REPLACED_SECONDS", 0)
    own = tmp_path / "now"
    copied(tmp_path, "tls.crt")
    access = Access(own / "ca.crt", own / "tls.crt", own / "tls.key")
    with pytest.raises(InvalidRequest, match=r"tls.key is not the key of .*tls.crt"):
        access.credentials()
    write_private(own / "tls.key", b"nothing")
    with pytest.raises(InvalidRequest, match="do not count"):
        access.credentials()
