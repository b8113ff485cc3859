"""Clients and forks of their process, each way in a process of its own (`support.forking`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import Up

TESTS = Path(__file__).parents[1]


def run(*arguments: str, **environment: str) -> str:
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize(("how", "way"), [("fork", "near"), ("forkserver", "wired"), ("spawn", "near")])
def test_a_data_loaders_workers_use_a_client(service: Up, how: str, way: str) -> None:
    assert run("-m", "support.forking", how, service.address, way) == "right"


@pytest.mark.parametrize(("support", "way"), [("", "near"), ("1", "wired")])
def test_children_of_a_fork_get_rows(service: Up, support: str, way: str) -> None:
    """With GRPC_ENABLE_FORK_SUPPORT=1 every child of a process that had a client hung.

    Children that worked on many rows waited for torch's threads of their parent, or died of a signal (SIGSEGV).
    """
    environment = {"GRPC_ENABLE_FORK_SUPPORT": support} if support else {}
    assert run("-m", "support.forking", "os.fork", service.address, way, **environment) == "right"


def test_a_child_whose_grpc_does_not_work_says_so(service: Up) -> None:
    """Rows or an error that names the remedy, never a wait for ever: here gRPC is told not to prepare for forks."""
    assert run("-m", "support.forking", "unprepared", service.address, "wired", GRPC_ENABLE_FORK_SUPPORT="0") == "right"


def test_importing_changes_nothing_for_others() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import embedding_service;"
        "print('grpc' in sys.modules, dict(os.environ) == before)"
    )
    assert run("-c", code) == "False True"
