"""Shards and controllers that come, go, die and hang in a seeded random order, under a load whose rows are checked.

make chaos SECONDS=600 SEED=3

With --secure all of them speak TLS. With --rotate certificates, keys, a token and the policy are replaced each second.
"""

from __future__ import annotations

import contextlib
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from embedding_service import EmbeddingClient
from embedding_service.client.channels import open_channel
from embedding_service.security.access import Access
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub
from support.checkpoints import longcat_checkpoint, longcat_table
from support.cluster import Cluster, Process, cluster, until
from support.load import CheckedLoad, Load, ThinLoad
from support.security import Rotation
from support.tracing import SLOW, Trace

COPIES = 2
FEWEST, MOST = 4, 6
LOST_AFTER = 3.0
CALM_SECONDS = 5.0
TABLE = "m/ngram"
CALM, TROUBLE = "calm", "trouble"
# Rows of each lookup of a near client. They read a million in a run.
NEAR_IDS = 600


def chaos_store(folder: Path) -> Path:
    """A store with model "m", the table of `longcat_table` as fp32, in 19 parts."""
    checkpoint = longcat_checkpoint(folder / "checkpoint")
    import_checkpoint(checkpoint, str(folder / "store"), "m", dtype="fp32", part_bytes=64 << 10)
    return folder / "store"


class Watcher:
    """Follows the controller's routing over its restarts. `ages` are the (term, epoch) in the order seen."""

    def __init__(self, address: str, access: Access | None) -> None:
        self.ages: list[tuple[int, int]] = []
        self._address, self._access = address, access
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """End within a second or so."""
        self._stop.set()
        self._thread.join()

    def went_back(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """The places where an older routing followed a newer one."""
        return [(before, after) for before, after in zip(self.ages, self.ages[1:], strict=False) if after < before]

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            with open_channel(self._address, self._access) as channel:
                try:
                    routing = EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest(), timeout=1)
                except grpc.RpcError:
                    continue  # the controller is away
                self.ages.append((routing.term, routing.epoch))


class TracedLoad(Load):
    """A Python client. Its lookups that take long are told step by step."""

    def __init__(self, addresses: list[str], began: float, **options: Any) -> None:
        super().__init__(addresses, TABLE, longcat_table(), **options)
        self.trace = Trace(self.client, began)

    def _lookup(self, ids: torch.Tensor) -> torch.Tensor:
        with self.trace.lookup():
            return super()._lookup(ids)


@dataclass
class Outcome:
    """The outcome of a run."""

    seed: int
    events: Counter[str]
    loads: dict[str, CheckedLoad]
    watcher: Watcher
    rotations: int

    @property
    def traced(self) -> dict[str, TracedLoad]:
        """The Python clients."""
        return {name: load for name, load in self.loads.items() if isinstance(load, TracedLoad)}

    @property
    def near_rows(self) -> int:
        """Rows that were read in place."""
        return sum(load.client.statistics.near_rows for load in self.traced.values())

    def check(self) -> None:
        """Nothing failed, nothing wrong, and time went forward."""
        for load in self.loads.values():
            load.check()
        assert len(self.watcher.ages) > 1
        assert not self.watcher.went_back()

    def table(self) -> Table:
        """The figures, for people."""
        happened = ", ".join(f"{count} {event}" for event, count in sorted(self.events.items()))
        first, last = self.watcher.ages[0], self.watcher.ages[-1]
        caption = f"{happened}; routing {first} to {last}, went back {len(self.watcher.went_back())} times"
        if self.rotations:
            caption += f"; all files were replaced {self.rotations} times"
        table = Table("lookups", "when", title=f"chaos, seed {self.seed}", caption=caption)
        for heading in ("answered", "p50 ms", "p99 ms", "longest ms", f"over {SLOW * 1000:.0f} ms", "failed", "wrong"):
            table.add_column(heading, justify="right")
        for name, load in self.loads.items():
            for phase in (CALM, TROUBLE):
                p50, p99, longest = np.percentile(load.seconds[phase] or [0.0], [50, 99, 100]) * 1000
                slow = sum(seconds > SLOW for seconds in load.seconds[phase])
                figures = (f"{len(load.seconds[phase]):,}", f"{p50:.1f}", f"{p99:.1f}", f"{longest:.0f}", str(slow))
                in_all = (str(len(load.failed)), str(len(load.wrong))) if phase == TROUBLE else ("", "")
                table.add_row(name, phase, *figures, *in_all)
        return table

    def notes(self) -> list[str]:
        """Besides the table: calls that were given up, where rows came from, and why lookups were slow."""
        notes = []
        for name, load in self.traced.items():
            trace, rows = load.trace, load.client.statistics
            share = trace.late / max(trace.calls, 1)
            notes += [
                f"{name}: {trace.calls:,} calls, {trace.late:,} given up for being late ({share:.2%}); "
                f"{rows.near_rows:,} rows near, {rows.wired_rows:,} over the wire; "
                f"{trace.held_up} were over {SLOW * 1000:.0f} ms as the machine held this process up",
                *trace.slow,
            ]
        return notes


class Chaos:
    """One run: a cluster with two copies of every part, the loads, and the events.

    A shard is killed or made to hang only when every part has its two holders and no other shard is away. Shards join
    and drain, and the controller is killed, at any time.
    """

    def __init__(
        self, running: Cluster, seed: int, console: Console, sockets: Path, rotation: Rotation | None = None
    ) -> None:
        self._cluster = running
        self._rotation = rotation
        self._sockets = sockets
        self._seed = seed
        self._random = random.Random(seed)
        self._console = console
        self._began = time.monotonic()
        self._names = (f"shard-{number}" for number in range(1 << 20))
        self._happened: Counter[str] = Counter()
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._draining: dict[str, Process] = {}
        self._away: set[str] = set()
        self._kinds: dict[str, Callable[[], None]] = {
            "join": self._join,
            "drain": self._drain,
            "kill": self._kill,
            "hang": self._hang,
            "controller killed": self._kill_controller,
        }

    def run(self, seconds: float) -> Outcome:
        """Run `seconds` seconds of events, each kind at least once, with some calm ones before and after.

        Raises AssertionError when the cluster does not mend, or a process ends that should not.
        """
        for _ in range(FEWEST):
            self._join()
        self._wait_whole()
        addresses = list(self._cluster.addresses.values())
        watcher = Watcher(self._cluster.controller_address, self._cluster.access)
        rotation = self._rotation
        own, token = (rotation.client, rotation.thin) if rotation else (self._cluster.access,) * 2
        loads: dict[str, CheckedLoad] = {
            "python client": TracedLoad(addresses, self._began, threads=3, pause=0.01, near=False, tls=own),
            "thin client": ThinLoad(self._running_addresses, TABLE, longcat_table(), pause=0.02, tls=token),
            "near client 1": TracedLoad(addresses, self._began, threads=1, pause=0.02, ids=NEAR_IDS, tls=own),
            "near client 2": TracedLoad(addresses, self._began, threads=1, pause=0.02, ids=NEAR_IDS, tls=own),
        }
        self._happened.clear()
        try:
            with contextlib.ExitStack() as running:
                for load in loads.values():
                    running.enter_context(load)
                self._phase(loads, CALM)
                self._rest(CALM_SECONDS)
                if rotation:
                    running.enter_context(rotation)
                self._phase(loads, TROUBLE)
                self._trouble(seconds)
                self._phase(loads, CALM)
                self._rest(CALM_SECONDS)
        finally:
            watcher.stop()
        return Outcome(self._seed, self._happened, loads, watcher, rotation.rounds if rotation else 0)

    def _phase(self, loads: dict[str, CheckedLoad], phase: str) -> None:
        self._say(phase)
        for load in loads.values():
            load.phase = phase

    def _trouble(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for kind in self._order():
            if kind in ("kill", "hang"):
                self._wait_whole()
            if time.monotonic() > end and len(self._happened) == len(self._kinds):
                break
            self._kinds[kind]()
            self._happened[kind] += 1
            self._rest(self._random.uniform(0.2, 2.5))
        self._wait_whole()

    def _order(self) -> Iterator[str]:
        """Rounds of all kinds, shuffled. A kind that needs more or fewer shards waits for its turn."""
        while True:
            left = self._random.sample(sorted(self._kinds), len(self._kinds))
            while kind := next((kind for kind in left if self._possible(kind)), None):
                left.remove(kind)
                yield kind

    def _possible(self, kind: str) -> bool:
        shards = len(self._cluster.addresses) - len(self._draining)
        return shards < MOST if kind == "join" else shards > FEWEST if kind == "drain" else True

    # The kinds

    def _join(self) -> None:
        name = next(self._names)
        self._start(name)
        self._say(f"{name} joins")

    def _drain(self) -> None:
        name = self._pick()
        self._draining[name] = self._cluster.processes[name]
        self._draining[name].popen.terminate()
        self._say(f"{name} drains")

    def _kill(self) -> None:
        name, seconds = self._pick(), self._random.uniform(0, 2 * LOST_AFTER)
        self._away.add(name)
        self._cluster.processes.pop(name).end(signal.SIGKILL)
        self._say(f"{name} is killed, to be started again in {seconds:.1f} s")

        def back() -> None:
            self._start(name)
            self._away.discard(name)
            self._say(f"{name} is started again")

        self._later(seconds, back)

    def _hang(self) -> None:
        name, seconds = self._pick(), self._random.uniform(1, 2 * LOST_AFTER)
        process = self._cluster.processes[name]
        self._away.add(name)
        process.popen.send_signal(signal.SIGSTOP)
        self._say(f"{name} hangs for {seconds:.1f} s")

        def go_on() -> None:
            process.popen.send_signal(signal.SIGCONT)
            self._away.discard(name)
            self._say(f"{name} goes on")

        self._later(seconds, go_on)

    def _kill_controller(self) -> None:
        until(self._ready, "a controller that is up")  # else it might never be, and draining shards give up
        self._cluster.processes["controller"].end(signal.SIGKILL)
        self._cluster.start_controller()
        self._say("the controller is killed and started again")

    # What they need

    def _start(self, name: str) -> None:
        # A rate that makes the few bytes of this table move for a second or two.
        near = f"--near={self._sockets}/{name}"
        with self._rotation.paused(name) if self._rotation else contextlib.nullcontext():
            self._cluster.start_shard(name, "--load-rate=1MiB", "--memory=64MiB", near)

    def _pick(self) -> str:
        """A shard that came up and does not drain or hang. A drain begins only after a shard came up."""
        return self._random.choice(until(self._ready, "a shard that is up"))

    def _ready(self) -> list[str]:
        self._tend()
        known = {shard.stats.pid for shard in self._cluster.status().shards}
        staying = [name for name in self._cluster.addresses if name not in self._away | self._draining.keys()]
        return [name for name in staying if self._cluster.processes[name].popen.pid in known]

    def _running_addresses(self) -> list[str]:
        return list(self._cluster.addresses.values())

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, action))

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._tend()
            time.sleep(0.05)

    def _wait_whole(self) -> None:
        until(self._is_whole, f"every part on {COPIES} shards; status: {self._cluster.status()}")

    def _is_whole(self) -> bool:
        self._tend()
        return not self._due and not self._draining and self._cluster.is_whole(COPIES)

    def _tend(self) -> None:
        """Do what is due, take leave of drained shards, and see that no shard died by itself."""
        for entry in [entry for entry in self._due if entry[0] <= time.monotonic()]:
            self._due.remove(entry)
            entry[1]()
        for name in [name for name, process in self._draining.items() if not process.runs]:
            process = self._draining.pop(name)
            assert handed_over(process.output()), f"{name} ended without handing over:\n{process.output()}"
            del self._cluster.addresses[name], self._cluster.processes[name]
            self._say(f"{name} has drained and ended")
        for name, process in self._cluster.processes.items():
            assert process.runs or name in self._draining, f"{name} died:\n{process.output()}"

    def _say(self, what: str) -> None:
        self._console.print(f"{time.monotonic() - self._began:6.1f} s  {what}", highlight=False)


def handed_over(output: str) -> bool:
    """Whether a shard that was told to end did so in order. One that held nothing has nothing to hand over."""
    return "INFO drained" in output or "INFO draining: " not in output


def run(
    folder: Path,
    store: Path,
    seed: int,
    seconds: float,
    console: Console,
    secure: bool = False,
    rotate: bool = False,
) -> Outcome:
    """One run over a store made by `chaos_store`. Its processes' output goes to `folder`.

    With `secure` everybody speaks TLS, and with `rotate` what they show is replaced every second.
    """
    options = (f"--replicas={COPIES}", f"--lost-after={LOST_AFTER}", "--grace=2")
    # The path of a socket may have 107 bytes, and that of a test's folder may be long.
    with (
        tempfile.TemporaryDirectory(prefix="near-") as sockets,
        cluster(folder, store, *options, secure=folder / "secure" if secure or rotate else None) as running,
    ):
        rotation = Rotation(folder / "secure") if rotate else None
        return Chaos(running, seed, console, Path(sockets), rotation).run(seconds)


def unserved_seconds(folder: Path, store: Path) -> float:
    """How long nobody serves a killed shard's rows, with one copy of each part and default options."""
    with cluster(folder, store, "--expect-shards=3") as running:
        for name in "abc":
            running.start_shard(name)
        running.wait_serving()
        routing = running.stub("a").GetRouting(wire.GetRoutingRequest())
        [table] = routing.models[0].tables
        [owned] = [index for index, shard in enumerate(routing.shards) if shard.id == "b"]
        firsts = [part for part, owners in enumerate(table.parts) if list(owners.shards) == [owned]]
        ids = torch.tensor(firsts) * routing.models[0].model.tables[0].rows_per_part
        with EmbeddingClient([running.addresses[name] for name in "ac"], timeout=60) as client:
            client.lookup(TABLE, ids)
            running.processes["b"].end(signal.SIGKILL)
            began = time.monotonic()
            rows = client.lookup(TABLE, ids)
        assert torch.equal(rows, longcat_table()[ids])
        return time.monotonic() - began


def main(
    seconds: Annotated[float, typer.Option(min=1, help="How long shards come and go.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the order and the choice of shards.")] = 1,
    secure: Annotated[bool, typer.Option("--secure", help="Everybody speaks TLS.")] = False,
    rotate: Annotated[bool, typer.Option("--rotate", help="Certificates, keys and policy change each second.")] = False,
) -> None:
    """Run chaos for a while, show the figures, and end with code 1 if a lookup failed or a row was wrong."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        store = chaos_store(folder)
        outcome = run(folder, store, seed, seconds, console, secure, rotate)
        console.print(outcome.table())
        for note in outcome.notes():
            console.print(note, markup=False, soft_wrap=True)
        if not (secure or rotate):
            unserved = unserved_seconds(folder, store)
            console.print(f"with one copy, a killed shard's rows were served by nobody for {unserved:.1f} s")
    outcome.check()


if __name__ == "__main__":
    typer.run(main)
