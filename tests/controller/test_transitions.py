"""Shards that join, drain and are replaced under a load whose rows are checked: nothing is lost, little moves."""

import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.checkpoints import longcat_table
from support.cluster import Cluster, cluster, until
from support.load import Load

from embedding_service.serving import ALIVE
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.store import Store

pytestmark = pytest.mark.service

PARTS_MOVED = "holds m@1/ngram"


@pytest.fixture
def own_store(checkpoint: Path, tmp_path: Path) -> Path:
    import_checkpoint(checkpoint, str(tmp_path / "store"), "m", dtype="fp32", part_bytes=16 << 10)
    return tmp_path / "store"


def parts_of(store: Path) -> int:
    return len(Store(store).manifest("m").tables[0].parts)


def loads(running: Cluster, name: str) -> int:
    """Parts that a shard loaded since it was first started."""
    return running.processes[name].output().count(PARTS_MOVED)


def settled(running: Cluster, shards: int, parts: int) -> None:
    """Wait until `shards` shards hold every part once, shared evenly, and nothing is on its way."""
    running.wait_until(
        lambda status: (
            len(status.shards) == shards
            and sum(shard.parts for shard in status.shards) == parts
            and max(shard.parts for shard in status.shards) - min(shard.parts for shard in status.shards) <= 2
            and not any(shard.parts_missing for shard in status.shards)
        ),
        f"{shards} shards to share {parts} parts",
    )


def test_a_shard_that_joins_gets_its_share_and_no_more_moves(own_store: Path, tmp_path: Path) -> None:
    parts = parts_of(own_store)
    with cluster(tmp_path, own_store, "--expect-shards=3", "--grace=1") as running:
        for name in "abc":
            running.start_shard(name, "--memory=64MiB")
        settled(running, 3, parts)
        before = {name: loads(running, name) for name in "abc"}
        with Load(list(running.addresses.values()), "m/ngram", longcat_table()) as load:
            until(lambda: load.lookups > 30, "lookups")
            running.start_shard("d", "--memory=64MiB")
            settled(running, 4, parts)
        load.check()
        assert loads(running, "d") <= 1.2 * parts / 4 + 1
        assert {name: loads(running, name) for name in "abc"} == before


def test_a_shard_that_is_told_to_end_hands_its_parts_over_first(own_store: Path, tmp_path: Path) -> None:
    parts = parts_of(own_store)
    with cluster(tmp_path, own_store, "--expect-shards=3", "--grace=1") as running:
        for name in "abc":
            running.start_shard(name, "--memory=64MiB")
        settled(running, 3, parts)
        with Load(list(running.addresses.values()), "m/ngram", longcat_table()) as load:
            until(lambda: load.lookups > 30, "lookups")
            assert running.processes["b"].end(signal.SIGTERM) == 0
            settled(running, 2, parts)
        load.check()
        assert "drained" in running.processes["b"].output()


def test_a_rolling_restart_loses_no_lookup(own_store: Path, tmp_path: Path) -> None:
    parts = parts_of(own_store)
    with cluster(tmp_path, own_store, "--expect-shards=2", "--grace=1") as running:
        for name in "ab":
            running.start_shard(name, "--memory=64MiB")
        settled(running, 2, parts)
        with Load(list(running.addresses.values()), "m/ngram", longcat_table()) as load:
            for name in "ab":
                assert running.processes[name].end(signal.SIGTERM) == 0
                running.start_shard(name, "--memory=64MiB")
                settled(running, 2, parts)
        load.check()


def test_a_shard_nobody_can_take_over_from_ends_after_its_time(own_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, own_store, "--expect-shards=2") as running:
        size = Store(own_store).manifest("m").bytes
        for name in "ab":
            running.start_shard(name, f"--memory={size * 2 // 3}", "--drain-seconds=3")
        running.wait_serving()
        assert running.processes["a"].end(signal.SIGTERM) == 0
        assert "not drained after 3.0 s" in running.processes["a"].output()


def test_the_last_shards_need_not_wait_for_anybody(own_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, own_store, "--expect-shards=1") as running:
        running.start_shard("a", "--drain-seconds=200")
        running.wait_serving()
        assert running.processes["a"].end(signal.SIGTERM) == 0
        assert "INFO drained" in running.processes["a"].output()


def test_a_shard_that_waits_for_others_is_alive_and_not_ready(own_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, own_store, "--expect-shards=2") as running:
        running.start_shard("a", "--memory=64MiB")
        running.wait_until(lambda status: len(status.shards) == 1, "its registration")
        with grpc.insecure_channel(running.addresses["a"]) as channel:

            def said(name: str) -> int:
                return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name)).status

            assert said(ALIVE) == health_pb2.HealthCheckResponse.SERVING
            assert said("") == health_pb2.HealthCheckResponse.NOT_SERVING
            running.start_shard("b", "--memory=64MiB")
            until(lambda: said("") == health_pb2.HealthCheckResponse.SERVING, "its first routing")
