"""Accidents in the store, and reports that no shard would send: nothing served is lost, and status names them."""

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import Cluster, Process, cluster, until
from support.load import Load

from embedding_service import EmbeddingClient
from embedding_service.controller.watch import TERM_FOLDER
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire import control_pb2 as control
from embedding_service.wire.control_pb2_grpc import ControlServiceStub

pytestmark = pytest.mark.service

PART_BYTES = 64 << 10


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accidents")
    import_checkpoint(checkpoint, str(folder / "store"), "m", dtype="fp32", part_bytes=PART_BYTES)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Cluster]:
    """Two shards over a store in which other models' folders are not as they should be."""
    store = folder / "store"
    (store / "old models").mkdir()
    (store / "torn/1").mkdir(parents=True)
    (store / "torn/1/manifest.json").write_bytes(b"\xff\xfe")
    shutil.copytree(store / "m", store / "n")
    with cluster(folder, store, "--expect-shards=2") as running:
        for name in "ab":
            running.start_shard(name, "--memory=64MiB")
        running.wait_serving()
        yield running


def say(running: Cluster, *words: str) -> control.Status:
    """Until a problem has all these words."""
    return running.wait_until(
        lambda status: any(all(word in problem.message for word in words) for problem in status.problems), str(words)
    )


def parts(status: control.Status) -> dict[str, int]:
    return {shard.shard_id: shard.parts for shard in status.shards}


def test_an_accident_in_the_store_loses_nothing_that_is_served(running: Cluster, folder: Path) -> None:
    store, manifest = folder / "store", folder / "store/m/1/manifest.json"
    for words in (("old models", "cannot be a name"), ("torn/1", "is skipped"), ("n/1", "manifest of m@1")):
        before = say(running, *words)
    whole = manifest.read_bytes()
    addresses = list(running.addresses.values())

    def restarted_controller_keeps(*words: str) -> None:
        running.processes["controller"].end(signal.SIGKILL)
        running.start_controller()
        after = say(running, *words)
        running.wait_until(lambda status: parts(status) == parts(before), "the shards to come back")
        asked = load.lookups
        until(lambda: load.lookups > asked + 50, "lookups")
        assert [(model.model.version, model.serving) for model in running.wait_serving().models] == [("1", True)]
        assert after.term != before.term

    with Load(addresses, "m/ngram", longcat_table()) as load:
        store.rename(folder / "away")
        say(running, "cannot be read", "what was loaded is served on")
        restarted_controller_keeps("cannot be read", "what was loaded is served on")
        store.mkdir()  # as a folder is that nothing is mounted on
        say(running, "is empty")
        restarted_controller_keeps("is empty")
        assert not list(store.iterdir())
        store.rmdir()
        (folder / "away").rename(store)
        manifest.write_bytes(whole[:-40])
        say(running, "m/1", "is skipped")
        restarted_controller_keeps("m/1", "is skipped")
        manifest.write_bytes(whole)
        running.wait_until(lambda status: not any("m/1 " in each.message for each in status.problems), "m to be mended")
    load.check()
    for name in running.addresses:
        assert "dropped m@1" not in running.processes[name].output()


def test_a_second_shard_of_one_id_is_told_and_ends_when_told(running: Cluster, folder: Path) -> None:
    before = running.wait_serving()
    second = Process(
        folder / "second.log",
        "shard",
        f"--store={folder / 'store'}",
        f"--controller={running.controller_address}",
        "--id=a",
    )
    try:
        second.wait_for("give each shard an --id of its own")
        status = say(running, "shard id a", "is taken by the shard at", "--id of its own")
        assert {shard.shard_id: shard.stats.pid for shard in status.shards} == {
            shard.shard_id: shard.stats.pid for shard in before.shards
        }
        assert second.end(signal.SIGTERM) == 0
    finally:
        second.end()
    assert second.output().count("--id of its own") == 1
    running.wait_until(lambda status: not any("is taken" in each.message for each in status.problems), "it to be over")


def described(**table: int) -> list[dict[str, object]]:
    return [{"name": "m", "version": "1", "tables": [{"name": "t", **table}]}]


REFUSED: dict[str, dict[str, Any]] = {
    "memory_limit must be at most": {"memory_limit": 2**64 - 1},
    "part_accesses must be at most": {"parts": [control.PartRef(model="m")], "part_accesses": [2**64 - 1]},
    "part_accesses must be one for each of": {"part_accesses": [1]},
    "the number of parts": {"parts": [control.PartRef(model="m", part=index) for index in range((1 << 18) + 1)]},
    "term must be at most": {"term": 2**64 - 1},
    "epoch must be at most": {"epoch": 2**64 - 1},
    "shard_id must not be empty": {"shard_id": ""},
    "shard_id must be at most 300 printable": {"shard_id": "x\n2026 ERROR forged"},
    "topology must be at most 300 printable": {"topology": "x" * 301},
    "device must be": {"device": "tpu"},
    "address: an address must be HOST:PORT": {"address": "nowhere"},
    "address: ports go up to 65,535": {"address": "127.0.0.1:70000"},
    "address must be the HOST:PORT": {"address": "127.0.0.1:0"},
    "table t has over": {"models": described(rows=2**62, rows_per_part=1)},
    "tables.0.rows: Input should be less than": {"models": described(rows=2**62, rows_per_part=2**62)},
}


def test_a_report_that_no_shard_would_send_is_refused_and_ends_nobody(running: Cluster) -> None:
    before = running.wait_serving()
    sound: dict[str, Any] = {"shard_id": "stranger", "address": "127.0.0.1:9", "device": "cpu", "has_parts": True}
    with grpc.insecure_channel(running.controller_address) as channel:
        register = ControlServiceStub(channel).Register

        over = threading.Event()

        def open_stream(*reports: control.ShardReport) -> Iterator[control.ShardReport]:
            yield from reports
            over.wait(240)

        def refused(*reports: control.ShardReport) -> str:
            with pytest.raises(grpc.RpcError) as caught:
                list(register(open_stream(*reports), timeout=240))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            return str(caught.value.details())

        for words, fields in REFUSED.items():
            assert words in refused(control.ShardReport(**{**sound, **fields}))
        first = control.ShardReport(**sound)
        assert "shard_id must stay 'stranger'" in refused(first, control.ShardReport(**{**sound, "shard_id": "other"}))
        # What may be reported and makes no sense: parts nobody knows, failures without end, another controller's term.
        failure = control.PartFailure(part=control.PartRef(model="x", version="y", table="z"), message="[/x]" * 10_000)
        ahead = 7 * 2**49  # microseconds: more than twice today's
        strange = control.ShardReport(
            **sound, term=ahead, parts=[control.PartRef(model="?", part=2**32 - 1)] * 50_000, failures=[failure] * 200
        )
        stream = register(open_stream(strange), timeout=240)
        next(stream)
        status = running.wait_until(lambda status: status.term > ahead, "a higher term")
        assert status.ByteSize() < 1 << 20
        stream.cancel()
        over.set()
    after = running.wait_until(lambda status: len(status.shards) == 2, "the stranger to be forgotten")
    assert parts(after) == parts(before)
    assert after.term == status.term
    assert running.processes["controller"].runs


def test_clients_outlive_a_restart_of_everything_whatever_the_clock_says(
    running: Cluster, folder: Path, checkpoint: Path
) -> None:
    """The store keeps the term. Where it cannot, as here where it is deleted, clients start over."""
    notes = folder / "store" / TERM_FOLDER
    expected = longcat_table()
    ids = torch.arange(len(expected))
    with EmbeddingClient([running.controller_address], timeout=60) as client:
        assert torch.equal(client.lookup("m/ngram", ids), expected)
        ahead = running.status().term
        assert max(int(note.read_text()) for note in notes.iterdir()) == ahead
        assert ahead > 2 * time.time_ns() // 1_000, "the test before left no term ahead of the clock"
        for keeps_term in (True, False):
            for process in running.processes.values():
                process.end(signal.SIGKILL)
            running.addresses.clear()
            if not keeps_term:
                shutil.rmtree(notes)
            running.start_controller()
            for name in "ab":
                running.start_shard(name, "--memory=64MiB")
            status = running.wait_serving()
            assert (status.term > ahead) is keeps_term
            assert torch.equal(client.lookup("m/ngram", ids), expected)
