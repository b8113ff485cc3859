"""Addresses that failed are left alone for a while, then tried by one caller at a time."""

from embedding_service.client.breaker import FIRST_REST, Breaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_failed_address_rests_and_is_then_tried_by_one_caller() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    assert breaker.resting() == (set(), set())
    breaker.failed("a")
    assert breaker.resting() == ({"a"}, set())
    clock.now += FIRST_REST
    assert breaker.resting() == (set(), {"a"})  # this caller tries it
    assert breaker.resting() == ({"a"}, set())  # the others go on avoiding it
    breaker.answered("a")
    assert breaker.resting() == (set(), set())


def test_a_turn_to_try_that_was_not_taken_is_the_next_caller_s() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed("a")
    clock.now += FIRST_REST
    assert breaker.resting() == (set(), {"a"})
    breaker.untried({"a", "never failed"})
    assert breaker.resting() == (set(), {"a"})
    assert breaker.resting() == ({"a"}, set())


def test_addresses_not_in_use_any_more_are_forgotten() -> None:
    breaker = Breaker(Clock())
    breaker.failed("a")
    breaker.failed("b")
    breaker.forget_others(["b", "c"])
    assert breaker.resting() == ({"b"}, set())


def test_rests_double_up_to_a_bound() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    rests = []
    for _ in range(8):
        breaker.failed("a")
        began = clock.now
        while "a" in breaker.resting()[0]:
            clock.now += FIRST_REST / 2
        rests.append(clock.now - began)
    assert rests == [0.5, 1, 2, 4, 8, 8, 8, 8]


def test_addresses_do_not_share_their_fate() -> None:
    breaker = Breaker(Clock())
    breaker.failed("a")
    breaker.failed("b")
    breaker.answered("b")
    assert breaker.resting() == ({"a"}, set())
