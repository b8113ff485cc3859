"""A shard of several processes over one copy of the rows: all answer, any may die, and parts move under them."""

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.absence import answered_by
from support.checkpoints import longcat_table
from support.cluster import Cluster, cluster, until
from support.load import Load

from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub

pytestmark = pytest.mark.service

ROWS = len(longcat_table())
CONNECTIONS = 40


def others(running: Cluster, name: str) -> list[psutil.Process]:
    """The processes of a shard besides its main one."""
    return psutil.Process(running.processes[name].popen.pid).children()


def connections(process: psutil.Process) -> list[Any]:
    """Of a process that may end at any moment."""
    try:
        return process.net_connections()
    except psutil.NoSuchProcess:
        return []


def answering(running: Cluster, name: str) -> list[int]:
    """Connections that each process of a shard has to this one, those of its main one first.

    The controller reads a shard's claims back over connections of its own, which do not count.
    """
    port = int(running.addresses[name].rpartition(":")[2])
    mine = {each.laddr.port for each in connections(psutil.Process()) if each.raddr and each.raddr.port == port}
    everyone = [psutil.Process(running.processes[name].popen.pid), *others(running, name)]
    return [
        sum(
            each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED and each.raddr.port in mine
            for each in connections(process)
        )
        for process in everyone
    ]


def listening(running: Cluster, name: str, count: int) -> bool:
    """Whether `count` processes take a shard's connections."""
    port = int(running.addresses[name].rpartition(":")[2])
    return count == sum(
        any(each.laddr.port == port and each.status == psutil.CONN_LISTEN for each in connections(process))
        for process in others(running, name)
    )


def rows(stub: EmbeddingServiceStub, ids: Sequence[int], routing: wire.Routing | None = None) -> torch.Tensor:
    """As a client asks that routed by itself, or as a thin one."""
    request = wire.LookupRequest(model="m@1", table="ngram", ids_int64=np.array(ids, "<i8").tobytes())
    if routing:
        request.term, request.epoch = routing.term, routing.epoch
    return torch.frombuffer(bytearray(stub.Lookup(request, timeout=120).rows), dtype=torch.float32).view(len(ids), -1)


@pytest.mark.parametrize("tier", ["ram", "mmap"])
def test_all_processes_answer_from_one_copy_and_are_counted_together(
    small_store: Path, tmp_path: Path, tier: str
) -> None:
    with cluster(tmp_path, small_store) as running, ExitStack() as stack:
        running.start_shard("a", f"--tier={tier}", "--processes=3")
        running.wait_serving()
        until(lambda: listening(running, "a", 2), "all processes to listen")
        own = [("grpc.use_local_subchannel_pool", 1)]
        channels = [stack.enter_context(grpc.insecure_channel(running.addresses["a"], own)) for _ in range(CONNECTIONS)]
        stubs = [EmbeddingServiceStub(channel) for channel in channels]
        routing = stubs[0].GetRouting(wire.GetRoutingRequest(), timeout=120)
        until(lambda: all(healthy(channel) for channel in channels), "all processes to say that they serve")
        for number, stub in enumerate(stubs):
            ids = [number, ROWS - 1 - number, 7 * number]
            assert torch.equal(rows(stub, ids, routing), longcat_table()[ids])
            assert torch.equal(rows(stub, ids), longcat_table()[ids])
        spread = answering(running, "a")
        assert sum(spread) == CONNECTIONS
        assert all(spread)
        until(lambda: answered_by(running, "a") == 2 * CONNECTIONS, "all lookups to be counted")
        with pytest.raises(grpc.RpcError, match="ids must be from 0"):
            for stub in stubs:
                rows(stub, [ROWS], routing)
        for channel in channels:
            for path, message, code in (
                (b"/\xff", b"", "UNIMPLEMENTED"),
                (b"/embedding.v1.EmbeddingService/Answer", b"", "UNIMPLEMENTED"),
                (b"/embedding.v1.EmbeddingService/Lookup", b"\xff", "INVALID_ARGUMENT"),
                (b"/embedding.v1.EmbeddingService/LookupNgrams", b"\xff", "INVALID_ARGUMENT"),
            ):
                with pytest.raises(grpc.RpcError) as raised:
                    channel.unary_unary(path)(message, timeout=120)
                assert raised.value.code().name == code
        # What was passed on is counted where it was refused.
        running.wait_until(
            lambda status: sum(each.stats.errors for each in status.shards) >= 4 * CONNECTIONS,
            "all refused calls to be counted",
        )


def healthy(channel: grpc.Channel) -> bool:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=120)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize("tier", ["ram", "mmap"])
def test_parts_move_and_processes_die_without_a_lookup_lost(small_store: Path, tmp_path: Path, tier: str) -> None:
    with cluster(tmp_path, small_store, "--expect-shards=2", "--replicas=1", "--grace=1") as running:
        for name in "ab":
            running.start_shard(name, f"--tier={tier}", "--processes=2", "--memory=64MiB")
        running.wait_serving()
        until(lambda: all(listening(running, name, 1) for name in "ab"), "all processes to listen")
        with Load(list(running.addresses.values()), "m/ngram", longcat_table()) as load:
            until(lambda: load.lookups > 30, "lookups")
            running.start_shard("c", f"--tier={tier}", "--processes=2", "--memory=64MiB")
            running.wait_whole(1, shards=3)
            [other] = others(running, "a")
            other.kill()
            until(lambda: listening(running, "a", 1) and others(running, "a") != [other], "a successor")
            running.processes["b"].end()
            del running.addresses["b"]
            running.wait_whole(1, shards=2)
            seen = load.lookups
            until(lambda: load.lookups > seen + 30, "further lookups")
        load.check()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_shard(small_store: Path, tmp_path: Path, how: signal.Signals) -> None:
    with cluster(tmp_path, small_store) as running:
        running.start_shard("a", "--processes=3", "--drain-seconds=0")
        running.wait_serving()
        until(lambda: listening(running, "a", 2), "all processes to listen")
        started = others(running, "a")
        main = psutil.Process(running.processes["a"].popen.pid)
        [private] = {Path(each.laddr) for each in main.net_connections("unix") if each.laddr.endswith("/main")}
        assert private.parent.stat().st_mode & 0o777 == 0o700
        assert not [each for each in main.net_connections("unix") if each.laddr.startswith(("@", "\0"))]
        running.processes["a"].end(how)
        assert private.parent.exists() == (how is signal.SIGKILL)
        until(lambda: not any(process.is_running() for process in started), "them to end")


def test_a_port_that_is_taken_is_named_and_not_shared(small_store: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, small_store) as running:
        running.start_shard("a", "--processes=2")
        running.wait_serving()
        running.addresses["b"] = running.addresses["a"]
        running.start_shard("b", "--processes=2")
        assert running.processes["b"].wait() == 1
        assert f"cannot listen on {running.addresses['a']}" in running.processes["b"].output()


@pytest.mark.parametrize("processes", [1, 2])
def test_an_address_that_is_none_is_named_and_nothing_else_said(
    small_store: Path, tmp_path: Path, processes: int
) -> None:
    with cluster(tmp_path, small_store) as running:
        running.addresses["a"] = "127.0.0.1:abc"
        running.start_shard("a", f"--processes={processes}")
        assert running.processes["a"].wait() == 1
        said = running.processes["a"].output()
        assert "an address must be HOST:PORT, got '127.0.0.1:abc'" in said
        assert "Traceback" not in said
