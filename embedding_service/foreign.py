"""Text and values that others wrote (names, configs, messages of other processes), made fit for a line of output."""

from __future__ import annotations

import logging
import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlong = 40
_SHORT.maxlevel = 3


def printable(text: str) -> str:
    """The text with escapes for all that is no visible character or space. It stays one line, and moves no cursor."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def shown(value: object) -> str:
    """The repr of a value for an error, short and in one line."""
    return printable(_SHORT.repr(value))


def one_line(error: BaseException) -> str:
    """The message of another library's error, in one line."""
    return printable(" ".join(str(error).split()))


class LineFormatter(logging.Formatter):
    """Keeps any record on one line. Lines of a traceback after it are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See the base class."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        """See the base class."""
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).split("\n"))
