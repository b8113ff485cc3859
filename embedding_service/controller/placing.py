"""Where the copies of all parts belong: when to plan, and which versions there is room for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace

from embedding_service.controller import decisions
from embedding_service.controller.decisions import Version
from embedding_service.controller.events import Plan, Planned, Question
from embedding_service.controller.fleet import Fleet, Shard
from embedding_service.controller.last import LastOfEach
from embedding_service.errors import PlacementError
from embedding_service.placement.demand import CUDA, Node, Placement
from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import Manifest

log = logging.getLogger(__name__)

HEAT_SECONDS = 60.0
# A planner that failed is not asked the same again before.
REPLAN_SECONDS = 5.0


class Placing:
    """The newest plan, and what it was made for. It does not plan by itself, but asks for plans.

    Args:
        replicas: Copies that are wanted of every part. 0: one on every shard.
        fleet: The shards.
        clock: Seconds now.

    Attributes:
        target: For each part the shards that are to hold it.
        problem: Why not everything is placed, or "".
        replicas_problem: Why there are fewer copies than wanted, or "".
    """

    def __init__(self, replicas: int, fleet: Fleet, clock: Callable[[], float]) -> None:
        self.target: decisions.Holders = {}
        self.problem = ""
        self.replicas_problem = ""
        self._replicas, self._fleet, self._clock = replicas, fleet, clock
        self._planned_for: tuple[list[Node], set[Version]] = ([], set())
        self._planned_at = 0.0
        self._replan_at = 0.0
        self._left_out: set[Version] = set()
        self._needs_plan: LastOfEach[Version, bool] = LastOfEach(decisions.needs_plan)

    @property
    def copies(self) -> int:
        """Copies that are wanted of every part, with the shards that there are."""
        return self._replicas or sum(not shard.report.draining for shard in self._fleet.shards.values())

    def is_due(self) -> bool:
        """Whether `update` is wanted though nothing changed: a planner failed a while ago, or parts may be hot now."""
        return self._is_retry_due() or self._is_heat_due()

    def _is_retry_due(self) -> bool:
        return 0 < self._replan_at <= self._clock()

    def _is_heat_due(self) -> bool:
        """Whether to look again for hot parts. Those that belong in GPU memory change with what is asked for."""
        gpus = any(shard.report.device == CUDA for shard in self._fleet.shards.values())
        return gpus and self._clock() - self._planned_at > HEAT_SECONDS

    def update(self, wanted: Sequence[Manifest], served: Sequence[Version]) -> Generator[Question, Planned, None]:
        """Place when a copy is missing, or when shards or versions came, went or changed."""
        names = {(each.model, each.version): each for each in wanted}
        shards = [shard for _, shard in sorted(self._fleet.shards.items())]
        nodes = [_empty_node(shard) for shard in shards]
        staying = frozenset(node.shard for node in nodes if not node.draining)
        replicas = min(self.copies, len(staying))
        about = (nodes, set(names))
        changed = about != self._planned_for
        failed, retry = self._replan_at > 0, self._is_retry_due()
        if not staying or (failed and not changed and not retry):
            return
        placed = {name: each for name, each in names.items() if name not in self._left_out}
        missing = self._needs_plan(
            {name: (each, self.target.get(name, {}), staying, replicas) for name, each in placed.items()}
        )
        if any(missing.values()) or changed or retry or self._is_heat_due():
            nodes = [node_of(shard, names) for shard in shards]
            self._planned_for, self._planned_at = about, self._clock()
            self.replicas_problem = decisions.too_few_shards(self.copies, replicas)
            yield from self._plan(decisions.by_importance(wanted, served), served, nodes, replicas)

    def _plan(
        self, manifests: Sequence[Manifest], served: Sequence[Version], nodes: list[Node], replicas: int
    ) -> Generator[Question, Planned, None]:
        """Place what is served, and as many further versions as fit."""
        fits, fails = sum((each.model, each.version) in served for each in manifests) - 1, len(manifests) + 1
        placement: Placement | None = None
        accesses = self._fleet.accesses()
        problem, self._replan_at, count = "", 0.0, len(manifests)
        while fails - fits > 1:  # `fits` versions fit, and `fails` do not
            answer = yield Plan(decisions.part_demands(manifests[:count], accesses), nodes, replicas)
            if isinstance(answer.outcome, Placement):
                placement, fits = answer.outcome, count
            elif isinstance(answer.outcome, PlacementError):
                problem, fails = str(answer.outcome), count
            else:
                error = answer.outcome
                problem = f"planning failed, and is tried again: {type(error).__name__}: {error}"
                self._replan_at = self._clock() + REPLAN_SECONDS
                break
            count = (fits + fails) // 2
        if placement:
            left_out = manifests[fits:]
            self.target = _expanded(placement.shards_of, manifests[:fits])
            self._left_out = {(each.model, each.version) for each in left_out}
            names = ", ".join(f"{each.model}@{each.version}" for each in left_out)
            problem = f"not placed: {names}: {problem}" if left_out else problem
            log.info("planned %d versions on %d shards", fits, len(nodes))
        if problem and problem != self.problem:
            log.error("cannot place the models: %s", problem)
        self.problem = problem


def _expanded(shards_of: Mapping[PartKey, list[str]], manifests: Sequence[Manifest]) -> decisions.Holders:
    """For each part of these versions its shards, which are those of the part that it has its rows from."""
    return {
        (manifest.model, manifest.version): {
            key: shards_of[decisions.shared_part(key, manifest)] for key in decisions.part_keys(manifest)
        }
        for manifest in manifests
    }


def node_of(shard: Shard, wanted: Mapping[Version, Manifest]) -> Node:
    """A shard as the planner sees it. The planner knows nothing of versions that are not wanted.

    A base counts as held though it is not wanted itself, for versions that are may use its rows.
    """
    roots = {manifest.root for manifest in wanted.values()}
    there = shard.keeps | (shard.assigned or frozenset())
    held = {decisions.shared_part(key, wanted[key[:2]]) for key in there if key[:2] in wanted}
    return replace(_empty_node(shard), held=frozenset(held | {key for key in there if key[:2] in roots}))


def _empty_node(shard: Shard) -> Node:
    """A shard as if it held nothing."""
    report = shard.report
    return Node(
        shard.name, report.memory_limit, device=report.device, topology=report.topology, draining=report.draining
    )
