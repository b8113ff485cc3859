"""Answers that stay as they are while the question does.

A decision asks about every version and every shard, and little changes from one decision to the next. Questions are
compared by value, so no answer is out of date. Where the same objects are asked about again, comparing takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Last(Generic[T]):
    """A pure function with its last answer. Nobody may change what it was given, or what it gave."""

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        self._known: tuple[tuple[Any, ...], T] | None = None

    def __call__(self, *question: Any) -> T:
        """The answer. It is worked out if this is not what was asked last."""
        known = self._known
        answer = known[1] if known and known[0] == question else self._function(*question)
        self._known = question, answer  # equal objects are let go for the new ones, which are likely to come again
        return answer


class LastOfEach(Generic[K, T]):
    """A pure function with its last answer for each of several things, as versions are. See `Last`."""

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        self._known: dict[K, Last[T]] = {}

    def __call__(self, questions: Mapping[K, tuple[Any, ...]]) -> dict[K, T]:
        """The answer for each thing. Those that are not asked about are forgotten."""
        known = {thing: self._known.get(thing) or Last(self._function) for thing in questions}
        self._known = known
        return {thing: known[thing](*question) for thing, question in questions.items()}
