"""What an operator does to a service and what befalls it, in turn, under one load whose rows are checked."""

import signal
import time
from pathlib import Path

import pytest
from support.checkpoints import longcat_table
from support.cluster import Cluster, cluster, until
from support.load import Load

from embedding_service.store.importing import import_checkpoint

pytestmark = pytest.mark.service

COPIES = 2
LOST_AFTER = 2.0
DRAIN_SECONDS = 120.0


@pytest.fixture
def own_store(checkpoint: Path, tmp_path: Path) -> Path:
    import_checkpoint(checkpoint, str(tmp_path / "store"), "m", dtype="fp32", part_bytes=64 << 10)
    return tmp_path / "store"


class Operator:
    """The steps; each ends when every part is whole again, and lookups were answered since."""

    def __init__(self, running: Cluster, load: Load | None = None) -> None:
        self.running, self.load = running, load

    def start(self, *names: str) -> None:
        for name in names:
            self.running.start_shard(name, "--memory=64MiB", f"--drain-seconds={DRAIN_SECONDS}")
        self.settle()

    def drain(self, *names: str) -> None:
        """As Kubernetes does: all that go are told at once."""
        for name in names:
            self.running.processes[name].popen.terminate()
        for name in names:
            assert self.running.processes[name].wait() == 0
            assert "INFO drained" in self.running.processes[name].output()
            del self.running.processes[name], self.running.addresses[name]
        self.settle()

    def roll(self) -> None:
        for name in list(self.running.addresses):
            assert self.running.processes[name].end(signal.SIGTERM) == 0
            self.start(name)

    def restart_controller(self) -> None:
        self.running.processes["controller"].end(signal.SIGKILL)
        self.answered(20)
        self.running.start_controller()
        self.settle()

    def kill(self, name: str) -> None:
        self.running.processes[name].end(signal.SIGKILL)
        self.answered(20)
        self.start(name)

    def cut_off(self, name: str) -> None:
        """For longer than the controller waits for it: its copies are made again elsewhere before it is back."""
        process = self.running.processes[name].popen
        process.send_signal(signal.SIGSTOP)
        others = len(self.running.addresses) - 1
        self.running.wait_until(lambda status: len(status.shards) == others, f"{name} to count as gone")
        self.answered(20)
        process.send_signal(signal.SIGCONT)
        self.settle()

    def settle(self) -> None:
        until(lambda: self.running.is_whole(COPIES), f"every part {COPIES} times; {self.running.status()}")
        self.answered(20)

    def answered(self, lookups: int) -> None:
        if self.load:
            asked = self.load.lookups
            until(lambda: self.load is None or self.load.lookups > asked + lookups, "lookups to be answered")


def test_scaling_rolling_restarts_deaths_and_cuts_lose_no_lookup(
    own_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--expect-shards=3", f"--replicas={COPIES}", f"--lost-after={LOST_AFTER}", "--grace=1")
    with cluster(tmp_path, own_store, *options) as running:
        operator = Operator(running)
        operator.start("a", "b", "c")
        with Load(list(running.addresses.values()), "m/ngram", longcat_table(), pause=0.005) as load:
            operator.load = load
            for phase, step in {
                "3 to 5": lambda: operator.start("d", "e"),
                "5 to 2": lambda: operator.drain("c", "d", "e"),
                "2 to 3": lambda: operator.start("c"),
                "rolling restart": operator.roll,
                "controller killed": operator.restart_controller,
                "shard killed": lambda: operator.kill("b"),
                "shard cut off": lambda: operator.cut_off("a"),
            }.items():
                load.phase, began = phase, time.monotonic()
                step()
                with capsys.disabled():
                    seconds = load.seconds[phase]
                    print(f"\n{phase}: {time.monotonic() - began:.1f} s, {len(seconds)} lookups, "
                          f"slowest {max(seconds):.2f} s", end="")  # fmt: skip
        load.check()
