"""Which prompts are run next, and which of them in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import DynamicCache

from model_worker.prefixes import BLOCK

if TYPE_CHECKING:
    from model_worker.engine import Request
    from model_worker.longcat_mtp import DraftRun


@dataclass(eq=False)
class PromptRun:
    """A request whose prompt is being run: the cache of its first `done` tokens. Its rows are of `tables`."""

    request: Request
    tables: str
    cache: DynamicCache
    done: int
    drafts: DraftRun | None = None
    """With a draft layer: what that has run."""

    @property
    def left(self) -> int:
        """Tokens that are still to be run."""
        return len(self.request.prompt) - self.done

    @property
    def is_whole(self) -> bool:
        """Whether it has been run to its end."""
        return not self.left


def next_pass(waiting: Iterable[PromptRun], room: int, cut: int, most: int) -> list[PromptRun]:
    """Choose prompts to be run together: the first one, and later ones that go with it.

    All are padded to the longest. So a pass has at most `room` places, and at most half of them are padding. The first
    one is cut to `cut` tokens. If it does not fit then, nothing is run. Of prompts that begin alike only one is begun,
    for the others may find what is kept of it. most: prompts in a pass.
    """
    chosen: list[PromptRun] = []
    longest, real = 0, 0
    begun: set[tuple[int, ...]] = set()
    for run in waiting:
        count = run.left if chosen else min(run.left, cut)
        widest = max(longest, count)
        places = widest * (len(chosen) + 1)
        beginning = () if run.done else tuple(run.request.prompt[:BLOCK])
        alike = len(beginning) == BLOCK and beginning in begun
        if places <= room and 2 * (real + count) >= places and not alike and len(chosen) < most:
            chosen.append(run)
            begun.add(beginning)
            longest, real = widest, real + count
        elif not chosen:
            break
    return chosen
