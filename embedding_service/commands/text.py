"""Lines, sizes and addresses as people write and read them."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any

import typer

from embedding_service.foreign import printable, shown
from embedding_service.machine import split_address

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def say_json(answer: dict[str, Any]) -> None:
    """Write one JSON object, in a line. Its escapes keep text of others harmless. NaN and infinities become null."""
    typer.echo(json.dumps(_finite(answer), allow_nan=False))


def _finite(value: Any) -> Any:
    """The value with null for each number that JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def say(text: str, err: bool = False) -> None:
    """Write a line that may hold text of others."""
    typer.echo(printable(text), err=err)


def check_address(address: str | None) -> str | None:
    """Check a HOST:PORT for typer. Raises InvalidRequest."""
    if address is not None:
        split_address(address)
    return address


def parse_bytes(text: str) -> int:
    """Read "256MiB", "4 GB", "1.5G" (an i or no B makes it binary) or "4096". Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b?))?", text.strip().lower())
    if not match:
        raise typer.BadParameter(f"{text!r} is no size: write 256MiB, 4GB or a number of bytes")
    number, prefix, suffix = match.groups()
    base = 1000 if suffix == "b" else 1024
    size = float(number) * base ** ("kmgt".index(prefix) + 1 if prefix else 0)
    if math.isinf(size):
        raise typer.BadParameter(f"{shown(text)} is too large")
    return int(size)


def format_bytes(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
