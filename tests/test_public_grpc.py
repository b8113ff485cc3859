"""The same tests where grpc's public API serves, as it does where its private names differ (`grpc_core`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedding_service.grpc_core import PUBLIC, VARIABLE

# What meets the front and the client's streams; `make public-grpc` runs whole rooms.
FILES = (
    "test_front.py",
    "test_floods.py",
    "test_drains.py::test_what_arrived_is_answered_and_what_comes_later_is_told",
    "client/test_streams.py",
)


@pytest.mark.polling
@pytest.mark.timeout(900)  # under a minute, but for a busy machine
def test_the_same_tests_pass_on_grpcs_public_api() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(here / file) for file in FILES)],
        env={**os.environ, VARIABLE: PUBLIC},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-10_000:]
