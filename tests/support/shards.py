"""Shards without a network: they answer the router's calls as real ones would, at a time that a test lets pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from embedding_service.client.calls import Call, Failure
from embedding_service.client.router import Router
from embedding_service.client.steps import Aside, Exchange, Pause
from embedding_service.client.wants import StoredRows, Want
from embedding_service.placement.routing import Model
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import Answer, EncodedLookup

ROWS, PER_PART, DIM = 40, 10, 2
IDS = [39, 0, 11, 12, 25, 7]
REDIRECT = Failure(grpc.StatusCode.ABORTED, "moved")
LATE = Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time")
GONE = Failure(grpc.StatusCode.UNAVAILABLE, "connection refused")


def routing(
    owners: list[list[int]],
    epoch: int = 1,
    version: str = "1",
    request_bytes: int = 1 << 20,
    response_bytes: int = 1 << 20,
) -> wire.Routing:
    """Shards a, b, c at h:0, h:1, h:2; `owners` of the four parts of the one table."""
    info = wire.ModelInfo(
        name="m",
        version=version,
        tables=[wire.TableInfo(name="t", rows=ROWS, dim=DIM, dtype="fp32", row_bytes=8, rows_per_part=PER_PART)],
    )
    table = wire.TablePlacement(parts=[wire.PartOwners(shards=shards) for shards in owners])
    return wire.Routing(
        term=1,
        epoch=epoch,
        shards=[wire.ShardAddress(id=name, address=f"h:{index}") for index, name in enumerate("abc")],
        models=[wire.ModelPlacement(model=info, tables=[table])],
        limits=wire.Limits(request_bytes=request_bytes, response_bytes=response_bytes),
    )


class Shards:
    """Answers calls the way real shards with these parts would; `now` is the routing they know.

    Calls of one exchange take their time one after the other.
    """

    def __init__(self, now: wire.Routing) -> None:
        self.now = now
        self.dead: set[str] = set()
        self.hanging: set[str] = set()
        self.seconds = 0.0  # that rows take
        self.asked: list[Call] = []
        self.pass_time: Callable[[float], None] = lambda seconds: None

    def answer(self, call: Call) -> Any:
        self.asked.append(call)
        if call.address in self.dead:
            return GONE
        hangs, asks_for_rows = call.address in self.hanging, isinstance(call.request, EncodedLookup)
        seconds = self.seconds if asks_for_rows else 0.0
        self.pass_time(call.timeout if hangs else min(seconds, call.timeout))
        if hangs or seconds > call.timeout:
            return LATE
        if not asks_for_rows:
            return self.now
        model = self.now.models[0]
        request = wire.LookupRequest.FromString(call.request.message())
        ids = np.frombuffer(request.ids_uint32, "<u4")
        here = int(call.address.removeprefix("h:"))
        held = all(here in model.tables[0].parts[row // PER_PART].shards for row in ids)
        if not held or request.model != f"m@{model.model.version}":
            return REDIRECT
        tag = float(model.model.version)
        rows = np.stack([ids.astype(np.float32), np.full(len(ids), tag, np.float32)], 1)
        return Answer(rows.view(np.uint8).reshape(-1), model.model.version)

    def run(self, steps: Any, most_steps: int = 200) -> Any:
        """Drive `steps`; waiting takes no time."""
        answers = None
        try:
            for _ in range(most_steps):
                step = steps.send(answers)
                answers = None
                if isinstance(step, Aside):
                    if step.call.address not in self.hanging:  # else it ends at some time, and nobody waits for that
                        step.done(self.answer(step.call))
                elif isinstance(step, Pause):
                    self.pass_time(step.seconds)
                elif isinstance(step, Exchange):
                    answers = [self.answer(call) for call in step.calls]
        except StopIteration as end:
            return end.value
        raise AssertionError("does not end")


def fetch(
    router: Router, shards: Shards, ids: list[int], name: str = "m", seconds: float = 60.0, decodes: bool = False
) -> np.ndarray:
    """Rows [n, 2] of the one table: each is its id and its version."""

    def wants_of(model: Model) -> list[Want]:
        sink = StoredRows(len(ids), 8)
        sink.decodes = decodes
        return [Want(model.table("t"), np.array(ids, np.int64), wire.ROW_ENCODING_STORED, 8, sink)]

    [want] = shards.run(router.fetch(name, wants_of, router._clock() + seconds))
    return want.sink.rows.view(np.float32)


def lookups_of(shards: Shards) -> list[Call]:
    return [call for call in shards.asked if isinstance(call.request, EncodedLookup)]


class Clock:
    """Stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
