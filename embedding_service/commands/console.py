"""Consoles of the commands. Text of others (names, messages, addresses) is shown as it is, and never obeyed."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from embedding_service.foreign import printable


class PlainConsole(Console):
    """A console that takes no markup, and shows control characters instead of sending them to the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """See the base class. Every string comes by here, those in a table too."""
        return super().render_str(printable(text), **options)


def wide_console(stderr: bool = False) -> PlainConsole:
    """A console that does not squeeze tables if there is no terminal to fit."""
    console = PlainConsole(stderr=stderr)
    return console if console.is_terminal else PlainConsole(stderr=stderr, width=140)
