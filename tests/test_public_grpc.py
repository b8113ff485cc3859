"""The same tests where grpc's public API serves, as it does where its private names differ (`grpc_core`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedding_service.grpc_core import PUBLIC, VARIABLE

# What meets the front and the client's streams; `make public-grpc` runs whole rooms.
TESTS = (
    "test_front.py",
    "test_floods.py::test_floods_are_cut_on_a_server_and_neighbours_are_answered",
    "test_floods.py::test_calls_that_wait_for_a_busy_server_are_answered_too",
    "test_drains.py::test_what_arrived_is_answered_and_what_comes_later_is_told",
    "client/test_streams.py::test_a_stream_answers_in_turn_and_outlives_errors",
    "client/test_streams.py::test_streams_that_ended_while_idle_are_replaced_without_a_failure",
)


@pytest.mark.polling
@pytest.mark.heavy
@pytest.mark.timeout(900)  # under a minute, but for a busy machine
def test_the_same_tests_pass_on_grpcs_public_api() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(here / test) for test in TESTS)],
        env={**os.environ, VARIABLE: PUBLIC},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-10_000:]
