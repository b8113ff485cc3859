"""Asking the owners of rows directly: the client's half of the protocol, without any I/O of its own.

`Router.fetch` is a generator of steps: it yields what shall be sent (a list of `Call`s, all at once) or how long to
wait (seconds), and is sent the answers in the same order, an iterable that may wait for each; or an `Aside`, which
nobody waits for. `run` and `run_async` drive it for threads and for asyncio; shards drive the same code to forward what
they do not hold. The rules it follows are in ARCHITECTURE.md ("Rules of the protocol").
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from functools import partial
from typing import Any, NamedTuple, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from embedding_service.client.breaker import Breaker
from embedding_service.client.sinks import Sink
from embedding_service.client.transport import Call, Failure, Transport
from embedding_service.errors import DeadlineExceeded, NotFound, Overloaded, ProtocolError, Unavailable
from embedding_service.grpc_codes import error_of
from embedding_service.placement.routing import Ids, Model, Routing, Table, check_ids
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.rows import Answer, Bytes, Request, Shape, lookup_request

T = TypeVar("T")


class Aside(NamedTuple):
    """A call that nobody waits for; `done` gets its outcome, on any thread."""

    call: Call
    done: Callable[[Any], None]


Steps = Generator[list[Call] | float | Aside, Any, T]

# A shard that takes this long for its routing is not worth waiting for: another one knows it too.
ROUTING_TIMEOUT = 2.0
# Shards that are asked for a newer routing before those who must know it.
ASKED_AT_RANDOM = 2
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5
# A routing may be right and yet not name new copies, of which no answer tells: so often one looks for a newer one.
LOOK_SECONDS = 10.0
# Where all who answer know only an older routing than this one, and have done so for this long, theirs is taken.
START_OVER_SECONDS = 2.0
ASKED_BEFORE_STARTING_OVER = 64
# Nobody asked for so long: what was found before says nothing of now.
DOUBT_ENDS_SECONDS = 10.0
# Where somebody else holds the rows too, a shard may take so long before they are asked; twice as long each round.
ATTEMPT_TIMEOUT = 2.0
# More rows than that, where they are to be decoded, are asked of a shard in pieces: it gathers one while others travel
# and are decoded.
PIECE_BYTES = 2 << 20


class Want(NamedTuple):
    """Rows of one table: `ids` int64 [n], `encoding` of the answer and its bytes a row, and where they go."""

    table: Table
    ids: Ids
    encoding: int
    row_bytes: int
    sink: Sink


class _Leg(NamedTuple):
    """What one shard is asked of one want: the rows at `positions` of its ids; None: all, in their order."""

    want: int
    positions: Ids | None
    call: Call


class _StartedOver(Exception):
    """An older routing was taken: what was fetched by the one before does not count."""


class Router:
    """Knows the routing, asks owners, follows redirects, retries what may be retried.

    Thread-safe: the routing is immutable and swapped whole.

    Args:
        seeds: Addresses that are asked for the first routing.
        routing: What is known already.
        alternatives: Give each call another owner to ask, for a `HedgingTransport`; that makes more and smaller calls.
        clock: Seconds now; deadlines are on it.
        chance: Draws turns, pauses and whom to ask; None: one of its own.
    """

    def __init__(
        self,
        seeds: Sequence[str],
        routing: Routing | None = None,
        *,
        alternatives: bool = False,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self._seeds = list(seeds)
        self._routing = routing
        self._alternatives = alternatives
        self._clock = clock
        self._chance = chance or random.Random()
        self._breaker = Breaker(clock)
        self._turn = itertools.count(self._chance.randrange(1 << 16))
        self._looks_at = self._next_look()
        self._doubted: tuple[float, float] | None = None  # since when, and when last, nobody knew this routing

    @property
    def current(self) -> Routing | None:
        """The newest routing it has seen."""
        return self._routing

    def adopt(self, routing: Routing) -> None:
        """Take a routing from elsewhere, if it is newer."""
        if self._routing is None or routing.age > self._routing.age:
            self._routing = routing
            self._breaker.forget_others(routing.addresses)

    def routing(self, deadline: float) -> Steps[Routing]:
        """The routing, asked for if there is none yet. `deadline` is on its clock, in seconds."""
        if self._routing is None:
            yield from self._learn(deadline)
        assert self._routing is not None
        return self._routing

    def fetch(self, name: str, wants_of: Callable[[Model], Sequence[Want]], deadline: float) -> Steps[list[Want]]:
        """Get rows of one version of a model: the wants whose sinks have all their rows.

        `wants_of` is called again should that version be replaced meanwhile, and gives new sinks then, so that versions
        are never mixed.

        Raises:
            NotFound, OutOfRange, InvalidRequest, RequestTooLarge: what the request asks for does not exist.
            Unavailable, DeadlineExceeded: the rows could not be had by the deadline.
        """
        while True:
            if self._routing and self._routing.addresses and self._clock() >= self._looks_at:
                self._looks_at = self._next_look()
                address = self._chance.choice(self._routing.addresses)
                yield Aside(_ask(address, self._routing, ROUTING_TIMEOUT), partial(self._looked, self._routing))
            known = self._routing and self._routing.find(name)
            model = known or (yield from self.model(name, deadline))
            wants = list(wants_of(model))
            for want in wants:
                check_ids(want.ids, want.table.rows, f"{model.full_name}/{want.table.name}")
            try:
                yield from self._fetch_version(model, wants, deadline)
            except NotFound:
                if name == model.full_name:
                    raise
                continue  # the version was retired while we asked: take the one that replaced it
            except _StartedOver:
                continue
            return wants

    def _looked(self, known: Routing, outcome: Any) -> None:
        if isinstance(outcome, wire.Routing):
            self._hear(outcome, known)

    def newest_routing(self, deadline: float) -> Steps[Routing]:
        """The routing, asked for again."""
        yield from self.routing(deadline)
        yield from self._refresh([], deadline, set())
        return (yield from self.routing(deadline))

    def model(self, name: str, deadline: float) -> Steps[Model]:
        """A served model by `name` or `name@version`; raises NotFound, naming the served ones."""
        for attempt in itertools.count():
            routing = yield from self.routing(deadline)
            pause = self._pause(attempt)
            # It may have been published since we learnt the routing; and where nobody knows that, it says nothing.
            in_doubt = self._doubted is not None and self._clock() + pause < deadline
            if routing.find(name) or (attempt and not in_doubt):
                return routing.model(name)
            if attempt:
                yield pause
            yield from self._refresh([], deadline, set())
        raise AssertionError("unreachable")

    def _fetch_version(self, model: Model, wants: Sequence[Want], deadline: float) -> Steps[None]:
        missing: dict[int, Ids | None] = {index: None for index, want in enumerate(wants) if len(want.ids)}
        avoid: set[str] = set()
        newest = (0, 0)
        for attempt in itertools.count():
            routing = self._routing or (yield from self.routing(deadline))
            if routing.age < newest:
                raise _StartedOver
            newest = routing.age
            current = routing.model(model.full_name)
            timeout = _attempt_timeout(attempt, current, deadline - self._clock())
            legs, nowhere = self._legs(routing, current, wants, missing, avoid, timeout)
            answers = yield [leg.call for leg in legs]
            failures: list[tuple[_Leg, Failure]] = []
            for leg, answer in zip(legs, answers, strict=True):
                if isinstance(answer, Failure):
                    failures.append((leg, answer))
                else:
                    self._breaker.answered(leg.call.address)
                    want = wants[leg.want]
                    want.sink.put(leg.positions, _rows_of(answer, leg, model, want))
            if not failures and not nowhere:
                return
            redirects = self._judge(failures, avoid)
            missing = _still_missing(failures, nowhere)
            pause = self._pause(attempt)
            if self._clock() + pause < deadline:
                yield from self._refresh(redirects, deadline, avoid)
            if self._clock() + pause >= deadline:  # asking for the routing may have taken all that was left
                raise _gave_up(model, wants, missing, failures, routing)
            if self._routing is routing:
                yield pause
        raise AssertionError("unreachable")

    def _legs(
        self,
        routing: Routing,
        model: Model,
        wants: Sequence[Want],
        missing: dict[int, Ids | None],
        avoid: set[str],
        timeout: float,
    ) -> tuple[list[_Leg], dict[int, Ids | None]]:
        """Who is asked for what; and the positions whose part nobody holds at the moment."""
        legs: list[_Leg] = []
        nowhere: dict[int, Ids | None] = {}
        resting, due = self._breaker.resting()
        badness = _badness(routing, avoid, resting, due)
        turn = next(self._turn)  # one for all tables: where owners are the shards of one group, it is asked alone
        for index, positions in missing.items():
            want, table = wants[index], model.tables[wants[index].table.name]
            ids = want.ids if positions is None else want.ids[positions]
            parts = ids // table.rows_per_part
            owners = _choose(table.owners, parts, turn, badness, best=-1 if due else 0)
            others = _others(table.owners, parts, owners, badness) if self._alternatives else None
            most = max(1, min(routing.response_bytes // want.row_bytes, routing.request_bytes // 8))
            for (shard, other), group in _groups(owners, others, positions):
                if shard < 0:
                    nowhere[index] = group
                    continue
                cut = min(most, max(1, PIECE_BYTES // want.row_bytes)) if want.sink.works else most
                for piece in _pieces(group, len(ids), cut):
                    asked = want.ids if piece is None else want.ids[piece]
                    request = _request(model, want, asked, routing)
                    shape = Shape(len(asked), want.row_bytes, want.table.dim, want.encoding, model.version)
                    second = Call(routing.addresses[other], request, timeout, None, shape) if other >= 0 else None
                    legs.append(_Leg(index, piece, Call(routing.addresses[shard], request, timeout, second, shape)))
        if due:
            self._breaker.untried(due - {leg.call.address for leg in legs})
        return legs, nowhere

    def _judge(self, failures: Sequence[tuple[_Leg, Failure]], avoid: set[str]) -> list[str]:
        """Raise for what no retry mends; remember whom to avoid; return who said that it no longer holds the rows."""
        redirects = []
        for leg, failure in failures:
            if failure.code in _NO_ANSWER:
                avoid.add(leg.call.address)
                self._breaker.failed(leg.call.address)
                continue
            self._breaker.answered(leg.call.address)
            if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                avoid.add(leg.call.address)  # requests are cut to the limits: it has no memory for more just now
            elif failure.code is grpc.StatusCode.ABORTED:
                redirects.append(leg.call.address)
            else:
                raise error_of(failure.code, failure.message)
        return redirects

    def _refresh(self, senders: Sequence[str], deadline: float, avoid: set[str]) -> Steps[None]:
        """Ask a few for a newer routing; those who did not answer come last. None being newer is fine.

        One of the `senders` who sent us away knows it, but sends everyone away at the same moment, and seeds are
        everyone's seeds: shards at random come first, so that the asking spreads.
        """
        known = self._routing
        addresses = [*(known.addresses if known else ())]
        asked = [
            *self._chance.sample(addresses, min(ASKED_AT_RANDOM, len(addresses))),
            *self._chance.sample(senders, min(1, len(senders))),
            *self._seeds,
        ]
        behind = []
        for address in sorted(dict.fromkeys(asked), key=lambda address: address in avoid):
            timeout = min(ROUTING_TIMEOUT, deadline - self._clock())
            if timeout <= 0:
                return
            [answer] = yield [_ask(address, known, timeout)]
            if not isinstance(answer, wire.Routing):
                continue
            if known and not self._hear(answer, known):
                behind.append(address)
            elif not senders or self._routing is not known:
                return
        if behind and known and self._doubt():
            yield from self._start_over(known, behind, deadline)

    def _hear(self, answer: wire.Routing, known: Routing) -> bool:
        """Take a newer routing in than the one `known` to who asked; returns whether the sender's is at least as new.

        One that is no newer came as its age alone. It must not be taken for a routing though another lookup may have
        started over meanwhile, with an older one.
        """
        age = (answer.term, answer.epoch)
        if age < known.age:
            return False
        self._doubted = None
        if age > known.age:
            self.adopt(Routing(answer))
        return True

    def _doubt(self) -> bool:
        """Nobody who answered knows this routing; returns whether that has been so for long enough."""
        now = self._clock()
        since, last = self._doubted or (now, now)
        since = since if now - last < DOUBT_ENDS_SECONDS else now
        self._doubted = since, now
        return now - since >= START_OVER_SECONDS

    def _start_over(self, known: Routing, behind: Sequence[str], deadline: float) -> Steps[None]:
        """Take the newest routing of those who know only older ones, unless somebody of the known one still knows it.

        They are the service now, and who is gone is not.
        """
        timeout = min(ROUTING_TIMEOUT, max(deadline - self._clock(), 0.001))
        others = self._chance.sample(known.addresses, min(ASKED_BEFORE_STARTING_OVER, len(known.addresses)))
        for answer in (yield [_ask(address, known, timeout) for address in others]):
            if isinstance(answer, wire.Routing) and self._hear(answer, known):
                return
        answers = yield [_ask(address, None, timeout) for address in behind]
        routings = [Routing(answer) for answer in answers if isinstance(answer, wire.Routing)]
        if routings and self._routing is known:
            self._routing = max(routings, key=lambda routing: routing.age)
            self._doubted = None
            self._breaker.forget_others(self._routing.addresses)

    def _learn(self, deadline: float) -> Steps[None]:
        """The first routing, from the seeds, until one answers."""
        for attempt in itertools.count():
            failure, pause = Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "no time left to ask"), self._pause(attempt)
            for address in self._seeds:
                timeout = min(ROUTING_TIMEOUT, max(deadline - self._clock(), 0.001))
                [answer] = yield [_ask(address, None, timeout)]
                if isinstance(answer, wire.Routing):
                    return self.adopt(Routing(answer))
                failure = answer
            if self._clock() + pause >= deadline:
                raise Unavailable(
                    f"no embedding service answers at {', '.join(self._seeds)} "
                    f"({failure.code.name}: {failure.message}); check the address, and `embedding-service status` there"
                )
            yield pause
        return None

    def _next_look(self) -> float:
        """When to look: spread, so that clients do not come in step."""
        return self._clock() + LOOK_SECONDS * self._chance.uniform(0.75, 1.25)

    def _pause(self, attempt: int) -> float:
        """Seconds to wait before the next try: doubling to a bound, spread so that clients do not come in step."""
        return min(FIRST_PAUSE * 2.0**attempt, LONGEST_PAUSE) * self._chance.uniform(0.5, 1.5)


_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


def _ask(address: str, known: Routing | None, timeout: float) -> Call:
    """For a newer routing than what is known."""
    term, epoch = known.age if known else (0, 0)
    return Call(address, wire.GetRoutingRequest(term=term, epoch=epoch), timeout)


def _attempt_timeout(attempt: int, model: Model, left: float) -> float:
    """Seconds that this round's calls may take, of those that are left.

    With copies elsewhere a hanging shard is given up early. With one copy it gets half of the time that is left: by
    then the controller may have had its parts loaded elsewhere.
    """
    left = max(left, 0.001)
    patience = ATTEMPT_TIMEOUT * 2**attempt
    return min(left, patience if model.replicated else max(patience, left / 2))


def _badness(routing: Routing, avoid: Set[str], resting: Set[str], due: Set[str]) -> npt.NDArray[np.int8]:
    """int8 [shards + 1]: 0 good, 1 failed others of late, 2 failed this lookup; at index -1: 3, nobody.

    1 and 2 must not be alike: a shard that was killed and started again is worth asking before one that hangs. -1 is
    this lookup's to try again; it comes first, for a turn that only might have met it would leave a shard unused long.
    """
    if not resting and not due and not avoid:
        return routing.nothing_known
    known = {**dict.fromkeys(due, -1), **dict.fromkeys(resting, 1), **dict.fromkeys(avoid, 2)}
    return np.array([*(known.get(address, 0) for address in routing.addresses), 3], np.int8)


def _choose(
    owners: npt.NDArray[np.int32], parts: Ids, turn: int, badness: npt.NDArray[np.int8], best: int
) -> npt.NDArray[np.int32]:
    """For each part the best of its owners, in turn among equals; -1 where there is none. Nobody is below `best`."""
    copies = owners.shape[1]
    chosen = owners[parts, turn % copies]
    for column in range(1, copies):
        if (badness[chosen] <= best).all():
            break
        other = owners[parts, (turn + column) % copies]
        chosen = np.where(badness[other] < badness[chosen], other, chosen)
    return chosen


def _others(
    owners: npt.NDArray[np.int32], parts: Ids, chosen: npt.NDArray[np.int32], badness: npt.NDArray[np.int8]
) -> npt.NDArray[np.int32]:
    """For each part a good owner that is not the chosen one, -1 where there is none."""
    others = np.full_like(chosen, -1)
    for column in range(owners.shape[1]):
        other = owners[parts, column]
        others = np.where((others < 0) & (other != chosen) & (badness[other] == 0), other, others)
    return others


def _groups(
    owners: npt.NDArray[np.int32], others: npt.NDArray[np.int32] | None, positions: Ids | None
) -> Iterator[tuple[tuple[int, int], Ids | None]]:
    """The positions of each pair of owner and other; of owner and -1 without others."""
    if others is None and np.count_nonzero(owners == owners[0]) == len(owners):
        yield (int(owners[0]), -1), positions
        return
    if others is None:
        others = np.full_like(owners, -1)
    if positions is None:
        positions = np.arange(len(owners))
    order = np.lexsort((others, owners))
    owners, others, positions = owners[order], others[order], positions[order]
    starts = [0, *(np.flatnonzero(np.diff(owners) | np.diff(others)) + 1), len(owners)]
    for start, end in itertools.pairwise(starts):
        yield (int(owners[start]), int(others[start])), positions[start:end]


def _pieces(positions: Ids | None, count: int, most: int) -> Iterator[Ids | None]:
    """Pieces of about the same size, of at most so many positions. None stands for all `count`."""
    whole = count if positions is None else len(positions)
    if whole <= most:
        yield positions
        return
    yield from np.array_split(np.arange(count) if positions is None else positions, -(-whole // most))


def _request(model: Model, want: Want, ids: Ids, routing: Routing) -> Request:
    return lookup_request(model.full_name, want.table.name, want.encoding, *routing.age, ids, want.table.rows)


def _rows_of(answer: Answer, leg: _Leg, model: Model, want: Want) -> Bytes:
    expected = (len(want.ids) if leg.positions is None else len(leg.positions)) * want.row_bytes
    if len(answer.rows) != expected or answer.version != model.version:
        raise ProtocolError(
            f"{leg.call.address} answered {len(answer.rows)} bytes of version {answer.version!r} where {expected} "
            f"bytes of {model.full_name}/{want.table.name} were asked; is it a service of another release?"
        )
    return answer.rows.reshape(-1, want.row_bytes)


def _still_missing(failures: Sequence[tuple[_Leg, Failure]], nowhere: dict[int, Ids | None]) -> dict[int, Ids | None]:
    pieces: dict[int, list[Ids]] = {}
    for index, positions in (*nowhere.items(), *((leg.want, leg.positions) for leg, _ in failures)):
        pieces.setdefault(index, []).extend([] if positions is None else [positions])
    return {index: np.concatenate(positions) if positions else None for index, positions in pieces.items()}


def _gave_up(
    model: Model,
    wants: Sequence[Want],
    missing: dict[int, Ids | None],
    failures: Sequence[tuple[_Leg, Failure]],
    routing: Routing,
) -> Exception:
    """Names the rows and the shards concerned."""
    rows = "; ".join(
        f"{len(wants[index].ids if positions is None else positions)} of {len(wants[index].ids)} rows of "
        f"{model.full_name}/{wants[index].table.name} "
        f"(the first: row {int(wants[index].ids[0 if positions is None else positions[0]])})"
        for index, positions in missing.items()
    )
    by_address = {leg.call.address: failure for leg, failure in failures}
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


def run(steps: Steps[T], transport: Transport) -> T:
    """Drive steps on the calling thread."""
    answers: Any = None
    try:
        while True:
            step = steps.send(answers)
            if isinstance(step, float):
                time.sleep(step)
            elif isinstance(step, Aside):
                _send_aside(step, transport)
            else:
                answers = transport.exchange(step)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        if answers is not None:
            answers.close()  # steps that failed left some of them


async def run_async(steps: Steps[T], transport: Transport) -> T:
    """Drive steps on the running event loop."""
    answers: Any = None
    try:
        while True:
            step = steps.send(answers)
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Aside):
                _send_aside(step, transport)
            else:
                answers = await transport.together.exchange(step)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _send_aside(step: Aside, transport: Transport) -> None:
    transport.send(step.call).add_done_callback(lambda future: step.done(future.result()))
