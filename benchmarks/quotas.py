"""What rights and quotas cost a call, and what an identity at its limit costs another one.

    python -m benchmarks.quotas [--rounds 5] [--seconds 4]

The first figures are CPU time of one thread, without a service. The others are of `up --secure`: a client asks for a
token's rows again and again, alone, beside a neighbour that is at its quota, and beside the same neighbour without one.
Each round has all three, and ends alone once more. What counts is the median of the rounds' ratios to the mean of both
times alone. The ratio of the second to the first one is the machine's own noise.

The neighbour is two processes that run when nobody else wants a core, as if they had a machine of their own. What they
do with their rows is no cost of the service. With --crowded they take cores as everybody does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data import ROW_BYTES, make_data
from benchmarks.peers.base import child, receive, service, wait_for_end
from embedding_service import EmbeddingClient
from embedding_service.errors import Overloaded
from embedding_service.methods import RIGHTS
from embedding_service.security.authority import prepare_folder
from embedding_service.security.policy import digest_of
from embedding_service.security.server import Files, Security

# Of a token, and of what the neighbour asks for.
IDS, MANY_IDS = 12, 12 * 1024
QUOTA = 100_000
CALLS = 200_000
# Of the neighbour, and the seconds after which it has taken what may be taken at once.
PROCESSES, SETTLING = 2, 2.0
TABLE = "int8/ngram"


def identity(name: str, quota: int = 0) -> str:
    """A table of the policy. Its token is its name."""
    limits = f"calls = 100\nrows_per_second = {quota}\nbytes_per_second = {quota * ROW_BYTES}\n" if quota else ""
    return f'\n[identities.{name}]\ntokens = ["sha256:{digest_of(name)}"]\nread = ["*"]\n{limits}'


def write_policy(folder: Path) -> None:
    """Add all of ours to the policy of `up --secure`."""
    more = identity("quiet") + identity("limited", QUOTA) + identity("unlimited") + identity("metered", 10**9)
    with (folder / "policy.toml").open("a") as policy:
        policy.write(more)


def cost(folder: Path) -> Iterator[tuple[str, float]]:
    """Microseconds of a call, by what is done for it."""
    prepare_folder(folder, ["127.0.0.1"], ["controller"])
    write_policy(folder)
    ours = folder / "controller"
    security = Security(Files(ours / "tls.crt", ours / "tls.key", folder / "ca.crt", folder / "policy.toml"))
    path = "embedding.v1.EmbeddingService/Lookup"
    whole = f"/{path}".encode()

    def rights(bearer: str) -> None:
        caller = security.admit(RIGHTS[path], whole, bearer=bearer)
        assert caller and caller.may_read("int8", "1")

    def both(bearer: str) -> None:
        caller = security.admit(RIGHTS[path], whole, bearer=bearer)
        assert caller and caller.may_read("int8", "1") and caller.quota
        caller.quota.enter()
        caller.spend(IDS, IDS * ROW_BYTES)
        caller.quota.leave()

    yield "rights of a call", _timed(rights, "Bearer unlimited")
    yield "rights and quota of a call", _timed(both, "Bearer metered")
    caller = security.admit(RIGHTS[path], whole, bearer="Bearer metered")
    assert caller

    def message(_: str) -> None:
        assert caller.may_read("int8", "1")
        caller.spend(0, 0)

    yield "rights and quota of a message on a stream", _timed(message, "")


def _timed(work: Callable[[str], None], argument: str) -> float:
    best = float("inf")
    for _ in range(5):
        began = time.thread_time()
        for _ in range(CALLS):
            work(argument)
        best = min(best, (time.thread_time() - began) / CALLS * 1e6)
    return best


def _neighbour(pipe: Connection, address: str, folder: Path, token: str, rows: int, crowded: bool) -> None:
    """Asks for many rows, again and again. Tells how many it got, when told to end."""
    if not crowded:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    ids, got = torch.arange(MANY_IDS) % rows, 0
    with EmbeddingClient(address, tls=folder / "client" / "ca.crt", token=token, near=False, timeout=5) as client:
        client.lookup(TABLE, ids[:1])
        pipe.send("asks")
        while not pipe.poll():
            with suppress(Overloaded):
                got += len(client.lookup(TABLE, ids))
    pipe.send(got)
    wait_for_end(pipe)


def beside(token: str, measure: Callable[[], float], *where: Any) -> tuple[float, float]:
    """What `measure` tells beside a neighbour with this token, and the rows a second that the neighbour got."""
    with ExitStack() as stack:
        pipes = [stack.enter_context(child(_neighbour, *where[:2], token, *where[2:]))[1] for _ in range(PROCESSES)]
        for pipe in pipes:
            receive(pipe, 30)
        began = time.monotonic()
        time.sleep(SETTLING)
        measured = measure()
        for pipe in pipes:
            pipe.send("end")
        seconds = time.monotonic() - began
        return measured, sum(receive(pipe, 30) for pipe in pipes) / seconds


def p99(client: EmbeddingClient, rows: int, seconds: float) -> float:
    """Milliseconds that 99 of 100 lookups of a token take at most."""
    chance, took = np.random.default_rng(1), []
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        client.lookup(TABLE, torch.from_numpy(chance.integers(0, rows, IDS)))
        took.append(time.perf_counter() - began)
    return 1000 * float(np.quantile(took, 0.99))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--crowded", action="store_true", help="the neighbour's own computing counts too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        for what, microseconds in cost(folder / "cost"):
            print(f"{what}: {microseconds:.2f} us", flush=True)
        data = make_data(folder / "data", 1 << 16)
        secure = folder / "secure"
        prepare_folder(secure, ["127.0.0.1"], [])
        write_policy(secure)
        ratios: dict[str, list[float]] = {"limited": [], "unlimited": [], "nobody": []}
        with (
            service(data.store, folder / "up.log", "--shards=2", f"--secure={secure}") as (address, _),
            EmbeddingClient(address, tls=secure / "ca.crt", token="quiet", near=False) as client,
        ):
            measure = partial(p99, client, data.rows, given.seconds)
            p99(client, data.rows, 1.0)
            for _ in range(given.rounds):
                alone, others, told = measure(), {}, []
                for token in ("limited", "unlimited"):
                    others[token], got = beside(token, measure, address, secure, data.rows, given.crowded)
                    told.append(f"beside {token}, who gets {got:,.0f} rows/s, {others[token]:.2f} ms")
                again = measure()
                ratios["nobody"].append(again / alone)
                for token, found in others.items():
                    ratios[token].append(2 * found / (alone + again))
                print(f"p99 alone {alone:.2f} ms, {', '.join(told)}, alone again {again:.2f} ms", flush=True)
        for token, rounds in ratios.items():
            print(f"p99 beside {token}: {statistics.median(rounds):.2f} times that alone")


if __name__ == "__main__":
    main()
