"""`up`: controller and shards on one machine, as child processes that end with this one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from embedding_service.client.status import get_status
from embedding_service.commands.query import status_tables, wide_console
from embedding_service.errors import EmbeddingServiceError, NotFound, PlacementError, Unavailable
from embedding_service.machine import check_free, end_with_parent
from embedding_service.wire import control_pb2 as control

# From SIGTERM on: what has not ended by then is killed.
STOP_SECONDS = 4.5
POLL_SECONDS = 0.1
# Without anything getting ready for so long, something is wrong that nobody reports.
STALL_SECONDS = 120.0
# Before a process that ended is started again. One that ran for longer than the second did not fail at once.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


@dataclass(frozen=True)
class UpOptions:
    """What `up` starts; `memory` is bytes a shard, None for an equal share of what is available.

    `processes` are those of one shard.
    """

    store: str
    shards: int
    replicas: int
    host: str
    port: int
    tier: str
    memory: int | None
    cache: Path | None
    processes: int


def run(options: UpOptions) -> None:
    """Start everything, say when it serves, and keep it running until SIGINT or SIGTERM.

    Raises:
        NotFound: the store has no model.
        InvalidRequest: the port is taken.
        PlacementError: the models do not fit the shards.
    """
    check_store(options.store)
    check_free(f"{options.host}:{options.port}", "--port")
    console = wide_console(stderr=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, interrupt)
    members: list[_Member] = []
    try:
        controller = f"{options.host}:{free_port(options.host)}"
        members.append(_Member("controller", controller_command(options, controller)))
        for index in range(options.shards):
            name = f"shard-{index}"
            members.append(_Member(name, shard_command(options, controller, name)))
        status = wait_until_serving(controller, lambda: _check_alive(members))
        for table in status_tables(status):
            console.print(table)
        print(f"ready: {options.shards} shards at {options.host}:{options.port}, controller {controller}", flush=True)
        _keep_running(members, console)
    except KeyboardInterrupt:
        console.print("ending")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop_processes([member.popen for member in members])


def check_store(store: str) -> None:
    """Raise NotFound if there is no model in it."""
    from embedding_service.store.store import Store  # with torch, which Ray's actors do without

    if not Store(store).models():
        absent = "" if "://" in store or Path(store).is_dir() else ", which is no folder"
        raise NotFound(f"no model in store {store}{absent}: `embedding-service import` puts one there")


def controller_command(options: UpOptions, controller: str) -> list[str]:
    """The arguments of a controller at host:port `controller`."""
    return [
        "controller",
        f"--store={options.store}",
        f"--listen={controller}",
        f"--replicas={options.replicas}",
        f"--expect-shards={options.shards}",
    ]


def shard_command(options: UpOptions, controller: str, name: str) -> list[str]:
    """The arguments of one shard."""
    command = [
        "shard",
        f"--store={options.store}",
        f"--controller={controller}",
        f"--listen={options.host}:0",
        f"--shared-listen={options.host}:{options.port}",
        f"--id={name}",
        f"--tier={options.tier}",
        f"--processes={options.processes}",
        "--drain-seconds=0",  # all of them end together
    ]
    memory = options.memory
    if memory is None and options.tier in ("ram", "cuda", "cuda-cached"):
        from embedding_service.shard.memory import offered_memory

        memory = offered_memory(options.tier) // options.shards
    if memory is not None:
        command.append(f"--memory={memory}")
    if options.cache:
        command.append(f"--cache={options.cache}")
    return command


def start_process(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command of `embedding-service` that ends with the calling thread."""
    return subprocess.Popen(
        [sys.executable, "-m", "embedding_service", *arguments],
        stdin=subprocess.DEVNULL,
        # Ctrl-C is for us: we end them in order. Should we die, the kernel tells them to end.
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),
    )


class _Member:
    """A process that is started again when it ends, each time after a longer pause unless it ran for a while."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = command
        self._pause = FIRST_PAUSE
        self._start_at = 0.0
        self._start()

    def _start(self) -> None:
        self.popen = start_process(self._command)
        self._started = time.monotonic()

    def look(self) -> str:
        """Start it where it is time to; says so when it has ended."""
        now = time.monotonic()
        if self.popen.poll() is None or now < self._start_at:
            return ""
        if self._start_at > self._started:
            self._start()
            return ""
        self._pause = FIRST_PAUSE if now - self._started > LONGEST_PAUSE else min(2 * self._pause, LONGEST_PAUSE)
        self._start_at = now + self._pause
        return f"{self.name} ended with exit code {self.popen.returncode}: it starts again in {self._pause:g} s"


def _check_alive(members: list[_Member]) -> None:
    for member in members:
        if member.popen.poll() is not None:
            raise Unavailable(f"{member.name} ended with exit code {member.popen.returncode}; its last words are above")


def wait_until_serving(controller: str, check_alive: Callable[[], None]) -> control.Status:
    """Until every model is served. `check_alive` is called all along and raises when one of the processes ended.

    Raises:
        PlacementError: the models do not fit the shards, or the store cannot be read.
        Unavailable: nothing got ready for STALL_SECONDS, or what shards report fails for 5 s.
    """
    ready, last_progress = -1, time.monotonic()
    while True:
        check_alive()
        try:
            status = get_status(controller, timeout=2.0)
        except EmbeddingServiceError:
            status = control.Status()
        if status.models and all(model.serving for model in status.models):
            return status
        for problem in status.problems:
            if problem.kind in (control.Problem.KIND_STORE, control.Problem.KIND_PLACEMENT):
                raise PlacementError(problem.message)
        now_ready = len(status.shards) + sum(model.parts_ready for model in status.models)
        if now_ready > ready:
            ready, last_progress = now_ready, time.monotonic()
        failing = [problem.message for problem in status.problems if problem.kind == control.Problem.KIND_SHARD]
        if time.monotonic() - last_progress > (5.0 if failing else STALL_SECONDS):
            raise Unavailable("; ".join(failing) or f"nothing got ready for {STALL_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


def _keep_running(members: list[_Member], console: Console) -> NoReturn:
    """Start again what ended, for this is their platform. The controller places a dead shard's parts meanwhile."""
    while True:
        for member in members:
            if said := member.look():
                console.print(said, style="red")
        time.sleep(POLL_SECONDS)


def stop_processes(children: Collection[subprocess.Popen[bytes]]) -> None:
    """End them; returns when they did, within STOP_SECONDS."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handle SIGTERM as Ctrl-C is."""
    raise KeyboardInterrupt


def free_port(host: str) -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
