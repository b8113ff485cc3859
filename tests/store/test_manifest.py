"""The manifest refuses what would send a row id to the wrong place."""

import json
from typing import Any

import pytest

from embedding_service.errors import InvalidRequest, NotFound, StoreError
from embedding_service.store import Manifest, manifest
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
    first = Manifest.from_json(json.dumps(entry()), "here")
    assert Manifest.from_json(first.to_json(), "there") == first
    assert first.bytes == first.table("ngram").bytes == 40_000
    with pytest.raises(NotFound, match="tiny@1 has no table 'words'; it has: ngram"):
        first.table("words")


def overlaid_entry() -> dict[str, Any]:
    """The next version, with one row over the last part and all rows of the first."""
    rows = {0: 1024, 2: 1}
    overlays = [
        {
            "part": part,
            "rows": count,
            "file": f"ngram/overlay-{part:05d}.safetensors",
            "bytes": count * 24,
            "checksum": "xxh3-128:" + "cd" * 16,
        }
        for part, count in rows.items()
    ]
    base = {"model": "tiny", "version": "1", "overlays": {"ngram": overlays}}
    return {**entry(), "format_version": 2, "version": "2", "base": base}


def test_json_of_a_version_with_a_base_and_back() -> None:
    second = Manifest.from_json(json.dumps(overlaid_entry()), "here")
    assert Manifest.from_json(second.to_json(), "there") == second
    assert (second.root, second.full_name) == (("tiny", "1"), "tiny@2")
    assert (second.replaced_rows, second.replaced_bytes) == (1025, 1025 * 24)
    assert set(second.overlays("ngram")) == {0, 2} and second.overlays("words") == {}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("part",), 1),
        (("part",), 3),
        (("rows",), 0),
        (("rows",), 2),
        (("bytes",), 25),
        (("file",), "ngram/overlay-00000.safetensors"),
    ],
    ids=str,
)
def test_an_overlay_that_does_not_fit_its_part_is_refused(path: tuple[str], value: Any) -> None:
    changed = overlaid_entry()
    changed["base"]["overlays"]["ngram"][1][path[0]] = value
    with pytest.raises(StoreError):
        Manifest.from_json(json.dumps(changed), "here")
    full = overlaid_entry()
    full["base"]["overlays"]["ngram"][0].update(rows=1025, bytes=1025 * 24)
    with pytest.raises(StoreError, match="an overlay of 1025 rows in part 0"):
        Manifest.from_json(json.dumps(full), "here")


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
        (("tables", 0, "parts", 1, "rows"), 1023),
        (("tables", 0, "parts", 0, "checksum"), "md5:00"),
        (("tables", 0, "parts", 0, "checksum"), "xxh3-128:" + "ab" * 17),
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


def test_what_is_refused_is_said_in_one_line_that_names_the_first_of_it() -> None:
    content = entry()
    content["tables"][0].update(rows=0, dim=(1 << 20) + 1, rows_per_part=0, row_bytes=0)
    with pytest.raises(StoreError) as refused:
        Manifest.from_json(json.dumps(content), "here")
    said = str(refused.value)
    assert all(f"tables.0.{name}: " in said for name in ("rows", "dim", "row_bytes"))
    assert "rows_per_part" not in said and "\n" not in said
    content = entry()
    content["tables"][0]["row_bytes"] = 17
    with pytest.raises(StoreError, match="int8 rows of 12 have 16 bytes, not 17"):
        Manifest.from_json(json.dumps(content), "here")
    content = entry()
    content["model"] = "a\nb"
    with pytest.raises(StoreError, match=r"here is not a manifest.*cannot be a name") as refused:
        Manifest.from_json(json.dumps(content), "here")
    assert "\n" not in str(refused.value)


def table_of(rows: int, rows_per_part: int, dim: int = 12, name: str = "ngram") -> dict[str, Any]:
    """A table of int8 rows, whole."""
    row_bytes = dim + 4
    parts = [
        {
            "index": index,
            "first_row": first,
            "rows": min(rows_per_part, rows - first),
            "file": f"{name}/part-{index:05d}.safetensors",
            "bytes": min(rows_per_part, rows - first) * row_bytes,
            "checksum": "xxh3-128:" + "ab" * 16,
        }
        for index, first in enumerate(range(0, rows, rows_per_part))
    ]
    sizes = {"rows": rows, "dim": dim, "row_bytes": row_bytes, "rows_per_part": rows_per_part}
    return {"name": name, "dtype": "int8", "parts": parts, **sizes}


def read(*tables: dict[str, Any]) -> Manifest:
    return Manifest.from_json(json.dumps({**entry(), "tables": tables}), "here")


def test_a_version_is_no_larger_than_all_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    most_dim = (1 << 20) - 4
    assert read(table_of(1, 1, dim=1 << 20)).tables[0].dim == 1 << 20
    with pytest.raises(StoreError, match="dim"):
        read(table_of(1, 1, dim=(1 << 20) + 1))
    with pytest.raises(StoreError, match="rows"):
        read(table_of((1 << 48) + 1, 1 << 48, dim=4))
    half = table_of(1 << 35, 1 << 35, dim=most_dim)
    assert read(half, table_of(1 << 35, 1 << 35, most_dim, "other")).bytes == 1 << 56
    with pytest.raises(StoreError, match="at most 72,057,594,037,927,936 bytes"):
        read(half, table_of(1 << 35, 1 << 35, most_dim, "other"), table_of(1, 1, name="third"))
    monkeypatch.setattr(manifest, "MOST_PARTS", 10)
    read(table_of(5, 1), table_of(5, 1, name="other"))
    with pytest.raises(StoreError, match="in 10 parts"):
        read(table_of(5, 1), table_of(6, 1, name="other"))
    with pytest.raises(StoreError, match="in 10 parts"):  # what is too much is not compared either
        read(*[table_of(1, 1)] * 11)


def test_tables_of_one_name_cannot_be_told_apart() -> None:
    with pytest.raises(StoreError, match="more than one table is named ngram"):
        read(table_of(5, 5), table_of(5, 5))


@pytest.mark.parametrize("name", ["tiny", "LongCat-Flash-Lite", "v1.5_b", "7"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a@1", "a b", "a\n", "-x", "ü", "x" * 129])
def test_names_that_are_no_folder_names(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be a name"):
        check_name(name)
