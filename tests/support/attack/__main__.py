"""Start a service and its neighbours, attack it in every way, and judge. Everything is over within `seconds`.

make attack SEED=3

With --secure the service speaks TLS. The attacker then has a client's token, and the certificate of another shard. A
model worker speaks HTTPS then and asks for keys, of which the attacker has one.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from embedding_service.security.authority import URI, Authority, write_private
from embedding_service.security.policy import digest_of
from support.attack.attacker import ATTACKS, SECURED_ATTACKS, SECURED_WORKER_ATTACKS, WORKER_ATTACKS
from support.attack.child import start
from support.attack.members import CONTROLLER, COPIES, Members
from support.attack.neighbours import PYTHON, THIN, WORKER, Figures, Neighbour
from support.attack.report import BEFORE, DURING, KEPT_BYTES, Outcome, Result
from support.attack.window import ATTACKER
from support.attack.worker_service import WorkerService
from support.chaos import chaos_store
from support.cluster import START_SECONDS, cluster
from support.security import HOSTS

SHARDS = ("a", "b", "c")
# The limit of open files, of members and of a worker's processes, which a class of attack uses up.
FILES = 1024
CALM_SECONDS = 2.0
# A class gets no less, and no more.
SHORTEST, LONGEST = 1.0, 10.0
# Of a class, besides its window: calm before, and until everything answers and is whole again.
AROUND = 7.0
# An attacker that does not end by itself is told to.
PATIENCE = 5.0
BACK_SECONDS = 5.0
# Until everything has ended.
END_SECONDS = 20.0


class Attacks:
    """One run over a service that is there."""

    def __init__(
        self,
        members: Members,
        neighbours: dict[str, Neighbour],
        worker: WorkerService | None,
        seed: int,
        console: Console,
        longest: float,
    ) -> None:
        self._members = members
        self._neighbours = neighbours
        self._worker = worker
        self._seed = seed
        self._console = console
        self._longest = longest

    def run(self, names: Sequence[str], until: float) -> list[Result]:
        """Each class in turn, in equal shares of the time that is left."""
        results, began, attacked = [], time.monotonic(), 0.0
        for index, name in enumerate(names):
            left = until - time.monotonic()
            if left < SHORTEST + AROUND:
                self._console.print(f"no time is left for {', '.join(names[index:])}")
                results += [Result(name, len(self._members.names)) for name in names[index:]]
                break
            # On a busy machine it takes longer than AROUND until all is whole again.
            around = max(AROUND, (time.monotonic() - began - attacked) / max(index, 1))
            seconds = min(max(left / (len(names) - index) - around, SHORTEST), self._longest)
            results.append(self._attack(name, seconds))
            attacked += seconds
        return results

    def _attack(self, name: str, seconds: float) -> Result:
        self._console.print(f"{name}, {seconds:.0f} s")
        members = self._members
        result = Result(name, len(members.names))
        self._phase(f"{name} {BEFORE}")
        time.sleep(CALM_SECONDS)
        result.resident = members.resident()
        self._phase(f"{name} {DURING}")
        with members.watched():
            result.ended = self._have_attacked(name, seconds)
            result.lost = members.lost()
            result.after = self._memory_back(result.resident)
        result.peak = dict(members.peak)
        self._phase("mending")
        for lost in result.lost:
            members.restart(lost)
        result.not_mended = members.wait_whole()
        for fault in [*(f"{lost} {how}" for lost, how in result.lost.items()), result.not_mended]:
            if fault:
                self._console.print(f"  {fault[:180]}", markup=False)
        return result

    def _have_attacked(self, name: str, seconds: float) -> Counter[str]:
        window = {
            "name": name,
            "seed": self._seed,
            "seconds": seconds,
            "shards": list(self._members.cluster.addresses.values()),
            "controller": self._members.cluster.controller_address,
            "control": self._members.cluster.control_address,
            "secure": str(self._members.cluster.secure or ""),
            "store": str(self._members.cluster.store),
            "worker": self._worker.address if self._worker else "",
            "worker_ca": str(self._worker.credentials / "ca.crt") if self._worker and self._worker.credentials else "",
            "pids": self._members.pids(),
        }
        attacker = start("attacker", json.dumps(window))
        timers = [_after(START_SECONDS, attacker.kill)]
        ended: Counter[str] = Counter()
        assert attacker.stdout
        for line in attacker.stdout:
            if line == "begun\n":
                timers.pop().cancel()
                # Told while it begins a call, gRPC may wait for the call's end forever.
                timers = [
                    _after(seconds + PATIENCE, attacker.terminate),
                    _after(seconds + 2 * PATIENCE, attacker.kill),
                ]
            elif line == "restart controller\n":
                self._members.restart(CONTROLLER)
                self._members.wait_for_controller()
            else:
                ended.update(json.loads(line))
        attacker.wait()
        for timer in timers:
            timer.cancel()
        return ended

    def _memory_back(self, before: dict[str, int]) -> dict[str, int]:
        """The memory of each once it is back, or when that takes too long."""
        end = time.monotonic() + BACK_SECONDS
        while time.monotonic() < end:
            now = self._members.resident()
            if all(now[name] - before[name] < KEPT_BYTES for name in now):
                return now
            time.sleep(0.1)
        return now

    def _phase(self, name: str) -> None:
        for neighbour in self._neighbours.values():
            neighbour.phase(name)


def _after(seconds: float, do: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, do)
    timer.start()
    return timer


def arm(secure: Path) -> None:
    """Give the attacker what one has who got hold of a client's token, and of another shard's certificate."""
    Authority.load(secure).issue(secure / ATTACKER, [f"{URI}/shard/{ATTACKER}", *HOSTS])
    policy = (secure / "policy.toml").read_text()
    theirs = f'[identities.{ATTACKER}]\ntokens = ["sha256:{digest_of(ATTACKER)}"]\nread = ["*"]\n'
    write_private(secure / "policy.toml", (policy + theirs).encode())


def run(
    folder: Path,
    names: Sequence[str],
    seed: int,
    seconds: float,
    console: Console,
    longest: float = LONGEST,
    secured: bool = False,
) -> Outcome:
    """Attack a service that is started for it; `names`: of the classes, `longest`: seconds that one may take."""
    began = time.monotonic()
    store = chaos_store(folder)
    secure = folder / "secure" if secured else None
    limited = ("prlimit", f"--nofile={FILES}:{FILES}")
    options = (f"--replicas={COPIES}", f"--expect-shards={len(SHARDS)}")
    with ExitStack() as stack:
        worker = None
        if any(name.startswith(WORKER) for name in names):
            worker = stack.enter_context(WorkerService(folder, limited, secured=secured))
        members = Members(stack.enter_context(cluster(folder, store, *options, within=limited, secure=secure)))
        if secure:
            arm(secure)
        for name in SHARDS:
            members.start_shard(name)
        if not_whole := members.wait_whole(START_SECONDS):
            raise AssertionError(not_whole)
        addresses = list(members.cluster.addresses.values())
        credentials = secure / "client" if secure else None
        neighbours = {kind: Neighbour(kind, addresses, credentials) for kind in (PYTHON, THIN)}
        if worker:
            worker.wait_until_ready()
            neighbours[WORKER] = Neighbour(WORKER, [worker.address], worker.credentials)
        for neighbour in neighbours.values():
            stack.callback(neighbour.kill)
            neighbour.wait_until_ready()
        attacks = Attacks(members, neighbours, worker, seed, console, longest)
        results = attacks.run(names, began + seconds - END_SECONDS)
        ends = {kind: neighbour.end() for kind, neighbour in neighbours.items()}
    for result in results:
        kinds = (WORKER,) if result.name.startswith(WORKER) else (PYTHON, THIN)
        for phase in (BEFORE, DURING):
            figures = (ends[kind][0].get(f"{result.name} {phase}", Figures()) for kind in kinds)
            setattr(result, phase, sum(figures, Figures()))
    troubles = [f"{kind}: {trouble}" for kind, (_, some) in ends.items() for trouble in some]
    return Outcome(seed, results, troubles, time.monotonic() - began)


def main(
    seconds: Annotated[float, typer.Option(min=30, help="For everything, start and end included.")] = 290.0,
    seed: Annotated[int, typer.Option(help="Of all values.")] = 1,
    only: Annotated[
        str,
        typer.Option(help="Names of classes, or worker: those on a model worker. Default: all others."),
    ] = "",
    secure: Annotated[bool, typer.Option("--secure", help="The service speaks TLS and knows who is who.")] = False,
) -> None:
    """Attack a service, show the figures, and end with code 1 where it did not hold."""
    usual = [*ATTACKS, *(SECURED_ATTACKS if secure else ())]
    of_worker = [*WORKER_ATTACKS, *(SECURED_WORKER_ATTACKS if secure else ())]
    known = [*usual, *of_worker]
    groups = {"": usual, "worker": of_worker}
    names = groups.get(only) or [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"no class of attack {unknown}: there are {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    console = Console(highlight=False, width=170)
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        outcome = run(Path(name), names, seed, seconds, console, secured=secure)
    console.print(outcome.table(), outcome.endings(), outcome.verdict(), sep="\n")
    raise SystemExit(1 if any(result.faults() for result in outcome.results) else 0)


if __name__ == "__main__":
    typer.run(main)
