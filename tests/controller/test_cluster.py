"""Controllers and shards as processes that come, go and die, under a load whose rows are checked."""

import mmap
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.checkpoints import longcat_checkpoint, longcat_table
from support.cluster import Cluster, cluster, until
from support.load import Load

from embedding_service import EmbeddingClient, errors
from embedding_service.placement.parts import PartKey
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.store import Store
from embedding_service.wire import control_pb2 as control

pytestmark = pytest.mark.service

PART_BYTES = 64 << 10


@pytest.fixture
def own_store(checkpoint: Path, tmp_path: Path) -> Path:
    """A store with model "m" as fp32, for a test that changes it."""
    import_checkpoint(checkpoint, str(tmp_path / "store"), "m", dtype="fp32", part_bytes=PART_BYTES)
    return tmp_path / "store"


def model_bytes(store: Path) -> int:
    return Store(store).manifest("m").bytes


def addresses(running: Cluster) -> list[str]:
    return list(running.addresses.values())


def test_a_table_larger_than_any_shard_is_spread_by_memory(own_store: Path, tmp_path: Path) -> None:
    size = model_bytes(own_store)
    with cluster(tmp_path, own_store, "--expect-shards=3") as running:
        running.start_shard("a", f"--memory={size // 5}")
        running.start_shard("b", f"--memory={size * 2 // 5}", "--tier=mmap")
        running.start_shard("c", f"--memory={size * 3 // 5}")
        running.wait_serving()

        def spread(status: control.Status) -> bool:
            held = {shard.shard_id: shard.stats.held_bytes for shard in status.shards}
            within = all(shard.stats.held_bytes <= shard.memory_limit for shard in status.shards)
            return within and 0 < held.get("a", 0) < held.get("b", 0) < held.get("c", 0) < size

        running.wait_until(spread, "each to hold what it has memory for")
        with EmbeddingClient(addresses(running)) as client:
            assert torch.equal(client.lookup("m/ngram", torch.arange(len(longcat_table()))), longcat_table())


def test_too_little_memory_is_said_with_the_bytes_and_mended_by_another_shard(own_store: Path, tmp_path: Path) -> None:
    size = model_bytes(own_store)
    with cluster(tmp_path, own_store, "--expect-shards=1") as running:
        running.start_shard("a", f"--memory={size * 3 // 4}")

        def placement_problems(status: control.Status) -> list[control.Problem]:
            return [problem for problem in status.problems if problem.kind == control.Problem.KIND_PLACEMENT]

        [problem] = placement_problems(running.wait_until(placement_problems, "a problem"))
        assert f"needs {size:,} bytes" in problem.message
        assert f"{size - size * 3 // 4:,} bytes are missing; add shards or raise --memory" in problem.message
        running.start_shard("b", f"--memory={size * 3 // 4}")
        running.wait_serving()
        running.wait_until(lambda status: status.shards and not status.problems, "no problem")


def test_a_corrupt_part_is_never_served_and_named_until_it_is_mended(own_store: Path, tmp_path: Path) -> None:
    part = own_store / "m/1/ngram/part-00003.safetensors"
    good = part.read_bytes()
    part.write_bytes(good[:-5] + bytes([good[-5] ^ 4]) + good[-4:])
    with cluster(tmp_path, own_store, "--expect-shards=1") as running:
        running.start_shard("a")

        def failing(status: control.Status) -> list[str]:
            return [problem.message for problem in status.problems if problem.kind == control.Problem.KIND_SHARD]

        status = running.wait_until(failing, "the corrupt part's problem")
        assert "part-00003.safetensors is corrupt" in failing(status)[0]
        assert not any(model.serving for model in status.models)
        with EmbeddingClient(addresses(running)) as client, pytest.raises(errors.NotFound, match="none yet"):
            client.lookup("m/ngram", torch.tensor([0]))
        part.write_bytes(good)
        running.wait_serving()
        with EmbeddingClient(addresses(running)) as client:
            assert torch.equal(client.lookup("m/ngram", torch.arange(len(longcat_table()))), longcat_table())


def test_a_controller_that_dies_loses_no_lookup_and_its_epoch_never_goes_back(own_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, own_store, "--expect-shards=2") as running:
        for name in "ab":
            running.start_shard(name)
        before = running.wait_serving()
        with Load(addresses(running), "m/ngram", longcat_table()) as load:
            running.processes["controller"].end(signal.SIGKILL)
            asked = load.lookups
            until(lambda: load.lookups > asked + 50, "lookups without a controller")
            running.start_controller()
            after = running.wait_serving()
            asked = load.lookups
            until(lambda: load.lookups > asked + 50, "lookups with the new controller")
        load.check()
        assert (after.term, after.epoch) > (before.term, before.epoch)
        running.wait_until(lambda status: parts(status) == parts(before), "each shard to hold what it held")


def parts(status: control.Status) -> dict[str, int]:
    """How many each shard holds."""
    return {shard.shard_id: shard.parts for shard in status.shards}


def test_a_new_version_replaces_the_old_one_under_load_and_is_never_mixed(own_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, own_store, "--expect-shards=2", "--grace=1") as running:
        for name in "ab":
            running.start_shard(name)
        running.wait_serving()
        new = longcat_checkpoint(tmp_path / "new", tag=2)
        with Load(addresses(running), "m/ngram", longcat_table(1), longcat_table(2)) as load:
            until(lambda: load.answered_by[0] > 20, "answers of the old version")
            import_checkpoint(new, str(own_store), "m", version="2", dtype="fp32", part_bytes=PART_BYTES)
            until(lambda: load.answered_by[1] > 20, "answers of the new version")
            running.wait_until(
                lambda status: (
                    [model.model.version for model in status.models] == ["2"]
                    and all(shard.parts == len(assigned(running, shard.shard_id)) for shard in status.shards)
                    and sum(shard.stats.held_bytes for shard in status.shards) == model_bytes(own_store)
                ),
                "the old version's parts to be dropped",
            )
        load.check()
        with EmbeddingClient(addresses(running)) as client, pytest.raises(errors.NotFound, match=r"m@1.*m@2"):
            client.lookup("m@1/ngram", torch.tensor([0]))


def assigned(running: Cluster, shard: str) -> list[PartKey]:
    """Parts that the routing names for a shard."""
    from embedding_service.controller.decisions import routed_parts
    from embedding_service.wire import embedding_pb2 as wire

    return sorted(routed_parts(running.stub(shard).GetRouting(wire.GetRoutingRequest()))[shard])


def test_a_model_imported_while_it_runs_is_served(own_store: Path, checkpoint: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, own_store, "--expect-shards=1") as running:
        running.start_shard("a")
        running.wait_serving()
        import_checkpoint(checkpoint, str(own_store), "second", dtype="int4", part_bytes=PART_BYTES)
        running.wait_serving(models=2)
        with EmbeddingClient(addresses(running)) as client:
            assert client.lookup("second/ngram", torch.tensor([1, 2])).shape == (2, 16)


def test_with_two_replicas_a_killed_shard_loses_no_lookup(own_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, own_store, "--expect-shards=3", "--replicas=2", "--lost-after=2") as running:
        for name in "abc":
            running.start_shard(name)
        running.wait_serving()
        parts = len(Store(own_store).manifest("m").tables[0].parts)
        running.wait_until(lambda status: sum(shard.parts for shard in status.shards) == 2 * parts, "two copies")
        with Load(addresses(running), "m/ngram", longcat_table()) as load:
            until(lambda: load.lookups > 50, "lookups")
            running.processes["b"].end(signal.SIGKILL)
            running.wait_until(
                lambda status: len(status.shards) == 2 and all(shard.parts == parts for shard in status.shards),
                "the lost copies to be made again",
            )
        load.check()


def test_a_part_cut_short_under_a_mapping_costs_a_shard_and_no_lookup(own_store: Path, tmp_path: Path) -> None:
    """Its pages are gone, and the kernel ends who reads them: there is no right answer that it could give."""
    whole = own_store
    hurt = tmp_path / "hurt"
    shutil.copytree(own_store, hurt)  # shards a and b read stores of their own, as from volumes of their own
    with cluster(tmp_path, whole, "--expect-shards=2", "--replicas=2", "--lost-after=2") as running:
        running.start_shard("a", "--tier=mmap")
        running.store = hurt
        running.start_shard("b", "--tier=mmap")
        until(lambda: running.is_whole(2), "two copies")
        with Load(addresses(running), "m/ngram", longcat_table()) as load:
            until(lambda: load.lookups > 50, "lookups")
            part = hurt / "m/1/ngram/part-00003.safetensors"
            with part.open("r+b") as file:
                # At a page's end: what is left of a page that was cut within reads as zeros, which nobody can tell.
                file.truncate(part.stat().st_size // 2 // mmap.PAGESIZE * mmap.PAGESIZE)
            assert running.processes["b"].wait() == -signal.SIGBUS
            running.start_shard("b", "--tier=mmap")

            def refused(status: control.Status) -> bool:
                return any("part-00003.safetensors is cut short" in problem.message for problem in status.problems)

            status = running.wait_until(refused, "the part's problem")
            asked = load.lookups
            until(lambda: load.lookups > asked + 50, "lookups beside the cut part")
        load.check()
        [problem] = [problem for problem in status.problems if "is cut short" in problem.message]
        assert problem.kind == control.Problem.KIND_SHARD
        assert "import the table again" in problem.message


def test_with_one_copy_a_killed_shards_parts_are_loaded_elsewhere(own_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, own_store, "--expect-shards=2", "--lost-after=1.5") as running:
        for name in "ab":
            running.start_shard(name)
        running.wait_serving()
        with Load(addresses(running), "m/ngram", longcat_table()) as load:  # its lookups may wait for 30 s
            until(lambda: load.lookups > 50, "lookups")
            running.processes["b"].end(signal.SIGKILL)
            asked = until(lambda: load.lookups, "any")
            until(lambda: load.lookups > asked + 50, "lookups after the parts were loaded again")
        load.check()


def test_a_remote_store_is_copied_and_a_bad_copy_fetched_again(own_store: Path, tmp_path: Path) -> None:
    url = f"simplecache::file://{own_store}"
    cache = tmp_path / "cache"
    shutil.copytree(own_store / "m", cache / "m")
    bad = cache / "m/1/ngram/part-00001.safetensors"
    bad.write_bytes(bad.read_bytes()[:-9] + b"corrupted")
    with cluster(tmp_path, Path(url), "--expect-shards=1") as running:
        running.store = url  # type: ignore[assignment]
        running.start_shard("a", f"--cache={cache}")
        running.wait_serving()
        with EmbeddingClient(addresses(running)) as client:
            assert torch.equal(client.lookup("m/ngram", torch.arange(len(longcat_table()))), longcat_table())
