"""The attacked service: who is there, what it takes, and whether it answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import psutil

from embedding_service.client.status import get_status
from embedding_service.errors import EmbeddingServiceError
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub
from support.cluster import Cluster, Process, until
from support.security import channel_to

CONTROLLER = "controller"
SHARD_OPTIONS = ("--memory=64MiB",)
COPIES = 2
SECONDS_TO_ANSWER = 10.0
SECONDS_TO_MEND = 30.0
SAMPLE_SECONDS = 0.05


class Members:
    """Controller and shards, each started again when it was lost."""

    def __init__(self, running: Cluster) -> None:
        self.cluster = running
        self.peak: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The controller first."""
        return [CONTROLLER, *self.cluster.addresses]

    def pids(self) -> dict[str, int]:
        """Of each."""
        return {name: self.cluster.processes[name].popen.pid for name in self.names}

    def resident(self) -> dict[str, int]:
        """Anonymous memory of each in bytes, its further processes included; 0 where it is gone."""
        return {name: _resident(pid) for name, pid in self.pids().items()}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """`peak` is the most memory of each until the end."""
        self.peak = self.resident()
        over = threading.Event()

        def watch() -> None:
            while not over.wait(SAMPLE_SECONDS):
                for name, nbytes in self.resident().items():
                    self.peak[name] = max(self.peak[name], nbytes)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def lost(self) -> dict[str, str]:
        """Those that ended or do not answer, and how that showed."""
        found = {}
        for name in self.names:
            process = self.cluster.processes[name]
            if not process.runs:
                found[name] = f"ended with {process.popen.returncode}: {last_words(process)}"
            elif said := self._does_not_answer(name):
                found[name] = f"does not answer: {said}"
        return found

    def restart(self, name: str) -> None:
        """Kill it and start it again."""
        self.cluster.processes[name].popen.kill()
        self.cluster.processes[name].popen.wait()
        if name == CONTROLLER:
            self.cluster.start_controller()
        else:
            self.start_shard(name)

    def wait_for_controller(self) -> None:
        """Until one that was started answers, or ended, or takes too long: `lost` then tells."""
        with suppress(AssertionError):
            until(self._controller_came, "", SECONDS_TO_MEND)

    def _controller_came(self) -> bool:
        return not self.cluster.processes[CONTROLLER].runs or self.cluster.status().term > 0

    def start_shard(self, name: str) -> None:
        """One shard."""
        self.cluster.start_shard(name, *SHARD_OPTIONS)

    def wait_whole(self, seconds: float = SECONDS_TO_MEND) -> str:
        """Until all hold what they should and nothing stands in the way; else what does."""
        with suppress(AssertionError):
            until(lambda: self.cluster.is_whole(COPIES), "", seconds)
            return ""
        problems = [problem.message for problem in self.cluster.status().problems]
        return f"not whole after {seconds:.0f} s: {'; '.join(problems) or 'copies are missing'}"

    def _does_not_answer(self, name: str) -> str:
        try:
            if name == CONTROLLER:
                self._ask_controller()
                return ""
            with channel_to(self.cluster.addresses[name], self.cluster.access) as channel:
                stub = EmbeddingServiceStub(channel)
                request = wire.LookupRequest(model="m", table="ngram", ids=range(0, 19000, 997))
                stub.Lookup(request, timeout=SECONDS_TO_ANSWER, wait_for_ready=True)
                stub.GetRouting(wire.GetRoutingRequest(), timeout=SECONDS_TO_ANSWER)
        except grpc.RpcError as error:
            return f"{error.code().name} {error.details()}"
        except EmbeddingServiceError as error:
            return str(error)
        return ""

    def _ask_controller(self) -> None:
        """Until it answers: for a second after a flood this host's new connections are dropped."""
        deadline = time.monotonic() + SECONDS_TO_ANSWER
        while True:
            try:
                get_status(self.cluster.controller_address, timeout=SECONDS_TO_ANSWER, tls=self.cluster.access)
                return
            except EmbeddingServiceError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def last_words(process: Process) -> str:
    """The last line that it logged."""
    return (process.output().strip().splitlines() or ["without a word"])[-1]


def _resident(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        return sum(_anonymous(each.pid) for each in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def _anonymous(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
