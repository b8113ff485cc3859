"""What an identity may take, and what its clients do when they took it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from support.shards import IDS, Clock, Shards, fetch, lookups_of, routing

from embedding_service.client import transport
from embedding_service.client.calls import Call, Failure
from embedding_service.client.router import Router
from embedding_service.errors import Overloaded, QuotaExceeded
from embedding_service.grpc_codes import PUSHBACK, trailing_of
from embedding_service.security.policy import Identity
from embedding_service.security.quotas import Quota
from embedding_service.wire.lookup_codec import EncodedLookup


def test_s7_rows_and_bytes_come_back_with_time_and_no_request_is_too_large() -> None:
    now = 100.0
    quota = Quota("team", Identity(rows_per_second=1000, bytes_per_second=10**6), lambda: now)
    quota.spend(2500, 10)  # more than a second's, and owed
    with pytest.raises(QuotaExceeded, match=r"team has used its quota of 1,000 rows a second") as raised:
        quota.spend(1, 1)
    assert raised.value.seconds == pytest.approx(1.501)
    assert trailing_of(raised.value) == ((PUSHBACK, "1501"),)
    now += raised.value.seconds
    quota.spend(1, 1)
    now += 1000  # a rest of any length is worth a second
    quota.spend(1, 10**7)
    with pytest.raises(QuotaExceeded, match=r"1,000,000 bytes a second") as raised:
        quota.spend(1, 1)
    assert raised.value.seconds == pytest.approx(9, rel=1e-3)
    quota.limit(Identity(calls=1))
    quota.spend(10**9, 10**9)


def test_s7_calls_at_once_are_counted_over_a_change_of_the_policy() -> None:
    quota = Quota("team", Identity(calls=2))
    quota.enter()
    quota.enter()
    with pytest.raises(QuotaExceeded, match="2 calls open"):
        quota.enter()
    quota.limit(Identity(calls=3))
    quota.enter()
    quota.leave()
    quota.limit(Identity(calls=2))
    with pytest.raises(QuotaExceeded):
        quota.enter()
    quota.leave()
    quota.enter()  # in the place of the one that ended
    with pytest.raises(QuotaExceeded):
        quota.enter()
    quota.limit(Identity(rows_per_second=5))
    quota.enter()


class Limited(Shards):
    """Each shard grants a lookup every two seconds, and says so."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(routing([[0, 1]] * 4))
        self._clock, self.pass_time = clock, clock.pass_time
        self._free = {"h:0": 0.0, "h:1": 0.0}

    def answer(self, call: Call) -> Any:
        if isinstance(call.request, EncodedLookup):
            if self._clock.now < self._free[call.address]:
                self.asked.append(call)
                left = self._free[call.address] - self._clock.now
                return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the quota is used", left)
            self._free[call.address] = self._clock.now + 2.0
        return super().answer(call)


def test_s7_a_client_waits_as_long_as_it_is_told() -> None:
    clock = Clock()
    shards = Limited(clock)
    router = Router(["h:0"], clock=clock)
    began = clock.now
    for _ in range(10):
        assert fetch(router, shards, IDS)[:, 0].tolist() == IDS
    # Two shards: every second lookup is refused once at most by each of them, and no call is made in vain after that.
    assert clock.now - began <= 20 and len(lookups_of(shards)) <= 20
    with pytest.raises(Overloaded, match="the quota is used"):
        for _ in range(3):
            fetch(router, shards, IDS, seconds=0.5)


def test_s7_what_a_server_says_of_the_time_to_wait_is_what_its_client_hears() -> None:
    said = trailing_of(QuotaExceeded("the quota is used", 1.2345))
    assert transport._pushback([("other", b"x"), *said]) == 1.235
    for odd in ([], trailing_of(Overloaded("busy")), [(PUSHBACK, "-1")], [(PUSHBACK, "soon")], [(PUSHBACK, b"7")]):
        assert transport._pushback(odd) == 0
