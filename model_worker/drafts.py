"""Guesses of a sequence's next tokens, which the model then checks in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

# How tokens are drafted. mtp: by the model's own draft layer. prompt: `PromptDrafts`.
Speculate = Literal["mtp", "prompt", "off"]

# Token sequences that are looked for, the longest first.
_LENGTHS = (4, 3, 2)


class PromptDrafts:
    """Guesses that a sequence goes on as it did when its last tokens came before (prompt look-up).

    tokens: the sequence so far.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        # What ended where: the place after the last time but one that these tokens came.
        self._after: dict[tuple[int, ...], int] = {}
        self._found: dict[int, int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The sequence has one more token."""
        self._tokens.append(token)
        end = len(self._tokens)
        self._found = {}
        for length in _LENGTHS:
            if length <= end:
                last = tuple(self._tokens[end - length :])
                if last in self._after:
                    self._found[length] = self._after[last]
                self._after[last] = end

    def guess(self, most: int) -> list[int]:
        """At most so many next tokens. None where nothing like the last tokens came before."""
        begin = next((self._found[length] for length in _LENGTHS if length in self._found), None)
        return [] if begin is None else self._tokens[begin : begin + most]


def same_width(drafts: list[list[int]]) -> list[list[int]]:
    """Drafts cut so that at most half of their places in a pass are padding: all are padded to the longest."""
    for most in range(max(map(len, drafts)), 0, -1):
        if 2 * sum(min(len(draft), most) for draft in drafts) >= most * len(drafts):
            return [draft[:most] for draft in drafts]
    return [[] for _ in drafts]
