"""Any manifest and any config: what comes of them is right, or is refused in one line. `make fuzz` draws many more."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import longcat_checkpoint
from test_manifest import entry, overlaid_entry
from test_tensorfile import JUNK

from embedding_service.errors import EmbeddingServiceError, StoreError
from embedding_service.store import Manifest
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.manifest import MOST_BYTES

pytestmark = pytest.mark.fuzz

NAMES = st.sampled_from(["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "\n", "\x1b[31m", "m", "é", "a" * 200])
NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**48, 2**63, 2**64, 10**30, 0.5, 1e308, math.inf, math.nan, True])
VALUES = JUNK | NAMES | NUMBERS | st.integers(-3, 3000)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within an object."""
    if here:
        yield here
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from places(child, (*here, name))


@st.composite
def changed(draw: st.DrawFn, *originals: dict[str, Any]) -> Any:
    """An object with a few values that are others, or gone, or there twice."""
    found = json.loads(json.dumps(draw(st.sampled_from(originals))))
    for _ in range(draw(st.integers(1, 3))):
        ways = list(places(found))
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        parent = found
        for each in way:
            parent = parent[each]
        match draw(st.sampled_from(["other", "other", "gone", "more"])):
            case "other":
                parent[last] = draw(VALUES)
            case "gone":
                del parent[last]
            case "more" if isinstance(parent, list):
                parent.append(parent[last])
            case "more":
                parent[draw(st.text(max_size=4))] = parent[last]
    return found


def fits_a_line(error: Exception) -> bool:
    return str(error).isprintable() and len(str(error)) < 2000


@given(document=changed(entry(), overlaid_entry()) | JUNK, cut=st.none() | st.integers(1, 2000))
def test_s10_a_manifest_leads_nowhere_else_and_every_row_lies_in_its_part(document: Any, cut: int | None) -> None:
    text = json.dumps(document).encode()[:cut]
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
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longcat_checkpoint(tmp_path_factory.mktemp("fuzzed") / "checkpoint")


# Each writes a store.
IMPORTS = max(20, int(os.environ.get("FUZZ_EXAMPLES", 0)) // 50)
CONFIG = {
    "architectures": ["LongcatFlashNgramForCausalLM"], "model_type": "longcat_flash_ngram", "vocab_size": 997,
    "hidden_size": 96, "eos_token_id": 2, "ngram_vocab_size_ratio": 3.25, "emb_neighbor_num": 4, "emb_split_num": 2,
}  # fmt: skip


@settings(max_examples=IMPORTS)
@given(config=changed(CONFIG))
def test_s10_an_import_brings_the_whole_version_or_nothing(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, config: Any
) -> None:
    store = tmp_path_factory.mktemp("store")
    (checkpoint / "config.json").write_text(json.dumps(config))
    beside = sorted(store.parent.iterdir())
    try:
        import_checkpoint(checkpoint, str(store), "m", dtype="fp32")
    except EmbeddingServiceError as error:
        assert fits_a_line(error)
        assert not list(store.rglob("manifest.json"))
    else:
        manifest = Manifest.from_json((store / "m/1/manifest.json").read_bytes(), "the import's")
        assert manifest.bytes == sum((store / "m/1" / part.file).stat().st_size > 0 and part.bytes
                                     for table in manifest.tables for part in table.parts)  # fmt: skip
    assert sorted(store.parent.iterdir()) == beside
