"""A process that answers no calls any more ends, and its keeper starts it again."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support import sabotage
from support.checkpoints import longcat_table
from support.cluster import Up, until, up

from embedding_service import EmbeddingClient
from embedding_service.errors import EmbeddingServiceError

pytestmark = pytest.mark.service


@pytest.fixture
def running(small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Up]:
    """`up` of two shards with a switch in each process that breaks its server."""
    monkeypatch.setenv("PYTHONPATH", sabotage.python_path())
    with up(tmp_path, small_store, 2, "--replicas=2", "--processes=2") as running:
        yield running


def called(process: psutil.Process) -> str:
    return next((each for each in process.cmdline() if each in ("controller", "shard")), "other")


def test_members_whose_server_died_end_and_up_starts_them_again(running: Up) -> None:
    status = running.status()
    controller = next(line for line in running.output().splitlines() if "ready: " in line).split()[-1]
    [process] = [each for each in running.family() if called(each) == "controller"]
    shard = status.shards[0]
    for pid, address in ((process.pid, controller), (shard.stats.pid, shard.address)):
        victim = psutil.Process(pid)
        until(lambda: sabotage.broken(victim, address), "it to end")  # noqa: B023
    until(lambda: running.output().count("starts again in") >= 2, "up to see it")

    def whole() -> bool:
        try:
            status = running.status()
        except EmbeddingServiceError:
            return False
        pids = {each.stats.pid for each in status.shards}
        return len(pids) == 2 and shard.stats.pid not in pids and not status.problems

    until(whole, "both to be there again")
    assert "the thread that serves" in running.output()
    with EmbeddingClient(running.address, timeout=60) as client:
        table = longcat_table()
        assert torch.equal(client.lookup("m/ngram", torch.arange(len(table))), table)
