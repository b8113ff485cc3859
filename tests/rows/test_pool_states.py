"""The pool under any order of takes and returns, beside a list of what is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from embedding_service.rows.pool import Pool

BYTES = 96


class PoolStates(RuleBasedStateMachine):
    """A piece lies at the lowest place that suits it, overlaps no other, and is refused only where none suits."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(torch.zeros(BYTES, dtype=torch.uint8))
        self.taken: dict[int, int] = {}  # where to how many bytes

    @rule(nbytes=st.integers(1, 40), unit=st.sampled_from([1, 3, 4, 8, 16, 24]))
    def take(self, nbytes: int, unit: int) -> None:
        suiting = [place for place in range(0, BYTES - nbytes + 1, unit) if self._is_free(place, nbytes)]
        if suiting:
            assert self.pool.take(nbytes, unit) == suiting[0]
            self.taken[suiting[0]] = nbytes
            return
        free = BYTES - sum(self.taken.values())
        with pytest.raises(MemoryError, match=f"no {nbytes} bytes in one piece among {free} free of {BYTES}: raise"):
            self.pool.take(nbytes, unit)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(sorted(self.taken)))
        self.pool.give_back(place)
        self._mark(place, self.taken.pop(place), 0)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), value=st.integers(1, 255))
    def write(self, data: st.DataObject, value: int) -> None:
        place = data.draw(st.sampled_from(sorted(self.taken)))
        self._mark(place, self.taken[place], value)

    @invariant()
    def rows_of_any_width_are_the_memory(self) -> None:
        for row_bytes in (1, 6, 8, 12, 20, 96):
            rows = self.pool.rows(row_bytes)
            whole = BYTES // row_bytes
            assert torch.equal(
                rows.contiguous().view(torch.uint8).view(whole, row_bytes),
                self.pool.memory[: whole * row_bytes].view(whole, row_bytes),
            )

    def _is_free(self, place: int, nbytes: int) -> bool:
        return all(place + nbytes <= begin or begin + held <= place for begin, held in self.taken.items())

    def _mark(self, place: int, nbytes: int, value: int) -> None:
        self.pool.memory[place : place + nbytes] = value


TestPoolStates = PoolStates.TestCase
TestPoolStates.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
