"""Another owner is asked when a shard takes unusually long, within a budget. At a clock of its own: no timing here."""

import pytest
from support.shards import ROWS, Clock, Shards, fetch, lookups_of, routing

from embedding_service.client.breaker import LONGEST_REST, _Failing
from embedding_service.client.calls import Call
from embedding_service.client.patience import BURST, FIRST_SECONDS, FLOOR_SECONDS, LEARN, NEVER, SHARE, Patience
from embedding_service.client.router import ATTEMPT_TIMEOUT, Router
from embedding_service.placement.routing import Routing

COPIES = [[0, 1], [1, 2], [2, 0], [0, 1]]
USUAL = 0.001
# What the longest lookup may take where one owner of each of its rows lives.
GOAL = 0.3
NOBODY_FAILED = _Failing(0.0, 0.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def started(
    clock: Clock, owners: list[list[int]] = COPIES, hedge: bool = True, lookups: int = LEARN
) -> tuple[Router, Shards]:
    """A router that did some lookups of shards that answer in a millisecond."""
    shards = Shards(routing(owners))
    shards.pass_time, shards.seconds = clock.pass_time, USUAL
    router = Router(["h:0"], Routing(shards.now), hedge=hedge, clock=clock)
    for number in range(lookups):
        fetch(router, shards, [number % ROWS])
    shards.asked.clear()
    return router, shards


def seconds_of(router: Router, shards: Shards, clock: Clock, ids: list[int]) -> float:
    before = clock.now
    assert fetch(router, shards, ids)[:, 0].tolist() == ids
    return clock.now - before


@pytest.mark.slow
def test_a_shard_that_hangs_costs_no_lookup_its_whole_try(clock: Clock) -> None:
    """From its first lookup on to long after, while the breaker lets it be tried now and then."""
    router, shards = started(clock)
    shards.hanging = {"h:1"}
    longest, began = 0.0, clock.now
    while clock.now < began + 60:
        longest = max(longest, seconds_of(router, shards, clock, [5, 15, 25]))
        clock.pass_time(0.01)
    assert FLOOR_SECONDS < longest < 2 * FLOOR_SECONDS
    tried = [call for call in lookups_of(shards) if call.address == "h:1"]
    assert 5 < len(tried) < 15


def test_without_hedging_it_costs_the_try(clock: Clock) -> None:
    router, shards = started(clock, hedge=False)
    shards.hanging = {"h:1"}
    assert max(seconds_of(router, shards, clock, [5]) for _ in range(2)) > ATTEMPT_TIMEOUT


def test_shards_get_more_time_before_enough_was_measured(clock: Clock) -> None:
    router, shards = started(clock, lookups=0)
    shards.seconds = 4 * FLOOR_SECONDS
    for number in range(LEARN // 2):
        fetch(router, shards, [number])
    assert len(lookups_of(shards)) == LEARN // 2
    shards.hanging, shards.seconds = {"h:1"}, USUAL
    assert FLOOR_SECONDS < max(seconds_of(router, shards, clock, [5]) for _ in range(2)) < GOAL


def test_the_others_are_asked_at_once_and_for_those_rows_only(clock: Clock) -> None:
    router, shards = started(clock)
    shards.hanging = {"h:1"}
    while not any(call.address == "h:1" for call in shards.asked):
        shards.asked.clear()
        fetch(router, shards, [5, 25])
    again = shards.asked[[call.address for call in shards.asked].index("h:1") + 1 :]
    assert [call.address for call in again if call.shape and call.shape.count == 1][-1:] == ["h:0"]
    assert len(lookups_of(shards)) == len(shards.asked) == 3  # nobody was asked for a routing


@pytest.mark.parametrize("kind", ["dead", "hanging"])
def test_a_shard_that_came_back_and_still_rests_is_asked_for_one_that_hangs(clock: Clock, kind: str) -> None:
    """It was away for long, so it rests for seconds. The other owner hangs in just that time."""
    router, shards = started(clock, [[0, 1]] * 4)
    setattr(shards, kind, {"h:1"})
    while router._breaker.failing.get("h:1", NOBODY_FAILED).rest < LONGEST_REST:
        fetch(router, shards, [5])
        clock.pass_time(0.1)
    setattr(shards, kind, set())
    shards.hanging = {"h:0"}
    assert seconds_of(router, shards, clock, [5]) < GOAL
    shards.hanging = {"h:1"}  # while both are remembered as failing
    assert seconds_of(router, shards, clock, [5]) < GOAL


@pytest.mark.parametrize("kind", ["dead", "hanging"])
def test_a_shard_that_failed_a_lookup_is_asked_by_it_again(clock: Clock, kind: str) -> None:
    """Both owners fail one lookup: one for a moment only, for it is there again and not all know it."""
    router, shards = started(clock, [[0, 1]] * 4)
    shards.hanging = {"h:0"}
    while not asked(shards, "h:0"):
        fetch(router, shards, [5])
    answer = shards.answer

    def for_a_moment(call: Call) -> object:
        setattr(shards, kind, set() if asked(shards, "h:1") else {"h:1"})
        shards.hanging |= {"h:0"}
        return answer(call)

    shards.answer = for_a_moment  # type: ignore[method-assign]
    shards.asked.clear()
    assert seconds_of(router, shards, clock, [5]) < GOAL + FLOOR_SECONDS
    assert asked(shards, "h:1") == 2


def asked(shards: Shards, address: str) -> int:
    return [call.address for call in lookups_of(shards)].count(address)


def test_a_lookup_that_was_sent_away_waits_for_no_shard_that_hangs(clock: Clock) -> None:
    """Others have answered that there is no newer routing, so the last one that is asked is not waited for."""
    router, shards = started(clock, [[0, 1], [1, 2], [0, 1], [0, 1]])
    shards.hanging = {"h:2"}
    while not asked(shards, "h:2"):
        fetch(router, shards, [15])
    shards.now = routing([[1]] * 4)  # of the same age: shard 0 was started again, and has no rows yet
    shards.asked.clear()
    longest = max(seconds_of(router, shards, clock, [5]) for _ in range(40))
    assert "h:2" in {call.address for call in shards.asked}
    assert longest < GOAL


def test_a_near_shard_that_hangs_is_not_waited_for_to_give_its_routing(clock: Clock) -> None:
    router, shards = started(clock)
    shards.hanging = {"h:1"}
    before = clock.now
    shards.run(router.learn_from("b", clock.now + 60))
    assert clock.now - before < GOAL


def test_owners_that_all_hang_cost_a_whole_try(clock: Clock) -> None:
    """Nobody can answer then, until one goes on."""
    router, shards = started(clock, [[0, 1]] * 4)
    shards.hanging = {"h:0", "h:1"}
    began, goes_on = clock.now, clock.now + 1.0

    def pass_time(seconds: float) -> None:
        clock.pass_time(seconds)
        if clock.now >= goes_on:
            shards.hanging = {"h:0"}

    shards.pass_time = pass_time
    fetch(router, shards, [5])
    assert {"h:0", "h:1"} == {call.address for call in lookups_of(shards)[:2]}
    assert clock.now - began < ATTEMPT_TIMEOUT + 2 * GOAL


def test_a_slow_shard_whose_other_owner_is_dead_gets_its_time(clock: Clock) -> None:
    router, shards = started(clock, [[0, 1]] * 4)
    shards.dead = {"h:1"}
    for _ in range(2):
        fetch(router, shards, [5])
    shards.seconds = 10 * FLOOR_SECONDS
    assert shards.seconds < seconds_of(router, shards, clock, [5]) < 2 * shards.seconds


@pytest.mark.parametrize(("owners", "hedged"), [([[0, 1]] * 4, False), ([[0, 2, 1]] * 4, True)])
def test_n8_a_slow_shard_is_hedged_in_its_own_zone_only(clock: Clock, owners: list[list[int]], hedged: bool) -> None:
    """Shards 0 and 2 are in zone a, 1 is in zone b."""
    message = routing(owners)
    for index, shard in enumerate(message.shards):
        shard.topology = "ab"[index % 2]
    shards = Shards(message)
    shards.pass_time, shards.seconds = clock.pass_time, USUAL
    router = Router(["h:0"], Routing(message), topology="a", clock=clock)
    for number in range(LEARN):
        fetch(router, shards, [number % ROWS])
    shards.asked.clear()
    shards.seconds = 10 * FLOOR_SECONDS
    fetch(router, shards, [5])
    assert {call.address for call in lookups_of(shards)} == ({"h:0", "h:2"} if hedged else {"h:0"})


def test_many_bytes_may_take_longer(clock: Clock) -> None:
    router, shards = started(clock)
    fetch(router, shards, [5])
    fetch(router, shards, list(range(ROWS)))
    few, *_, many = [call.timeout for call in lookups_of(shards)]
    assert few < many


@pytest.mark.parametrize("ids", [[5], [5, 15, 25]])
def test_a_storm_is_bounded_by_the_budget(clock: Clock, ids: list[int]) -> None:
    """Answers are fast and slow by turns, so that waiting long is always unusual."""
    router, shards = started(clock)
    rounds = 3000
    for number in range(rounds):
        shards.seconds = 3 * FLOOR_SECONDS if number % 8 == 0 else USUAL
        fetch(router, shards, ids)
        clock.pass_time(1.0)  # addresses that rested are due again
    needed = rounds * len(ids)
    extra = len(lookups_of(shards)) - needed
    assert 0 < extra <= SHARE * rounds + BURST + len(ids)


def test_a_service_that_became_slow_as_a_whole_is_not_asked_twice_for_ever(clock: Clock) -> None:
    router, shards = started(clock)
    shards.seconds = 4 * FLOOR_SECONDS
    for _ in range(600):
        fetch(router, shards, [5])
        clock.pass_time(1.0)
    shards.asked.clear()
    for _ in range(100):
        fetch(router, shards, [5])
        clock.pass_time(1.0)
    assert len(lookups_of(shards)) == 100


def test_the_budget_ends_and_comes_back() -> None:
    patience = Patience()
    assert patience.seconds == FIRST_SECONDS
    patience.took = [USUAL] * LEARN
    patience.learn()
    assert patience.seconds == patience.usual == FLOOR_SECONDS
    patience.spend(int(BURST), FLOOR_SECONDS)
    assert patience.seconds == NEVER
    assert patience.usual == FLOOR_SECONDS
    patience.took = [USUAL] * LEARN
    patience.learn()
    assert patience.seconds == FLOOR_SECONDS
