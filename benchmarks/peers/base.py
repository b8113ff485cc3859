"""A peer: something that serves the rows of one table to clients in other processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import Data, Ids
from embedding_service.machine import free_port

START_SECONDS = 90.0
STOP_SECONDS = 10.0
# Row ids int64 [n] -> rows [n, dim], a numpy array or a torch tensor.
Lookup = Callable[[Ids], Any]

# Processes begin as forks of one that has loaded torch and has no threads. That is quick, and its memory is shared.
processes = get_context("forkserver")
processes.set_forkserver_preload(["torch", "benchmarks.data"])


class Unusable(Exception):
    """The peer cannot run here. The message says why."""


@dataclass
class Server:
    """A running peer: what a client's process needs to reach it, and the processes whose CPU time is counted."""

    target: Any = None
    pids: list[int] = field(default_factory=list)


class Peer(ABC):
    """Instances go to other processes by pickle: they hold settings only.

    Attributes:
        name: What the tables call it.
    """

    name: str

    @property
    def server_name(self) -> str:
        """Peers with the same share one running server."""
        return self.name

    @abstractmethod
    def serve(self, data: Data, folder: Path) -> AbstractContextManager[Server]:
        """Run its servers within the `with`. `folder` is for their files. Raises Unusable."""

    @abstractmethod
    def connect(self, data: Data, target: Any) -> AbstractContextManager[Lookup]:
        """In a client's process: a lookup of its own for one thread."""


@contextmanager
def command(
    arguments: Sequence[str], log: Path, ready: Callable[[], bool], seconds: float = START_SECONDS, **options: Any
) -> Iterator[subprocess.Popen]:
    """Run a program within the `with`, entered when `ready()`. SIGTERM ends it, or force if it ignores that."""
    with log.open("w") as output:
        running = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)
    try:
        deadline = time.monotonic() + seconds
        while not ready():
            if running.poll() is not None or time.monotonic() > deadline:
                raise Unusable(f"{arguments[0]} did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.05)
        yield running
    finally:
        running.terminate()
        try:
            running.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def says(log: Path, words: str) -> Callable[[], bool]:
    """Whether a program's log holds these words yet."""
    return lambda: words in log.read_text(errors="replace")


@contextmanager
def service(
    store: Path, log: Path, *options: str, seconds: float = START_SECONDS
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run `embedding-service up` over a store within the `with`. Gives its address once it serves, and the process."""
    port = free_port()
    up = [sys.executable, "-m", "embedding_service", "up", f"--store={store}", f"--port={port}", *options]
    with command(up, log, says(log, "ready: "), seconds) as running:
        yield f"127.0.0.1:{port}", running


def listening(port: int) -> bool:
    """Whether somebody answers there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[int, Connection]]:
    """A process of ours that runs `target(pipe, *arguments)` until the pipe closes: its pid and our end of the pipe."""
    here, there = processes.Pipe()
    process = processes.Process(target=_run_child, args=(target, there, *arguments), daemon=True)
    process.start()
    there.close()
    try:
        yield process.pid or 0, here
    finally:
        here.close()
        end(process)


def _run_child(target: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    torch.set_num_threads(1)  # several of us share the cores
    with Path(os.devnull).open("w") as silence:  # what peers' libraries log while all is well
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    try:
        target(pipe, *arguments)
    except Exception as error:  # whatever it is, the caller who waits for an answer is told
        with contextlib.suppress(OSError):
            pipe.send(Unusable(f"{type(error).__name__}: {error}"))


def end(process: Any) -> None:
    """Wait for a process that was told to end, and force it if it does not."""
    process.join(STOP_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


def receive(pipe: Connection, seconds: float) -> Any:
    """The next message. An exception is raised. Raises Unusable if none comes in time."""
    try:
        message = pipe.recv() if pipe.poll(seconds) else Unusable(f"no answer within {seconds:.0f} s")
    except EOFError:
        message = Unusable("the process ended")
    if isinstance(message, Exception):
        raise message
    return message


def wait_for_end(pipe: Connection) -> None:
    """In a `child`: wait until the process that started it closes the pipe."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
