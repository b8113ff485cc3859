"""Texts, docstrings and comments stay plain, and what texts point to is there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from support.prose import Reading, reading_of

ROOT = Path(__file__).parent.parent
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md")])
ROOMS = [
    *sorted(path.parent for path in ROOT.glob("embedding_service/*/__init__.py")),
    *(ROOT / name for name in ("model_worker", "benchmarks", "docs", "examples", "protos")),
    pytest.param(ROOT / "tests", marks=pytest.mark.slow),
]
# Words that send a reader back to the sentence's beginning.
_HARD = re.compile(r"\b(so many|anew|shall|whoever|meanwhile)\b", re.IGNORECASE)
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def check_plain(reading: Reading) -> None:
    longest = "\n".join(sorted(reading.sentences, key=lambda sentence: -len(sentence.split()))[:5])
    words = f"median {reading.median:g} words, 9 of 10 at most {reading.nine_in_ten}"
    assert reading.is_plain, f"{words}; the longest sentences:\n{longest}"
    assert not [sentence for sentence in reading.sentences if sentence.count("; ") > 2]


@pytest.mark.parametrize("text", TEXTS, ids=named)
def test_a_text_is_plain(text: Path) -> None:
    reading = reading_of([text])
    check_plain(reading)
    assert not [sentence for sentence in reading.sentences if _HARD.search(sentence)]


@pytest.mark.parametrize("room", ROOMS, ids=named)
def test_docstrings_and_comments_are_plain(room: Path) -> None:
    check_plain(reading_of(path for path in room.rglob("*.py") if "_pb2" not in path.name))


def test_docstrings_and_comments_of_single_files_are_plain() -> None:
    check_plain(reading_of(ROOT.glob("embedding_service/*.py")))


@pytest.mark.parametrize("text", TEXTS, ids=named)
def test_what_a_text_links_to_is_there(text: Path) -> None:
    for target, anchor in _LINK.findall(text.read_text()):
        if "://" in target:
            continue
        file = text.parent / target if target else text
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def anchors(text: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS, ids=named)
def test_the_tests_that_a_text_names_are_there(text: Path) -> None:
    for path, name in _TEST.findall(text.read_text()):
        assert name in functions_of(path), f"{path}::{name}"


@cache
def functions_of(path: str) -> set[str]:
    """The names of a file's functions and methods."""
    return set(re.findall(r"^ *(?:async )?def (\w+)", (ROOT / path).read_text(), re.M))


def test_every_rule_names_its_test() -> None:
    _, rules = (ROOT / "ARCHITECTURE.md").read_text().split("\n## Rules of the protocol\n")
    numbered = re.split(r"\n(?=\d+\. )", re.sub(r"\n(?=###? )", "\n0. ", rules))
    missing = [rule for rule in numbered if re.match(r"[1-9]", rule) and not _TEST.search(rule)]
    assert not missing
