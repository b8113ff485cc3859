"""`up --ray`: controller and shards as actors of a Ray cluster, on as many nodes as it has.

Ray places the shards (a placement group, spread over the nodes) and starts them again when they die. It ends them when
this process, their driver, is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from rich.console import Console
from rich.text import Text

from embedding_service.commands import up
from embedding_service.commands.console import wide_console
from embedding_service.commands.query import status_tables
from embedding_service.commands.secured import check_plain
from embedding_service.commands.text import format_bytes
from embedding_service.commands.up import UpOptions
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, NotFound, PlacementError, Unavailable
from embedding_service.local_ray import start_ray
from embedding_service.machine import check_free, join_address, split_address
from embedding_service.placement.demand import CUDA
from embedding_service.private_folder import PrivateFolder
from embedding_service.rows import TIERS
from embedding_service.rows.base import LiesIn
from embedding_service.security.authority import AUTHORITY, CERTIFICATE, KEY, POLICY, write_private
from embedding_service.security.files import Stamp, stamp_of

LOCAL = "local"
# Ray's `memory` that a shard needs besides its rows, for its own process and the actor's.
PROCESS_BYTES = 512 << 20
# A cluster may have to add nodes first. On this machine alone there is room at once or never.
ROOM_SECONDS, LOCAL_ROOM_SECONDS = 120.0, 5.0
LOOK_SECONDS = 0.5


def run(options: UpOptions, address: str) -> None:
    """Start everything in the Ray cluster at `address`, say when it serves, and stay until SIGINT or SIGTERM.

    Args:
        options: Those of `up` on one machine. But shards listen on the addresses of their nodes, not on `host`.
        address: HOST:PORT of a running cluster, "auto" for the one that this machine is a node of, "local" for one
            that starts here and ends with this process.

    Raises:
        NotFound: the store has no model, or a node does not see it.
        InvalidRequest: the port is taken on a node, it has no GPU for a tier that needs one, or `address` is of a
            wrong kind.
        PlacementError: the cluster has no room for the shards, or the models do not fit them.
        Unavailable: there is no such cluster or it fails, or a process ended before everything was served.
    """
    console = wide_console(stderr=True)
    _check_address(address)
    up.check_store(options.store)
    options = _for_other_nodes(options)
    servers: list[_Server] = []
    _on_signals(up.interrupt)
    try:
        _join(options, address)
        _on_signals(up.interrupt)  # Ray has taken SIGTERM for itself
        gpus = _gpus_a_shard(options)
        room = _reserve(options, gpus, address, console)
        _survey_nodes(options, gpus, room)
        secured = _Secured(options) if options.secure else None
        controller = _start(options, gpus, room, servers, secured)
        _say_ready(options, controller, servers, console, secured)
        _watch(servers, console, secured)
    except KeyboardInterrupt:
        console.print("ending")
    except RayError as error:
        raise Unavailable(f"the Ray cluster at {address} fails: {error}") from error
    finally:
        _on_signals(signal.SIG_IGN)
        _end(servers)


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _for_other_nodes(options: UpOptions) -> UpOptions:
    """The options without anything that another machine would take differently."""
    store = options.store if "://" in options.store else str(Path(options.store).absolute())
    cache = options.cache.absolute() if options.cache else None
    memory = options.memory
    if memory is None and TIERS[options.tier].lies_in is not LiesIn.FILES:
        memory = _needed_memory(options)
    secure = options.secure.absolute() if options.secure else None
    return replace(options, store=store, cache=cache, memory=memory, secure=secure)


def _needed_memory(options: UpOptions) -> int:
    """Bytes of a shard: an even share and one more part (parts do not divide evenly), all twice for new versions."""
    from embedding_service.store.store import Store

    manifests = Store(options.store).newest()
    copies = options.replicas * sum(manifest.bytes for manifest in manifests)
    largest = max(part.bytes for manifest in manifests for table in manifest.tables for part in table.parts)
    return 2 * (copies // options.shards + largest)


# The cluster


def _check_address(address: str) -> None:
    """Check that somebody is there. Ray itself would go on trying for minutes."""
    if address in (LOCAL, "auto"):
        return
    try:
        host, port = split_address(address)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"--ray must be auto, local or the HOST:PORT of a cluster that this machine is a node of: {error}"
        ) from None
    try:
        socket.create_connection((host.strip("[]"), port), timeout=5).close()
    except OSError as error:
        raise Unavailable(f"no Ray cluster at {address} ({error}): `ray start --head` starts one") from None


def _join(options: UpOptions, address: str) -> None:
    """Become a driver, so that all that this process starts ends with it."""
    if address == LOCAL:
        gpus = None if _on_gpu(options) else 0  # None: Ray finds out how many there are
        start_ray(num_cpus=max(os.cpu_count() or 1, options.shards), num_gpus=gpus)
    else:
        ray.init(address=address, logging_level=logging.ERROR)


def _on_gpu(options: UpOptions) -> bool:
    return TIERS[options.tier].device == CUDA


def _gpus_a_shard(options: UpOptions) -> float:
    """A GPU for each shard if enough are free, else equal pieces, so that several shards share one."""
    if not _on_gpu(options):
        return 0
    free = int(ray.available_resources().get("GPU", 0)) or options.shards  # none yet: for nodes that come later
    sharing = -(-options.shards // free)
    return 10_000 // sharing / 10_000  # Ray counts in ten-thousandths. Rounded up, the last piece would not fit


def _reserve(options: UpOptions, gpus: float, address: str, console: Console) -> PlacementGroup:
    """Room for each shard, on different nodes while there are enough."""
    host_rows = options.memory or 0 if TIERS[options.tier].lies_in is LiesIn.HOST else 0
    need = {"CPU": 1, "memory": PROCESS_BYTES + host_rows} | ({"GPU": gpus} if gpus else {})
    room = placement_group([need] * options.shards, strategy="SPREAD", name="embedding-service")
    if _comes(room, LOCAL_ROOM_SECONDS):
        return room
    free = ray.available_resources()
    free_gpus = f", {free.get('GPU', 0):g} GPUs" if gpus else ""
    missing = (
        f"the Ray cluster has no room for {options.shards} shards of 1 CPU{f', {gpus:g} GPU' if gpus else ''} and "
        f"{format_bytes(need['memory'])}: {free.get('CPU', 0):g} CPUs{free_gpus} and "
        f"{format_bytes(free.get('memory', 0))} are free in all"
    )
    if address != LOCAL:
        console.print(f"{missing}; waiting for nodes", style="red")
        if _comes(room, ROOM_SECONDS):
            return room
    raise PlacementError(f"{missing}; add nodes, or lower --shards or --memory")


def _comes(room: PlacementGroup, seconds: float) -> bool:
    """Whether it is there in time. It is asked again and again, because Ray's own wait hears no signals."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if room.wait(1):
            return True
    return False


def _survey_nodes(options: UpOptions, gpus: float, room: PlacementGroup) -> None:
    """Check before the start that every node sees the store, has the port free, and a GPU if the tier needs one."""
    bundles = {node: bundle for bundle, node in placement_group_table(room)["bundles_to_node_id"].items()}
    # In a worker of its own, so that its imports do not stay in one of the actors.
    survey = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=1)(_survey)
    try:
        ray.get([survey.options(scheduling_strategy=_in(room, bundle)).remote(options) for bundle in bundles.values()])
    except RayTaskError as error:
        if isinstance(error.cause, EmbeddingServiceError):
            raise error.cause from None
        raise Unavailable(f"a node cannot run shards, is this release installed on it? {error.cause!r}") from error


def _survey(options: UpOptions) -> None:
    host = ray.util.get_node_ip_address()
    check_free(join_address(host, options.port), "--port")
    try:
        up.check_store(options.store)
    except NotFound as error:
        raise NotFound(f"{error}; node {host} must see it too: use a folder that all nodes share, or a URL") from None
    try:
        TIERS[options.tier].check_machine()
    except InvalidRequest as error:
        raise InvalidRequest(f"node {host}: {error}") from None


def _in(room: PlacementGroup, bundle: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=bundle)


# What secures them


class _Secured:
    """The folder of `up --secure`, of which each node gets what its shards need. Ray carries it there.

    Attributes:
        access: What the admin shows.
    """

    def __init__(self, options: UpOptions) -> None:
        assert options.secure
        self._folder, self._host = options.secure, options.host
        self._shards = [up.shard_name(index) for index in range(options.shards)]
        self._hosts: list[str] = []
        self._sent: Stamp = ()
        self.look()

    def look(self) -> bool:
        """Make certificates for nodes that came. Returns whether there is something new for the shards."""
        hosts = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
        if not set(hosts) <= set(self._hosts):
            self._hosts = sorted({*hosts, *self._hosts})
            self.access = up.prepare(self._folder, self._host, self._shards, self._hosts)
        stamp = stamp_of([*self._common(), *(self._folder / name / CERTIFICATE for name in self._shards)])
        changed, self._sent = stamp != self._sent, stamp
        return changed

    def files(self, shard: str) -> dict[str, bytes]:
        """Of a shard, by their names within the folder: its own, the policy, and the keys that the policy names."""
        own = [self._folder / shard / file for file in (CERTIFICATE, KEY, AUTHORITY)]
        return {str(path.relative_to(self._folder)): path.read_bytes() for path in (*own, *self._common())}

    def _common(self) -> list[Path]:
        return [self._folder / POLICY, *sorted(self._folder.glob("*.json"))]


# The actors


class _MemberActor:
    """An actor with one process of the service. Neither stays without the other.

    The process is a child, as everywhere else, rather than this one. A Ray worker has signal handlers, an event loop, a
    gRPC and memory of its own. The child is started on this thread, because the kernel ends it with the thread. This
    thread lives as long as the actor.
    """

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self._ending = False
        self._child = up.start_process(arguments)
        threading.Thread(target=self._follow, args=(name,), daemon=True).start()

    def pid(self) -> int:
        return self._child.pid

    def end(self) -> None:
        """Returns when the process is gone."""
        self._ending = True
        up.stop_processes([self._child])

    def _follow(self, name: str) -> None:
        code = self._child.wait()
        if not self._ending:
            print(f"{name} ended with exit code {code}", file=sys.stderr, flush=True)
            os._exit(1)  # Ray takes any other way out for a wish to end, and would not start it again


class _Shard(_MemberActor):
    def __init__(self, name: str, options: UpOptions, controller: str, files: dict[str, bytes]) -> None:
        # Found at each start: when a node is lost, Ray moves its shards.
        here = replace(options, host=ray.util.get_node_ip_address())
        node = ray.get_runtime_context().get_node_id()
        self._sockets = PrivateFolder()
        self._secure = self._sockets.path / "secure"
        if options.secure:
            self.renew(files)
            here = replace(here, secure=self._secure)
        command = up.shard_command(here, controller, name, str(self._sockets.path))
        super().__init__(name, [*command, f"--topology={node}"])

    def renew(self, files: dict[str, bytes]) -> None:
        """Put what secures the shard where it reads it, again when it changed."""
        for name, content in files.items():
            path = self._secure / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(path, content)


class _Server:
    """An actor as its driver sees it.

    Attributes:
        pid: Its process's, which no two processes of the actor share. 0 while there is none.
    """

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.actor = actor
        self.pid = 0
        self._asked = actor.pid.remote()

    def look(self) -> bool:
        """Take in the actor's last answer. Returns whether a process that ran does not any more."""
        if not ray.wait([self._asked], timeout=0)[0]:
            return False
        before = self.pid
        try:
            self.pid = ray.get(self._asked)
        except ActorUnavailableError:  # Ray is about to start it again
            self.pid = 0
        except RayActorError as error:
            raise Unavailable(f"{self.name} cannot be started: {error}") from error
        self._asked = self.actor.pid.remote()
        return before not in (0, self.pid)


def _start(
    options: UpOptions, gpus: float, room: PlacementGroup, servers: list[_Server], secured: _Secured | None
) -> str:
    """Add the controller and all shards to `servers`. Returns the controller's address.

    The controller starts on this node each time, at the same address. If this node is lost, so is the driver.
    """
    host = ray.util.get_node_ip_address()
    if not secured:
        check_plain(options.insecure, host)
    controller, control = up.two_addresses(host)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(_MemberActor).options(name="controller", num_cpus=0, max_restarts=-1, scheduling_strategy=here)
    command = up.controller_command(options, controller, control)
    servers.append(_Server("controller", actor.remote("controller", command)))
    for index in range(options.shards):
        name = up.shard_name(index)
        files = secured.files(name) if secured else {}
        needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": _in(room, index)}
        shard = ray.remote(_Shard).options(name=name, max_restarts=-1, **needs)
        servers.append(_Server(name, shard.remote(name, options, control if secured else controller, files)))
    return controller


def _say_ready(
    options: UpOptions, controller: str, servers: list[_Server], console: Console, secured: _Secured | None
) -> None:
    access = secured.access if secured else None
    status = up.wait_until_serving(controller, lambda: _check_alive(servers), options.shards, console, access)
    for table in status_tables(status):
        console.print(table)
    hosts = sorted({shard.address.rpartition(":")[0] for shard in status.shards})
    addresses = ", ".join(join_address(host, options.port) for host in hosts)
    if options.secure:
        first = join_address(hosts[0], options.port)
        console.print(Text(f'clients: EmbeddingClient("{first}", tls="{options.secure / "client"}")'))
    print(f"ready: {options.shards} shards at {addresses}, controller {controller}", flush=True)


def _check_alive(servers: list[_Server]) -> None:
    for server in servers:
        if server.look():
            raise Unavailable(f"{server.name} ended; its last words are above")


def _watch(servers: list[_Server], console: Console, secured: _Secured | None) -> None:
    while True:
        if secured and secured.look():
            for server in servers[1:]:
                server.actor.renew.remote(secured.files(server.name))
        for server in servers:
            if server.look():
                console.print(f"{server.name} ended, Ray starts it again", style="red")
        time.sleep(LOOK_SECONDS)


def _end(servers: list[_Server]) -> None:
    """End all processes, then their actors. What else runs in a joined cluster is left alone."""
    if not ray.is_initialized():
        return
    ends = [server.actor.end.remote() for server in servers]
    if ends:
        ray.wait(ends, num_returns=len(ends), timeout=up.STOP_SECONDS + 1)
    for server in servers:
        ray.kill(server.actor)
    ray.shutdown()  # the placement group goes with its driver
