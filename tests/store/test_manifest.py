"""The manifest refuses what would send a row id to the wrong place."""

import json
from typing import Any

import pytest

from embedding_service.errors import InvalidRequest, NotFound, StoreError
from embedding_service.store import Manifest
from embedding_service.store.manifest import check_name


def entry() -> dict[str, Any]:
    """A manifest of one table of 2,500 int8 rows of 12 values in parts of 1,024."""
    parts = [
        {
            "index": index,
            "first_row": first,
            "rows": rows,
            "file": f"ngram/part-{index:05d}.safetensors",
            "bytes": rows * 16,
            "checksum": "xxh3-128:" + "ab" * 16,
        }
        for index, (first, rows) in enumerate([(0, 1024), (1024, 1024), (2048, 452)])
    ]
    table = {"name": "ngram", "rows": 2500, "dim": 12, "dtype": "int8", "row_bytes": 16, "rows_per_part": 1024}
    return {
        "format_version": 1,
        "model": "tiny",
        "version": "1",
        "family": "longcat",
        "hash_params": {"vocab_size": 7},
        "tables": [{**table, "parts": parts}],
    }


def test_json_and_back() -> None:
    manifest = Manifest.from_json(json.dumps(entry()), "here")
    assert Manifest.from_json(manifest.to_json(), "there") == manifest
    assert manifest.bytes == manifest.table("ngram").bytes == 40_000
    with pytest.raises(NotFound, match="tiny@1 has no table 'words'; it has: ngram"):
        manifest.table("words")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format_version",), 2),
        (("surprise",), 1),
        (("tables",), []),
        (("model",), "a/b"),
        (("tables", 0, "name"), "../ngram"),
        (("tables", 0, "dtype"), "int5"),
        (("tables", 0, "row_bytes"), 17),
        (("tables", 0, "rows"), 2501),
        (("tables", 0, "rows_per_part"), 1000),
        (("tables", 0, "parts", 1, "first_row"), 1025),
        (("tables", 0, "parts", 1, "index"), 0),
        (("tables", 0, "parts", 2, "bytes"), 451 * 16),
        (("tables", 0, "parts", 0, "checksum"), "md5:00"),
        (("tables", 0, "parts", 0, "file"), "ngram/part-00001.safetensors"),
        (("tables", 0, "parts", 0, "file"), "../ngram/part-00000.safetensors"),
        (("tables", 0, "parts", 0, "file"), "ngram/../ngram/part-00000.safetensors"),
        (("tables", 0, "parts", 0, "file"), "/etc/passwd"),
        (("tables", 0, "parts", 0, "file"), "memory://x/part-00000.safetensors"),
        (("tables", 0, "parts", 0, "file"), ""),
    ],
)
def test_what_cannot_be_is_refused_with_its_file(path: tuple[str | int, ...], value: object) -> None:
    content: Any = entry()
    target = content
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(StoreError, match=r"store/m/1/manifest\.json is not a manifest"):
        Manifest.from_json(json.dumps(content), "store/m/1/manifest.json")


@pytest.mark.parametrize("name", ["tiny", "LongCat-Flash-Lite", "v1.5_b", "7"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a@1", "a b", "a\n", "-x", "ü", "x" * 129])
def test_names_that_are_no_folder_names(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be a name"):
        check_name(name)
