"""Texts and comments stay plain, and what they point to is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.prose import reading_of

ROOT = Path(__file__).parent.parent
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md")])
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_architecture_is_plain() -> None:
    assert reading_of([ROOT / "ARCHITECTURE.md"]).is_plain


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
        functions = [
            node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
        ]
        assert name in {function.name for function in functions}, f"{path}::{name}"


def test_every_rule_names_its_test() -> None:
    _, rules = (ROOT / "ARCHITECTURE.md").read_text().split("\n## Rules of the protocol\n")
    numbered = re.split(r"\n(?=\d+\. )", re.sub(r"\n(?=###? )", "\n0. ", rules))
    missing = [rule for rule in numbered if re.match(r"[1-9]", rule) and not _TEST.search(rule)]
    assert not missing
