"""Drafts under any order of imports that begin, die, are damaged, go on and publish, beside what each should find."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from embedding_service.errors import ImportRefused
from embedding_service.formats import get_format
from embedding_service.store import Manifest, Part, Store, verify
from embedding_service.store.draft import Draft, finish_published, open_draft
from embedding_service.store.manifest import Table
from embedding_service.store.parts import NewPart, PartWriter
from embedding_service.tensorfile import PAGE_BYTES

PARTS, ROWS, DIM = 3, 1024, 4
FORMAT = get_format("fp32")


class Died(Exception):
    """The process that imported is gone."""


class DraftStates(RuleBasedStateMachine):
    """Nothing is visible before it is published; what was finished and is whole is not done again; nobody mixes two."""

    scheme = ""
    damages: tuple[str, ...] = ("cut", "longer", "gone", "flipped")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store(f"{self.scheme}{self.folder}/store")
        self.life: ExitStack | None = None  # of the import that runs
        self.draft: Draft
        self.fingerprint = ""  # of that import
        self.of = ""  # the fingerprint that the parts on disk are of
        self.whole: dict[int, Part] = {}
        self.published: Manifest | None = None

    def teardown(self) -> None:
        if self.life:
            self.life.close()
        shutil.rmtree(self.folder)

    @precondition(lambda self: not self.life and not self.published)
    @rule(fingerprint=st.sampled_from(["job", "other job"]))
    def begin(self, fingerprint: str) -> None:
        self.life = ExitStack()
        self.draft = self.life.enter_context(open_draft(self.store, "m", "1"))
        self.draft.resume(fingerprint)
        if fingerprint != self.of:
            self.of, self.whole = fingerprint, {}
        self.fingerprint = fingerprint

    @precondition(lambda self: self.life)
    @rule()
    def finished_parts_are_known(self) -> None:
        for index in range(PARTS):
            assert self.draft.finished(f"t/part-{index:05d}.safetensors") == self.whole.get(index)

    @precondition(lambda self: self.life)
    @rule(index=st.integers(0, PARTS - 1), dies=st.booleans())
    def write(self, index: int, dies: bool) -> None:
        if index in self.whole:
            return
        values = torch.full((ROWS, DIM), float(1000 * len(self.fingerprint) + index))
        writer = PartWriter(self.draft.folder, NewPart("t", index, index * ROWS, ROWS, DIM, FORMAT))
        with writer:
            writer.write(FORMAT.encode(values))
            part = writer.finish()
        if dies:  # between the part and its note
            self.die()
            return
        self.draft.keep(part)
        self.whole[index] = part
        assert self.place_of(part).stat().st_size == PAGE_BYTES + part.bytes
        # A machine that imports into a remote store has room for one part.
        assert (self.draft.folder / part.file).exists() == self.store.is_local

    def place_of(self, part: Part) -> Path:
        """Where a finished part lies before it is published."""
        return self.draft.folder / part.file

    @precondition(lambda self: self.life)
    @rule()
    def die(self) -> None:
        """Its lock goes with it; what it had not finished stays for the next one."""
        assert self.life
        life, self.life = self.life, None
        with pytest.raises(Died), life:
            raise Died
        if not self.whole:
            self.of = ""
            assert not self.draft.folder.exists()

    @precondition(lambda self: not self.life and self.whole and not self.published)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.whole)))
        how = data.draw(st.sampled_from(self.damages))
        path = self.place_of(self.whole.pop(index))
        if how == "gone":
            path.unlink()
            return
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes({"cut": content[:-8], "longer": content + bytes(8), "flipped": content}[how])

    @precondition(lambda self: not self.life and self.whole and not self.published)
    @rule(torn=st.sampled_from(['{"index": 2, "fir', "[]", "null", "\x00\x01"]))
    def tear_the_journal(self, torn: str) -> None:
        """The line that was being written when the machine lost its power."""
        with (self.draft.folder / "journal").open("a") as journal:
            journal.write(torn)
            os.fsync(journal.fileno())

    @precondition(lambda self: self.life)
    @rule()
    def a_second_import_is_refused(self) -> None:
        with pytest.raises(ImportRefused, match="another import of m@1 is running"), open_draft(self.store, "m", "1"):
            pass

    @precondition(lambda self: self.life and len(self.whole) == PARTS)
    @rule()
    def publish(self) -> None:
        parts = tuple(self.whole[index] for index in range(PARTS))
        table: dict[str, Any] = dict(rows=PARTS * ROWS, dim=DIM, dtype="fp32", row_bytes=4 * DIM, rows_per_part=ROWS)
        tables = (Table(name="t", parts=parts, **table),)
        self.published = Manifest(model="m", version="1", family="", hash_params={}, tables=tables)
        self.draft.publish(self.published)
        assert self.life
        self.life.close()
        self.life = None

    @precondition(lambda self: self.published)
    @rule()
    def what_is_published_is_whole_and_its_name_is_taken(self) -> None:
        assert self.store.manifest("m", "1") == self.published
        where = Path(self.store.location("m", "1"))
        assert sorted(path.name for path in where.iterdir()) == ["manifest.json", "t"]
        for part in self.whole.values():
            verify(where / part.file, part)
        assert not self.draft.folder.exists()
        assert finish_published(self.store, "m", "1", self.fingerprint) is None
        with pytest.raises(ImportRefused, match=r"name taken.*--version 2"), open_draft(self.store, "m", "1"):
            pass

    @invariant()
    def nothing_is_visible_before(self) -> None:
        assert self.store.has("m", "1") == bool(self.published)
        assert self.store.models() == (["m"] if self.published else [])


class RemoteDraftStates(DraftStates):
    """The same in a store that is elsewhere. Parts lie at their final place at once, and their size is looked at."""

    scheme = "simplecache::file://"
    damages = ("cut", "longer", "gone")

    def place_of(self, part: Part) -> Path:
        return Path(self.store.location("m", "1", part.file))


TestDraftStates = DraftStates.TestCase
TestRemoteDraftStates = RemoteDraftStates.TestCase
TestDraftStates.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestRemoteDraftStates.settings = TestDraftStates.settings
