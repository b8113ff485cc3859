"""Measures how hard a text is to read, by the words of its sentences.

`python -m support.prose FILE...`, in tests/, prints a line for each file and its sentences that are too long.

Of Markdown all running text counts, but no code, table or heading. Of Python its docstrings and comments count.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Words of the median sentence, and of nine in ten, at most.
MEDIAN, NINE_IN_TEN = 15, 26
_LINK = re.compile(r"!?\[((?:[^][]|\[[^]]*\])*)\]\([^)]*\)")
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Reading(NamedTuple):
    """Sentences, and their words: in the median one, and in nine of ten at most."""

    sentences: list[str]
    median: float
    nine_in_ten: int

    @property
    def is_plain(self) -> bool:
        """Whether people can read it once."""
        return self.median <= MEDIAN and self.nine_in_ten <= NINE_IN_TEN


def reading_of(paths: Iterable[Path]) -> Reading:
    """The files as one text."""
    sentences = [sentence for path in paths for paragraph in _paragraphs(path) for sentence in _sentences(paragraph)]
    words = sorted(len(sentence.split()) for sentence in sentences) or [0]
    return Reading(sentences, statistics.median(words), words[int(0.9 * (len(words) - 1))])


def _sentences(paragraph: str) -> Iterator[str]:
    """Those of more than two words."""
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
        if len(sentence.split()) > 2:
            yield sentence


def _paragraphs(path: Path) -> Iterator[str]:
    return _of_python(path.read_text()) if path.suffix == ".py" else _of_markdown(path.read_text())


def _of_markdown(text: str) -> Iterator[str]:
    """Paragraphs and list items. A line that names a rule's test is no prose."""
    paragraph: list[str] = []
    code = False
    for line in [*re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).splitlines(), ""]:
        blank = not line.strip()
        code = (not paragraph and line.startswith("    ")) or (code and blank)
        skipped = code or line.startswith(("#", "<", "![")) or line.strip().startswith(("|", "Test: ["))
        if blank or _ITEM.match(line) or skipped:
            if paragraph:
                yield " ".join(paragraph)
            paragraph = []
        if not blank and not skipped:
            paragraph.append(_LINK.sub(r"\1", _ITEM.sub("", line).strip()))


def _of_python(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, _DOCUMENTED):
            yield from re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    comment: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comment.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.INDENT) and comment:
            yield " ".join(comment)
            comment = []


def main(names: list[str]) -> None:
    """Print each file's reading, and its sentences that are too long."""
    for path in map(Path, names):
        reading = reading_of([path])
        words = f"median {reading.median:g} words, 9 of 10 at most {reading.nine_in_ten}"
        print(f"{path}: {len(reading.sentences)} sentences, {words}")
        for sentence in reading.sentences:
            if len(sentence.split()) > NINE_IN_TEN:
                print(f"    {len(sentence.split())}: {sentence}")


if __name__ == "__main__":
    main(sys.argv[1:])
