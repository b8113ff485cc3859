"""Prometheus metrics of every process, and what a shard counts."""

import tempfile
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from support.checkpoints import longcat_table
from support.cluster import Cluster, cluster, free_port, until

from embedding_service import EmbeddingClient
from embedding_service.client.status import get_status
from embedding_service.commands.query import status_tables
from embedding_service.store.importing import import_checkpoint

pytestmark = pytest.mark.service


def scrape(port: int) -> dict[str, float]:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).raise_for_status().text
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def test_n7_shard_and_controller_tell_prometheus(checkpoint: Path, tmp_path: Path) -> None:
    manifest = import_checkpoint(checkpoint, str(tmp_path / "store"), "m", dtype="fp32", part_bytes=64 << 10)
    parts = len(manifest.tables[0].parts)
    shard_port, controller_port = free_port(), free_port()
    options = ("--expect-shards=1", f"--metrics-port={controller_port}")
    with (
        tempfile.TemporaryDirectory(prefix="near-") as sockets,
        cluster(tmp_path, tmp_path / "store", *options) as running,
    ):
        running.start_shard("a", f"--metrics-port={shard_port}", f"--near={sockets}/a")
        running.wait_serving()
        with EmbeddingClient(running.addresses["a"], near=False) as client:
            for _ in range(3):
                assert torch.equal(client.lookup("m/ngram", torch.arange(50)), longcat_table()[:50])
        until(lambda: scrape(shard_port)["embedding_lookup_seconds_count"] == 3, "all lookups to be counted")
        shard = scrape(shard_port)
        assert (shard["embedding_lookups_total"], shard["embedding_rows_total"]) == (3, 150)
        assert shard["embedding_row_bytes_total"] == 150 * manifest.tables[0].row_bytes
        assert (shard["embedding_held_parts"], shard["embedding_held_bytes"]) == (parts, manifest.bytes)
        assert shard["process_resident_memory_bytes"] > 0
        controller = scrape(controller_port)
        assert (controller["embedding_wanted_parts"], controller["embedding_lost_parts"]) == (parts, 0)
        assert (controller["embedding_shards"], controller["embedding_served_versions"]) == (1, 1)
        until(
            lambda: scrape(shard_port)["embedding_routing_term"] == scrape(controller_port)["embedding_routing_term"],
            "term",
        )
        check_that_near_rows_are_told(running, shard_port)


def check_that_near_rows_are_told(running: Cluster, shard_port: int) -> None:
    """N7: metrics and `status` tell rows that were read in place from those that were sent."""
    ids = torch.arange(50)
    with EmbeddingClient(running.addresses["a"], near=True) as client:

        def read_in_place() -> bool:
            assert torch.equal(client.lookup("m/ngram", ids), longcat_table()[:50])
            return client.statistics.near_rows >= 3 * len(ids)

        until(read_in_place, f"near rows, {client.statistics}")
        near, wired, _ = client.statistics
        until(lambda: scrape(shard_port)["embedding_near_rows_total"] == near, "the report")
        until(lambda: scrape(shard_port)["embedding_rows_total"] == 150 + wired, "the others to be counted")

    def told() -> bool:
        [shard] = get_status(running.addresses["a"]).shards
        return (shard.stats.near_rows, shard.stats.rows) == (near, 150 + wired)

    until(told, "the status to say the same")
    [shards, _] = status_tables(get_status(running.addresses["a"]))
    columns = {column.header: list(column.cells) for column in shards.columns}
    assert columns["near rows"] == [str(near)]
    assert columns["rows"] == [str(150 + wired)]
