"""What is placed where, and how little moves when versions come that share rows."""

import random
from collections.abc import Generator
from typing import Any

from controller.test_decisions import overlaid
from support.manifests import manifest
from support.planner import plan

from embedding_service.controller import decisions
from embedding_service.controller.events import Plan, Planned
from embedding_service.controller.fleet import Fleet
from embedding_service.controller.placing import Placing
from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import Manifest
from embedding_service.wire import control_pb2 as control


def answered(questions: Generator[Any, Any, None]) -> None:
    """Plans as the planner does."""
    answer = None
    try:
        while True:
            question = questions.send(answer)
            assert isinstance(question, Plan)
            answer = Planned(plan(question.parts, question.nodes, question.replicas))
    except StopIteration:
        return


def test_t12_a_version_over_what_is_served_moves_nothing_and_needs_no_second_memory() -> None:
    one, two, legal = manifest("1", parts=24), overlaid_of(24, "2"), overlaid_of(24, "1", "m+legal")
    fleet, chance = Fleet(5.0, lambda: 0.0), random.Random(1)
    shards = {name: report_of(name, one) for name in "abcd"}
    keys = decisions.part_keys(one)
    chance.shuffle(keys)
    for index, key in enumerate(keys):
        shards["abcd"[index % 4]].parts.append(key.to_wire())
    for report in shards.values():
        fleet.join(object(), report)  # type: ignore[arg-type]
    placing = Placing(1, fleet, lambda: 0.0)
    answered(placing.update([one], [("m", "1")]))
    before = placing.target["m", "1"]
    answered(placing.update([legal, one, two], [("m", "1")]))
    assert not placing.problem
    for version in (one, two, legal):
        for key in decisions.part_keys(version):
            assert placing.target[key[:2]][key] == before[PartKey("m", "1", *key[2:])]
    answered(placing.update([legal, two], [("m", "2"), ("m+legal", "1")]))  # the base is served no more
    assert all(placing.target[key[:2]][key] == before[PartKey("m", "1", *key[2:])] for key in decisions.part_keys(two))


def report_of(name: str, one: Manifest) -> control.ShardReport:
    """Of a shard that has a third more memory than its share of the base."""
    return control.ShardReport(
        shard_id=name, address=f"{name}:1", device="cpu", memory_limit=one.bytes // 3, has_parts=True
    )


def overlaid_of(parts: int, version: str, model: str = "m") -> Manifest:
    """A version that replaces rows in each part."""
    whole = manifest("1", parts=parts)
    few = overlaid(version, model, rows=dict.fromkeys(range(3), 2))
    assert few.base
    overlay = few.base.overlays["t"][0]
    overlays = tuple(
        overlay.model_copy(update={"part": part, "file": f"t/overlay-{part:05d}.safetensors"}) for part in range(parts)
    )
    return few.model_copy(
        update={"tables": whole.tables, "base": few.base.model_copy(update={"overlays": {"t": overlays}})}
    )
