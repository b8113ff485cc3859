"""Any manifest and any config: what comes of them is right, or is refused in one line. `make fuzz` draws many more."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import longcat_checkpoint
from support.json_values import JUNK, alike, changed
from support.wire_bytes import ALIKE
from test_manifest import entry, overlaid_entry

from embedding_service.errors import EmbeddingServiceError, StoreError
from embedding_service.store import Manifest
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.manifest import MOST_BYTES

pytestmark = pytest.mark.fuzz

# `make fuzz` counts all that are made of what is drawn.
few_with_others = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", 3 * ALIKE)) // ALIKE)


def fits_a_line(error: Exception) -> bool:
    return str(error).isprintable() and len(str(error)) < 2000


@few_with_others
@given(document=changed(entry(), overlaid_entry()) | JUNK, cut=st.integers(1, 2000))
def test_s10_a_manifest_leads_nowhere_else_and_every_row_lies_in_its_part(document: Any, cut: int) -> None:
    for each in alike(document):
        check_manifest(json.dumps(each).encode())
    check_manifest(json.dumps(document).encode()[:cut])


def check_manifest(text: bytes) -> None:
    """It is right, or refused."""
    try:
        manifest = Manifest.from_json(text, "a manifest")
    except StoreError as error:
        assert fits_a_line(error)
        return
    assert Manifest.from_json(manifest.to_json(), "again") == manifest
    assert manifest.bytes <= MOST_BYTES
    overlays = [each for table in manifest.tables for each in manifest.overlays(table.name).values()]
    for file in [part.file for table in manifest.tables for part in table.parts] + [each.file for each in overlays]:
        path = PurePosixPath(file)
        assert not path.is_absolute() and ".." not in path.parts and file.isprintable() and "\\" not in file
    for table in manifest.tables:
        for part in table.parts:
            for row in (part.first_row, part.first_row + part.rows - 1):
                assert table.parts[row // table.rows_per_part] is part
        assert sum(part.rows for part in table.parts) == table.rows


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A checkpoint, and room for a store beside it, in memory. Its tensors' header has room for a longer one."""
    with tempfile.TemporaryDirectory(prefix="fuzzed-", dir="/dev/shm") as made:
        file = longcat_checkpoint(Path(made) / "checkpoint") / "model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header, rows = content[8 : 8 + length], content[8 + length :]
        file.write_bytes(struct.pack("<Q", ROOM) + header.ljust(ROOM) + rows)
        yield Path(made)


ROOM, PART_BYTES = 8192, 512 << 10
CONFIG = {
    "architectures": ["LongcatFlashNgramForCausalLM"], "model_type": "longcat_flash_ngram", "vocab_size": 997,
    "hidden_size": 96, "eos_token_id": 2, "ngram_vocab_size_ratio": 3.25, "emb_neighbor_num": 4, "emb_split_num": 2,
}  # fmt: skip


@few_with_others
@given(config=changed(CONFIG))
def test_s10_an_import_brings_the_whole_version_or_nothing(folder: Path, config: Any) -> None:
    for each in alike(config):
        (folder / "checkpoint/config.json").write_text(json.dumps(each))
        check_import(folder)


@few_with_others
@given(data=st.data())
def test_s10_tensors_of_any_header_are_a_whole_version_or_nothing(folder: Path, data: st.DataObject) -> None:
    (folder / "checkpoint/config.json").write_text(json.dumps(CONFIG))
    with (folder / "checkpoint/model.safetensors").open("r+b", buffering=0) as file:
        original = file.read(8 + ROOM)[8:]
        try:
            for each in alike(data.draw(changed(json.loads(original)))):
                os.pwrite(file.fileno(), json.dumps(each).encode().ljust(ROOM)[:ROOM], 8)
                check_import(folder)
        finally:
            os.pwrite(file.fileno(), original, 8)


def check_import(folder: Path) -> None:
    """The version is whole, or is not there, and nothing else was written."""
    store, beside = folder / "store", sorted(folder.rglob("*"))
    try:
        import_checkpoint(folder / "checkpoint", str(store), "m", dtype="fp32", part_bytes=PART_BYTES)
    except EmbeddingServiceError as error:
        assert fits_a_line(error)
        assert not list(store.rglob("manifest.json"))
    else:
        manifest = Manifest.from_json((store / "m/1/manifest.json").read_bytes(), "the import's")
        for part in (part for table in manifest.tables for part in table.parts):
            assert (store / "m/1" / part.file).stat().st_size > part.bytes
    shutil.rmtree(store, ignore_errors=True)
    assert sorted(folder.rglob("*")) == beside
