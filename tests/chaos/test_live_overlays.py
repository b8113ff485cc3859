"""Versions with a base come and go under a service that is used. Rows name their version, so none can hide."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.chaos import chaos_store
from support.checkpoints import longcat_table
from support.cluster import cluster, until
from support.load import Load
from support.overlays import new_rows, rows_file, some_ids

from embedding_service.store.publishing import publish_rows, rollback
from embedding_service.store.store import Store
from embedding_service.wire import control_pb2 as control

pytestmark = pytest.mark.service


def over(table: torch.Tensor, ids: np.ndarray, tag: int) -> torch.Tensor:
    """The table with those rows of that tag."""
    table = table.clone()
    table[torch.from_numpy(ids)] = new_rows(ids, tag)
    return table


@pytest.mark.timeout(300)
def test_t11_clients_switch_to_what_is_published_and_back_and_see_no_other_row(tmp_path: Path) -> None:
    store = Store(chaos_store(tmp_path / "store"))
    base, many, few = longcat_table(), some_ids(7, 0.05), some_ids(8, 0.001)
    second, legal = over(base, many, 7), over(base, few, 8)
    everything = torch.arange(len(base))
    with cluster(tmp_path, Path(store.url), "--replicas=2", "--grace=0.5", "--lost-after=2") as running:
        running.start_shard("a", "--processes=2")
        running.start_shard("b", "--tier=mmap")
        running.wait_serving()
        until(lambda: running.is_whole(2), "two copies of m@1")
        with Load(running.addresses["b"], "m/ngram", base, second, pause=0.01) as load:

            def serves(*names: str) -> bool:
                models = running.status().models
                served = {f"{each.model.name}@{each.model.version}" for each in models if each.serving}
                return served == set(names) and running.is_whole(2)

            def is_seen(table: torch.Tensor) -> bool:
                return torch.equal(load.client.lookup("m/ngram", everything), table)

            publish_rows(store, "m@1", rows_file(tmp_path / "rows" / "many", many, 7))
            until(lambda: serves("m@2"), "m@2")
            until(lambda: is_seen(second), "the client to switch")
            until(lambda: "folded m@2" in running.processes["a"].output(), "m@2 to be folded in")
            publish_rows(store, "m@1", rows_file(tmp_path / "rows" / "few", few, 8), name="m+legal")
            until(lambda: serves("m@2", "m+legal@1"), "m+legal")
            with Load(running.addresses["b"], "m+legal/ngram", legal, threads=1, pause=0.02) as beside:
                running.start_shard("c")
                until(lambda: running.is_whole(2), "a shard that never held the base")
                running.processes["a"].popen.kill()
                until(lambda: len(running.status().shards) == 2, "the dead shard to be missed")
                rollback(store, "m")
                del running.processes["a"], running.addresses["a"]
                until(lambda: serves("m@3", "m+legal@1"), "m@3")
                until(lambda: is_seen(base), "the client to switch back")
                assert torch.equal(beside.client.lookup("m+legal/ngram", everything), legal)
                replaced = sum(store.manifest(*name).replaced_bytes for name in (("m", "2"), ("m+legal", "1")))
                most = store.manifest("m").bytes + replaced

                def within(status: control.Status) -> bool:
                    return len(status.shards) == 2 and all(0 < each.stats.held_bytes <= most for each in status.shards)

                running.wait_until(within, f"shards to hold at most {most} bytes")
            beside.check()
        load.check()
        assert all(load.answered_by)
