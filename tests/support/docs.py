"""The code in texts: blocks that are fenced or indented, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TEXTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
_FENCED = re.compile(r"^```(\w*)\n([\s\S]*?)^```$", re.MULTILINE)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)")
# Two spaces before it tell a remark from an argument.
_REMARK = re.compile(r" {2,}(#|[a-z]).*$")
PROGRAMS = ("embedding-service", "model-worker", "make", "kubectl", "python")


class Block(NamedTuple):
    """Code of a text. An indented block has the language "sh"."""

    language: str
    code: str


def blocks(text: Path) -> list[Block]:
    """All blocks of a text, in order."""
    source = text.read_text()
    fenced = [(each.start(), Block(each[1], each[2])) for each in _FENCED.finditer(source)]
    # What is indented in a fenced block is a part of it.
    rest = _FENCED.sub(lambda each: re.sub(r"[^\n]+|^$", "x", each[0], flags=re.MULTILINE), source)
    indented = [(each.start(), Block("sh", re.sub(r"(?m)^ {4}", "", each[1]))) for each in _INDENTED.finditer(rest)]
    return [block for _, block in sorted([*fenced, *[each for each in indented if each[1].code.strip()]])]


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command that is one of ours or has a path of ours. "..." and what follows is left out."""
    for line in code.replace("\\\n", " ").split("\n"):
        if line.startswith(PROGRAMS):
            try:
                words = shlex.split(_REMARK.sub("", line), comments=True)
            except ValueError:  # a text in quotes goes on in the next line
                words = line.split()
            yield words[: words.index("...")] if "..." in words else words
