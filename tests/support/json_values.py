"""JSON that is a document of ours, or nearly so, for hypothesis to draw."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from support.wire_bytes import ALIKE

JUNK: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ODD_NAMES = ("", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "\n", "\x1b[31m", "m", "é", "a" * 200)
ODD_NUMBERS = (0, -1, 1, 2**31, 2**48, 2**63, 2**64, 10**30, 0.5, 1e308, math.inf, math.nan, True)
NAMES, NUMBERS = st.sampled_from(ODD_NAMES), st.sampled_from(ODD_NUMBERS)
VALUES = JUNK | NAMES | NUMBERS | st.integers(-3, 3000)
SOME: tuple[Any, ...] = (*ODD_NAMES, *ODD_NUMBERS, None, [], {}, [0], {"": 0}, 1.0, 2, 3, 4, 16)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within an object."""
    if here:
        yield here
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from places(child, (*here, name))


def change(found: Any, choose: Callable[[Sequence[Any]], Any], other: Callable[[], Any]) -> None:
    """Let a value within an object be another one, or gone, or there twice."""
    if not (ways := list(places(found))):
        return
    *way, last = choose(ways)
    parent = found
    for each in way:
        parent = parent[each]
    match choose(["other", "other", "gone", "more"]):
        case "other":
            parent[last] = copy.deepcopy(other())  # it may be changed next
        case "gone":
            del parent[last]
        case "more" if isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        case "more":
            parent[f"{last}s"] = copy.deepcopy(parent[last])


@st.composite
def changed(draw: st.DrawFn, *originals: dict[str, Any]) -> Any:
    """An object with a few values that are others, or gone, or there twice."""
    found = json.loads(json.dumps(draw(st.sampled_from(originals))))
    for _ in range(draw(st.integers(0, 3))):
        change(found, lambda some: draw(st.sampled_from(some)), lambda: draw(VALUES))
    return found


def alike(document: Any) -> Iterator[Any]:
    """An object, and ALIKE - 1 others that differ from it in a value or two. The same ones each time."""
    yield document
    text = json.dumps(document)
    chance = random.Random(text)
    for _ in range(ALIKE - 1):
        found = json.loads(text)
        for _ in range(chance.choice((1, 1, 2))):
            change(found, chance.choice, lambda: chance.choice((*SOME, chance.randrange(3000))))
        yield found
