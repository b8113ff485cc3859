"""The client's half of the protocol: it asks the owners of rows directly, and does no I/O of its own.

`Router.fetch` is a generator of steps (`client.steps`). Drivers for threads and for asyncio carry them out. Shards
drive the same code to forward what they do not hold. Its rules are in ARCHITECTURE.md ("Rules of the protocol").
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import grpc

from embedding_service.client.breaker import Breaker
from embedding_service.client.calls import Call, Failure
from embedding_service.client.owners import (
    FAILED,
    JUST_FAILED,
    Leg,
    Missing,
    Standing,
    cut,
    has_other,
    share_out,
    standing_of,
    still_missing,
)
from embedding_service.client.patience import LEARN, SLOWEST, Patience
from embedding_service.client.steps import Aside, Exchange, Pause, Steps
from embedding_service.client.wants import FEW_BYTES, Want
from embedding_service.errors import DeadlineExceeded, NotFound, Overloaded, ProtocolError, Unavailable
from embedding_service.grpc_codes import error_of
from embedding_service.placement.routing import Model, Routing
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import Answer, Shape, encode_lookup

# A shard that takes this long for its routing is not waited for: the last one that is asked, and those before it.
ROUTING_TIMEOUT, ROUTING_PATIENCE = 2.0, 0.25
# Shards that are asked for a newer routing before those who must know it.
ASKED_AT_RANDOM = 2
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5
# Seconds between two looks for a newer routing. A routing may be right and lack new copies. No answer tells that.
LOOK_SECONDS = 10.0
# If all that answer have known only older routings for this long, the newest of those is taken.
START_OVER_SECONDS = 2.0
ASKED_BEFORE_STARTING_OVER = 64
# If nobody asked for this long, what was found before says nothing about now.
DOUBT_ENDS_SECONDS = 10.0
# Seconds that a shard may take before other owners are asked. They double each round.
ATTEMPT_TIMEOUT = 2.0
# A lookup that gave up twice waits so many times longer each time, for all owners may be slow.
LONGER = 4.0


class _Round(NamedTuple):
    """What is asked at the same time: legs with their calls, for `nbytes` of rows. `nowhere`: what nobody holds now."""

    legs: list[Leg]
    calls: list[Call]
    nowhere: Missing
    nbytes: int
    timeout: float


class _Failed(NamedTuple):
    """A leg without rows. `late`: seconds after which it was given up for other owners. 0: it was not."""

    leg: Leg
    address: str
    failure: Failure
    late: float


class Router:
    """Knows the routing, asks owners, follows redirects, retries what may be retried.

    Thread-safe, because the routing is immutable and swapped whole.

    Args:
        seeds: Addresses that are asked for the first routing.
        routing: What is known already.
        hedge: Ask another owner when a shard takes unusually long.
        topology: Where the caller is. Owners of the same topology are asked first, and hedged by one another only.
        clock: Seconds now; deadlines are on it.
        chance: Draws turns, pauses and whom to ask; None: one of its own.
    """

    def __init__(
        self,
        seeds: Sequence[str],
        routing: Routing | None = None,
        *,
        hedge: bool = True,
        topology: str = "",
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self._seeds = list(seeds)
        self._routing = routing
        self._topology = topology
        self._clock = clock
        self._chance = chance or random.Random()
        self._breaker = Breaker(clock)
        self._hedge = hedge
        self._patience = Patience()
        self._turn = itertools.count(self._chance.randrange(1 << 16))
        self._looks_at = self._next_look()
        self._doubted: tuple[float, float] | None = None  # since when, and when last, nobody knew this routing

    @property
    def current(self) -> Routing | None:
        """The newest routing it has seen."""
        return self._routing

    @property
    def addresses(self) -> set[str]:
        """Whom it may ask: the shards of the routing, and the seeds."""
        return {*self._seeds, *(self._routing.addresses if self._routing else ())}

    def adopt(self, routing: Routing) -> None:
        """Take a routing from elsewhere, if it is newer."""
        if self._routing is None or routing.age > self._routing.age:
            self._routing = routing
            self._breaker.forget_others(routing.addresses)

    def routing(self, deadline: float) -> Steps[Routing]:
        """The routing. It is asked for if there is none yet. `deadline` is on its clock, in seconds."""
        if self._routing is None:
            yield from self._learn(deadline)
        assert self._routing is not None
        return self._routing

    def fetch(self, name: str, wants_of: Callable[[Model], Sequence[Want]], deadline: float) -> Steps[Sequence[Want]]:
        """Get rows of one version of a model: the wants whose sinks have all their rows.

        `wants_of` checks its ids. If the version is replaced during the lookup, it is called again and gives new
        sinks, so versions are never mixed.

        Raises:
            NotFound, OutOfRange, InvalidRequest, RequestTooLarge: the request asks for what is not there.
            Unavailable, DeadlineExceeded: the rows could not be had by the deadline.
        """
        while True:
            routing = self._routing or (yield from self.routing(deadline))
            if self._clock() >= self._looks_at and routing.addresses:
                self._looks_at = self._next_look()
                yield self._look(routing)
            model = routing.by_name.get(name)
            if model is None:
                yield from self.model(name, deadline)  # raises, or learns a routing that has it
                continue
            wants = wants_of(model)
            if not wants:
                return wants
            try:
                if (yield from self._fetch_version(routing, model, wants, deadline)):
                    return wants
            except NotFound:
                if name == model.full_name:
                    raise  # otherwise the version was retired, and its successor is next

    def look_around(self) -> Steps[float]:
        """Have a shard at random asked for a newer routing, if there is one. Returns seconds until it is due again."""
        if self._routing and self._routing.addresses:
            yield self._look(self._routing)
        return self._next_look() - self._clock()

    def _look(self, known: Routing) -> Aside:
        """Has a shard at random asked for a newer routing, without waiting for it."""
        address = self._chance.choice(known.addresses)
        return Aside(_ask(address, known, ROUTING_TIMEOUT), partial(self._looked, known))

    def _looked(self, known: Routing, outcome: Any) -> None:
        if isinstance(outcome, wire.Routing):
            self._hear(outcome, known)

    def learn_from(self, shard: str, deadline: float) -> Steps[None]:
        """Ask a shard, by its id, for a newer routing than this one. It may hang, so it has 0.25 s at most."""
        known = self._routing
        if known is not None and shard in known.shard_ids:
            timeout = min(ROUTING_PATIENCE, 2 * self._patience.usual, self._routing_timeout(deadline))
            address = known.addresses[known.shard_ids.index(shard)]
            [answer] = yield Exchange([_ask(address, known, timeout)])
            if isinstance(answer, wire.Routing):
                self._hear(answer, known)

    def newest_routing(self, deadline: float) -> Steps[Routing]:
        """The routing, asked for again."""
        yield from self.routing(deadline)
        yield from self._refresh([], deadline, set())
        return (yield from self.routing(deadline))

    def model(self, name: str, deadline: float) -> Steps[Model]:
        """A served model by `name` or `name@version`. Raises NotFound, naming the served ones."""
        for attempt in itertools.count():
            routing = yield from self.routing(deadline)
            pause = self._pause(attempt)
            # The model may have been published after our routing. If nobody knows our routing, it says nothing.
            in_doubt = self._doubted is not None and self._clock() + pause < deadline
            if name in routing.by_name or (attempt and not in_doubt):
                return routing.model(name)
            if attempt:
                yield Pause(pause)
            yield from self._refresh([], deadline, set())
        raise AssertionError("unreachable")

    def _fetch_version(self, routing: Routing, model: Model, wants: Sequence[Want], deadline: float) -> Steps[bool]:
        """Fill all sinks. False: an older routing was taken, so rows by the one before do not count."""
        missing: Missing = {index: None for index, want in enumerate(wants) if len(want.ids)}
        if not missing:
            return True
        avoid: dict[str, int] = {}
        attempt, late, given_up = 0, 0.0, 0
        while True:
            began = self._clock()
            timeout = _attempt_timeout(attempt, model, deadline - began)
            this = self._plan(routing, model, wants, missing, avoid, timeout, given_up)
            if late:
                self._patience.spend(len(this.calls), late)
            outcomes = yield Exchange(this.calls, in_turn=this.nbytes > FEW_BYTES)
            failures = self._take(this, outcomes, wants)
            if not failures and not this.nowhere:
                if self._hedge and model.replicated:
                    self._patience.took.append(self._clock() - began)
                    if len(self._patience.took) >= LEARN:
                        self._patience.learn()
                return True
            redirects = self._judge(failures, avoid)
            missing = still_missing([failed.leg for failed in failures], this.nowhere)
            late = max((failed.late for failed in failures), default=0.0)
            given_up += late > 0
            pushback = max((failed.failure.pushback for failed in failures), default=0.0)
            if late and all(failed.late for failed in failures) and not this.nowhere:
                if given_up > 1:
                    yield self._look(routing)
                pause = 0.0  # the others are asked at once
            else:
                pause = max(self._pause(attempt), pushback)
                attempt += 1
                # Another lookup may have learned a newer one by now. Nobody knows more than that.
                if self._clock() + pause < deadline and self._routing is routing:
                    yield from self._refresh(redirects, deadline, avoid)
                if self._clock() + pause >= deadline:  # asking for the routing may have taken all that was left
                    raise _gave_up(model, wants, missing, failures, routing)
            before, routing = routing, self._routing or routing
            if routing.age < before.age:
                return False
            if routing is before:
                # They do not hold the rows, and nobody knows who does. One that was late may.
                avoid.update(dict.fromkeys(redirects, JUST_FAILED))
            if pause and (routing is before or pushback):
                yield Pause(pause)
            model = routing.model(model.full_name)

    def _plan(
        self,
        routing: Routing,
        model: Model,
        wants: Sequence[Want],
        missing: Missing,
        avoid: Mapping[str, int],
        timeout: float,
        given_up: int,
    ) -> _Round:
        """Whom to ask for what, and how long each may take. `given_up`: rounds of this lookup that had late calls."""
        resting, due = self._breaker.resting() if self._breaker.failing else (_NOBODY, _NOBODY)
        standing = standing_of(routing, avoid, resting, due, self._topology)
        legs, nowhere = share_out(wants, missing, model, standing, next(self._turn))
        legs, nbytes = cut(legs, wants, routing)
        timeouts, calls = [timeout] * len(legs), []
        if self._hedge and model.replicated:
            timeouts = self._hedged(legs, wants, routing, model, standing, timeout, nbytes, given_up)
        for leg, seconds in zip(legs, timeouts, strict=True):
            want = wants[leg.want]
            ids = want.ids if leg.positions is None else want.ids[leg.positions]
            request = encode_lookup(model.full_name, want.table.name, want.encoding, *routing.age, ids, want.table.rows)
            shape = Shape(len(ids), want.row_bytes, want.table.dim, want.encoding, model.version)
            calls.append(Call(routing.addresses[leg.shard], request, seconds, shape))
        if due:
            self._breaker.untried(due - {call.address for call in calls})
        return _Round(legs, calls, nowhere, nbytes, timeout)

    def _hedged(
        self,
        legs: Sequence[Leg],
        wants: Sequence[Want],
        routing: Routing,
        model: Model,
        standing: Standing,
        timeout: float,
        nbytes: int,
        given_up: int,
    ) -> list[float]:
        """Seconds that each leg may take before other owners are asked. `timeout` if there is no other to ask.

        The budget does not count for a shard whose rest is over. The breaker lets one lookup try it now and then.
        """
        timeouts = []
        for leg in legs:
            usual = self._patience.usual if routing.addresses[leg.shard] in standing.due else self._patience.seconds
            seconds = (usual + nbytes / SLOWEST) * LONGER ** max(given_up - 1, 0)
            anybody = standing.calm and not self._topology
            others = seconds < timeout and (anybody or has_other(leg, wants, model, standing))
            timeouts.append(seconds if others else timeout)
        return timeouts

    def _take(self, this: _Round, outcomes: Iterable[Any], wants: Sequence[Want]) -> list[_Failed]:
        """Put the rows that came where they belong. Returns what did not come."""
        failures: list[_Failed] = []
        for leg, call, outcome in zip(this.legs, this.calls, outcomes, strict=True):
            if isinstance(outcome, Failure):
                late = outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED and call.timeout < this.timeout
                failures.append(_Failed(leg, call.address, outcome, call.timeout if late else 0.0))
                continue
            if self._breaker.failing:
                self._breaker.answered(call.address)
            shape = call.shape
            assert shape is not None
            if len(outcome.rows) != shape.count * shape.row_bytes or outcome.version != shape.version:
                raise _misfit(call, outcome)
            wants[leg.want].sink.put(leg.positions, outcome.rows.reshape(-1, shape.row_bytes))
        return failures

    def _judge(self, failures: Sequence[_Failed], avoid: dict[str, int]) -> list[str]:
        """Raise what no retry mends, and remember whom to avoid. Returns the addresses that no longer hold the rows."""
        redirects = []
        avoid.update(dict.fromkeys(avoid, FAILED))
        for _, address, failure, _ in failures:
            if failure.code in _NO_ANSWER:
                avoid[address] = JUST_FAILED
                self._breaker.failed(address)
                continue
            self._breaker.answered(address)
            if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                avoid[address] = JUST_FAILED  # requests are cut to the limits, so it has no memory for more now
            elif failure.code is grpc.StatusCode.ABORTED:
                redirects.append(address)
            else:
                raise error_of(failure.code, failure.message)
        return redirects

    def _refresh(self, senders: Sequence[str], deadline: float, avoid: Collection[str]) -> Steps[None]:
        """Ask a few for a newer routing. Those that did not answer come last. There may be no newer one.

        Each of the `senders` that sent us away knows it. But they send everyone away at the same moment, and seeds are
        everyone's seeds. So shards at random come first, and the load spreads.
        """
        known = self._routing
        addresses = [*(known.addresses if known else ())]
        asked = [
            *self._chance.sample(addresses, min(ASKED_AT_RANDOM, len(addresses))),
            *self._chance.sample(senders, min(1, len(senders))),
            *self._seeds,
        ]
        behind, answered = [], False
        asked = sorted(dict.fromkeys(asked), key=lambda each: (each in avoid, each in self._breaker.failing))
        for address in asked:
            patience = ROUTING_PATIENCE if answered or address != asked[-1] else ROUTING_TIMEOUT
            timeout = min(patience, deadline - self._clock())
            if timeout <= 0:
                return
            [answer] = yield Exchange([_ask(address, known, timeout)])
            if not isinstance(answer, wire.Routing):
                continue
            answered = True
            if known and not self._hear(answer, known):
                behind.append(address)
            elif not senders or self._routing is not known:
                return
        if behind and known and self._doubt():
            yield from self._start_over(known, behind, deadline)

    def _hear(self, answer: wire.Routing, known: Routing) -> bool:
        """Take in a routing that is newer than the asker's, `known`. Returns whether the sender's is at least as new.

        A routing that is no newer came as its age alone. Never take that for a routing: another lookup may have started
        over with an older one since.
        """
        age = (answer.term, answer.epoch)
        if age < known.age:
            return False
        self._doubted = None
        if age > known.age:
            self.adopt(Routing(answer))
        return True

    def _doubt(self) -> bool:
        """Nobody that answered knows this routing. Returns whether that has lasted long enough."""
        now = self._clock()
        since, last = self._doubted or (now, now)
        since = since if now - last < DOUBT_ENDS_SECONDS else now
        self._doubted = since, now
        return now - since >= START_OVER_SECONDS

    def _start_over(self, known: Routing, behind: Sequence[str], deadline: float) -> Steps[None]:
        """Take the newest of the older routings, unless a shard of the known one still knows it.

        Those that answer are the service now. Those that are gone are not.
        """
        others = self._chance.sample(known.addresses, min(ASKED_BEFORE_STARTING_OVER, len(known.addresses)))
        timeout = self._routing_timeout(deadline)
        for answer in (yield Exchange([_ask(address, known, timeout) for address in others])):
            if isinstance(answer, wire.Routing) and self._hear(answer, known):
                return
        timeout = self._routing_timeout(deadline)
        answers = yield Exchange([_ask(address, None, timeout) for address in behind])
        routings = [Routing(answer) for answer in answers if isinstance(answer, wire.Routing)]
        newest = max(routings, key=lambda routing: routing.age, default=known)
        if self._routing is not known or newest.age == known.age:
            return
        self._doubted = None
        self._routing = newest
        self._breaker.forget_others(newest.addresses)

    def _routing_timeout(self, deadline: float) -> float:
        return min(ROUTING_TIMEOUT, max(deadline - self._clock(), 0.001))

    def _learn(self, deadline: float) -> Steps[None]:
        """The first routing, from the seeds, until one answers."""
        for attempt in itertools.count():
            failure, pause = Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "no time left to ask"), self._pause(attempt)
            for address in self._seeds:
                timeout = self._routing_timeout(deadline)
                [answer] = yield Exchange([_ask(address, None, timeout)])
                if isinstance(answer, wire.Routing):
                    return self.adopt(Routing(answer))
                failure = answer
            if failure.code in _REFUSALS:
                raise error_of(failure.code, failure.message)
            if self._clock() + pause >= deadline:
                raise Unavailable(
                    f"no embedding service answers at {', '.join(self._seeds)} "
                    f"({failure.code.name}: {failure.message}); check the address, "
                    "whether it speaks TLS (tls=..., --tls), and `embedding-service status` there"
                )
            yield Pause(pause)
        return None

    def _next_look(self) -> float:
        """When to look. It is spread, so that clients do not come in step."""
        return self._clock() + LOOK_SECONDS * self._chance.uniform(0.75, 1.25)

    def _pause(self, attempt: int) -> float:
        """Seconds to wait before the next try. They double to a bound. Spreading keeps clients out of step."""
        return min(FIRST_PAUSE * 2.0**attempt, LONGEST_PAUSE) * self._chance.uniform(0.5, 1.5)


_NOBODY: frozenset[str] = frozenset()
# Whom we are will not change by asking again.
_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


def _ask(address: str, known: Routing | None, timeout: float) -> Call:
    """Asks for a newer routing than the known one."""
    term, epoch = known.age if known else (0, 0)
    return Call(address, wire.GetRoutingRequest(term=term, epoch=epoch), timeout)


def _attempt_timeout(attempt: int, model: Model, left: float) -> float:
    """Seconds that this round's calls may take, of those that are left.

    With copies elsewhere a hanging shard is given up early. With one copy it gets half of the time that is left. By
    then its parts may have been loaded elsewhere.
    """
    left = max(left, 0.001)
    patience = ATTEMPT_TIMEOUT * 2**attempt
    return min(left, patience if model.replicated else max(patience, left / 2))


def _misfit(call: Call, answer: Answer) -> ProtocolError:
    assert call.shape is not None
    return ProtocolError(
        f"{call.address} answered {len(answer.rows)} bytes of version {answer.version!r} where {call.shape.nbytes} "
        f"bytes of version {call.shape.version!r} were asked; is it a service of another release?"
    )


def _gave_up(
    model: Model,
    wants: Sequence[Want],
    missing: Missing,
    failures: Sequence[_Failed],
    routing: Routing,
) -> Exception:
    """Names the rows and the shards concerned."""
    rows = "; ".join(
        f"{len(wants[index].ids if positions is None else positions)} of {len(wants[index].ids)} rows of "
        f"{model.full_name}/{wants[index].table.name} "
        f"(the first: row {int(wants[index].ids[0 if positions is None else positions[0]])})"
        for index, positions in missing.items()
    )
    by_address = {failed.address: failed.failure for failed in failures}
    names = dict(zip(routing.addresses, routing.shard_ids, strict=True))
    shards = "; ".join(
        f"shard {names.get(address, '?')} at {address}: {failure.code.name} {failure.message}"
        for address, failure in by_address.items()
    )
    message = f"no answer by the deadline for {rows}; {shards or 'no shard holds them at the moment'}"
    codes = {failure.code for failure in by_address.values()}
    if grpc.StatusCode.DEADLINE_EXCEEDED in codes:
        return DeadlineExceeded(message)
    return Overloaded(message) if codes == {grpc.StatusCode.RESOURCE_EXHAUSTED} else Unavailable(message)
