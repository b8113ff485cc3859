"""`embedding-service up` and the commands that ask it, as a person runs them."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import Up, free_port, until, up

from embedding_service import EmbeddingClient
from embedding_service.client.status import get_status
from embedding_service.commands.up import awaited
from embedding_service.rows import TIERS
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire import control_pb2 as control

pytestmark = pytest.mark.service


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embedding_service", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(("how", "options"), [(signal.SIGINT, ()), (signal.SIGTERM, ("--replicas=2", "--tier=mmap"))])
def test_ends_cleanly_when_told(store: Path, tmp_path: Path, how: signal.Signals, options: tuple[str, ...]) -> None:
    with up(tmp_path, store, 2, *options) as running:
        if options:
            until(lambda: len({shard.parts for shard in running.status().shards}) == 1, "both to hold everything")
        children = psutil.Process(running.popen.pid).children(recursive=True)
        assert len(children) == 4  # the controller has one that plans
        assert running.end(how) == 0
        until(lambda: not [child for child in children if child.is_running()], "the processes to end")
        assert "Traceback" not in running.output()


def test_on_ipv6_it_says_what_it_waits_for_and_leaves_nothing_when_it_is_killed(store: Path, tmp_path: Path) -> None:
    with up(tmp_path, store, 1, "--host=::1", "--memory=64MiB") as running:
        address = running.address.replace("127.0.0.1", "[::1]")
        with EmbeddingClient(address, timeout=60) as client:
            assert torch.equal(client.lookup("fp32/ngram", torch.tensor([130])), longcat_table()[130:131])
        assert f"ready: 1 shards at {address}, controller [::1]:" in running.output()
        assert get_status(address).shards[0].address.startswith("[::1]:")
        children = psutil.Process(running.popen.pid).children(recursive=True)
        running.end(signal.SIGKILL)
        until(lambda: not [child for child in children if child.is_running()], "the processes to end")
    first, second = running.output().splitlines()[:2]
    assert first == f"looking for models in {store}"
    assert second.startswith("waiting for the controller and 1 shards to start (")


def test_what_it_waits_for_is_named() -> None:
    status = control.Status(shards=[control.ShardStatus(shard_id="shard-1")])
    assert awaited(control.Status(), 2) == "waiting for the controller and 2 shards to start"
    assert awaited(status, 2) == "waiting: 1 of 2 shards registered, not yet shard-0"
    status.shards.add(shard_id="shard-0")
    model = control.ModelStatus(parts=5, parts_ready=3)
    model.model.name, model.model.version = "m", "1"
    status.models.append(model)
    assert awaited(status, 2) == "waiting: 2 of 2 shards registered, 3 of 5 parts loaded; not served yet: m@1"


def test_an_empty_store(tmp_path: Path) -> None:
    done = run_command("up", f"--store={tmp_path}")
    assert done.returncode == 1
    assert "no model in store" in done.stderr
    assert "embedding-service import" in done.stderr


def test_a_port_that_is_taken(store: Path, service: Up) -> None:
    done = run_command("up", f"--store={store}", f"--port={service.address.partition(':')[2]}")
    assert done.returncode == 1
    assert f"cannot listen on {service.address}" in done.stderr
    assert "another --port" in done.stderr


def test_shards_too_small(store: Path, tmp_path: Path) -> None:
    done = run_command("up", f"--store={store}", "--shards=2", f"--port={free_port()}", "--memory=300KiB")
    assert done.returncode == 1
    assert "bytes are missing; add shards or raise --memory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["up"], ["shard", "--controller=127.0.0.1:1"]])
def test_no_memory_at_all(store: Path, command: list[str]) -> None:
    done = run_command(*command, f"--store={store}", "--memory=0")
    assert done.returncode == 2
    assert "--memory 0 leaves no room for rows" in done.stderr


def test_an_unknown_tier(store: Path) -> None:
    """Before anything is started."""
    done = run_command("up", f"--store={store}", "--shards=1", f"--port={free_port()}", "--tier=tape")
    assert done.returncode == 2
    assert "--tier" in done.stderr
    assert all(repr(tier) in done.stderr for tier in TIERS)


def test_what_is_no_store(tmp_path: Path) -> None:
    done = run_command("up", f"--store={tmp_path / 'nowhere'}")
    assert done.returncode == 1
    assert "nowhere, which is no folder: `embedding-service import`" in done.stderr


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid"])
def test_a_host_that_is_not_this_machine(store: Path, host: str) -> None:
    done = run_command("up", f"--store={store}", f"--host={host}", f"--port={free_port()}", "--insecure")
    assert done.returncode == 1
    assert "the host must be an address of this machine" in done.stderr


def test_a_controller_without_a_port(store: Path) -> None:
    done = run_command("shard", f"--store={store}", "--controller=somewhere")
    assert done.returncode == 1
    assert "an address must be HOST:PORT, got 'somewhere'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
@pytest.mark.parametrize("tier", ["cuda", "cuda-cached"])
def test_a_gpu_tier_without_a_gpu(store: Path, tier: str) -> None:
    done = run_command("up", f"--store={store}", "--shards=1", f"--port={free_port()}", f"--tier={tier}")
    assert done.returncode == 1
    assert "use --tier ram or mmap" in done.stderr


def test_status_shows_shards_and_models(service: Up) -> None:
    done = run_command("status", service.address)
    assert done.returncode == 0, done.stderr
    for text in ("shard-0", "shard-1", "shard-2", "cpu ram", "int8@1", "serving", "routing: term"):
        assert text in done.stdout


def test_lookup_prints_rows(service: Up) -> None:
    done = run_command("lookup", "fp32/ngram", "130", "5", "--address", service.address)
    assert done.returncode == 0, done.stderr
    first, second = (line.split() for line in done.stdout.splitlines())
    table = longcat_table()
    assert first[0] == "130:"
    assert [float(value) for value in first[1:4]] == table[130, :3].tolist()
    assert [float(value) for value in second[1:4]] == table[5, :3].tolist()


def test_lookup_says_what_is_wrong(service: Up) -> None:
    done = run_command("lookup", "nope/ngram", "1", "--address", service.address)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no model 'nope' is served")


def test_models_are_listed(service: Up) -> None:
    done = run_command("models", service.address)
    assert f"int4@1/ngram: {len(longcat_table()):,} rows of 16 int4 (longcat)" in done.stdout


def test_nobody_there() -> None:
    address = f"127.0.0.1:{free_port()}"
    done = run_command("status", address)
    assert done.returncode == 1
    assert address in done.stderr


def test_fewer_shards_than_copies_and_a_folder_that_is_no_models_are_said_and_stop_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    import_checkpoint(checkpoint, str(tmp_path / "store"), "m", dtype="int8", part_bytes=64 << 10)
    (tmp_path / "store/old models").mkdir()
    with up(tmp_path, tmp_path / "store", 1, "--replicas=3") as running:
        said = " ".join(running.output().split())
        assert "note: 3 copies of every part need 3 shards; 1 can hold any, so 1 are held: add shards" in said
        assert "old models is skipped: 'old models' cannot be a name" in said
        kinds = {control.Problem.KIND_COPIES, control.Problem.KIND_SKIPPED}
        until(lambda: {problem.kind for problem in running.status().problems} == kinds, "both problems and no other")
