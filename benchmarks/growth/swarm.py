"""A controller with many shards. Their registrations are real, but there are no rows.

One process speaks for all shards. Each has a `Register` stream and reports every second, as a shard does. It reports an
assigned part as held at once.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc

from benchmarks.peers.base import START_SECONDS, child, command, receive, says
from benchmarks.rounds import cpu_seconds
from embedding_service.client.channels import CHANNEL_OPTIONS
from embedding_service.client.status import get_status
from embedding_service.machine import free_port
from embedding_service.placement.routing import Routing
from embedding_service.shard.registration import HEARTBEAT_SECONDS
from embedding_service.store.manifest import Manifest, Part, Table, part_file
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.control_pb2_grpc import ControlServiceStub
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub

# A connection may have 256 streams.
STREAMS = 200
# Seconds to wait for a controller.
PATIENCE = 120.0
# GetRouting calls that are measured.
ASKED = 300
ROWS, ROW_BYTES, DIM = 4096, 260, 256
CHECKSUM = "xxh3-128:" + "0" * 32


def table_of(parts: int) -> Table:
    """A table of `parts` parts without their files. A controller reads no rows."""
    described = tuple(
        Part(
            index=index,
            first_row=index * ROWS,
            rows=ROWS,
            file=part_file("ngram", index),
            bytes=ROWS * ROW_BYTES,
            checksum=CHECKSUM,
        )
        for index in range(parts)
    )
    return Table(
        name="ngram",
        rows=parts * ROWS,
        dim=DIM,
        dtype="int8",
        row_bytes=ROW_BYTES,
        rows_per_part=ROWS,
        parts=described,
    )


def write_manifest(store: Path, parts: int) -> None:
    """A model with one such table."""
    manifest = Manifest(model="large", version="1", family="", hash_params={}, tables=(table_of(parts),))
    folder = store / "large" / "1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest.to_json())


@dataclass
class Fleet:
    """What a controller with `shards` shards does. CPU seconds are its own, without those of the process that plans.

    `served` is the seconds until everything is served. `whole_again` is the seconds from the death of a hundredth of
    the shards until every part is held again. `lost` counts shards that it took for dead while they reported.
    `routings` counts those it sent until everything was served. `idle` is CPU a second while nothing changes.
    `get_routing` and `get_known` are CPU of one GetRouting, for a caller that has none and for one that has the newest.
    `slowest_status` is the longest that it took to answer.
    """

    shards: int
    parts: int
    served: float
    lost: int
    cpu: float
    routings: int
    routing_bytes: int
    parse: float
    idle: float
    whole_again: float
    get_routing: float
    get_known: float
    slowest_status: float


@dataclass
class Told:
    """What the controller sent to all shards."""

    assignments: int = 0
    routings: int = 0


class _Shard:
    def __init__(self, index: int, told: Told) -> None:
        self.about = control.ShardReport(
            shard_id=f"shard-{index:04d}",
            address=f"shard-{index:04d}.shards.embedding.svc.cluster.local:7070",
            device="cpu",
            tier="ram",
            memory_limit=1 << 36,
        )
        self.told = told
        self.changed = asyncio.Event()
        self.parts: list[control.PartRef] = []
        self.age = (0, 0)
        self.served: list[str] = []

    async def live(self, stub: ControlServiceStub) -> None:
        while True:
            self.changed.set()
            try:
                async for message in stub.Register(self.reports()):
                    self.obey(message)
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.5)

    def obey(self, message: control.Assignment) -> None:
        self.told.assignments += 1
        if message.HasField("routing"):
            self.told.routings += 1
            self.age = (message.routing.term, message.routing.epoch)
            self.served = [f"{each.model.name}@{each.model.version}" for each in message.routing.models]
        parts = list(message.parts)
        if parts != self.parts:
            self.parts = parts
            self.changed.set()

    async def reports(self) -> AsyncIterator[control.ShardReport]:
        while True:
            report = control.ShardReport()
            report.CopyFrom(self.about)
            report.term, report.epoch = self.age
            report.served.extend(self.served)
            if self.changed.is_set():
                self.changed.clear()
                report.has_parts = True
                report.parts.extend(self.parts)
                report.part_accesses.extend([1] * len(self.parts))
            yield report
            try:
                await asyncio.wait_for(self.changed.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                continue


def speak(pipe: Connection, controller: str, count: int) -> None:
    """A child. It ends as many shards as the pipe says, and sends what all were told. It ends with its pipe."""
    asyncio.run(_speak(pipe, controller, count))


async def _speak(pipe: Connection, controller: str, count: int) -> None:
    told = Told()
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(controller, options) for _ in range(-(-count // STREAMS))]
    shards = [_Shard(index, told) for index in range(count)]
    lives = [
        asyncio.create_task(shard.live(ControlServiceStub(channels[index // STREAMS])))
        for index, shard in enumerate(shards)
    ]
    try:
        while True:
            order = await asyncio.to_thread(pipe.recv)
            for life in lives[:order]:
                life.cancel()
            lives = lives[order:]
            pipe.send(told)
    except EOFError:
        for life in lives:
            life.cancel()


def measure(folder: Path, shards: int, parts: int) -> Fleet:
    """Run a controller and `shards` shards, from their start to the death of a hundredth of them."""
    store, log, address = folder / f"store-{parts}", folder / "controller.log", f"127.0.0.1:{free_port()}"
    write_manifest(store, parts)
    arguments = [f"--store={store}", f"--listen={address}", f"--expect-shards={shards}"]
    run = [sys.executable, "-m", "embedding_service", "controller", *arguments]
    with command(run, log, says(log, "listening on")) as controller, child(speak, address, shards) as (_, pipe):
        waits: list[float] = []
        before = cpu_seconds([controller.pid])
        served = _until(address, waits, lambda status: any(model.serving for model in status.models))
        told = _told(pipe, 0)
        cpu = cpu_seconds([controller.pid]) - before
        lost = log.read_text().count("was not heard of")
        time.sleep(5)
        idle = _cpu_of(controller.pid, lambda: time.sleep(5)) / 5
        routing, get_routing, get_known = _ask_for_routing(address, controller.pid, idle)
        began = time.perf_counter()
        parsed = Routing(routing)
        parse = time.perf_counter() - began
        dead = max(1, shards // 100)
        _told(pipe, dead)
        whole_again = _until(
            address,
            waits,
            lambda status: (
                len(status.shards) == shards - dead
                and all(model.parts_ready == model.parts for model in status.models)
                and (status.term, status.epoch) > parsed.age
            ),
        )
        lost += log.read_text().count("was not heard of") - lost - dead
    return Fleet(
        shards,
        parts,
        served,
        lost,
        cpu,
        told.routings,
        routing.ByteSize(),
        parse,
        idle,
        whole_again,
        get_routing,
        get_known,
        max(waits),
    )


def _told(pipe: Connection, end: int) -> Told:
    pipe.send(end)
    answer = receive(pipe, START_SECONDS)
    assert isinstance(answer, Told)
    return answer


def _until(address: str, waits: list[float], condition: Callable[[control.Status], bool]) -> float:
    """Seconds until the status fulfils a condition. The time of each status is added to `waits`."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        asked = time.monotonic()
        status = get_status(address, timeout=60)
        waits.append(time.monotonic() - asked)
        if condition(status):
            return time.monotonic() - began
        time.sleep(0.5)
    raise SystemExit(f"not there after {PATIENCE:.0f} s: {[problem.message for problem in status.problems][:5]}")


def _ask_for_routing(address: str, pid: int, idle: float) -> tuple[wire.Routing, float, float]:
    """The routing, and the CPU seconds of sending it and of answering that there is no newer one."""
    with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        stub = EmbeddingServiceStub(channel)
        routing = stub.GetRouting(wire.GetRoutingRequest())
        costs = []
        for request in (wire.GetRoutingRequest(), wire.GetRoutingRequest(term=routing.term, epoch=routing.epoch)):
            began = time.perf_counter()
            cpu = _cpu_of(pid, lambda request=request: [stub.GetRouting(request) for _ in range(ASKED)])  # type: ignore[misc]
            costs.append((cpu - idle * (time.perf_counter() - began)) / ASKED)
    return routing, costs[0], costs[1]


def _cpu_of(pid: int, work: Callable[[], object]) -> float:
    before = cpu_seconds([pid])
    work()
    return cpu_seconds([pid]) - before
