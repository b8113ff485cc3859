"""The client's half of the protocol: what it asks next, given what it was answered. No I/O: every turn can be had."""

import random
from typing import Any

import grpc
import numpy as np
import pytest
from support.shards import GONE, IDS, LATE, ROWS, Clock, Shards, fetch, lookups_of, routing

from embedding_service import errors
from embedding_service.client import owners
from embedding_service.client.breaker import FIRST_REST
from embedding_service.client.calls import Call, Failure
from embedding_service.client.router import (
    ATTEMPT_TIMEOUT,
    LOOK_SECONDS,
    ROUTING_PATIENCE,
    ROUTING_TIMEOUT,
    START_OVER_SECONDS,
    Router,
)
from embedding_service.client.wants import StoredRows, Want
from embedding_service.placement.routing import Model, Routing
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import Answer, EncodedLookup


def test_each_owner_is_asked_once_for_its_rows() -> None:
    shards = Shards(routing([[0], [1], [2], [0]]))
    assert fetch(Router(["h:0"]), shards, IDS)[:, 0].tolist() == IDS
    assert sorted(call.address for call in lookups_of(shards)) == ["h:0", "h:1", "h:2"]


def test_requests_are_cut_to_the_limit() -> None:
    shards = Shards(routing([[0]] * 4, response_bytes=16))
    assert fetch(Router(["h:0"]), shards, list(range(ROWS)))[:, 0].tolist() == list(range(ROWS))
    sizes = {len(wire.LookupRequest.FromString(call.request.message()).ids_uint32) for call in lookups_of(shards)}
    assert sizes == {8}


def test_requests_are_cut_to_the_limit_of_their_ids() -> None:
    shards = Shards(routing([[0]] * 4, request_bytes=3 * 8))
    assert fetch(Router(["h:0"]), shards, list(range(ROWS)))[:, 0].tolist() == list(range(ROWS))
    sizes = {len(wire.LookupRequest.FromString(call.request.message()).ids_uint32) // 4 for call in lookups_of(shards)}
    assert max(sizes) == 3


def test_many_rows_are_asked_in_pieces_and_only_those_that_failed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Once(Shards):
        def answer(self, call: Call) -> Any:
            answer = super().answer(call)
            return GONE if isinstance(answer, Answer) and len(lookups_of(self)) == 2 else answer

    monkeypatch.setattr(owners, "PIECE_BYTES", 5 * 8)
    shards = Once(routing([[0]] * 4))
    assert fetch(Router(["h:0"]), shards, list(range(13)), decodes=True)[:, 0].tolist() == list(range(13))
    asked = [wire.LookupRequest.FromString(call.request.message()).ids_uint32 for call in lookups_of(shards)]
    assert [np.frombuffer(ids, "<u4").tolist() for ids in asked] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, 10, 11, 12],
        [5, 6, 7, 8],
    ]


def test_a_redirect_is_followed_with_the_newer_routing() -> None:
    router = Router(["h:0"], Routing(routing([[0], [0], [0], [0]])))
    shards = Shards(routing([[0], [1], [1], [2]], epoch=2))
    assert fetch(router, shards, IDS)[:, 0].tolist() == IDS
    assert router.current is not None
    assert router.current.age == (1, 2)


def test_rows_that_several_shards_sent_away_are_found_each_in_its_place() -> None:
    chance = np.random.default_rng(0)
    for _ in range(200):
        before, after = chance.integers(0, 3, (2, 4, 1)).tolist()
        router = Router(["h:0"], Routing(routing(before)))
        ids = chance.permutation(ROWS)[: chance.integers(1, 12)].tolist()
        assert fetch(router, Shards(routing(after, epoch=2)), ids)[:, 0].tolist() == ids, (before, after, ids)


def test_an_owner_that_came_back_without_its_rows_is_asked_after_one_that_was_late() -> None:
    """No controller is there to say so: the routing stays."""

    class LateOnce(Shards):
        def answer(self, call: Call) -> Any:
            outcome = super().answer(call)
            if outcome is LATE:
                self.hanging.clear()
            return outcome

    for first in range(4):
        clock = Clock()
        router, shards = Router(["h:0"], Routing(routing([[0, 1]] * 4)), clock=clock), LateOnce(routing([[0]] * 4))
        shards.pass_time, shards.hanging = clock.pass_time, {"h:0"}
        for _ in range(first):
            next(router._turn)
        assert fetch(router, shards, [7])[:, 0].tolist() == [7]
        assert [call.address for call in lookups_of(shards)].count("h:1") <= 2


def test_an_older_routing_is_never_adopted() -> None:
    router = Router(["h:0"], Routing(routing([[0]] * 4, epoch=5)))
    router.adopt(Routing(routing([[1]] * 4, epoch=4)))
    assert router.current is not None
    assert router.current.age == (1, 5)


def test_a_routing_of_the_same_age_is_not_taken() -> None:
    """Nor is what was learnt of its shards forgotten: every adoption does that for those it does not name."""
    first = Routing(routing([[0]] * 4, epoch=5))
    router = Router(["h:0"], first)
    router.adopt(Routing(routing([[1]] * 4, epoch=5)))
    assert router.current is first


def timeouts_of(replicas: list[int], seconds: float, clock: Clock) -> list[float]:
    """Of the calls of one lookup whose shards all hang, without hedging."""
    shards = Shards(routing([replicas] * 4))
    shards.hanging, shards.pass_time = {f"h:{shard}" for shard in replicas}, clock.pass_time
    router = Router(["h:2"], Routing(shards.now), hedge=False, clock=clock)
    with pytest.raises(errors.DeadlineExceeded):
        fetch(router, shards, [5], seconds=seconds)
    return [call.timeout for call in lookups_of(shards)]


def test_a_shard_that_hangs_is_given_up_early_where_others_hold_the_rows(clock: Clock) -> None:
    timeouts = timeouts_of([0, 1], 60, clock)
    doubling = [ATTEMPT_TIMEOUT * 2**attempt for attempt in range(len(timeouts))]
    assert timeouts[:-1] == doubling[:-1]
    assert timeouts[-1] <= doubling[-1]


def test_a_shard_that_is_alone_gets_half_of_the_time_that_is_left(clock: Clock) -> None:
    first, second, third, last = timeouts_of([0], 60, clock)
    assert first == pytest.approx(30, abs=0.1)
    assert second == pytest.approx(15, abs=0.1)
    assert third == 4 * ATTEMPT_TIMEOUT  # never less than where there are others
    assert last == pytest.approx(7, abs=0.1)  # all of it
    assert timeouts_of([0], 3, clock)[0] == ATTEMPT_TIMEOUT


class NoSpread(random.Random):
    """The middle of all that it may be."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def test_waits_between_tries_double_from_10_ms_to_half_a_second(clock: Clock) -> None:
    waits: list[float] = []

    def pass_time(seconds: float) -> None:
        clock.pass_time(seconds)
        waits.append(seconds)

    shards = Shards(routing([[0, 1]] * 4))
    shards.dead, shards.pass_time = {"h:0", "h:1", "h:2"}, pass_time
    with pytest.raises(errors.Unavailable):
        fetch(Router(["h:2"], Routing(shards.now), clock=clock, chance=NoSpread(1)), shards, [5], seconds=5)
    assert waits[:6] == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.32])
    assert len(waits) > 10 and set(waits[6:]) == {0.5}
    waits.clear()
    with pytest.raises(errors.Unavailable):
        fetch(Router(["h:2"], Routing(shards.now), clock=clock), shards, [5], seconds=10)
    assert all(0.25 <= wait <= 0.75 for wait in waits[6:]) and len(set(waits[6:])) > 10


def test_no_call_outlives_its_deadline(clock: Clock) -> None:
    for replicas in ([0], [0, 1]):
        began = clock.now
        timeouts_of(replicas, 3, clock)
        assert clock.now - began == pytest.approx(3, abs=0.2)


def test_a_few_are_asked_for_a_newer_routing_and_not_always_who_sends_away() -> None:
    old = routing([[0]] * 4)
    asked_after_a_flip, asked_in_vain = [], []
    for _ in range(200):
        router = Router(["h:2"], Routing(old))
        shards = Shards(routing([[1]] * 4, epoch=2))
        fetch(router, shards, [5])
        [asked] = [call for call in shards.asked if isinstance(call.request, wire.GetRoutingRequest)]
        # A routing that is no newer need not be sent.
        assert (asked.request.term, asked.request.epoch) == (1, 1)  # type: ignore[union-attr]
        asked_after_a_flip.append(asked.address)
        shards = Shards(old)
        router = Router(["h:2"], Routing(old))
        shards.run(router._refresh(["h:0", "h:1"], router._clock() + 60, set()))
        asked_in_vain.append(len(shards.asked))
    assert all(asked_after_a_flip.count(f"h:{index}") > 20 for index in range(3))
    assert max(asked_in_vain) <= 4


def test_a_shard_that_hangs_keeps_nobody_from_a_newer_routing(clock: Clock) -> None:
    for _ in range(50):
        router = Router(["h:0"], Routing(routing([[0]] * 4)), clock=clock)
        shards = Shards(routing([[1], [2], [2], [1]], epoch=2))
        shards.hanging, shards.pass_time = {"h:0", "h:1"}, clock.pass_time
        began = clock.now
        shards.run(router._refresh([], clock() + 60, set()))
        assert clock.now - began <= ROUTING_TIMEOUT + ROUTING_PATIENCE
        timeouts = [call.timeout for call in shards.asked]
        assert timeouts[:-1] == [ROUTING_PATIENCE] * (len(timeouts) - 1)


def test_one_group_answers_a_lookup_of_several_tables() -> None:
    message = routing([[0, 1]] * 4)  # the first owners of all parts are one group, the second ones another
    [placement] = message.models
    placement.model.tables.add().CopyFrom(placement.model.tables[0])
    placement.model.tables[1].name = "u"
    placement.tables.add().CopyFrom(placement.tables[0])
    shards, router = Shards(message), Router(["h:0"], Routing(message))

    def wants_of(model: Model) -> list[Want]:
        ids = np.array(IDS, np.int64)
        return [Want(model.table(name), ids, wire.ROW_ENCODING_STORED, 8, StoredRows(len(ids), 8)) for name in "tu"]

    for _ in range(4):
        shards.asked.clear()
        shards.run(router.fetch("m", wants_of, router._clock() + 60))
        assert len({call.address for call in shards.asked}) == 1


def test_another_replica_answers_for_a_dead_shard() -> None:
    shards = Shards(routing([[0, 1], [1, 2], [2, 0], [0, 1]]))
    shards.dead = {"h:1"}
    assert fetch(Router(["h:0"]), shards, IDS)[:, 0].tolist() == IDS


def test_who_failed_this_lookup_is_asked_last_even_where_the_other_replica_failed_before() -> None:
    for _ in range(20):  # whose turn it is at first is random
        shards = Shards(routing([[0, 1]] * 4))
        router = Router(["h:0"], Routing(shards.now))
        shards.dead = {"h:1"}
        for _ in range(2):  # one of them asks h:1 first, and remembers
            fetch(router, shards, [5])
        shards.dead, shards.asked = {"h:0"}, []
        assert fetch(router, shards, [5])[:, 0].tolist() == [5]
        assert [call.address for call in shards.asked].count("h:0") == 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_shard_that_rested_is_tried_by_the_first_lookup_it_has_rows_of(clock: Clock) -> None:
    """Whosever turn it would be, and however many lookups of other rows come before."""
    for others in range(4):
        shards = Shards(routing([[0, 1], [2, 1], [0, 2], [0, 2]]))
        router = Router(["h:0"], Routing(shards.now), clock=clock)
        shards.dead = {"h:1"}
        for _ in range(2):  # one of the two turns meets it
            fetch(router, shards, [5])
        shards.dead = set()
        clock.now += FIRST_REST
        for _ in range(others):
            fetch(router, shards, [25])
        shards.asked.clear()
        fetch(router, shards, [5])
        assert [call.address for call in shards.asked] == ["h:1"]


def test_a_shard_that_sends_away_is_alive(clock: Clock) -> None:
    shards = Shards(routing([[0, 1]] * 4))
    router = Router(["h:0"], Routing(shards.now), clock=clock)
    shards.dead = {"h:1"}
    for _ in range(2):
        fetch(router, shards, [5])
    shards.dead, shards.now = set(), routing([[0], [0, 1], [0, 1], [0, 1]], epoch=2)
    clock.now += FIRST_REST
    fetch(router, shards, [5])
    shards.asked.clear()
    for _ in range(2):
        fetch(router, shards, [15])
    assert sorted(call.address for call in shards.asked) == ["h:0", "h:1"]


def test_what_failed_is_forgotten_with_its_place_in_the_routing(clock: Clock) -> None:
    shards = Shards(routing([[0, 1]] * 4))
    router = Router(["h:0"], Routing(shards.now), clock=clock)
    shards.dead = {"h:1"}
    for _ in range(2):
        fetch(router, shards, [5])
    without = routing([[0]] * 4, epoch=2)
    del without.shards[1:]
    router.adopt(Routing(without))
    shards.now, shards.dead = routing([[0, 1]] * 4, epoch=3), set()
    router.adopt(Routing(shards.now))
    shards.asked.clear()
    for _ in range(2):
        fetch(router, shards, [5])
    assert sorted(call.address for call in shards.asked) == ["h:0", "h:1"]


def test_nobody_is_asked_for_a_routing_that_another_lookup_has_learned() -> None:
    """All that are sent away at a moment learn of one newer routing."""
    shards = Shards(routing([[1]] * 4, epoch=2))
    router = Router(["h:0"], Routing(routing([[0]] * 4)))
    answer = shards.answer

    def learned_by_another(call: Call) -> object:
        router.adopt(Routing(shards.now))
        return answer(call)

    shards.answer = learned_by_another  # type: ignore[method-assign]
    assert fetch(router, shards, IDS)[:, 0].tolist() == IDS
    assert [call.address for call in shards.asked] == ["h:0", "h:1"]


def test_somebody_who_looks_nothing_up_hears_of_a_newer_routing_too() -> None:
    shards = Shards(routing([[0]] * 4, epoch=2))
    router = Router(["h:0"], Routing(routing([[0]] * 4)))
    assert 0 < shards.run(router.look_around()) <= 2 * LOOK_SECONDS
    assert router.current is not None and router.current.age == (1, 2)
    assert shards.run(Router(["h:0"]).look_around()) > 0  # of no routing there are no shards to ask


def test_copies_of_which_no_answer_tells_are_used_once_somebody_was_asked(clock: Clock) -> None:
    shards = Shards(routing([[0]] * 4))
    router = Router(["h:0"], clock=clock)
    fetch(router, shards, [5])
    shards.now = routing([[0, 1]] * 4, epoch=2)
    shards.asked.clear()
    for _ in range(4):
        fetch(router, shards, [5])
    assert [call.address for call in shards.asked] == ["h:0"] * 4
    clock.now += 1.25 * LOOK_SECONDS
    shards.asked.clear()
    for _ in range(4):
        fetch(router, shards, [5])
    assert len(shards.asked) == 5
    assert {call.address for call in lookups_of(shards)} == {"h:0", "h:1"}


def test_reads_are_spread_over_replicas() -> None:
    shards = Shards(routing([[0, 1, 2]] * 4))
    router = Router(["h:0"])
    for _ in range(30):
        fetch(router, shards, [5])
    lookups = [call.address for call in lookups_of(shards)]
    assert {lookups.count(f"h:{index}") for index in range(3)} == {10}


def test_without_an_owner_the_error_names_rows_and_shards() -> None:
    shards = Shards(routing([[0], [1], [], [2]]))
    shards.dead = {"h:1"}
    with pytest.raises(errors.Unavailable, match=r"rows of m@1/t .*shard b at h:1: UNAVAILABLE connection refused"):
        fetch(Router(["h:0"]), shards, IDS, seconds=0)
    shards.dead = set()
    with pytest.raises(errors.Unavailable, match=r"1 of 6 rows of m@1/t \(the first: row 25\).*no shard holds them"):
        fetch(Router(["h:0"]), shards, IDS, seconds=0)


def test_a_version_retired_during_a_lookup_is_replaced_and_never_mixed() -> None:
    router = Router(["h:0"], Routing(routing([[0], [0], [1], [1]], version="1")))
    shards = Shards(routing([[0], [1], [1], [2]], epoch=2, version="2"))
    assert set(fetch(router, shards, IDS)[:, 1]) == {2.0}


def test_a_pinned_version_that_is_gone_is_not_found() -> None:
    router = Router(["h:0"], Routing(routing([[0]] * 4, version="1")))
    shards = Shards(routing([[0]] * 4, epoch=2, version="2"))
    with pytest.raises(errors.NotFound, match="m@1"):
        fetch(router, shards, IDS, name="m@1")


def test_an_answer_of_the_wrong_size_is_refused() -> None:
    class Short(Shards):
        def answer(self, call: Call) -> Any:
            answer = super().answer(call)
            return answer._replace(rows=answer.rows[:-1]) if isinstance(answer, Answer) else answer

    with pytest.raises(errors.ProtocolError, match="another release"):
        fetch(Router(["h:0"]), Short(routing([[0]] * 4)), IDS)


class Refusing(Shards):
    """Some of them answer lookups with a failure, `times` times."""

    def __init__(self, now: wire.Routing, failure: Failure, *addresses: str, times: int = 1 << 20) -> None:
        super().__init__(now)
        self._failure, self._addresses, self._left = failure, addresses, times

    def answer(self, call: Call) -> Any:
        if isinstance(call.request, EncodedLookup) and call.address in self._addresses and self._left:
            self._left -= 1
            self.asked.append(call)
            return self._failure
        return super().answer(call)


def test_what_no_retry_mends_is_raised_at_once() -> None:
    refusing = Refusing(routing([[0]] * 4), Failure(grpc.StatusCode.INVALID_ARGUMENT, "what is that"), "h:0")
    with pytest.raises(errors.InvalidRequest, match="what is that"):
        fetch(Router(["h:0"]), refusing, IDS)
    assert sum(isinstance(call.request, EncodedLookup) for call in refusing.asked) == 1


FULL = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "no memory for it")


def test_where_a_shard_has_no_memory_for_a_request_another_one_is_asked() -> None:
    full = Refusing(routing([[0, 1]] * 4), FULL, "h:0")
    for _ in range(3):
        assert fetch(Router(["h:1"]), full, IDS)[:, 0].tolist() == IDS


def test_a_shard_that_had_no_memory_is_asked_again_until_the_deadline() -> None:
    full = Refusing(routing([[0]] * 4), FULL, "h:0", times=3)
    assert fetch(Router(["h:0"]), full, IDS)[:, 0].tolist() == IDS
    with pytest.raises(errors.Overloaded, match=r"6 of 6 rows of m@1/t .*RESOURCE_EXHAUSTED no memory for it"):
        fetch(Router(["h:0"]), Refusing(routing([[0]] * 4), FULL, "h:0"), IDS, seconds=0)


def moved(message: wire.Routing, term: int) -> wire.Routing:
    """Of another term, with shards at h:10, h:11, h:12, which `Shards` does not know."""
    other = wire.Routing()
    other.CopyFrom(message)
    other.term = term
    for index, shard in enumerate(other.shards):
        shard.address = f"h:{10 + index}"
    return other


class Restarted(Shards):
    """A whole service that was restarted elsewhere, with its clock set back: `before` is gone, but for some shards."""

    def __init__(self, now: wire.Routing, before: wire.Routing, clock: Clock) -> None:
        super().__init__(now)
        self.before, self.pass_time = before, clock.pass_time
        self.left: set[str] = set()
        self.answered_before = 0

    def answer(self, call: Call) -> Any:
        index = int(call.address.removeprefix("h:"))
        if index < 10:
            return super().answer(call)
        if call.address not in self.left:
            self.asked.append(call)
            return GONE
        if not isinstance(call.request, EncodedLookup):
            return self.before
        rows = super().answer(call._replace(address=f"h:{index - 10}"))
        rows.rows.view(np.float32)[1::2] = -1.0  # what the service before had by this name
        self.answered_before += 1
        return rows


def test_a_client_starts_over_where_nobody_who_answers_knows_its_routing(clock: Clock) -> None:
    now = routing([[0], [1], [2], [0]])
    before = moved(now, term=9)
    shards, router = Restarted(now, before, clock), Router(["h:1"], Routing(before), clock=clock)
    began = clock.now
    assert fetch(router, shards, IDS, seconds=30)[:, 0].tolist() == IDS
    assert router.current is not None and router.current.age == (1, 1)
    assert START_OVER_SECONDS <= clock.now - began < 2 * START_OVER_SECONDS
    shards.asked.clear()
    fetch(router, shards, IDS)
    assert len(shards.asked) == len(lookups_of(shards)) == 3


def test_a_client_starts_over_for_a_model_that_its_routing_does_not_name(clock: Clock) -> None:
    """Its routing is from before the model was there, and newer than the service now."""
    now, before = routing([[0], [1], [2], [0]]), moved(routing([[0]] * 4), term=9)
    del before.models[:]
    shards, router = Restarted(now, before, clock), Router(["h:1"], Routing(before), clock=clock)
    assert fetch(router, shards, IDS, seconds=30)[:, 0].tolist() == IDS
    assert router.current is not None and router.current.age == (1, 1)
    with pytest.raises(errors.NotFound):  # at once: everybody knows this routing
        fetch(router, shards, IDS, name="n", seconds=30)
    shards.left, router = {"h:11"}, Router(["h:1"], Routing(before), clock=clock)
    with pytest.raises(errors.NotFound):
        fetch(router, shards, IDS, seconds=30)
    assert router.current is not None and router.current.age == (9, 1)


def test_an_age_that_comes_after_another_lookup_started_over_is_no_routing(clock: Clock) -> None:
    """Who is asked with a newer routing answers with the age of its own alone."""
    now, before = routing([[0], [1], [2], [0]], epoch=2), moved(routing([[0]] * 4), term=9)
    shards, router = Restarted(now, before, clock), Router(["h:1"], Routing(before), clock=clock)
    asking = router.newest_routing(clock() + 60)
    next(asking)
    assert fetch(router, shards, IDS, seconds=30)[:, 0].tolist() == IDS
    started_over = router.current
    shards.now.epoch = 3
    with pytest.raises(StopIteration):
        asking.send([wire.Routing(term=1, epoch=3)])
        asking.send([GONE])
        asking.send([GONE])
    assert router.current is started_over


def test_a_lookup_ends_by_its_deadline_though_asking_for_the_routing_takes_all_of_it(clock: Clock) -> None:
    class Slow(Shards):
        """All are dead; that nobody answers for the routing is found out only when it is too late."""

        def answer(self, call: Call) -> Any:
            if not isinstance(call.request, EncodedLookup):
                clock.pass_time(call.timeout)
            return GONE

    for seconds in (0.5, 1.9, 2.1, 2.5, 4.2, 5.0):
        for _ in range(10):
            shards, router = Slow(routing([[0]] * 4)), Router(["h:9"], Routing(routing([[0]] * 4)), clock=clock)
            shards.pass_time = clock.pass_time
            began = clock.now
            with pytest.raises(errors.Unavailable):
                fetch(router, shards, IDS, seconds=seconds)
            assert clock.now - began <= seconds + 1e-6


def test_a_client_does_not_go_back_while_somebody_knows_its_routing(clock: Clock) -> None:
    now = routing([[0], [1], [2], [0]])
    before = moved(now, term=9)
    shards, router = Restarted(now, before, clock), Router(["h:1"], Routing(before), clock=clock)
    shards.left = {"h:10", "h:11"}  # the third is dead, and the seed lags behind
    with pytest.raises(errors.Unavailable, match="1 of 6 rows of m@1/t"):
        fetch(router, shards, IDS, seconds=4 * START_OVER_SECONDS)
    assert router.current is not None and router.current.age == (9, 1)


def test_those_who_lag_behind_for_a_moment_send_nobody_back(clock: Clock) -> None:
    """Also where that was seen before: what is long ago does not count."""
    now = routing([[0]] * 4)
    before = moved(now, term=9)
    for _ in range(3):
        shards, router = Restarted(now, before, clock), Router(["h:1"], Routing(before), clock=clock)
        for _ in range(3):
            with pytest.raises(errors.Unavailable):
                fetch(router, shards, IDS, seconds=START_OVER_SECONDS / 2)
            clock.pass_time(60)
        assert router.current is not None and router.current.age == (9, 1)
        shards.now = routing([[1]] * 4)
        shards.now.term = 10
        assert fetch(router, shards, IDS)[:, 0].tolist() == IDS
        assert router.current.age == (10, 1)


def test_a_client_that_starts_over_mixes_nothing_with_what_it_had(clock: Clock) -> None:
    now = routing([[0], [1], [2], [0]])
    before = moved(now, term=9)

    class Lagging(Restarted):
        """One shard of before still answers lookups, and has learnt of the service now."""

        def answer(self, call: Call) -> Any:
            lookup = isinstance(call.request, EncodedLookup)
            return super().answer(call) if lookup or call.address not in self.left else self.now

    shards, router = Lagging(now, before, clock), Router(["h:1"], Routing(before), clock=clock)
    shards.left = {"h:10"}
    rows = fetch(router, shards, IDS)
    assert shards.answered_before > 0
    assert rows[:, 0].tolist() == IDS
    assert set(rows[:, 1]) == {1.0}


def test_a_version_that_the_older_service_does_not_have_is_not_found(clock: Clock) -> None:
    now = routing([[0]] * 4, version="1")
    before = moved(routing([[0]] * 4, version="2"), term=9)
    for name in ("m", "m@2"):
        shards, router = Restarted(now, before, clock), Router(["h:1"], Routing(before), clock=clock)
        if name == "m":
            assert set(fetch(router, shards, IDS)[:, 1]) == {1.0}
        else:
            with pytest.raises(errors.NotFound, match="m@2"):
                fetch(router, shards, IDS, name=name)


def zones(owners: list[list[int]]) -> wire.Routing:
    """Shards 0 and 2 are in zone a, 1 is in zone b."""
    message = routing(owners)
    for index, shard in enumerate(message.shards):
        shard.topology = "ab"[index % 2]
    return message


@pytest.mark.parametrize("zone", [0, 1])
def test_n8_no_byte_crosses_zones_while_the_own_zone_has_all_rows(zone: int) -> None:
    shards = Shards(zones([[0, 1], [1, 2], [2, 1], [1, 0]]))
    router = Router(["h:0"], Routing(shards.now), topology="ab"[zone])
    for _ in range(20):
        assert fetch(router, shards, list(range(ROWS)))[:, 0].tolist() == list(range(ROWS))
    assert lookups_of(shards)
    assert not [call for call in lookups_of(shards) if int(call.address[-1]) % 2 != zone]


def test_n8_everything_goes_on_when_the_own_zone_is_lost() -> None:
    shards = Shards(zones([[0, 1], [1, 2], [2, 1], [1, 0]]))
    shards.dead = {"h:0", "h:2"}
    router = Router(["h:1"], Routing(shards.now), topology="a")
    for _ in range(5):
        assert fetch(router, shards, list(range(ROWS)))[:, 0].tolist() == list(range(ROWS))


def test_n8_a_shard_of_another_zone_that_failed_once_is_not_tried_before_it_is_needed() -> None:
    clock = Clock()
    shards = Shards(zones([[0, 1]] * 4))
    shards.pass_time = clock.pass_time
    router = Router(["h:0"], Routing(shards.now), topology="a", clock=clock)
    shards.dead = {"h:0", "h:1"}
    with pytest.raises(errors.Unavailable):
        fetch(router, shards, IDS, seconds=3)
    shards.dead = {"h:1"}
    for _ in range(3):
        clock.pass_time(10)
        fetch(router, shards, IDS)
    shards.dead = set()
    shards.asked.clear()
    for _ in range(20):
        fetch(router, shards, IDS)
        clock.pass_time(10)  # its rest is over
    assert {call.address for call in lookups_of(shards)} == {"h:0"}
    shards.dead = {"h:0"}
    fetch(router, shards, IDS)
    assert lookups_of(shards)[-1].address == "h:1"


def test_n8_a_client_that_says_no_zone_asks_all_in_turn() -> None:
    shards = Shards(zones([[0, 1]] * 4))
    router = Router(["h:0"], Routing(shards.now))
    for _ in range(4):
        fetch(router, shards, IDS)
    assert {call.address for call in lookups_of(shards)} == {"h:0", "h:1"}
