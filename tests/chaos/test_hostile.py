"""Shards that hang or are cut off, disks that are full, parts that are damaged, peers that do not behave."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from support.absence import HERE, OPTIONS, answered_by, check_absence, inside, two_networks
from support.chaos import TABLE
from support.checkpoints import DIM, longcat_table
from support.cluster import Cluster, Process, cluster, free_port, until
from support.hostile import PREFACE, Forwarder, bygone_controller, dial, half_a_lookup, unread_lookups
from support.load import Load

from embedding_service import EmbeddingClient, errors
from embedding_service.client.status import get_status
from embedding_service.errors import EmbeddingServiceError
from embedding_service.store.store import Store
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub

pytestmark = pytest.mark.service

MIB = 1 << 20


@pytest.fixture(scope="module")
def running(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two shards for clients that behave badly."""
    with cluster(tmp_path_factory.mktemp("running"), small_store, "--expect-shards=2") as running:
        for name in "ab":
            running.start_shard(name)
        running.wait_serving()
        yield running


def check_all_rows(addresses: list[str], name: str = TABLE) -> None:
    with EmbeddingClient(addresses, timeout=60) as client:
        table = longcat_table()
        assert torch.equal(client.lookup(name, torch.arange(len(table))), table)


# Shards that are away


def test_a_shard_that_hangs_is_forgotten_and_used_again_when_it_goes_on(small_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, small_store, *OPTIONS) as running:
        for name in "abc":
            running.start_shard(name)
        process = running.processes["c"].popen
        check_absence(
            running,
            "c",
            leave=lambda: process.send_signal(signal.SIGSTOP),
            come_back=lambda: process.send_signal(signal.SIGCONT),
        )


def test_a_shard_that_is_cut_off_is_forgotten_and_used_again_when_the_link_is_back(
    small_store: Path, tmp_path: Path
) -> None:
    try:
        networks = two_networks()
        here, there = networks.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root and iproute2 to make network namespaces: {getattr(error, 'stderr', '') or error}")
    try:
        tests = Path(__file__).parents[1]
        done = subprocess.run(
            [*inside(here), sys.executable, "-m", "support.absence", str(tmp_path), str(small_store), there],
            env={**os.environ, "PYTHONPATH": str(tests), "NO_PROXY": f"{HERE}/24"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout
    finally:
        networks.__exit__(None, None, None)


def answers(stub: EmbeddingServiceStub, lookup: wire.LookupRequest) -> bool:
    """Whether all rows came; False where gRPC itself refused the call, which the shard never saw."""
    try:
        return len(stub.Lookup(lookup, timeout=120).rows) == 4 * DIM * len(lookup.ids)
    except grpc.RpcError as error:
        if "RST_STREAM" not in error.details():
            raise
        return False


def test_calls_that_are_given_up_leave_nothing_behind(small_store: Path, tmp_path: Path) -> None:
    """A thin client asks again and again for rows of a shard that hangs, and never waits."""
    with cluster(tmp_path, small_store, "--expect-shards=2") as running:
        for name in "ab":
            running.start_shard(name)
        running.wait_serving()
        process = psutil.Process(running.processes["a"].popen.pid)
        with grpc.insecure_channel(running.addresses["a"]) as channel:
            stub = EmbeddingServiceStub(channel)
            every = wire.LookupRequest(model="m", table="ngram", ids=range(0, len(longcat_table()), 97))
            stub.Lookup(every, timeout=120)
            threads = process.num_threads()
            running.processes["b"].popen.send_signal(signal.SIGSTOP)
            try:
                for _ in range(20):
                    calls = [stub.Lookup.future(every) for _ in range(100)]
                    for call in calls:
                        call.cancel()
                assert process.num_threads() < threads + 20
                own = [("grpc.use_local_subchannel_pool", 1)]
                with grpc.insecure_channel(running.addresses["a"], own) as elsewhere:
                    someone_else = EmbeddingServiceStub(elsewhere)
                    assert someone_else.GetRouting(wire.GetRoutingRequest(), timeout=120).shards
            finally:
                running.processes["b"].popen.send_signal(signal.SIGCONT)
            until(lambda: process.num_threads() < threads + 20, "its threads to end")
            # gRPC refuses calls on a connection whose given-up ones it has not cleared away yet.
            until(lambda: answers(stub, every), "answers on the connection that gave up")


# What lies on disk


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of its own at `folder`, in memory. Skips the test where it cannot be made."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs root to mount a small disk: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_costs_only_its_own_parts_and_is_mended_by_room(small_store: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    url = f"simplecache::file://{small_store}"
    with small_disk(disk, "256k"), cluster(tmp_path, url, "--expect-shards=2", "--replicas=2") as running:
        running.start_shard("a", f"--cache={tmp_path / 'roomy'}")
        running.start_shard("b", f"--cache={disk / 'cache'}")

        def full(status: control.Status) -> list[str]:
            return [problem.message for problem in status.problems if problem.kind == control.Problem.KIND_SHARD]

        status = running.wait_until(full, "the full disk's problem")
        assert all(message.startswith("shard b: m@1/ngram") for message in full(status))
        assert f"no room on the disk of {disk / 'cache'}" in full(status)[0]
        running.wait_serving()
        check_all_rows(list(running.addresses.values()))
        parts = len(Store(small_store).manifest("m").tables[0].parts)

        def some_on_b(status: control.Status) -> bool:
            held = {shard.shard_id: shard.parts for shard in status.shards}
            return held.get("a") == parts and 0 < held.get("b", 0) < parts

        running.wait_until(some_on_b, "all parts on a and some on b")
        until(lambda: not list(disk.rglob("*.partial*")), "what did not fit to be removed")

        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        until(lambda: running.is_whole(2), "every part on both shards")
        check_all_rows([running.addresses["b"]])


def test_only_models_with_a_damaged_part_are_not_served(small_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("m", "cut", "flipped"):
        shutil.copytree(small_store / "m", store / name)
        manifest = store / name / "1/manifest.json"
        manifest.write_text(manifest.read_text().replace('"model": "m"', f'"model": "{name}"'))
    cut = store / "cut/1/ngram/part-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4096])
    flipped = store / "flipped/1/ngram/part-00003.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-5] ^= 4
    flipped.write_bytes(content)
    with cluster(tmp_path, store, "--expect-shards=2") as running:
        for name in "ab":
            running.start_shard(name)

        def served(status: control.Status) -> list[str]:
            return [model.model.name for model in status.models if model.serving]

        def named(status: control.Status) -> bool:
            said = " ".join(problem.message for problem in status.problems)
            return str(cut) in said and f"{flipped} is corrupt" in said

        running.wait_until(lambda status: served(status) == ["m"] and named(status), "the sound model")
        running.wait_until(lambda status: len(status.problems) == 2, "no other problem")
        addresses = list(running.addresses.values())
        check_all_rows(addresses)
        with EmbeddingClient(addresses) as client:
            for name in ("cut", "flipped"):
                with pytest.raises(errors.NotFound, match=rf"no model '{name}' is served; served models: m@1$"):
                    client.lookup(f"{name}/ngram", torch.tensor([0]))


# Clients that do not behave


def peak_until_still(running: Cluster, name: str, since: int = -1) -> int:
    """The most anonymous memory that a shard took until it had answered more, and then nothing for 3 s."""
    peak, seen = 0, list[int]()
    while len(seen) < 30 or len(set(seen[-30:])) > 1 or seen[-1] <= since:
        peak = max(peak, running.processes[name].resident_anonymous())
        seen.append(answered_by(running, name))
        time.sleep(0.1)
    return peak


def test_garbage_and_half_messages_harm_nobody_else(running: Cluster) -> None:
    address, process = running.addresses["a"], running.processes["a"]
    generator = torch.Generator().manual_seed(5)
    noise = bytes(torch.randint(0, 256, (4096,), generator=generator).tolist())
    before = process.resident_anonymous()
    connections = []
    with Load(list(running.addresses.values()), TABLE, longcat_table(), threads=1) as load:
        for sent in (noise, PREFACE + noise, half_a_lookup(100, noise[:9], end=True)):
            connections.append(dial(address))
            with suppress(OSError):  # it may have hung up before everything was sent
                connections[-1].sendall(sent)
        for _ in range(100):
            connections.append(dial(address))
            connections[-1].sendall(half_a_lookup(16 * MIB, noise[:1000], end=False))
        with grpc.insecure_channel(address) as channel:
            lookup = channel.unary_unary("/embedding.v1.EmbeddingService/Lookup")
            for sent, said in (
                (noise, "the message is malformed: it is no valid protobuf"),
                (bytes(17 * MIB), "Received message larger than max"),
            ):
                with pytest.raises(grpc.RpcError) as raised:
                    lookup(sent, timeout=120)
                assert said in raised.value.details()
        asked = load.lookups
        until(lambda: load.lookups > asked + 50, "lookups beside them")
        assert process.resident_anonymous() - before < 64 * MIB
    load.check()
    for connection in connections:
        connection.close()
    assert process.runs


def test_a_stream_that_is_never_read_takes_bounded_memory(running: Cluster) -> None:
    asked, rows = 1000, MIB // (4 * DIM)  # a GiB of answers in all
    ids = torch.randint(0, len(longcat_table()), (rows,)).numpy().astype("<u4").tobytes()
    lookup = wire.LookupRequest(model="m", table="ngram", ids_uint32=ids)
    address, process = running.addresses["a"], running.processes["a"]
    peak_until_still(running, "a")  # what an earlier test asked is reported a moment later, and is not this one's
    before, done = process.resident_anonymous(), answered_by(running, "a")
    with grpc.insecure_channel(address) as channel:
        requests = (wire.StreamLookupRequest(request_id=number, lookup=lookup) for number in range(asked))
        stream = EmbeddingServiceStub(channel).StreamLookup(requests)
        peak = peak_until_still(running, "a", done)
        answered = answered_by(running, "a") - done
        check_all_rows(list(running.addresses.values()))
        stream.cancel()
    assert 0 < answered < asked // 2
    assert peak - before < 128 * MIB
    assert process.runs


def test_answers_that_are_never_read_take_bounded_memory(running: Cluster) -> None:
    message = wire.LookupRequest(model="m", table="ngram", ids=[0] * (15 << 10)).SerializeToString()
    address, process = running.addresses["a"], running.processes["a"]
    peak_until_still(running, "a")
    before = process.resident_anonymous()
    for _ in range(2):  # the second time shows that the first one's memory is used again
        done = answered_by(running, "a")
        with unread_lookups(address, message, 1000):  # 0.9 GiB of answers in all
            peak = peak_until_still(running, "a", done)
            check_all_rows(list(running.addresses.values()))
        assert 64 * MIB < peak - before < 640 * MIB  # the allowance of 128 MiB, in four copies, and a margin
    assert process.runs


def test_a_thousand_connections_at_once_are_answered(running: Cluster) -> None:
    table = longcat_table()

    async def lookup(number: int) -> bool:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        addresses = list(running.addresses.values())
        async with grpc.aio.insecure_channel(addresses[number % 2], options=options) as channel:
            await channel.channel_ready()
            connected.release()
            await all_connected.wait()
            ids = [number, 3 * number]
            request = wire.LookupRequest(model="m", table="ngram", ids=ids)
            answer = await EmbeddingServiceStub(channel).Lookup(request, timeout=200)
            return torch.equal(torch.frombuffer(bytearray(answer.rows), dtype=torch.float32).view(2, DIM), table[ids])

    async def all_at_once() -> list[bool]:
        tasks = [asyncio.create_task(lookup(number)) for number in range(1000)]
        for _ in tasks:
            await connected.acquire()
        all_connected.set()
        return await asyncio.gather(*tasks)

    connected, all_connected = asyncio.Semaphore(0), asyncio.Event()
    right = asyncio.run(asyncio.wait_for(all_at_once(), 240))
    assert len(right) == 1000 and all(right)


# Controllers


def test_of_two_controllers_the_older_ends_itself_and_no_lookup_is_lost(small_store: Path, tmp_path: Path) -> None:
    options = ("--replicas=2", "--lost-after=60")
    with (
        closing(Forwarder()) as to_a,
        closing(Forwarder()) as to_b,
        cluster(tmp_path, small_store, "--expect-shards=2", *options) as running,
    ):
        for name, forwarder in (("a", to_a), ("b", to_b)):
            forwarder.point(running.controller_address)
            running.start_shard(name, f"--controller={forwarder.address}")
        until(lambda: running.is_whole(2), "two copies")
        old, before = running.processes["controller"], running.status()
        address = f"127.0.0.1:{free_port()}"
        where = (f"--store={small_store}", f"--listen={address}")
        with Load(list(running.addresses.values()), TABLE, longcat_table(), pause=0.005) as load:
            running.processes["controller"] = Process(tmp_path / "second.log", "controller", *where, *options)
            to_b.point(address)

            def led(*shards: str) -> control.Status | None:
                with suppress(EmbeddingServiceError):
                    status = get_status(address)
                    by_name = {shard.shard_id: shard for shard in status.shards}
                    if set(by_name) == set(shards) and not any(shard.parts_missing for shard in status.shards):
                        return status if status.epoch else None
                return None

            second = until(lambda: led("b"), "the second controller to lead b")
            assert second.term > before.term
            to_b.point(running.controller_address)  # it tells the first what it saw since
            assert old.wait() == 1
            assert (
                f"a controller of term {second.term} is there, above this one's {before.term}: ending" in old.output()
            )
            for forwarder in (to_a, to_b):
                forwarder.point(address)
            last = until(lambda: led("a", "b"), "the second controller to lead both")
            assert (last.term, last.epoch) > (second.term, 0)
            asked = load.lookups
            until(lambda: load.lookups > asked + 50, "lookups led by the second controller")
        load.check()


def test_a_controller_that_starts_while_a_shard_is_dead_goes_on_serving(small_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, small_store) as running:
        for name in "abc":
            running.start_shard(name)
        until(lambda: running.is_whole(1), "every part")
        with Load(list(running.addresses.values()), TABLE, longcat_table(), pause=0.005) as load:
            running.processes.pop("b").end(signal.SIGKILL)
            running.processes["controller"].end(signal.SIGKILL)
            running.start_controller()
            until(lambda: running.is_whole(1), "every part on the shards that are left")
            asked = load.lookups
            until(lambda: load.lookups > asked + 50, "lookups of them")
        load.check()  # rows that only the dead shard held were waited for


def test_a_shard_obeys_no_controller_of_an_older_term(small_store: Path, tmp_path: Path) -> None:
    with (
        closing(Forwarder()) as forwarder,
        bygone_controller(term=7) as (address, bygone),
        cluster(tmp_path, small_store, "--expect-shards=1") as running,
    ):
        forwarder.point(running.controller_address)
        running.start_shard("a", f"--controller={forwarder.address}")
        running.wait_serving()
        forwarder.point(address)
        until(lambda: len(bygone.told) > 1, "the shard to be told to hold nothing, and to report again")
        running.processes["a"].wait_for("ignored an assignment of term 7, below term")
        check_all_rows([running.addresses["a"]])
        forwarder.point(running.controller_address)
        running.wait_serving()
