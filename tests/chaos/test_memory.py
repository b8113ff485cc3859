"""Under a container's limit of memory a shard refuses what it has no room for, stays, and gives back what it took."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from support.chaos import TABLE
from support.checkpoints import DIM, longcat_table
from support.cluster import cluster, until
from support.hostile import unread_lookups
from support.load import Load

from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub

pytestmark = pytest.mark.service

MIB = 1 << 20
LIMIT = 1 << 30
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]


@contextmanager
def control_group(limit: int) -> Iterator[list[str]]:
    """What runs a command in a group of that much memory. Skips the test where none can be made."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    old = "memory" in groups
    parent = Path("/sys/fs/cgroup/memory" if old else "/sys/fs/cgroup") / groups["memory" if old else ""].lstrip("/")
    group = parent / f"test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"needs a control group with a limit of memory, which cannot be made here: {error}")
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "in-group"]
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the group to be empty")
        group.rmdir()


def test_large_answers_and_refused_requests_do_not_end_a_shard(small_store: Path, tmp_path: Path) -> None:
    with control_group(LIMIT) as within, cluster(tmp_path, small_store, "--expect-shards=1") as running:
        running.start_shard("a", "--memory=64MiB", within=within)
        running.wait_serving()
        address, process = running.addresses["a"], running.processes["a"]
        before = process.resident_anonymous()
        large = wire.LookupRequest(model="m", table="ngram", ids_uint32=bytes(4 * (64 * MIB // (4 * DIM))))
        refused = wire.LookupRequest(model="m", table="ngram", ids_int64=b"\x7f" * (15 * MIB))
        unread = wire.LookupRequest(model="m", table="ngram", ids=[0] * (60 << 10)).SerializeToString()
        ended: Counter[str] = Counter()
        unexpected: list[str] = []
        with Load([address], TABLE, longcat_table(), threads=1, pause=0.01) as load:
            for _ in range(2):
                with ExitStack() as stack:
                    for _ in range(4):
                        stack.enter_context(unread_lookups(address, unread, 60))  # 0.9 GiB of answers that nobody reads
                    channels = [stack.enter_context(grpc.insecure_channel(address, OPTIONS)) for _ in range(16)]
                    stubs = [EmbeddingServiceStub(channel) for channel in channels]
                    calls = [stub.Lookup.future(large, timeout=180) for stub in stubs]
                    calls += [stub.Lookup.future(refused, timeout=180) for stub in stubs[:12]]
                    ended.update(call.code().name for call in calls)
                    others = [call for call in calls if call.code().name not in ("OK", "RESOURCE_EXHAUSTED")]
                    unexpected += [f"{call.code().name}: {call.details()}" for call in others]
        load.check()
        assert process.runs
        told = ended, unexpected, process.output()[-2000:]
        assert set(ended) <= {"OK", "RESOURCE_EXHAUSTED"} and ended["RESOURCE_EXHAUSTED"] >= 24, told
        until(lambda: process.resident_anonymous() - before < 256 * MIB, "its memory to be given back")
        with grpc.insecure_channel(address, OPTIONS) as channel:
            answer = EmbeddingServiceStub(channel).Lookup(large, timeout=180)
            assert len(answer.rows) == 64 * MIB
