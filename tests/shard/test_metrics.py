"""Prometheus metrics of every process, and what a shard counts."""

from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from support.checkpoints import longcat_table
from support.cluster import cluster, free_port, until

from embedding_service import EmbeddingClient
from embedding_service.store.importing import import_checkpoint

pytestmark = pytest.mark.service


def scrape(port: int) -> dict[str, float]:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def test_shard_and_controller_tell_prometheus(checkpoint: Path, tmp_path: Path) -> None:
    manifest = import_checkpoint(checkpoint, str(tmp_path / "store"), "m", dtype="fp32", part_bytes=64 << 10)
    parts = len(manifest.tables[0].parts)
    shard_port, controller_port = free_port(), free_port()
    options = ("--expect-shards=1", f"--metrics-port={controller_port}")
    with cluster(tmp_path, tmp_path / "store", *options) as running:
        running.start_shard("a", f"--metrics-port={shard_port}")
        running.wait_serving()
        with EmbeddingClient(running.addresses["a"]) as client:
            for _ in range(3):
                assert torch.equal(client.lookup("m/ngram", torch.arange(50)), longcat_table()[:50])
        shard = scrape(shard_port)
        assert (shard["embedding_lookups_total"], shard["embedding_rows_total"]) == (3, 150)
        assert shard["embedding_row_bytes_total"] == 150 * manifest.tables[0].row_bytes
        assert (shard["embedding_held_parts"], shard["embedding_held_bytes"]) == (parts, manifest.bytes)
        assert shard["embedding_lookup_seconds_count"] == 3
        assert shard["process_resident_memory_bytes"] > 0
        controller = scrape(controller_port)
        assert (controller["embedding_wanted_parts"], controller["embedding_lost_parts"]) == (parts, 0)
        assert (controller["embedding_shards"], controller["embedding_served_versions"]) == (1, 1)
        until(
            lambda: scrape(shard_port)["embedding_routing_term"] == scrape(controller_port)["embedding_routing_term"],
            "term",
        )
