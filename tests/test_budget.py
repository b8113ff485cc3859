"""Bytes under way in a process are bounded: what is over that is refused before anything is made of it."""

from pathlib import Path

import grpc
import pytest
from support.cluster import until
from support.toy import TOY, Request, toy_server

from embedding_service import memory
from embedding_service.budget import Budget
from embedding_service.errors import Overloaded
from embedding_service.front import REQUEST_COPIES

MIB = 1 << 20


def test_a_budget_grants_what_is_left_and_the_first_always() -> None:
    budget = Budget(10)
    assert budget.take(25) and budget.left == -15  # else nobody could ever ask for that
    assert not budget.take(1)
    budget.give_back(25)
    assert budget.take(6) and budget.take(4) and not budget.take(1)
    with pytest.raises(Overloaded, match=r"needs 3 bytes of memory, and of the 10 .* only 0 are free: ask again"):
        budget.promise(3)
    budget.give_back(4)
    budget.promise(3)
    assert budget.left == 1


def test_large_requests_over_the_budget_are_refused_and_count_until_their_calls_end(tmp_path: Path) -> None:
    message = Request(service="z" * (MIB - 100)).SerializeToString()
    budget = Budget(2 * REQUEST_COPIES * MIB)
    with toy_server(str(tmp_path / "private"), budget) as toy, grpc.insecure_channel(toy.address) as channel:
        wait = channel.unary_unary(f"/{TOY}/Wait")
        waiting = [wait.future(message, timeout=60) for _ in range(2)]
        until(lambda: toy.toy.waiting == 2, "two calls under way")
        for refused in (wait.future(message, timeout=60), wait.future(message, timeout=60)):
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "bytes of memory" in refused.details()
        stream = channel.stream_stream(f"/{TOY}/Each")(iter([message]), timeout=60)
        assert stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        small = channel.unary_unary(f"/{TOY}/Echo", None, Request.FromString)
        assert small(Request(service="small").SerializeToString(), timeout=60).service.startswith("small")
        for call in waiting:
            call.cancel()
        until(lambda: budget.left == budget.most, "its bytes to be free again")
        echo = channel.unary_unary(f"/{TOY}/Echo", None, Request.FromString)
        assert echo(message, timeout=60).service.startswith("zzz")
        assert len(list(channel.stream_stream(f"/{TOY}/Each")(iter([message] * 5), timeout=60))) == 5
        until(lambda: budget.left == budget.most, "its bytes to be free again")


@pytest.mark.parametrize(
    ("lines", "files", "found"),
    [
        ("0::/pod/own\n", {"pod/own/memory": ("max", "7"), "pod/memory": ("100", "40")}, [(100, 40)]),
        ("0::/pod/own\n", {"memory": ("100", "40")}, [(100, 40)]),
        ("4:memory:/pod\n0::/\n", {"memory/pod/memory": ("300", "20"), "memory/memory": ("900", "50")}, None),
        ("4:memory:/host/pod\n", {"memory/memory": ("900", "50")}, [(900, 50)]),
        ("", {}, []),
    ],
    ids=["a group above", "seen from within", "version 1", "version 1, seen from within", "no groups"],
)
def test_limits_of_the_container_are_found(
    lines: str, files: dict[str, tuple[str, str]], found: list[tuple[int, int]] | None, tmp_path: Path
) -> None:
    for path, (limit, use) in files.items():
        old = path.startswith("memory/")
        folder = tmp_path / "groups" / Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(limit + "\n")
        (folder / ("memory.usage_in_bytes" if old else "memory.current")).write_text(use + "\n")
    (tmp_path / "own").write_text(lines)
    expected = [(300, 20), (900, 50)] if found is None else found
    assert sorted(memory.containers(tmp_path / "groups", tmp_path / "own")) == expected


@pytest.mark.parametrize(
    ("folder", "limit", "use", "field"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["version 2", "version 1"],
)
def test_pages_of_files_that_the_kernel_may_drop_are_free(
    folder: str, limit: str, use: str, field: str, tmp_path: Path
) -> None:
    """A shard that writes a log fills its container with them."""
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    for name, text in ((limit, "100"), (use, "90"), ("memory.stat", f"anon 30\n{field} 60\nactive_file 0")):
        (group / name).write_text(f"{text}\n")
    assert memory.containers(tmp_path, tmp_path / "own") == [(100, 30)]


def test_a_container_leaves_memory_for_requests_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    for limit, rows, processes, expected in (
        (2 * gib, gib, 1, 576 * MIB),
        (2 * gib, gib, 2, 192 * MIB),
        (64 * gib, gib, 1, gib),
        (gib, gib, 1, 128 * MIB),
    ):
        monkeypatch.setattr(memory, "containers", lambda limit=limit: [(limit, 0)])
        monkeypatch.setattr(memory, "_machine", lambda field: 100 * gib)
        assert memory.memory_for_requests(rows, processes) == expected
