"""Real processes for tests: `up`, or a controller and shards one by one. Each ends with its context manager."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import grpc
import psutil
import pytest

from embedding_service.client.status import get_status
from embedding_service.errors import EmbeddingServiceError
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import embedding_pb2_grpc

START_SECONDS = 180
READY = "ready: "  # `up` says it when all is served
# Of an environment that has the service's packages, where that of the tests has the client's alone.
PYTHON = os.environ.get("EMBEDDING_SERVICE_PYTHON", sys.executable)
T = TypeVar("T")


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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

    def __init__(self, log: Path, *arguments: str, within: Sequence[str] = ()) -> None:
        """`within`: a command that runs another, as `ip netns exec NAME` does."""
        self.log = log
        self._command = [*within, PYTHON, "-m", "embedding_service", *arguments]
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
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

    def end(self, how: signal.Signals = signal.SIGTERM, seconds: float = 15) -> int:
        """Signal it, and return its exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        try:
            return self.popen.wait(seconds)
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


class Up(Process):
    """`embedding-service up`. `address` answers for all of its shards, and stays over restarts."""

    def __init__(self, log: Path, store: Path, shards: int, *options: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        super().__init__(log, "up", f"--store={store}", f"--shards={shards}", f"--port={port}", *options)

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
def up(folder: Path, store: Path, shards: int, *options: str) -> Iterator[Up]:
    """A running `up` that is ready. It is ended afterwards."""
    process = Up(folder / "up.log", store, shards, *options)
    try:
        process.wait_for(READY)
        yield process
    finally:
        process.end()


class Cluster:
    """A controller and shards that a test starts, stops and kills one by one.

    Args:
        store: A folder or an fsspec URL.
        host: Where the controller listens, and shards unless told otherwise.
        within: A command that runs theirs, as `prlimit --nofile=1024` does.
    """

    def __init__(
        self,
        folder: Path,
        store: Path | str,
        *controller_options: str,
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
    ) -> None:
        self.store = store
        self.controller_address = f"{host}:{free_port()}"
        self.processes: dict[str, Process] = {}
        self.addresses: dict[str, str] = {}
        self._host = host
        self._within = within
        self._folder = folder
        self._controller_options = controller_options
        self.start_controller()

    def start_controller(self) -> None:
        """The controller, at the same address each time."""
        self.processes["controller"] = Process(
            self._folder / "controller.log",
            "controller",
            f"--store={self.store}",
            f"--listen={self.controller_address}",
            *self._controller_options,
            within=self._within,
        )

    def start_shard(self, name: str, *options: str, host: str = "", within: Sequence[str] = ()) -> None:
        """A shard, at the same address each time. `host` and `within` run it elsewhere."""
        address = self.addresses.setdefault(name, f"{host or self._host}:{free_port()}")
        self.processes[name] = Process(
            self._folder / f"{name}.log",
            "shard",
            f"--store={self.store}",
            f"--controller={self.controller_address}",
            f"--listen={address}",
            f"--id={name}",
            *options,
            within=within or self._within,
        )

    def status(self) -> control.Status:
        """The controller's view. It is empty while the controller cannot be reached."""
        try:
            return get_status(self.controller_address)
        except EmbeddingServiceError:
            return control.Status()

    def wait_until(self, condition: Callable[[control.Status], object], what: str) -> control.Status:
        """Wait until the controller's view fulfils a condition."""

        def fulfilling() -> control.Status | None:
            status = self.status()
            return status if condition(status) else None

        return until(fulfilling, what)

    def wait_serving(self, models: int = 1) -> control.Status:
        """Wait until `models` models are served."""
        return self.wait_until(
            lambda status: len(status.models) == models and all(model.serving for model in status.models),
            f"{models} served models",
        )

    def is_whole(self, copies: int) -> bool:
        """Whether the controller knows just the running shards, and every part is served by `copies` of them."""
        status = self.status()
        running = {process.popen.pid for name, process in self.processes.items() if name in self.addresses}
        if status.problems or {shard.stats.pid for shard in status.shards} != running:
            return False
        if any(shard.draining or shard.parts_missing for shard in status.shards):
            return False
        try:
            with grpc.insecure_channel(self.controller_address) as channel:
                stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
                routing = stub.GetRouting(wire.GetRoutingRequest(), timeout=5)
        except grpc.RpcError:
            return False
        parts = [part for model in routing.models for table in model.tables for part in table.parts]
        return bool(parts) and all(len(part.shards) >= copies for part in parts)

    def stub(self, name: str) -> embedding_pb2_grpc.EmbeddingServiceStub:
        """A thin client of one shard."""
        return embedding_pb2_grpc.EmbeddingServiceStub(grpc.insecure_channel(self.addresses[name]))

    def end(self) -> None:
        """End everything, the controller last. It releases shards when all of them drain."""
        shards = [process for name, process in self.processes.items() if name != "controller"]
        for process in shards:
            if process.runs:
                process.popen.terminate()
                process.popen.send_signal(signal.SIGCONT)  # in case it was stopped
        for process in [*shards, self.processes["controller"]]:
            process.end()


@contextmanager
def cluster(
    folder: Path, store: Path | str, *controller_options: str, host: str = "127.0.0.1", within: Sequence[str] = ()
) -> Iterator[Cluster]:
    """A cluster without shards yet. It is ended afterwards."""
    running = Cluster(folder, store, *controller_options, host=host, within=within)
    try:
        yield running
    finally:
        running.end()
