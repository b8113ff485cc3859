"""Decisions of a controller with many domains: `python -m benchmarks.deciding --parts 1000 --domains 100 --shards 100`.

While it decides, it hears no shard and answers nobody. Seconds are of the CPU, so that other processes do not count.
Everything is in memory: no store, no network, and a plan that is given.
"""

import argparse
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import process_time
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from benchmarks.growth.swarm import CHECKSUM, ROW_BYTES, table_of
from embedding_service.controller.events import (
    Event,
    Joined,
    Looked,
    NoteTerm,
    Plan,
    Planned,
    ReadTerm,
    Reported,
    TermNoted,
    TermRead,
    Tick,
)
from embedding_service.controller.presenter import metrics_of
from embedding_service.controller.state import ControllerState, Settings
from embedding_service.machine import spare_collections
from embedding_service.placement.demand import Placement
from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import Base, Manifest, Overlay, overlay_file
from embedding_service.store.store import Catalogue
from embedding_service.wire import control_pb2 as control

LIMIT_SECONDS = 0.5
COPIES = 2


def manifests(parts: int, domains: int) -> list[Manifest]:
    """A base, and domains that replace a row of it."""
    about: dict[str, Any] = {"version": "1", "family": "", "hash_params": {}, "tables": (table_of(parts),)}
    row = Overlay(part=0, rows=1, file=overlay_file("ngram", 0), bytes=ROW_BYTES + 8, checksum=CHECKSUM)
    base = Base(model="m", version="1", overlays={"ngram": (row,)})
    each = [Manifest(model=f"m+{number}", format_version=2, base=base, **about) for number in range(domains)]
    return [Manifest(model="m", **about), *each]


class Cluster:
    """A state with shards that do as they are told."""

    def __init__(self, parts: int, domains: int, shards: int) -> None:
        self.now = 0.0
        settings = Settings("127.0.0.1:1", replicas=COPIES, expect_shards=shards)
        self.state = ControllerState(settings, lambda: self.now, random.Random(1))
        self.streams = [f"s{number}" for number in range(shards)]
        self.told = dict.fromkeys(self.streams, 0)
        for stream in self.streams:
            self.handle(Joined(stream, self.report(stream)))
        self.found = Catalogue(manifests={each.model: [each] for each in manifests(parts, domains)})
        self.handle(Looked(self.found))
        while not self.state.routing:
            self.tick()
        self.tell()
        self.held = {stream: sorted(self.state.fleet.shards[stream].assigned or ()) for stream in self.streams}

    def report(self, name: str, held: Iterable[PartKey] = ()) -> control.ShardReport:
        """What a shard says that holds these parts."""
        parts = [key.to_wire() for key in held]
        return control.ShardReport(
            shard_id=name,
            address=f"127.0.0.1:{1000 + int(name[1:])}",
            device="cpu",
            memory_limit=1 << 40,
            has_parts=True,
            parts=parts,
            obeyed=self.told[name],
        )

    def handle(self, event: Event) -> None:
        """Take an event in, and answer what is asked about it."""
        for instruction in self.state.handle(event):
            match instruction:
                case ReadTerm():
                    self.handle(TermRead(0, 1_000_000))
                case NoteTerm():
                    self.handle(TermNoted(True))
                case Plan():
                    self.handle(Planned(given(instruction)))

    def tick(self) -> None:
        """What there is to decide is decided."""
        self.now += 1.0
        self.handle(Tick())

    def decide(self) -> None:
        """Look at the store, which is as it was, and decide."""
        self.handle(Looked(self.found))
        self.tick()

    def tell(self) -> None:
        """Make the messages for all shards."""
        for stream in self.streams:
            if message := self.state.message(stream):
                self.told[stream] = message.number

    def hear(self, streams: Iterable[str], lacking: str = "") -> None:
        """Shards say that they hold all that they were told, and one of them all but one part."""
        for stream in streams:
            self.handle(Reported(stream, self.report(stream, self.held[stream][stream == lacking :])))


def given(question: Plan) -> Placement:
    """Each part on the next shards in turn."""
    names = [node.shard for node in question.nodes]
    placement = Placement(parts_of={name: set() for name in names})
    for index, demand in enumerate(question.parts):
        chosen = [names[(index + copy) % len(names)] for copy in range(COPIES)]
        placement.shards_of[demand.key] = chosen
        for name in chosen:
            placement.parts_of[name].add(demand.key)
    return placement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--parts", type=int, default=1000, help="parts of the base, and of each domain")
    parser.add_argument("--domains", type=int, default=100)
    parser.add_argument("--shards", type=int, default=100)
    options = parser.parse_args()
    spare_collections()  # as a controller does
    grid = Grid("what", "CPU seconds", title_justify="left")
    taken: dict[str, float] = {}

    @contextmanager
    def measured(what: str) -> Iterator[None]:
        began = process_time()
        yield
        taken[what] = process_time() - began
        grid.add_row(what, f"{taken[what]:.3f}")

    with measured("joins, first plan and first messages"):
        cluster = Cluster(options.parts, options.domains, options.shards)
    first = cluster.streams[0]
    with measured("reports of all parts but one"):
        cluster.hear(cluster.streams, lacking=first)
    with measured("the decision after that"):
        cluster.tick()
    with measured("messages to all shards, with the routing"):
        cluster.tell()
    cluster.hear(cluster.streams, lacking=first)
    cluster.decide()
    changes: dict[str, Callable[[], object]] = {
        "a decision where nothing changed": cluster.decide,
        "a report of one part more": lambda: cluster.hear([first]),
        "the decision after that ": cluster.tick,
        "metrics": lambda: list(metrics_of(cluster.state, "")),
    }
    for what, change in changes.items():
        with measured(what):
            change()
    keys = options.parts * (options.domains + 1)
    grid.title = f"{keys:,} parts in {COPIES} copies, {options.shards} shards"
    Console(highlight=False).print(grid)
    if taken["a decision where nothing changed"] > LIMIT_SECONDS:
        raise SystemExit(f"over the limit of {LIMIT_SECONDS} s for a decision where nothing changed")


if __name__ == "__main__":
    main()
