"""Measuring: clients in processes of their own, and rounds in which every peer has a short slice.

Peers are compared within a round of a second or so, in which the machine is as busy for one as for the other. A ratio
is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.data import DIM, Data, Ids, named_rows
from benchmarks.peers.base import START_SECONDS, Lookup, Peer, Server, Unusable, child, receive
from embedding_service.commands.load import Load, run_load, together

# Clients are told to begin a little later than now, so that several do at the same time.
LEAD_SECONDS = 0.03


@dataclass(frozen=True)
class Slice:
    """A short load of `tokens` a lookup, with `ids` of one kind. `rate` is lookups a second, from `threads` threads."""

    tokens: int
    seconds: float
    ids: str = "uniform"
    clients: int = 1
    rate: float | None = None
    threads: int = 1


@dataclass
class Outcome:
    """What a slice gave, with CPU seconds of all clients and of all servers."""

    load: Load
    client_cpu: float
    server_cpu: float


# By a peer's name and slice: an outcome for each round.
Outcomes = dict[tuple[str, Slice], list[Outcome]]


@dataclass
class Running:
    """A peer with its servers and its clients, each a pipe to a process."""

    peer: Peer
    server: Server
    clients: list[Connection]


@contextmanager
def running(peer: Peer, server: Server, data: Data, clients: int = 1) -> Iterator[Running]:
    """Clients of a served peer. Each got right rows. Raises Unusable."""
    with ExitStack() as stack:
        started = [child(_client, peer, data, server.target) for _ in range(clients)]
        pipes = [stack.enter_context(each)[1] for each in started]
        for pipe in pipes:
            receive(pipe, START_SECONDS)
        yield Running(peer, server, pipes)


def _client(pipe: Connection, peer: Peer, data: Data, target: Any) -> None:
    """A client's process. It gets a Slice and a seed, then a time to begin. It answers with Load and CPU seconds."""
    with ExitStack() as stack:
        lookups = [stack.enter_context(peer.connect(data, target))]
        _check(lookups[0], data)
        pipe.send("connected")
        with contextlib.suppress(EOFError):
            while True:
                what, seed = pipe.recv()
                requests = data.requests(what.ids, what.tokens, seed)
                while len(lookups) < what.threads:
                    lookups.append(stack.enter_context(peer.connect(data, target)))
                calls = [_call(lookup, requests[index :: what.threads]) for index, lookup in enumerate(lookups)]
                calls[0](0)  # the first call after a pause is slow, and nobody's latency
                pipe.send("ready")
                begin = pipe.recv()
                before = time.process_time()
                load = run_load(calls[: what.threads], what.seconds, rate=what.rate, begin=begin)
                pipe.send((load, time.process_time() - before))


def _check(lookup: Lookup, data: Data) -> None:
    """Raise Unusable unless each row is that of its id. A benchmark that reads wrong rows is void."""
    for ids in [*data.requests("uniform", 64, seed=7)[:2], *data.requests("text", 64, seed=7)[:2]]:
        rows = np.asarray(lookup(ids))
        if rows.shape != (len(ids), DIM) or not np.array_equal(rows, named_rows(ids)):
            raise Unusable("it answered with wrong rows")


def _call(lookup: Lookup, requests: Sequence[Ids]) -> Callable[[int], Any]:
    count = len(requests)
    return lambda turn: lookup(requests[turn % count])


def run_slice(peer: Running, what: Slice, seed: int) -> Outcome:
    """One load on one peer. Raises Unusable if it gave errors."""
    pipes = peer.clients[: what.clients]
    for index, pipe in enumerate(pipes):
        pipe.send((what, 1000 * seed + index))
    for pipe in pipes:
        receive(pipe, START_SECONDS)
    before = cpu_seconds(peer.server.pids)
    begin = time.perf_counter() + LEAD_SECONDS
    for pipe in pipes:
        pipe.send(begin)
    results = [receive(pipe, 4 * what.seconds + START_SECONDS) for pipe in pipes]
    server_cpu = cpu_seconds(peer.server.pids) - before
    load = together([load for load, _ in results])
    if set(load.errors) - {"unsent"}:
        raise Unusable(f"{peer.peer.name} failed under load: {dict(load.errors)}")
    return Outcome(load, sum(cpu for _, cpu in results), server_cpu)


def run_rounds(
    peers: Sequence[Running], slices: Sequence[Slice], rounds: int, progress: Callable[[], object] = lambda: None
) -> Outcomes:
    """Run every slice on every peer in every round. Another peer comes first each time."""
    outcomes: Outcomes = {}
    for turn in range(rounds):
        for what in slices:
            first = turn % len(peers)
            for peer in [*peers[first:], *peers[:first]]:
                outcomes.setdefault((peer.peer.name, what), []).append(run_slice(peer, what, seed=turn))
            progress()
    return outcomes


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU seconds that processes used, by their own clocks (ids as clock_getcpuclockid(3) makes them)."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)
