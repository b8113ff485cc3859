"""The trial of grpc's private names: what it finds, and what is done where it fails."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from embedding_service import grpc_core
from embedding_service.errors import InvalidRequest

PRIVATE = [
    "CompletionQueue",
    "Server",
    "RequestCallEvent",
    "CompletionType",
    "OperationType",
    "SendInitialMetadataOperation",
    "SendMessageOperation",
    "SendStatusFromServerOperation",
    "ReceiveInitialMetadataOperation",
    "ReceiveMessageOperation",
    "ReceiveStatusOnClientOperation",
    "ReceiveCloseOnServerOperation",
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing is remembered of a trial."""
    grpc_core.why_public.cache_clear()


def test_this_grpc_has_all_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(grpc_core.VARIABLE, raising=False)
    assert grpc_core.differs() == ""
    assert grpc_core.why_public() == ""


class Without:
    """grpc's module without one of its names."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        if name == self._name:
            raise AttributeError(f"no {name}")
        from grpc._cython import cygrpc

        return getattr(cygrpc, name)


@pytest.mark.parametrize("name", PRIVATE)
def test_the_trial_finds_a_name_that_is_gone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(grpc_core.VARIABLE, raising=False)
    monkeypatch.setattr(grpc_core, "cygrpc", Without(name))
    assert grpc_core.why_public().endswith(f"differ: AttributeError: no {name}")


def test_the_trial_finds_names_that_mean_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(port: grpc_core.Port, tag: object) -> None:
        """Takes no call."""

    with monkeypatch.context() as changed:
        changed.setattr(grpc_core, "PATIENCE", 0.5)
        changed.setattr(grpc_core.Port, "next_call", silent)
        assert "TimeoutError" in grpc_core.differs()
    with monkeypatch.context() as changed:
        changed.setattr(grpc_core, "_received", lambda event: b"other bytes")
        assert "a received message is b'other bytes', not b'1'" in grpc_core.differs()
    monkeypatch.setattr(grpc_core, "cygrpc", None)
    assert "there is no grpc._cython.cygrpc" in grpc_core.differs()


def test_the_log_says_once_which_api_serves_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.delenv(grpc_core.VARIABLE, raising=False)
    for _ in range(2):
        grpc_core.why_public()
    grpc_core.why_public.cache_clear()
    monkeypatch.setattr(grpc_core, "cygrpc", None)
    grpc_core.why_public()
    core, public = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert core == ("INFO", f"calls go by the core of grpcio {grpc.__version__}")
    assert public[0] == "WARNING"
    assert public[1].startswith("calls go by grpc's public API, which takes longer: private names of grpc ")


def test_the_variable_asks_for_the_public_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(grpc_core.VARIABLE, "public")
    assert grpc_core.why_public() == "EMBEDDING_SERVICE_GRPC is public"
    grpc_core.why_public.cache_clear()
    monkeypatch.setenv(grpc_core.VARIABLE, "fast")
    with pytest.raises(InvalidRequest, match="EMBEDDING_SERVICE_GRPC must be 'public' or not set, got 'fast'"):
        grpc_core.why_public()


def test_nothing_else_touches_grpcs_private_names() -> None:
    private = re.compile(r"cygrpc|\._channel\._channel|\bgrpc\._[a-z]")
    root = Path(grpc_core.__file__).parent.parent
    sources = [path for room in ("embedding_service", "model_worker") for path in (root / room).rglob("*.py")]
    found = [path.name for path in sources if private.search(path.read_text()) and path.parent.name != "wire"]
    assert found == ["grpc_core.py"]


def test_the_trial_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "embedding_service.grpc_core"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"the core of grpcio {grpc.__version__} can be used\n")
