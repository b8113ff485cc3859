"""Real processes for tests: `up`, a service, or a controller and shards one by one.

Each ends with its context manager. All but `up` and its members are forked from one process that has imported torch.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import grpc
import psutil
import pytest
import torch

from embedding_service.client.channels import open_channel
from embedding_service.client.status import get_status
from embedding_service.errors import EmbeddingServiceError
from embedding_service.security.access import Access
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import embedding_pb2_grpc
from support.zygote import PACKAGE, TESTS, Forked, Zygote

START_SECONDS = 180
READY = "ready: "  # `up` says it when all is served
# Of an environment that has the service's packages, where that of the tests has the client's alone.
PYTHON = os.environ.get("EMBEDDING_SERVICE_PYTHON", sys.executable)
T = TypeVar("T")
# Whether the test that runs is marked `service`; `make quick` leaves those out.
may_start = True

# Below the ports that the kernel gives to connections, so that none of those takes a port before its listener does.
# Each test process begins somewhere else.
PORTS = range(10_000, 32_000)
_ports = itertools.cycle(PORTS)
next(itertools.islice(_ports, (start := random.SystemRandom().randrange(len(PORTS))), start), None)


def free_port() -> int:
    """A port that nobody listens on at the moment, another one each time."""
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


@functools.cache
def zygote() -> Zygote:
    """This process's own, from the first time it is asked for."""
    return Zygote.start()


def proxies_of_nobody() -> dict[str, str]:
    """Variables that name proxies for the web, at ports where nobody listens."""
    names = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    dead = {case(name): f"http://127.0.0.1:{free_port()}" for name in names for case in (str.lower, str.upper)}
    return {"no_proxy": "", "NO_PROXY": "", **dead}


def dead_proxies(environment: pytest.MonkeyPatch) -> None:
    """Set them for this process and those it starts."""
    for name, value in proxies_of_nobody().items():
        environment.setenv(name, value)


def until(condition: Callable[[], T | None], what: str, seconds: float = START_SECONDS) -> T:
    """The first true result of `condition`. Fails the test if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s for {what}")


class Process:
    """One command of `embedding-service` with its output in a file."""

    popen: subprocess.Popen[bytes] | Forked

    def __init__(
        self,
        log: Path,
        *arguments: str,
        within: Sequence[str] = (),
        forked: bool = True,
        module: str = PACKAGE,
    ) -> None:
        """`within`: a command that runs another, as `ip netns exec NAME` does. `forked`: by the zygote if it can.

        module: What runs, of the package or of the tests' `support`.
        """
        self.log = log
        self._arguments, self._module = arguments, module
        self._within = within
        # What the zygote imported has made use of CUDA, which a child cannot use then.
        self._forked = forked and not within and sys.executable == PYTHON and not torch.cuda.is_available()
        self._start()

    def _start(self) -> None:
        assert may_start, "a test that starts processes of the service needs the mark `service`"
        self.log.touch()
        if self._forked and zygote().suits():
            self.popen = zygote().fork(self._arguments, self._module, self.log)
            return
        command = [*self._within, PYTHON, "-m", self._module, *self._arguments]
        folder = TESTS if self._module.startswith("support") else None
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def output(self) -> str:
        """All it printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until it printed `text`. If it ends before that, fail and show its output."""

        def printed() -> bool:
            if text in self.output():
                return True
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}:\n{self.output()}"
            return False

        until(printed, f"{text!r} from {self.popen.args!r}")

    def wait(self, seconds: float = START_SECONDS) -> int:
        """Its exit code, once it has ended. Raises subprocess.TimeoutExpired."""
        return self.popen.wait(seconds)

    def end(self, how: signal.Signals = signal.SIGTERM, seconds: float = START_SECONDS) -> int:
        """Signal it, and return its exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def resident_anonymous(self) -> int:
        """Its RssAnon in bytes."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        return int(line.split()[1]) * 1024


class Up(Protocol):
    """What answers lookups at one address while tests change nothing, or end and restart it."""

    address: str

    def restart(self) -> None:
        """Start it again after its end; returns when it is ready."""

    def end(self) -> object:
        """End it."""

    def output(self) -> str:
        """All that its processes printed so far."""

    def family(self) -> list[psutil.Process]:
        """Its processes."""

    def status(self) -> control.Status:
        """The controller's view."""


class UpCommand(Process):
    """`embedding-service up`. `address` answers for all of its shards, and stays over restarts."""

    def __init__(self, log: Path, store: Path, shards: int, *options: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        where = (f"--store={store}", f"--shards={shards}", f"--port={port}")
        super().__init__(log, "up", *where, *options, forked=False)

    def restart(self) -> None:
        """Start it again after its end. Returns when it is ready."""
        self.log.unlink()
        self._start()
        self.wait_for(READY)

    def family(self) -> list[psutil.Process]:
        """Its processes: `up`, the controller and the shards."""
        first = psutil.Process(self.popen.pid)
        return [first, *first.children(recursive=True)]

    def status(self) -> control.Status:
        """The controller's view."""
        return get_status(self.address)


@contextmanager
def up(folder: Path, store: Path, shards: int, *options: str) -> Iterator[UpCommand]:
    """A running `up` that is ready. It is ended afterwards."""
    process = UpCommand(folder / "up.log", store, shards, *options)
    try:
        process.wait_for(READY)
        yield process
    finally:
        process.end()


class Members:
    """What `up` starts, with the same arguments, but forked: a controller and shards with one address for all.

    Args:
        secure: The folder of `up --secure`; None for plain text.
        policy: In place of the policy that is made there.
        more: Further arguments of members.
        metrics_port: As of `up`.
        variables: Of the environment, at each of their starts.

    Attributes:
        client_address: The controller's, for clients.
        control: Where shards register.
        access: What an admin shows.
        processes: By name, "controller" among them.
    """

    def __init__(
        self,
        folder: Path,
        store: Path,
        shards: int,
        replicas: int,
        memory: int | None,
        secure: Path | None = None,
        policy: str = "",
        more: Mapping[str, Sequence[str]] | None = None,
        metrics_port: int = 0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        from embedding_service.commands.up import UpOptions, controller_command, prepare, shard_command

        self.address = f"127.0.0.1:{free_port()}"
        self._folder, self._variables = folder, variables or {}
        self.client_address = f"127.0.0.1:{free_port()}"
        port = int(self.address.rpartition(":")[2])
        options = UpOptions(str(store), shards, replicas, "127.0.0.1", port, "ram", memory, None, 1, secure)
        options = replace(options, metrics_port=metrics_port)
        self.control = f"127.0.0.1:{free_port()}" if secure else self.client_address
        self._sockets = tempfile.TemporaryDirectory(prefix="embedding-")
        names = [f"shard-{number}" for number in range(shards)]
        self.access = prepare(secure, options.host, names) if secure else None
        if secure and policy:
            (secure / "policy.toml").write_text(policy)
        self._commands = {name: shard_command(options, self.control, name, self._sockets.name) for name in names}
        self._commands["controller"] = controller_command(options, self.client_address, self.control)
        for name, further in (more or {}).items():
            self._commands[name] += further
        self.processes: dict[str, Process] = {}

    def restart(self) -> None:
        """Start them; returns when all is served."""
        from rich.console import Console

        from embedding_service.commands.up import wait_until_serving

        self.processes = {name: self._start(name) for name in self._commands}
        with (self._folder / "waiting.log").open("w") as said:
            wait_until_serving(
                self.client_address, self._check, len(self._commands) - 1, Console(file=said), self.access
            )

    def restart_member(self, name: str) -> None:
        """End a member, if it runs, and start it again. Does not wait for it."""
        self.processes[name].end()
        self.processes[name] = self._start(name)

    def _start(self, name: str) -> Process:
        with _environment(self._variables):
            return Process(self._folder / f"{name}.log", *self._commands[name])

    def end(self) -> None:
        """End them."""
        for process in self.processes.values():
            process.popen.terminate()
        for process in self.processes.values():
            process.end()

    def output(self) -> str:
        """All they printed so far."""
        return "".join(process.output() for process in self.processes.values())

    def family(self) -> list[psutil.Process]:
        """They and what they started."""
        first = [psutil.Process(process.popen.pid) for process in self.processes.values()]
        return [*first, *(child for each in first for child in each.children(recursive=True))]

    def status(self) -> control.Status:
        """The controller's view."""
        return get_status(self.address, tls=self.access)

    def _check(self) -> None:
        for process in self.processes.values():
            assert process.runs, process.output()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[pytest.MonkeyPatch]:
    """Have these variables until the end, or `undo`."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        yield environment


@contextmanager
def serving(
    folder: Path,
    store: Path,
    shards: int,
    *,
    replicas: int = 1,
    memory: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Up]:
    """A running service that is ready; ended afterwards.

    memory: Bytes a shard; None for what `up` gives it. variables: Of the environment, at each start of a process.
    """
    if sys.executable != PYTHON:
        options = (f"--replicas={replicas}", *([f"--memory={memory}"] if memory else []))
        with _environment(variables or {}) as environment, up(folder, store, shards, *options) as running:
            environment.undo()
            yield running
        return
    members = Members(folder, store, shards, replicas, memory, variables=variables)
    try:
        members.restart()
        yield members
    finally:
        members.end()


def routing_of(address: str, access: Access | None = None) -> wire.Routing:
    """The routing that a controller or a shard has. It is empty while nobody answers."""
    try:
        with open_channel(address, access) as channel:
            return embedding_pb2_grpc.EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest(), timeout=5)
    except grpc.RpcError:
        return wire.Routing()


class Cluster:
    """A controller and shards that a test starts, stops and kills one by one.

    Args:
        store: A folder or an fsspec URL.
        host: Where the controller listens, and shards unless told otherwise.
        within: A command that runs theirs, as `prlimit --nofile=1024` does.
        secure: A folder for what `up --secure` makes. None for plain text.
        mortal: A folder for what tells each kind of process where to die (`support.mortal`). None: it is not told.

    Attributes:
        controller_address: The controller's, for clients.
        control_address: Where shards register.
        access: What an admin shows. None for plain text.
    """

    def __init__(
        self,
        folder: Path,
        store: Path | str,
        *controller_options: str,
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
        secure: Path | None = None,
        mortal: Path | None = None,
    ) -> None:
        self.store = store
        self.controller_address = f"{host}:{free_port()}"
        self.control_address = f"{host}:{free_port()}" if secure else self.controller_address
        self.secure = secure
        self.access: Access | None = None
        self.processes: dict[str, Process] = {}
        self.addresses: dict[str, str] = {}
        self._host = host
        self._within, self._mortal = within, mortal
        self._folder = folder
        self._controller_options = controller_options
        self.start_controller()

    def start_controller(self) -> None:
        """The controller, at the same address each time."""
        self._run(
            "controller",
            "controller",
            f"--store={self.store}",
            f"--listen={self.controller_address}",
            *([f"--control-listen={self.control_address}"] if self.secure else []),
            *self._secured("controller"),
            *self._controller_options,
            within=self._within,
        )

    def _run(self, name: str, kind: str, *arguments: str, within: Sequence[str]) -> None:
        log = self._folder / f"{name}.log"
        if self._mortal:
            told = str(self._mortal / kind), kind, PACKAGE, kind
            self.processes[name] = Process(log, *told, *arguments, within=within, module="support.mortal")
        else:
            self.processes[name] = Process(log, kind, *arguments, within=within)

    def start_shard(self, name: str, *options: str, host: str = "", within: Sequence[str] = ()) -> None:
        """A shard, at the same address each time. `host` and `within` run it elsewhere."""
        address = self.addresses.setdefault(name, f"{host or self._host}:{free_port()}")
        self._run(
            name,
            "shard",
            f"--store={self.store}",
            f"--controller={self.control_address}",
            f"--listen={address}",
            f"--id={name}",
            f"--drain-seconds={START_SECONDS}",
            *self._secured(name),
            *options,
            within=within or self._within,
        )

    def status(self) -> control.Status:
        """The controller's view. It is empty while the controller cannot be reached."""
        try:
            return get_status(self.controller_address, tls=self.access)
        except EmbeddingServiceError:
            return control.Status()

    def wait_until(self, condition: Callable[[control.Status], object], what: str) -> control.Status:
        """Wait until the controller's view fulfils a condition."""

        def fulfilling() -> control.Status | None:
            status = self.status()
            return status if condition(status) else None

        try:
            return until(fulfilling, what)
        except AssertionError as error:
            said = [f"{name}: {process.output()[-2000:]}" for name, process in self.processes.items()]
            problems = [problem.message for problem in self.status().problems]
            raise AssertionError("\n".join([f"{error}; the controller's problems: {problems}", *said])) from None

    def wait_serving(self, models: int = 1) -> control.Status:
        """Wait until `models` models are served, and every shard knows it."""

        def serving(status: control.Status) -> bool:
            served = len(status.models) == models and all(model.serving for model in status.models)
            return served and self._all_know(status.shards)

        return self.wait_until(serving, f"{models} served models")

    def wait_whole(self, copies: int, shards: int) -> None:
        """Wait until there are so many shards, and every part is served by `copies` of them (`is_whole`)."""
        until(
            lambda: self.is_whole(copies) and len(self.status().shards) == shards, f"{copies} copies on {shards} shards"
        )

    def is_whole(self, copies: int) -> bool:
        """Whether every part is served by `copies` of the running shards or more, and all of them know it."""
        status = self.status()
        running = {process.popen.pid for name, process in self.processes.items() if name in self.addresses}
        if status.problems or {shard.stats.pid for shard in status.shards} != running:
            return False
        if any(shard.draining or shard.parts_missing for shard in status.shards):
            return False
        routing = routing_of(self.controller_address, self.access)
        parts = [part for model in routing.models for table in model.tables for part in table.parts]
        enough = bool(parts) and all(len(part.shards) >= copies for part in parts)
        return enough and self._all_know(status.shards)

    def _all_know(self, shards: Iterable[control.ShardStatus]) -> bool:
        """Whether each of them has the controller's routing."""
        routing = routing_of(self.controller_address, self.access)
        return bool(routing.models) and all(routing_of(shard.address, self.access) == routing for shard in shards)

    def stub(self, name: str) -> embedding_pb2_grpc.EmbeddingServiceStub:
        """A thin client of one shard."""
        return embedding_pb2_grpc.EmbeddingServiceStub(open_channel(self.addresses[name], self.access))

    def _secured(self, name: str) -> list[str]:
        """The arguments that secure a member, whose certificate is made for it."""
        if self.secure is None:
            return []
        from embedding_service.commands.up import prepare, secured_by

        self.access = prepare(self.secure, self._host, [name])
        return secured_by(self.secure, name)

    def end(self) -> None:
        """End everything, the controller last. It releases shards when all of them drain."""
        shards = [process for name, process in self.processes.items() if name != "controller"]
        for process in shards:
            if process.runs:
                process.popen.terminate()
                process.popen.send_signal(signal.SIGCONT)  # in case it was stopped
        with ExitStack() as stack:  # all of them, though one does not end
            for process in [self.processes["controller"], *shards]:
                stack.callback(process.end)


@contextmanager
def cluster(
    folder: Path,
    store: Path | str,
    *controller_options: str,
    host: str = "127.0.0.1",
    within: Sequence[str] = (),
    secure: Path | None = None,
    mortal: Path | None = None,
) -> Iterator[Cluster]:
    """A cluster without shards yet. It is ended afterwards."""
    running = Cluster(folder, store, *controller_options, host=host, within=within, secure=secure, mortal=mortal)
    try:
        yield running
    finally:
        running.end()
