"""The rules of the packing, on fleets that hypothesis thinks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedding_service.errors import PlacementError
from embedding_service.placement.demand import Node, PartDemand, Placement, moved_bytes
from embedding_service.placement.packing import TOLERANCE, more_needed, pack
from embedding_service.placement.parts import PartKey

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def demand(index: int, rows: int, load: float = 0.0) -> PartDemand:
    return PartDemand(PartKey("m", "1", "t", index), rows, 10, load)


def equal_parts(count: int) -> list[PartDemand]:
    return [demand(index, 100) for index in range(count)]


def equal_nodes(count: int, memory: int = 10**9, **more: str) -> list[Node]:
    return [Node(f"s{index:03d}", memory, **more) for index in range(count)]  # type: ignore[arg-type]


def placed(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> Placement:
    """As a Placement, after checking what holds always: limits, copies apart, every part placed."""
    placement = Placement(parts_of={node.shard: set() for node in nodes})
    for part, ranks in zip(parts, pack(parts, nodes, replicas), strict=True):
        assert len(set(ranks)) == len(ranks) == replicas
        placement.shards_of[part.key] = [nodes[rank].shard for rank in ranks]
        for rank in ranks:
            placement.parts_of[nodes[rank].shard].add(part.key)
    size = {part.key: part.nbytes for part in parts}
    for node in nodes:
        assert sum(size[key] for key in placement.parts_of[node.shard]) <= node.memory_limit
    return placement


def holding(nodes: Sequence[Node], placement: Placement) -> list[Node]:
    """The nodes with what the placement gave them."""
    return [replace(node, held=frozenset(placement.parts_of.get(node.shard, ()))) for node in nodes]


def used(parts: Sequence[PartDemand], placement: Placement) -> dict[str, int]:
    size = {part.key: part.nbytes for part in parts}
    return {shard: sum(size[key] for key in keys) for shard, keys in placement.parts_of.items()}


part_lists = st.lists(st.integers(1, 100), min_size=1, max_size=60).map(
    lambda rows: [demand(index, count) for index, count in enumerate(rows)]
)
# Of unequal memory, but each with room for a good deal: whether what hardly fits fits at all is a hard question.
memories = st.lists(st.integers(30_000, 200_000), min_size=3, max_size=9)
replica_counts = st.integers(1, 3)


@quick
@given(part_lists, memories, replica_counts, st.data())
def test_unequal_nodes_come_and_go(
    parts: list[PartDemand], limits: list[int], replicas: int, data: st.DataObject
) -> None:
    """After each change limits hold, copies are apart, balance is within the tolerance, and nothing moves again."""
    nodes = [Node(f"s{index}", limit) for index, limit in enumerate(limits)]
    placement = Placement()
    for step in range(4):
        if step and data.draw(st.booleans()) and len(nodes) > 3:
            nodes.pop(data.draw(st.integers(0, len(nodes) - 1)))
        elif step:
            nodes.append(Node(f"new{step}", data.draw(st.integers(30_000, 200_000))))
        before = holding(nodes, placement)
        try:
            placement = placed(parts, before, replicas)
        except PlacementError:
            assert sum(part.nbytes for part in parts) * replicas > sum(node.memory_limit for node in nodes) * 0.4
            return
        again = placed(parts, holding(nodes, placement), replicas)
        assert again.parts_of == placement.parts_of
        if replicas == 1:
            assert_balanced(parts, nodes, placement)


def assert_balanced(parts: Sequence[PartDemand], nodes: Sequence[Node], placement: Placement) -> None:
    """No node is off its share by as much as the largest part or 5 %, unless its limit is in the way."""
    largest, total = max(part.nbytes for part in parts), sum(part.nbytes for part in parts)
    offered = sum(node.memory_limit for node in nodes)
    held = used(parts, placement)
    roomy = all(node.memory_limit - total * node.memory_limit // offered >= largest for node in nodes)
    for node in nodes if roomy else ():
        share = total * node.memory_limit // offered
        assert abs(held[node.shard] - share) <= max(largest, share * TOLERANCE)


@pytest.mark.slow
@quick
@given(st.integers(2, 12), st.integers(1, 3), st.integers(1, 300), st.booleans())
def test_one_of_equal_shards_joins_or_leaves(count: int, replicas: int, parts_: int, joins: bool) -> None:
    """Moves at most 1.2 times the newcomer's fair share, or what the leaving one held.

    With R copies of few parts, R - 1 parts may come on top: what has to stay apart does not fill every gap.
    """
    replicas = min(replicas, count - (not joins))
    parts, nodes = equal_parts(parts_), equal_nodes(count)
    before = placed(parts, nodes, replicas)
    if joins:
        after = placed(parts, [*holding(nodes, before), Node("s999", 10**9)], replicas)
        least = sum(part.nbytes for part in parts) * replicas / (count + 1)
    else:
        after = placed(parts, holding(nodes[:-1], before), replicas)
        least = used(parts, before)[nodes[-1].shard]
    one_part = parts[0].nbytes
    assert moved_bytes(parts, before, after) <= 1.2 * least + (replicas - 1) * one_part
    bytes_ = used(parts, after).values()
    fair = sum(bytes_) / len(bytes_)
    assert all(abs(held - fair) < max(one_part, TOLERANCE * fair) + 1 for held in bytes_)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("from_count", "to_count"), [(4, 5), (5, 4), (8, 9), (9, 8), (30, 31), (2, 12)])
def test_unequal_parts_move_little(from_count: int, to_count: int, replicas: int) -> None:
    parts = [demand(index, 100 if index % 7 else 30 + index % 11) for index in range(500)]
    total = sum(part.nbytes for part in parts) * replicas
    before = placed(parts, equal_nodes(from_count), replicas)
    after = placed(parts, holding(equal_nodes(to_count), before), replicas)
    least = total * abs(to_count - from_count) / max(from_count, to_count)
    assert moved_bytes(parts, before, after) <= 1.2 * least


@quick
@given(st.integers(1, 60), st.lists(st.integers(-200, 200), min_size=2, max_size=9))
def test_wavering_limits_move_nothing(parts_a_node: int, wavers: list[int]) -> None:
    """Limits that are reported up to 2 % larger or smaller, as they are after restarts, are no reason to move."""
    parts, nodes = equal_parts(parts_a_node * len(wavers)), equal_nodes(len(wavers), 1_000_000)
    before = placed(parts, nodes, 1)
    later = [
        replace(node, memory_limit=1_000_000 + 100 * waver)
        for node, waver in zip(holding(nodes, before), wavers, strict=True)
    ]
    assert placed(parts, later, 1).parts_of == before.parts_of


def test_a_new_table_moves_nothing_that_is_held() -> None:
    old, new = equal_parts(40), [demand(1000 + index, 55) for index in range(31)]
    nodes = equal_nodes(5)
    before = placed(old, nodes, 2)
    after = placed([*old, *new], holding(nodes, before), 2)
    assert all(before.parts_of[shard] <= after.parts_of[shard] for shard in before.parts_of)


def test_a_part_that_two_hold_stays_with_the_emptier() -> None:
    """Half-way through a join: the old owner holds it still, the new one was told to hold it."""
    parts, nodes = equal_parts(50), equal_nodes(5)
    before = placed(parts, nodes[:4], 1)
    target = placed(parts, holding(nodes, before), 1)
    both = [replace(node, held=node.held | target.parts_of[node.shard]) for node in holding(nodes, before)]
    assert placed(parts, both, 1).parts_of == target.parts_of


@quick
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 40), st.integers(2, 3))
def test_copies_lie_in_different_places(zones: int, a_zone: int, count: int, replicas: int) -> None:
    nodes = [Node(f"s{zone}{index}", 10**9, topology=f"z{zone}") for zone in range(zones) for index in range(a_zone)]
    if len(nodes) < replicas:
        return
    zone_of = {node.shard: node.topology for node in nodes}
    placement = placed(equal_parts(count), nodes, replicas)
    for shards in placement.shards_of.values():
        assert len({zone_of[shard] for shard in shards}) == min(replicas, zones)


def test_copies_in_one_place_are_taken_apart() -> None:
    parts = equal_parts(6)
    both = frozenset(part.key for part in parts)
    nodes = [
        Node("a1", 10**9, both, topology="a"),
        Node("a2", 10**9, both, topology="a"),
        Node("b", 10**9, topology="b"),
    ]
    placement = placed(parts, nodes, 2)
    assert placement.parts_of["b"] == both
    assert len(placement.parts_of["a1"]) == len(placement.parts_of["a2"]) == 3


def test_a_full_place_does_not_keep_copies_from_being_made() -> None:
    nodes = [Node("a1", 9000, topology="a"), Node("a2", 9000, topology="a"), Node("b", 3000, topology="b")]
    assert len(placed(equal_parts(9), nodes, 2).parts_of["b"]) == 3


def test_a_place_with_few_nodes_holds_one_copy_of_everything() -> None:
    parts = equal_parts(30)
    nodes = [Node("a", 10**9, topology="a"), *equal_nodes(3, topology="b")]
    placement = placed(parts, nodes, 2)
    assert len(placement.parts_of["a"]) == 30
    assert placed(parts, holding(nodes, placement), 2).parts_of == placement.parts_of


def test_held_parts_make_room_for_one_that_fits_nowhere() -> None:
    """Each node has 60 free of 100, the part needs 70: one small part has to go."""
    small = [demand(index, 4) for index in range(2)]
    nodes = [Node(name, 100, frozenset({part.key})) for name, part in zip("ab", small, strict=True)]
    parts = [*small, demand(9, 7)]
    placement = placed(parts, nodes, 1)
    assert sorted(len(keys) for keys in placement.parts_of.values()) == [1, 2]


def keys_of(*indices: int) -> frozenset[PartKey]:
    return frozenset(demand(index, 1).key for index in indices)


def parts_of(placement: Placement) -> dict[str, set[int]]:
    return {shard: {key.part for key in keys} for shard, keys in placement.parts_of.items()}


def test_room_is_made_where_most_is_free_by_the_smallest_part_that_suffices() -> None:
    """All other parts stay. If everything were packed again, more would move."""
    three, one = [demand(index, 20) for index in range(3)], demand(3, 40)
    nodes = [Node("a", 1000, keys_of(0, 1, 2)), Node("b", 1000, keys_of(3))]
    assert parts_of(placed([*three, one, demand(9, 70)], nodes, 1)) == {"a": {0, 1, 2, 3}, "b": {9}}

    parts = [demand(0, 60), demand(1, 5), demand(2, 10), demand(3, 14), demand(4, 30)]
    nodes = [Node("a", 1000, keys_of(0)), Node("b", 1000, keys_of(1, 2, 3, 4))]
    assert parts_of(placed([*parts, demand(9, 51)], nodes, 1)) == {"a": {0, 2}, "b": {1, 3, 4, 9}}

    parts = [demand(0, 60), demand(1, 30), demand(2, 40)]
    nodes = [Node("a", 1000, keys_of(0, 1)), Node("b", 1000, keys_of(2)), Node("c", 450)]
    assert parts_of(placed([*parts, demand(9, 65)], nodes, 1)) == {"a": {0, 1}, "b": {9}, "c": {2}}


def test_room_for_a_second_copy_is_made_on_another_node() -> None:
    parts = [demand(0, 40), demand(1, 40), demand(2, 55), demand(9, 70)]
    nodes = [Node("a", 3000, keys_of(0, 1, 2)), Node("b", 1000, keys_of(0, 1)), Node("c", 1000, keys_of(2))]
    placement = placed(parts, [*nodes, Node("d", 600)], 2)
    assert parts_of(placement) == {"a": {0, 1, 2, 9}, "b": {0, 1}, "c": {9}, "d": {2}}


def test_a_part_that_too_many_hold_stays_where_least_lies_once_the_others_have_their_place() -> None:
    parts = [demand(0, 50), demand(1, 40)]
    nodes = [Node("a", 1000, keys_of(0, 1)), Node("b", 1000, keys_of(0))]
    assert parts_of(placed(parts, nodes, 1)) == {"a": {1}, "b": {0}}
    parts = [demand(0, 50), demand(1, 30), demand(2, 30)]
    nodes = [Node(name, 1000, keys_of(0, 1, 2)) for name in "ab"]
    assert parts_of(placed(parts, nodes, 1)) == {"a": {0}, "b": {1, 2}}


def test_a_node_that_could_hold_more_than_one_copy_of_all_leaves_the_rest_to_the_others() -> None:
    """The others' fair shares are by their limits, of what is left."""
    nodes = [Node("huge", 10**9), Node("b", 20_000), Node("c", 10_000), Node("d", 10_000)]
    placement = placed(equal_parts(20), nodes, 2)
    assert [len(keys) for keys in placement.parts_of.values()] == [20, 10, 5, 5]


def test_nodes_are_brought_to_their_share_and_no_further() -> None:
    """Within the tolerance of the largest part nothing moves; from there on, as little as brings them closer."""
    parts = equal_parts(12)
    nodes = [Node("a", 10**6, keys_of(*range(7))), Node("b", 10**6, keys_of(*range(7, 12)))]
    assert parts_of(placed(parts, nodes, 1)) == {"a": set(range(6)), "b": set(range(6, 12))}
    parts = equal_parts(11)
    nodes = [Node("a", 10**6, keys_of(*range(6))), Node("b", 10**6, keys_of(*range(6, 11)))]
    assert parts_of(placed(parts, nodes, 1)) == {"a": set(range(6)), "b": set(range(6, 11))}


def test_memory_may_be_full_to_the_last_byte_with_copies() -> None:
    placement = placed(equal_parts(30), equal_nodes(6, 15_000), 3)
    assert all(len(keys) == 15 for keys in placement.parts_of.values())


@pytest.mark.parametrize(("count", "replicas"), [(5, 2), (9, 3)])
def test_what_one_node_holds_is_shared_with_all_others(count: int, replicas: int) -> None:
    """So that no two nodes are copies of each other, and the death of one is borne by many."""
    placement = placed(equal_parts(60), equal_nodes(count), replicas)
    for shard, keys in placement.parts_of.items():
        in_common = [len(keys & others) for other, others in placement.parts_of.items() if other != shard]
        assert max(in_common) <= 1.5 * sum(in_common) / len(in_common)


# GPU memory


def on_gpu(placement: Placement) -> set[int]:
    return {key.part for shard, keys in placement.parts_of.items() for key in keys if shard.startswith("gpu")}


def mixed(gpu_memory: int, host_memory: int = 10**9) -> list[Node]:
    hosts = [Node(f"cpu{index}", host_memory) for index in range(3)]
    return [*hosts, *(Node(f"gpu{index}", gpu_memory, device="cuda") for index in range(2))]


def test_the_hottest_parts_go_to_gpu_memory() -> None:
    parts = [demand(index, 100, load=1 + (index * 37) % 40) for index in range(40)]
    hottest = sorted(range(40), key=lambda index: -parts[index].load)[:10]
    placement = placed(parts, mixed(5_000), 1)
    assert on_gpu(placement) == set(hottest)
    held = used(parts, placement)
    assert held["gpu0"] == held["gpu1"] == 5_000
    assert held["cpu0"] == held["cpu1"] == held["cpu2"] == 10_000


def test_heat_counts_by_the_byte() -> None:
    parts = [demand(0, 300, load=90), demand(1, 100, load=60), demand(2, 100, load=50), demand(3, 100, load=40)]
    assert on_gpu(placed(parts, mixed(1_000), 1)) == {1, 2}


def test_without_measurements_gpus_come_last() -> None:
    parts = equal_parts(30)
    assert on_gpu(placed(parts, mixed(10_000), 1)) == set()
    assert len(on_gpu(placed(parts, mixed(10_000, host_memory=7_000), 1))) == 9
    gpus_only = placed(parts, mixed(20_000)[3:], 1)
    assert len(gpus_only.parts_of["gpu0"]) == len(gpus_only.parts_of["gpu1"]) == 15


def test_what_lies_in_gpu_memory_stays_when_measurements_are_lost() -> None:
    hot = [demand(index, 100, load=index) for index in range(30)]
    before = placed(hot, mixed(4_000), 1)
    assert on_gpu(before) == set(range(22, 30))
    after = placed(equal_parts(30), holding(mixed(4_000), before), 1)
    assert after.parts_of == before.parts_of


def test_parts_of_nearly_equal_heat_do_not_take_turns() -> None:
    parts = [demand(index, 100, load=100 - index) for index in range(10)]
    nodes = mixed(2_000)
    before = placed(parts, nodes, 1)
    assert on_gpu(before) == {0, 1, 2, 3}
    warmer = [replace(part, load=110 if part.key.part == 9 else part.load) for part in parts]
    assert placed(warmer, holding(nodes, before), 1).parts_of == before.parts_of
    hot = [replace(part, load=200 if part.key.part == 9 else part.load) for part in parts]
    assert on_gpu(placed(hot, holding(nodes, before), 1)) == {0, 1, 2, 9}


def test_copies_beyond_the_gpus_lie_in_host_memory() -> None:
    parts = [demand(index, 100, load=1 + index) for index in range(6)]
    placement = placed(parts, mixed(2_000), 3)
    assert on_gpu(placement) == {4, 5}
    for part in (4, 5):
        devices = sorted(shard[:3] for shard in placement.shards_of[PartKey("m", "1", "t", part)])
        assert devices == ["cpu", "gpu", "gpu"]


@quick
@given(part_lists, st.data())
def test_mixed_devices_hold_everything_within_limits(parts: list[PartDemand], data: st.DataObject) -> None:
    loads = data.draw(st.lists(st.integers(0, 9), min_size=len(parts), max_size=len(parts)))
    parts = [replace(part, load=float(load)) for part, load in zip(parts, loads, strict=True)]
    nodes = mixed(data.draw(st.integers(0, 20_000)), data.draw(st.integers(21_000, 40_000)))
    placement = placed(parts, nodes, data.draw(st.integers(1, 2)) if len(parts) < 25 else 1)
    assert placed(parts, nodes, len(next(iter(placement.shards_of.values())))).parts_of == placement.parts_of


# What is missing


@pytest.mark.parametrize(
    ("parts", "replicas", "memory", "more"), [(48, 1, 12_000, 3), (48, 2, 13_500, 7), (5, 3, 9_000, 2)]
)
def test_how_many_more_nodes_would_do(parts: int, replicas: int, memory: int, more: int) -> None:
    demands, nodes = equal_parts(parts), equal_nodes(1, memory)
    assert more_needed(demands, nodes, replicas, nodes[0]) == more
    added = [replace(nodes[0], shard=f"more{index}") for index in range(more)]
    placed(demands, [*nodes, *added], replicas)
    with pytest.raises(PlacementError):
        placed(demands, [*nodes, *added[1:]], replicas)


def test_no_number_of_nodes_smaller_than_a_part_would_do() -> None:
    nodes = equal_nodes(2, 999)
    assert more_needed(equal_parts(3), nodes, 1, nodes[0]) is None


def test_a_node_that_is_too_large_for_its_copies_is_counted_by_what_it_can_hold() -> None:
    nodes = [Node("huge", 10**9), Node("small", 10_000)]
    with pytest.raises(PlacementError, match=r"of which 999,970,000 are of no use .* 20,000 bytes are missing"):
        placed(equal_parts(30), nodes, 2)
