"""The pictures of the documentation, as SVG: `python docs/generate/pictures.py` writes docs/pictures/."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
INK, PAPER, PALE, STRONG = "#263238", "#ffffff", "#e3f2fd", "#1565c0"
LINE = 18


@dataclass
class Picture:
    """Boxes and arrows on paper of their own, so that they can be read on a dark page too."""

    title: str
    width: int
    height: int
    shapes: list[str] = field(default_factory=list)

    def box(self, left: int, top: int, width: int, height: int, text: str, fill: str = PALE) -> None:
        """A box with lines of text in its middle. The first one is bold."""
        place = f'x="{left}" y="{top}" width="{width}" height="{height}"'
        self.shapes.append(f'<rect {place} rx="8" fill="{fill}" stroke="{STRONG}" stroke-width="1.5"/>')
        lines = text.split("\n")
        first = top + height / 2 - LINE * (len(lines) - 1) / 2 + 5
        for number, line in enumerate(lines):
            self.text(left + width / 2, first + number * LINE, line, bold=number == 0)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", *, bold: bool = False) -> None:
        """One line of text."""
        look = f'font-weight="{"bold" if bold else "normal"}" font-size="{14 if bold else 13}"'
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.shapes.append(f'<text {place} fill="{INK}" {look}>{escape(text)}</text>')

    def arrow(self, x: int, y: int, to_x: int, to_y: int, text: str = "", *, beside: bool = False) -> None:
        """A straight arrow with a text over its middle, or beside it."""
        ends = f'x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}"'
        self.shapes.append(f'<line {ends} stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>')
        if text and beside:
            self.text((x + to_x) / 2 + 8, (y + to_y) / 2 + 5, text, "start")
        elif text:
            self.text((x + to_x) / 2, (y + to_y) / 2 - 7, text)

    def svg(self) -> str:
        """The file's text."""
        size = f'width="{self.width}" height="{self.height}"'
        head = '<path d="M0 0 L8 4 L0 8 z" fill="#263238"/>'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" {size} role="img"',
                f'  aria-label="{escape(self.title)}" font-family="system-ui, sans-serif">',
                f"<title>{escape(self.title)}</title>",
                '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="8" refY="4" orient="auto">',
                f"{head}</marker></defs>",
                f'<rect {size} rx="10" fill="{PAPER}"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def architecture() -> Picture:
    """Processes, and what goes between them."""
    picture = Picture("A store's parts go to shards, which workers and other clients ask for rows", 860, 400)
    picture.box(20, 40, 150, 60, "checkpoint\nof Hugging Face", PAPER)
    picture.arrow(170, 70, 290, 70, "import")
    picture.box(290, 30, 190, 80, "store\nmanifests and parts,\na folder or a bucket")
    picture.arrow(480, 70, 640, 70, "manifests")
    picture.box(640, 30, 200, 80, "controller\nplans with TorchRec,\npublishes the routing")
    picture.arrow(385, 110, 385, 190, "parts", beside=True)
    picture.arrow(700, 110, 560, 195)
    picture.text(660, 162, "what to hold, the routing", "start")
    picture.arrow(530, 190, 660, 112)
    picture.text(555, 136, "what they hold", "end")
    for number in (3, 2, 1):
        picture.box(280 + 12 * number, 190 + 8 * number, 260, 70, "shards\nrows in memory, FBGEMM's kernels")
    picture.arrow(130, 232, 292, 232, "Lookup")
    picture.box(20, 195, 110, 74, "workers\nthe model,\nno tables", PALE)
    picture.arrow(75, 340, 75, 269, "HTTP", beside=True)
    picture.box(20, 340, 110, 44, "users", PAPER)
    picture.arrow(430, 340, 430, 284, "Lookup", beside=True)
    picture.box(310, 340, 240, 44, "clients in any language", PAPER)
    picture.arrow(640, 340, 578, 270)
    picture.text(622, 300, "read in place", "start")
    picture.box(600, 340, 240, 44, "clients beside a shard", PAPER)
    return picture


def lookup() -> Picture:
    """A lookup's way, step by step."""
    picture = Picture("Tokens are hashed to ids, ids are asked of the shards that own them, rows come back", 860, 275)
    steps = (
        ("1. hash", "tokens to row ids\n[B, S, L, H]"),
        ("2. dedupe", "each different id\nonce"),
        ("3. route", "id // rows_per_part:\none request an owner"),
    )
    for number, (name, text) in enumerate(steps):
        picture.box(20 + 200 * number, 50, 160, 74, f"{name}\n{text}")
        picture.arrow(180 + 200 * number, 87, 220 + 200 * number, 87)
    picture.text(300, 30, "client")
    picture.text(735, 30, "shards, in parallel")
    picture.box(620, 50, 220, 74, "4. check\nmodel, table, size, every id,\nbefore any work", PAPER)
    picture.arrow(730, 124, 730, 180)
    picture.box(620, 180, 220, 74, "5. gather\nrows into the answer,\nas they are stored", PAPER)
    picture.arrow(620, 217, 580, 217)
    picture.box(420, 180, 160, 74, "6. decode\neach answer\nas it comes")
    picture.arrow(420, 217, 300, 217, "in its place")
    picture.box(100, 180, 200, 74, "float32 rows\n[B, S, L, H, dim]", PAPER)
    return picture


PICTURES = {"architecture": architecture, "lookup": lookup}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())
