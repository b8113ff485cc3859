"""Bytes between zones cost money: what the shards of two zones were asked for, by their own metrics."""

import signal
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import Cluster, cluster, free_port, routing_of, until
from support.load import Load

from embedding_service.client.client import TOPOLOGY
from embedding_service.placement.routing import Routing
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire import embedding_pb2 as wire

ZONES = {"a": ("a1", "a2"), "b": ("b1", "b2")}


class Zones:
    """Two shards in each of two zones."""

    def __init__(self, running: Cluster) -> None:
        self.running = running
        self._metrics = {name: free_port() for names in ZONES.values() for name in names}

    def start(self, zone: str) -> None:
        for name in ZONES[zone]:
            self.running.start_shard(name, f"--topology={zone}", f"--metrics-port={self._metrics[name]}")

    def kill(self, zone: str) -> None:
        for name in ZONES[zone]:
            self.running.processes[name].end(signal.SIGKILL)

    def row_bytes(self, zone: str) -> float:
        """All that its shards have answered, to other shards too."""
        return sum(self._metric(name, "embedding_row_bytes_total") for name in ZONES[zone])

    def _metric(self, shard: str, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics[shard]}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        [value] = [line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(value)


@pytest.mark.service
def test_n8_no_row_crosses_zones_while_all_shards_live_and_all_goes_on_without_one_zone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = longcat_table()
    monkeypatch.setenv(TOPOLOGY, "a")  # the client's; shards are told theirs
    import_checkpoint(checkpoint, str(tmp_path / "store"), "m", dtype="fp32", part_bytes=64 << 10)
    options = ("--replicas=2", "--expect-shards=4", "--lost-after=2", "--grace=1")
    with cluster(tmp_path, tmp_path / "store", *options) as running:
        zones = Zones(running)
        zones.start("a")
        zones.start("b")
        until(lambda: is_spread(running), "a copy in each zone")
        with Load(list(running.addresses.values()), "m/ngram", table) as load:
            until(lambda: nothing_crosses(zones, partial(more, load)), "lookups in the client's zone alone")
            thin = partial(look_up_thin, running, "a1", table)
            until(lambda: nothing_crosses(zones, thin), "a thin client's lookup in one zone")
            until(lambda: zones.row_bytes("a") >= table.nbytes, "all rows to be counted")
            zones.kill("a")
            until(lambda: not nothing_crosses(zones, partial(more, load)), "lookups in the other zone")
            zones.start("a")
            until(lambda: is_spread(running), "a copy in each zone again")
            until(lambda: nothing_crosses(zones, partial(more, load)), "the client to come back to its zone")
        load.check()


def is_spread(running: Cluster) -> bool:
    """Whether each zone has one copy of every part and no other, as all shards know."""
    if not running.is_whole(2):
        return False
    routing = Routing(routing_of(running.addresses["b1"]))
    parts = routing.model("m").table("ngram").owners
    return all(sorted(routing.topologies[shard] for shard in owners) == ["a", "b"] for owners in parts)


def more(load: Load, lookups: int = 100) -> None:
    before = load.lookups
    until(lambda: load.lookups > before + lookups, "more lookups")


def look_up_thin(running: Cluster, shard: str, table: torch.Tensor) -> None:
    """What it does not hold, it fetches of its own zone."""
    asked = wire.LookupRequest(model="m", table="ngram", ids=range(len(table)))
    answer = running.stub(shard).Lookup(asked, timeout=120)
    assert torch.equal(torch.frombuffer(bytearray(answer.rows), dtype=torch.float32).view(table.shape), table)


def nothing_crosses(zones: Zones, look_up: Callable[[], None]) -> bool:
    """Whether what it looks up was answered in zone a. Where a shard stalls for 2 s, the other zone is asked."""
    before = zones.row_bytes("b")
    look_up()
    return zones.row_bytes("b") == before
