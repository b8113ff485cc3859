"""Put the documentation's pages together for `mkdocs build`: `python docs/generate OUT` (`make docs`).

A page has one home: the texts at the root and in docs/, the code for the reference. They are copied with their links
pointed at one another. A link to a file of the repository that is no page becomes its name.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import reference

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Texts at the root, and what they are called on the site.
AT_ROOT = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
}
GENERATED: dict[str, Callable[[], str]] = {
    "reference/api.md": reference.api,
    "reference/cli.md": reference.commands,
    "reference/protos.md": reference.protos,
    "reference/metrics.md": reference.metrics,
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
# Fenced blocks, and blocks that are indented after an empty line.
_CODE = re.compile(r"(^```[\s\S]*?^```$|(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+)", re.MULTILINE)
_MERMAID = re.compile(r"^```mermaid\n[\s\S]*?^```$", re.MULTILINE)


def pages() -> dict[Path, str]:
    """Each text, and where it is on the site."""
    return {
        **{ROOT / name: page for name, page in AT_ROOT.items()},
        **{path: path.name for path in sorted(DOCS.glob("*.md"))},
    }


def assemble(out: Path) -> None:
    """Write all pages into a folder. What was there before is removed."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "reference").mkdir(parents=True)
    for text, page in pages().items():
        (out / page).write_text(rendered(text))
    for image in [*DOCS.glob("*.png"), *DOCS.glob("pictures/*.svg")]:
        place = out / image.relative_to(DOCS)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(image, place)
    for page, write in GENERATED.items():
        (out / page).write_text(write())


def rendered(text: Path) -> str:
    """A text as the site's Markdown wants it."""
    source = text.read_text()
    if text.name == "ARCHITECTURE.md":  # a viewer of mermaid would come from the internet
        source = _MERMAID.sub("![Processes, and what goes between them](docs/pictures/architecture.svg)", source)
    return "".join(
        _prose(text, piece) if number % 2 == 0 else piece for number, piece in enumerate(_CODE.split(source))
    )


def _prose(text: Path, piece: str) -> str:
    """A piece without code. What belongs to an item of a numbered list begins where GitHub wants it: too early here."""
    return _LINK.sub(lambda link: _pointed(text, link), re.sub(r"^   (?=\S)", "    ", piece, flags=re.MULTILINE))


def _pointed(text: Path, link: re.Match[str]) -> str:
    """A link of a text, as it is on the site."""
    image, name, target = link.groups()
    path, _, anchor = target.partition("#")
    if "://" in target or not path:
        return link.group()
    found = Path(os.path.normpath(text.parent / path))
    page = pages().get(found)
    if page is None and found.is_relative_to(DOCS) and found.suffix in (".svg", ".png"):
        page = str(found.relative_to(DOCS))
    if page is None:
        return name
    return f"{image}[{name}]({page}{'#' + anchor if anchor else ''})"


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
