"""`embedding-service up --ray` over a Ray cluster of three nodes, all of them on this machine's loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support import sabotage
from support.checkpoints import longcat_table
from support.cluster import UpCommand, free_port, until, up
from support.load import Load
from support.nearness import come_near

from embedding_service import EmbeddingClient, Unauthenticated
from embedding_service.client.status import get_status
from embedding_service.errors import EmbeddingServiceError
from embedding_service.security.access import access_of
from embedding_service.security.policy import digest_of

pytestmark = [pytest.mark.service, pytest.mark.heavy]

# Each node has room for one shard.
NODES, SHARDS = 3, 2
TABLE = "fp32/ngram"


class RayNodes:
    """A Ray cluster with an `address`, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._said()

    def add(self) -> None:
        """One more, in place of a lost one."""
        assert self._process.stdin
        self._process.stdin.write("add\n")
        self._process.stdin.flush()
        assert self._said() == "added"

    def _said(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[RayNodes]:
    """A Ray cluster. A test that takes a node of it adds another one."""
    command = [sys.executable, str(Path(__file__).with_name("nodes.py")), str(NODES)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # for drivers too: see nodes.py
        # Else nodes and drivers ask for the token in the user's home, each if it is there when they start.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", sabotage.python_path())
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nodes:
            yield RayNodes(nodes)
            assert nodes.stdin
            nodes.stdin.close()


@pytest.fixture
def ray_cluster(ray_nodes: RayNodes) -> str:
    """Its address."""
    return ray_nodes.address


def run_up(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "embedding_service", "up", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, **options)  # type: ignore[call-overload]


def shard_pids(running: UpCommand) -> dict[str, int]:
    """The processes of the shards that hold all their parts. Empty while the controller does not answer."""
    try:
        shards = running.status().shards
    except EmbeddingServiceError:
        return {}
    return {shard.shard_id: shard.stats.pid for shard in shards if shard.parts and not shard.parts_missing}


def controller_process(running: UpCommand) -> psutil.Process | None:
    """Its address, in the line that says that everything is ready, is the same at each of its starts."""
    address = running.output().partition(", controller ")[2].split()[0]
    for process in psutil.process_iter(["cmdline"]):
        if f"--listen={address}" in (process.info["cmdline"] or []):
            return process
    return None


def its_processes(running: UpCommand, shards: int) -> list[psutil.Process]:
    """Of controller and shards, and of their actors."""
    controller = controller_process(running)
    assert controller
    processes = [controller, *(psutil.Process(pid) for pid in shard_pids(running).values())]
    actors = [process.parent() for process in processes]
    assert len(processes) == len(set(actors)) == shards + 1
    return [*processes, *(actor for actor in actors if actor)]


def raylet_of(pid: int) -> psutil.Process:
    """The first process of the Ray node on which a server's process runs."""
    return next(process for process in psutil.Process(pid).parents() if process.name() == "raylet")


def wait_for_another(running: UpCommand, name: str, pid: int) -> None:
    """Until a process other than `pid` holds that shard's parts."""
    until(lambda: shard_pids(running).get(name, pid) != pid, f"another process of {name}")


def test_every_row_whatever_dies_a_server_the_controller_an_actor_or_a_node(
    ray_nodes: RayNodes, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for one more shard. In the end `up` is killed, and nothing of it is left."""
    # Which cluster `auto` is: this machine may be a node of several.
    monkeypatch.setenv("RAY_ADDRESS", ray_nodes.address)
    with up(tmp_path, store, SHARDS, "--ray=auto", "--replicas=2", "--tier=mmap") as running:
        assert len({shard.topology for shard in running.status().shards}) == SHARDS
        table = longcat_table()
        with EmbeddingClient(running.address, timeout=60) as client:
            assert torch.equal(client.lookup(TABLE, torch.arange(len(table))), table)
        with Load(running.address, TABLE, table, threads=1) as load:
            [broken] = [shard for shard in running.status().shards if shard.shard_id == "shard-1"]
            victim = psutil.Process(broken.stats.pid)
            until(lambda: sabotage.broken(victim, broken.address), "shard-1 to end, whose server is broken")
            wait_for_another(running, "shard-1", victim.pid)

            shard, controller = shard_pids(running)["shard-0"], controller_process(running)
            actor = psutil.Process(shard).parent()
            assert controller and actor and actor.cmdline()[0].startswith("ray::")
            controller.kill()
            actor.kill()
            wait_for_another(running, "shard-0", shard)
            until(lambda: len(shard_pids(running)) == SHARDS, "all shards to find another controller")
            until(lambda: len({shard.topology for shard in running.status().shards}) == SHARDS, "a node for each shard")

            controller, pids = controller_process(running), shard_pids(running)
            assert controller
            lost = next(name for name, pid in pids.items() if raylet_of(pid) != raylet_of(controller.pid))
            node, asked = raylet_of(pids[lost]), load.lookups
            for process in [*node.children(recursive=True), node]:
                process.kill()
            until(lambda: load.lookups > asked + 50, "lookups without the node")
            wait_for_another(running, lost, pids[lost])
            asked = load.lookups
            until(lambda: load.lookups > asked + 50, "lookups with the new shard")
        load.check()
        assert raylet_of(until(lambda: shard_pids(running).get(lost), "its process")) != node
        for name in ("shard-0", "shard-1", "controller"):
            running.wait_for(f"{name} ended, Ray starts it again")
        # That of the broken server, and no other.
        assert 1 <= running.output().count("RuntimeError: sabotage") == running.output().count("Traceback")
        processes = its_processes(running, SHARDS)
        running.end(signal.SIGKILL)
        until(lambda: not [process for process in processes if process.is_running()], "its processes to end")
    ray_nodes.add()


def test_more_shards_than_there_is_room_for(ray_cluster: str, store: Path, tmp_path: Path) -> None:
    """And what others took before, whether told to end or killed, is free again."""
    running = UpCommand(tmp_path / "up.log", store, NODES + 1, f"--ray={ray_cluster}")
    try:
        running.wait_for("waiting for nodes")
        assert f"no room for {NODES + 1} shards of 1 CPU and 5" in running.output()
        assert f": {NODES} CPUs and" in running.output()
    finally:
        assert running.end(signal.SIGINT) == 0
    assert "Traceback" not in running.output()


def test_shards_share_gpus_where_there_are_more_of_them(ray_cluster: str, store: Path, tmp_path: Path) -> None:
    running = UpCommand(tmp_path / "up.log", store, NODES + 1, f"--ray={ray_cluster}", "--tier=cuda")
    try:
        running.wait_for("waiting for nodes")
        assert f"no room for {NODES + 1} shards of 1 CPU, 0.5 GPU and" in running.output()
        assert f": {NODES} CPUs, {NODES} GPUs and" in running.output()
    finally:
        assert running.end(signal.SIGINT) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_a_gpu_that_torch_cannot_use(ray_cluster: str, store: Path) -> None:
    """Nothing was started then that Ray would start again and again."""
    done = run_up(f"--store={store}", "--shards=2", f"--port={free_port()}", f"--ray={ray_cluster}", "--tier=cuda")
    assert done.returncode == 1
    assert "error: node 127.0.0.1: tiers cuda and cuda-cached need a" in done.stderr
    assert "use --tier ram or mmap" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_a_node_does_not_see(ray_cluster: str, store: Path) -> None:
    """An open folder has a name that only the process that opened it knows."""
    folder = os.open(store, os.O_RDONLY)
    try:
        os.dup2(folder, 200)
        options = ("--store=/proc/self/fd/200", "--shards=1", f"--port={free_port()}", f"--ray={ray_cluster}")
        done = run_up(*options, pass_fds=(200,))
    finally:
        os.close(folder)
        os.close(200)
    assert done.returncode == 1
    assert "error: no model in store /proc/self/fd/200" in done.stderr
    assert "node 127.0.0.1 must see it too" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_ray_of_its_own(store: Path, tmp_path: Path) -> None:
    secure = tmp_path / "secure"
    with up(tmp_path, store, 2, "--ray=local", f"--secure={secure}") as running:
        table = longcat_table()
        with EmbeddingClient(running.address, timeout=60, tls=secure / "client") as client:
            come_near(client)
            assert torch.equal(client.lookup(TABLE, torch.arange(len(table))), table)
        # S1: what has no token gets nothing, and a change of the policy comes to every node.
        other = access_of(secure / "ca.crt", "other")
        with EmbeddingClient(running.address, timeout=60, tls=other, near=False) as client:
            with pytest.raises(Unauthenticated):
                client.lookup(TABLE, torch.arange(3))
            with (secure / "policy.toml").open("a") as policy:
                policy.write(f'[identities.other]\ntokens = ["sha256:{digest_of("other")}"]\nread = ["*"]\n')

            def is_let_in() -> bool:
                try:
                    return torch.equal(client.lookup(TABLE, torch.arange(len(table))), table)
                except Unauthenticated:
                    return False

            until(is_let_in, "the new policy at every shard")
        shards = get_status(running.address, tls=access_of(secure / "client", None)).shards
        niceness = {psutil.Process(shard.stats.pid).nice() for shard in shards}
        assert niceness == {psutil.Process().nice()}
        family = psutil.Process(running.popen.pid).children(recursive=True)
        listening = [
            (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
            for process in family
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert running.address in {f"{ip}:{port}" for ip, port in listening}
        assert {ip for ip, _ in listening} <= {"127.0.0.1", "::1"}
        assert running.end() == 0
        assert not psutil.wait_procs(family, timeout=60)[1]
        assert "Traceback" not in running.output()


def test_no_cluster_there(store: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    done = run_up(f"--store={store}", f"--ray={address}")
    assert done.returncode == 1
    assert f"error: no Ray cluster at {address}" in done.stderr
    assert "ray start --head" in done.stderr


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "somewhere"])
def test_no_address_of_a_cluster(store: Path, address: str) -> None:
    done = run_up(f"--store={store}", f"--ray={address}")
    assert done.returncode == 1
    assert "error: --ray must be auto, local or the HOST:PORT" in done.stderr


def test_a_host_to_listen_on_is_refused(store: Path) -> None:
    done = run_up(f"--store={store}", "--ray=local", "--host=0.0.0.0")
    assert done.returncode == 2
    assert "leave --host out" in done.stderr
