"""What the controller decides, from given states."""

import pytest
from support.checkpoints import DIM

from embedding_service.controller import decisions
from embedding_service.controller.fleet import Fleet
from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import Manifest, Part, Table
from embedding_service.wire import control_pb2 as control


def manifest(version: str, model: str = "m", parts: int = 3) -> Manifest:
    row_bytes, rows = DIM * 4, 64
    return Manifest(
        model=model,
        version=version,
        family="",
        hash_params={},
        tables=(
            Table(
                name="t",
                rows=rows * parts,
                dim=DIM,
                dtype="fp32",
                row_bytes=row_bytes,
                rows_per_part=rows,
                parts=tuple(
                    Part(
                        index=index,
                        first_row=index * rows,
                        rows=rows,
                        file=f"t/part-{index:05d}.safetensors",
                        bytes=rows * row_bytes,
                        checksum="xxh3-128:" + "0" * 32,
                    )
                    for index in range(parts)
                ),
            ),
        ),
    )


def held(*manifests: Manifest, by: str = "a") -> dict[PartKey, list[str]]:
    return {key: [by] for each in manifests for key in decisions.part_keys(each)}


def test_a_model_is_served_once_all_its_parts_are_held() -> None:
    one = manifest("1")
    holders = held(one)
    assert decisions.choose_versions({"m": [one]}, [], holders) == ([one], [one])
    del holders[PartKey("m", "1", "t", 2)]
    assert decisions.choose_versions({"m": [one]}, [], holders) == ([one], [])


def test_a_served_model_stays_served_when_a_part_is_lost() -> None:
    one = manifest("1")
    assert decisions.choose_versions({"m": [one]}, [("m", "1")], {}) == ([one], [one])


def test_the_old_version_is_served_until_the_new_one_is_whole() -> None:
    one, two = manifest("1"), manifest("2")
    catalog = {"m": [one, two]}
    assert decisions.choose_versions(catalog, [("m", "1")], held(one)) == ([one, two], [one])
    assert decisions.choose_versions(catalog, [("m", "1")], held(one, two)) == ([two], [two])


def test_versions_never_served_are_skipped() -> None:
    versions = [manifest(version) for version in ("1", "2", "10")]
    assert decisions.choose_versions({"m": versions}, [], {}) == ([versions[2]], [])


def test_a_plan_is_needed_when_copies_are_missing_or_their_shard_is_gone() -> None:
    one = manifest("1")
    target = {key: ["a", "b"] for key in decisions.part_keys(one)}
    assert not decisions.needs_plan([one], target, {"a", "b"}, 2)
    assert decisions.needs_plan([one], target, {"a"}, 2)
    assert not decisions.needs_plan([one], target, {"a"}, 1)
    assert decisions.needs_plan([one, manifest("2")], target, {"a", "b"}, 1)


def test_routing_names_those_who_hold_and_shall_hold() -> None:
    one = manifest("1")
    keys = decisions.part_keys(one)
    holders = {keys[0]: ["a", "b"], keys[1]: ["b"]}
    target = {keys[0]: ["b"], keys[1]: ["a"], keys[2]: ["a"]}
    routing = decisions.build_routing([one], target, holders, {"a": "h:1", "b": "h:2"})
    owners = [[routing.shards[index].id for index in part.shards] for part in routing.models[0].tables[0].parts]
    # moving: the old holder answers until the new one has it; lost: nobody, and clients wait
    assert owners == [["b"], ["b"], []]
    assert decisions.routed_parts(routing) == {"a": set(), "b": {keys[0], keys[1]}}


def test_a_copy_that_moves_is_asked_at_its_old_place_until_all_copies_are_at_their_new_ones() -> None:
    one = manifest("1", parts=1)
    [key] = decisions.part_keys(one)
    addresses = {"a": "h:1", "b": "h:2", "c": "h:3"}

    def owners(target: list[str], holders: list[str]) -> list[str]:
        routing = decisions.build_routing([one], {key: target}, {key: holders}, addresses)
        return [routing.shards[index].id for index in routing.models[0].tables[0].parts[0].shards]

    assert owners(target=["a", "c"], holders=["a", "b"]) == ["a", "b"]
    assert owners(target=["a", "c"], holders=["a", "b", "c"]) == ["a", "c"]
    assert owners(target=["a"], holders=["a", "b"]) == ["a"]
    assert owners(target=[], holders=["b"]) == ["b"]


def test_a_fleet_adds_up_who_holds_and_who_was_asked() -> None:
    keys = decisions.part_keys(manifest("1"))

    def report(name: str, held: list[PartKey], accesses: list[int], **fields: bool) -> control.ShardReport:
        parts = [key.to_wire() for key in held]
        return control.ShardReport(shard_id=name, has_parts=True, parts=parts, part_accesses=accesses, **fields)

    fleet = Fleet(lost_after=60)
    first = fleet.join(report("a", keys[:2], [5, 7]))
    fleet.join(report("b", keys[1:], [3, 4]))
    assert fleet.holders() == {keys[0]: ["a"], keys[1]: ["a", "b"], keys[2]: ["b"]}
    assert fleet.accesses() == {keys[0]: 5, keys[1]: 10, keys[2]: 4}
    assert not fleet.hear(first, report("a", keys[:2], [50, 7]))  # more accesses alone call for nothing
    assert fleet.accesses()[keys[0]] == 50
    assert fleet.hear(first, report("a", keys[:1], [50]))
    assert fleet.hear(first, report("a", keys[:1], [50], draining=True))


def test_silence_counts_only_while_the_controller_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("embedding_service.controller.fleet.time.monotonic", lambda: now)
    fleet = Fleet(lost_after=5)
    talking, silent = (fleet.join(control.ShardReport(shard_id=name)) for name in ("talking", "silent"))
    now += 60  # held up: what both said meanwhile waits to be read
    assert fleet.forget_lost() == []
    for _ in range(5):
        now += 0.9
        fleet.hear(talking, talking.report)
        lost = fleet.forget_lost()
    assert lost == ["silent"]
    assert silent.outbox.is_set()
    assert list(fleet.shards) == ["talking"]


def test_a_routing_is_sent_once_to_who_has_not_seen_it() -> None:
    shard = Fleet(lost_after=5).join(control.ShardReport(shard_id="a", term=7, epoch=2))
    assert shard.knows == (7, 2)
    shard.sent = (7, 3)
    assert shard.knows == (7, 3)
    shard.report = control.ShardReport(shard_id="a", term=8, epoch=1)  # another controller's
    assert shard.knows == (8, 1)


def test_the_first_holders_of_all_parts_are_of_one_topology() -> None:
    keys, fleet = decisions.part_keys(manifest("1")), Fleet(lost_after=5)
    for name, topology, held in (("a", "y", keys), ("b", "x", keys[:2]), ("c", "x", keys[2:])):
        parts = [key.to_wire() for key in held]
        fleet.join(control.ShardReport(shard_id=name, topology=topology, has_parts=True, parts=parts))
    assert fleet.holders() == {keys[0]: ["b", "a"], keys[1]: ["b", "a"], keys[2]: ["c", "a"]}
