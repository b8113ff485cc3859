"""Shards whose rows lie in a GPU's memory, or beside it: the whole service, with its own processes."""

from pathlib import Path

import pytest
from support.checkpoints import longcat_table
from support.cluster import cluster, until
from support.load import Load

pytestmark = [pytest.mark.service, pytest.mark.gpu]


@pytest.mark.parametrize("tiers", [("cuda", "cuda"), ("cuda-cached", "cuda-cached"), ("ram", "cuda")])
def test_parts_move_between_gpu_shards_without_a_lookup_lost(
    small_store: Path, tmp_path: Path, tiers: tuple[str, str]
) -> None:
    with cluster(tmp_path, small_store, "--expect-shards=2", "--replicas=1", "--grace=1") as running:
        for name, tier in zip("ab", tiers, strict=True):
            running.start_shard(name, f"--tier={tier}", "--memory=64MiB")
        running.wait_serving()
        with Load(list(running.addresses.values()), "m/ngram", longcat_table()) as load:
            until(lambda: load.lookups > 30, "lookups")
            running.start_shard("c", f"--tier={tiers[1]}", "--memory=64MiB")
            running.wait_whole(1, shards=3)
            running.processes["b"].end()
            del running.addresses["b"]
            running.wait_whole(1, shards=2)
            seen = load.lookups
            until(lambda: load.lookups > seen + 30, "further lookups")
        load.check()
