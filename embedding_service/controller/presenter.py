"""What a person sees of the controller: `status`, its problems, and Prometheus metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from prometheus_client.core import Metric

from embedding_service.controller import decisions
from embedding_service.controller.fleet import Shard
from embedding_service.controller.state import ControllerState, Phase
from embedding_service.metrics import gauge
from embedding_service.wire import control_pb2 as control

MOST_PROBLEMS = 100
# What to do about a problem, by its kind.
REMEDIES: dict[int, str] = {
    control.Problem.KIND_WAITING: "Start the shards that are missing, or look at their logs.",
    control.Problem.KIND_STORE: "See that the store is mounted and can be read: `embedding-service inspect STORE`.",
    control.Problem.KIND_PLACEMENT: "Add shards or give them more --memory; try it under What if. Or remove a model.",
    control.Problem.KIND_SHARD: "Look at that shard's log and machine. With copies elsewhere, lookups go on.",
    control.Problem.KIND_SKIPPED: "Everything else is served. Import it again under another name, or remove it.",
    control.Problem.KIND_COPIES: "Add shards, or lower --replicas.",
}


def status_of(state: ControllerState, store: str) -> control.Status:
    """Everything that a person wants to know. `store` is its path or URL."""
    held = state.copies(state.fleet.holders())
    served = {model.full_name for model in state.routing.models} if state.routing else set()
    status = control.Status(problems=list(problems_of(state, store)))
    status.term, status.epoch = state.routing.age if state.routing else (state.term, 0)
    for _, shard in sorted(state.fleet.shards.items()):
        status.shards.append(_shard_status(shard))
    for manifest in state.wanted:
        copies = held[manifest.model, manifest.version]
        status.models.add(
            model=decisions.model_info(manifest),
            parts=copies.total(),
            parts_ready=copies.total() - copies[0],
            bytes=manifest.bytes,
            serving=f"{manifest.model}@{manifest.version}" in served,
        )
    return status


def metrics_of(state: ControllerState, store: str) -> Iterator[Metric]:
    """For Prometheus."""
    shards, held = list(state.fleet.shards.values()), state.copies(state.fleet.holders())
    # The state may take another version in meanwhile, for this runs on a thread of the metrics.
    copies = sum((held.get((each.model, each.version), Counter()) for each in state.wanted), Counter[int]())
    term, epoch = state.routing.age if state.routing else (state.term, 0)
    served = len(state.routing.models) if state.routing else 0
    missing = sum(max(state.placing.copies - count, 0) * parts for count, parts in copies.items())
    problems = len(list(problems_of(state, store)))
    yield gauge("routing_term", "Term of the routing.", term)
    yield gauge("routing_epoch", "Epoch of the routing.", epoch)
    yield gauge("shards", "Shards that are there.", len(shards))
    yield gauge("draining_shards", "Shards that want to end.", sum(shard.report.draining for shard in shards))
    yield gauge("served_versions", "Model versions in the routing.", served)
    yield gauge("wanted_parts", "Parts of the wanted model versions.", copies.total())
    yield gauge("lost_parts", "Wanted parts that nobody holds.", copies[0])
    yield gauge("missing_copies", "Copies of wanted parts that are not held yet.", missing)
    yield gauge("problems", "What stands in the way; `embedding-service status` says it.", problems)


def problems_of(state: ControllerState, store: str) -> Iterator[control.Problem]:
    """The first MOST_PROBLEMS of what stands in the way."""
    problems = _all_problems(state, store)
    yield from islice(problems, MOST_PROBLEMS)
    if more := sum(1 for _ in problems):
        yield control.Problem(message=f"and {more:,} more")


def _all_problems(state: ControllerState, store: str) -> Iterator[control.Problem]:
    problem = control.Problem
    shards = state.fleet.shards
    if state.phase is Phase.SETTLING:
        expected = state.settings.expect_shards or "more"
        message = f"waiting for shards: {len(shards)} registered, {expected} expected"
        yield problem(kind=problem.KIND_WAITING, message=message)
    if message := _store_problem(state, store):
        yield problem(kind=problem.KIND_STORE, message=message)
    if state.placing.problem:
        yield problem(kind=problem.KIND_PLACEMENT, message=state.placing.problem)
    if state.placing.replicas_problem:
        yield problem(kind=problem.KIND_COPIES, message=state.placing.replicas_problem)
    for message in state.fleet.refusals():
        yield problem(kind=problem.KIND_SHARD, message=message)
    for name, shard in sorted(shards.items()):
        if not shard.connected:
            yield problem(kind=problem.KIND_SHARD, message=f"shard {name}: not connected")
        for key, message in sorted(shard.failures.items()):
            yield problem(kind=problem.KIND_SHARD, message=f"shard {name}: {key}: {message}")
    skipped = state.found.problems.values() if state.found else ()
    for message in (*skipped, *decisions.never_served(state.catalog)):
        yield problem(kind=problem.KIND_SKIPPED, message=message)


def _store_problem(state: ControllerState, store: str) -> str:
    away = "what was loaded is served on, and nothing new can be loaded"
    if state.store_problem:
        return f"{state.store_problem}; {away}" if state.catalog else state.store_problem
    if not state.found or state.found.manifests:
        return ""
    if decisions.is_away(state.found, state.catalog):
        return f"store {store} is empty, as a folder is on which nothing is mounted: {away}"
    return f"no model in {store}: `embedding-service import` puts one there"


def _shard_status(shard: Shard) -> control.ShardStatus:
    report = shard.report
    return control.ShardStatus(
        shard_id=report.shard_id,
        address=report.address,
        device=report.device,
        tier=report.tier,
        memory_limit=report.memory_limit,
        parts=len(shard.held),
        parts_missing=len((shard.assigned or frozenset()) - shard.held),
        stats=report.stats,
        draining=report.draining,
        topology=report.topology,
    )
