"""What a config may ask for. It is checked before anything is computed, because a config is somebody else's text.

The bounds are far above every published model, and low enough that a hasher is made within seconds.
"""

from __future__ import annotations

from operator import index

from embedding_service.errors import InvalidRequest
from embedding_service.foreign import shown

MOST_TOKENS = 1 << 31  # of a vocabulary
MOST_ROWS = 1 << 48  # of a table
MOST_ORDER = 64  # tokens of an n-gram
MOST_LAYERS = 1024  # with a table each
MOST_LAYER = 1 << 20  # a layer's id
MOST_HEADS = 4096  # of a table
MOST_HEADS_IN_ALL = 16_384
MOST_ENDS = 256  # ids that end a segment
MOST_IGNORED = 1 << 16  # ids that are no text
MOST_WORD = 1 << 63


def whole(key: str, value: object, most: int) -> int:
    """A whole number of at most `most`, up or down. Raises TypeError for anything else, InvalidRequest for a larger."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{key} must be a whole number, got {shown(value)}")
    number = index(value)  # type: ignore[arg-type]
    if not -most <= number <= most:
        raise InvalidRequest(f"{key} must be at most {most:,}, got {shown(number)}")
    return number


def wholes(key: str, value: object, most: int, count: int) -> list[int]:
    """At most `count` whole numbers. Raises as `whole` does."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{key} must be a list of whole numbers, got {shown(value)}")
    if len(value) > count:
        raise InvalidRequest(f"{key} may have at most {count:,} numbers, got {len(value):,}")
    return [whole(key, each, most) for each in value]


def check_heads(what: str, tables: int, heads: int) -> None:
    """Raise InvalidRequest for too many heads of a table, or of all tables. `what` names the keys."""
    if heads > MOST_HEADS or tables * heads > MOST_HEADS_IN_ALL:
        raise InvalidRequest(
            f"{what} ask for {tables:,} tables of {heads:,} heads: at most {MOST_HEADS:,} a table and "
            f"{MOST_HEADS_IN_ALL:,} in all"
        )
