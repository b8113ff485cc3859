"""The audit: what is written, and what is not."""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import stat
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.security import write_policy

from embedding_service.budget import Budget
from embedding_service.client.router import Router
from embedding_service.errors import PermissionDenied, Unauthenticated
from embedding_service.methods import RIGHTS, Aborted, Context
from embedding_service.placement.routing import Routing
from embedding_service.security import audit
from embedding_service.security.audit import Audit
from embedding_service.security.authority import prepare_folder
from embedding_service.security.identity import Caller, Credential
from embedding_service.security.policy import Identity
from embedding_service.security.server import Files, Security
from embedding_service.serving import RequestLimits
from embedding_service.shard.shares import Shares
from embedding_service.shard.training import TrainingService
from embedding_service.store.store import Store
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import training_pb2 as training


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_s9_lines_are_bounded_and_cannot_be_forged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(audit.time, "monotonic", lambda: now)
    path = tmp_path / "audit.jsonl"
    writer = Audit(path)
    for _ in range(audit.MOST_LINES + 7):
        writer.note("denied", "team", why='a\n{"action": "publish"}\x1b[2J' + "x" * 10_000)
    writer.note("publish", "team", model="m@2")
    now += 1
    writer.note("denied", "team", why="b")
    found = lines(path)
    assert [each["action"] for each in found] == ["denied"] * audit.MOST_LINES + ["publish", "denied"]
    assert found[-1] | {"time": ""} == {"time": "", "action": "denied", "who": "team", "why": "b", "left_out": 7}
    assert all(len(each.get("why", "")) <= audit.MOST_CHARACTERS for each in found)
    assert "\x1b" not in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600


def write(path: Path, who: str, count: int) -> None:
    writer = Audit(path)
    for number in range(count):
        writer._lines.clear()
        writer.note("train", who, step=str(number))


def test_s9_writers_share_a_file_that_is_put_aside_when_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each opens the file for itself, as processes do."""
    path, count = tmp_path / "audit.jsonl", 300
    monkeypatch.setattr(audit, "MOST_BYTES", 45_000)
    with ThreadPoolExecutor(2) as writers:
        list(writers.map(lambda number: write(path, f"writer-{number}", count), range(2)))
    found = [*lines(tmp_path / "audit.jsonl.1"), *lines(path)]
    # Of 60 KB, all is there, each writer's in its order.
    for number in range(2):
        own = [int(each["step"]) for each in found if each["who"] == f"writer-{number}"]
        assert own == list(range(count))
    assert all(file.stat().st_size <= 45_000 for file in tmp_path.iterdir())


def test_s9_a_process_that_stopped_while_it_wrote_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock stays. The file is put aside when it is gone."""
    path = tmp_path / "audit.jsonl"
    monkeypatch.setattr(audit, "MOST_BYTES", 1000)
    writer = Audit(path)
    writer.note("drain", "shard-1")
    with path.open("rb") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        for number in range(20):
            writer.note("drain", f"shard-{number}")
        assert len(lines(path)) == 21
    writer.note("drain", "shard-1")
    assert (len(lines(tmp_path / "audit.jsonl.1")), len(lines(path))) == (21, 1)


def test_s9_who_is_denied_is_noted_without_what_was_shown(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "secure", ["127.0.0.1"], ["controller"])
    write_policy(tmp_path / "secure", {"reader": {"tokens": ["reader-secret"], "read": ["m"]}})
    own = tmp_path / "secure" / "controller"
    path = tmp_path / "audit.jsonl"
    files = Files(own / "tls.crt", own / "tls.key", own / "ca.crt", tmp_path / "secure" / "policy.toml", path)
    security = Security(files)
    status = "embedding.v1.ControlService/GetStatus"
    with pytest.raises(PermissionDenied):
        security.admit(RIGHTS[status], f"/{status}".encode(), bearer="Bearer reader-secret", peer="ipv4:127.0.0.1:5")
    with pytest.raises(Unauthenticated):
        security.admit(RIGHTS[status], f"/{status}".encode(), bearer="Bearer guess", peer="ipv4:127.0.0.1:6")
    security.admit(("read",), b"/embedding.v1.EmbeddingService/Lookup", bearer="Bearer reader-secret", peer="p")
    known, nobody = lines(path)
    assert (known["who"], known["method"], known["peer"]) == ("reader", status, "ipv4:127.0.0.1:5")
    assert "admin or member" in known["why"]
    assert (nobody["who"], nobody["peer"]) == ("nobody", "ipv4:127.0.0.1:6")
    assert "secret" not in path.read_text() and "guess" not in path.read_text()


def test_s9_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Audit(tmp_path / "absent" / "audit.jsonl")
    writer.note("drain", "shard-1")
    writer.note("drain", "shard-1")
    assert caplog.text.count("cannot be written") == 1
    Audit(None).note("drain", "shard-1")


def refused(folder: Path, caller: Caller, ask: Callable[[TrainingService, Context], Awaitable[object]]) -> Aborted:
    """How a shard refuses what somebody asks of branches."""

    async def asked() -> Aborted:
        one = wire.Routing(term=1, epoch=1, shards=[wire.ShardAddress(id="shard-0", address="127.0.0.1:1")])
        store, router = Store(folder), Router(["127.0.0.1:1"], Routing(one))
        shares = Shares(store, "shard-0", router, None, 0.1)
        audit = Audit(folder / "audit.jsonl")
        service = TrainingService(store, "shard-0", router, RequestLimits(), Budget(1 << 20), shares, audit)
        with pytest.raises(Aborted) as raised:
            await ask(service, Context("a peer", math.inf, caller))
        return raised.value

    return asyncio.run(asked())


def test_s9_who_may_not_train_a_branch_is_noted(tmp_path: Path) -> None:
    caller = Caller("reader", Identity(read=("m",), train=("other@*",)), Credential())
    error = refused(tmp_path, caller, lambda service, of: service.Begin(training.BeginRequest(branch="m@b"), of))
    assert error.code is grpc.StatusCode.PERMISSION_DENIED
    [line] = lines(tmp_path / "audit.jsonl")
    assert (line["action"], line["who"], line["model"], line["peer"]) == ("denied", "reader", "m@b", "a peer")


def open_branch(request: training.OpenRequest, service: TrainingService, of: Context) -> Awaitable[object]:
    return service.Open(request, of)


FILE, SUM = "t/part-00000.safetensors", "xxh3-128:" + "ab" * 16
MANIFEST: dict[str, Any] = {
    "format_version": 1, "model": "hidden", "version": "1", "family": "longcat", "hash_params": {"vocab_size": 7},
    "tables": [{
        "name": "t", "rows": 1, "dim": 12, "dtype": "int8", "row_bytes": 16, "rows_per_part": 1024,
        "parts": [{"index": 0, "first_row": 0, "rows": 1, "bytes": 16, "file": FILE, "checksum": SUM}],
    }],
}  # fmt: skip


@pytest.mark.parametrize(("patterns", "hears"), [(["mine@*"], False), (["*"], True)])
def test_s4_a_trainer_hears_of_no_models_and_branches_of_others(
    tmp_path: Path, patterns: list[str], hears: bool
) -> None:
    caller = Caller("trainer", Identity(train=tuple(patterns)), Credential())
    for path, content in (("mine/.hidden.branch/branch.json", {}), ("hidden/1/manifest.json", MANIFEST)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(json.dumps(content))
    for new_session in (False, True):
        request = training.OpenRequest(branch="mine@new", new_session=new_session)
        error = refused(tmp_path, caller, partial(open_branch, request))
        assert error.code is grpc.StatusCode.NOT_FOUND and "mine" in error.details
        assert ("hidden" in error.details) is hears, error.details
