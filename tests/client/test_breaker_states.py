"""The breaker under any order of failures, answers and turns, beside what its rules say of each address."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from embedding_service.client.breaker import FIRST_REST, LONGEST_REST, Breaker

ADDRESSES = st.sampled_from("abc")


@dataclass
class Failing:
    failures: int
    avoided_until: float

    @property
    def rest(self) -> float:
        return float(min(FIRST_REST * 2 ** (self.failures - 1), LONGEST_REST))


class BreakerStates(RuleBasedStateMachine):
    """An address that failed is avoided for its rest, then offered to one caller for each further rest."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.breaker = Breaker(lambda: self.now)
        self.failing: dict[str, Failing] = {}
        self.offered: set[str] = set()  # to the caller that asked last

    @rule(quarters=st.integers(0, 40))
    def time_goes_by(self, quarters: int) -> None:
        self.now += quarters / 4

    @rule(address=ADDRESSES)
    def failed(self, address: str) -> None:
        self.breaker.failed(address)
        known = self.failing.get(address)
        self.failing[address] = failing = Failing(known.failures + 1 if known else 1, 0)
        failing.avoided_until = self.now + failing.rest

    @rule(address=ADDRESSES)
    def answered(self, address: str) -> None:
        self.breaker.answered(address)
        self.failing.pop(address, None)

    @rule()
    def a_caller_asks(self) -> None:
        due = {address for address, failing in self.failing.items() if failing.avoided_until <= self.now}
        assert self.breaker.resting() == (self.failing.keys() - due, due)
        for address in due:
            self.failing[address].avoided_until = self.now + self.failing[address].rest
        self.offered = due

    @rule()
    def it_has_no_use_for_them(self) -> None:
        self.breaker.untried(self.offered | {"never seen"})
        for address in self.offered & self.failing.keys():
            self.failing[address].avoided_until = self.now
        self.offered = set()

    @rule(kept=st.sets(ADDRESSES))
    def others_leave_the_routing(self, kept: set[str]) -> None:
        self.breaker.forget_others(kept)
        self.failing = {address: failing for address, failing in self.failing.items() if address in kept}


TestBreakerStates = BreakerStates.TestCase
TestBreakerStates.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
