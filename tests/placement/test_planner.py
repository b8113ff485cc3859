"""Placement through TorchRec's planner: what fits, where it goes, what stays."""

from collections import Counter

import pytest

from embedding_service.errors import PlacementError
from embedding_service.placement.demand import moved_bytes
from embedding_service.placement.parts import PartKey
from embedding_service.placement.planner import Node, PartDemand, Placement, plan

ROWS, ROW_BYTES = 1000, 260
BYTES = ROWS * ROW_BYTES


def parts(count: int, rows: int = ROWS) -> list[PartDemand]:
    return [PartDemand(PartKey("m", "1", "t", index), rows, ROW_BYTES) for index in range(count)]


def counts(placement: Placement) -> dict[str, int]:
    return {shard: len(held) for shard, held in placement.parts_of.items()}


def test_equal_nodes_get_equal_shares() -> None:
    nodes = [Node(name, 20 * BYTES) for name in "abcd"]
    assert counts(plan(parts(48), nodes)) == dict.fromkeys("abcd", 12)


def test_tables_of_different_row_sizes_are_placed_together() -> None:
    demands = [PartDemand(PartKey("m", "1", f"t{size}", index), ROWS, size) for size in (64, 260) for index in range(4)]
    placement = plan(demands, [Node(name, 2 * ROWS * (64 + 260)) for name in "ab"])
    assert counts(placement) == {"a": 4, "b": 4}


def test_unequal_nodes_get_shares_by_their_memory_and_no_more() -> None:
    nodes = [Node("a", 10 * BYTES), Node("b", 30 * BYTES), Node("c", 20 * BYTES)]
    assert counts(plan(parts(48), nodes)) == {"a": 8, "b": 24, "c": 16}


def test_memory_may_be_used_to_the_last_byte() -> None:
    nodes = [Node("a", 5 * BYTES), Node("b", 3 * BYTES)]
    assert counts(plan(parts(8), nodes)) == {"a": 5, "b": 3}


def test_copies_lie_on_different_shards() -> None:
    placement = plan(parts(30), [Node(name, 25 * BYTES) for name in "abc"], replicas=2)
    assert all(len(set(shards)) == 2 for shards in placement.shards_of.values())
    assert counts(placement) == dict.fromkeys("abc", 20)


def test_parts_stay_where_they_are_held() -> None:
    before = plan(parts(48), [Node(name, 40 * BYTES) for name in "abcd"])
    nodes = [Node(name, 40 * BYTES, frozenset(before.parts_of[name])) for name in "abc"]
    after = plan(parts(48), nodes)
    assert all(before.parts_of[name] <= after.parts_of[name] for name in "abc")
    assert Counter(counts(after).values()) == {16: 3}


def test_a_draining_node_keeps_nothing_and_moves_nothing_else() -> None:
    before = plan(parts(48), [Node(name, 40 * BYTES) for name in "abcd"], replicas=2)
    nodes = [Node(name, 40 * BYTES, frozenset(before.parts_of[name]), draining=name == "b") for name in "abcd"]
    after = plan(parts(48), nodes, replicas=2)
    assert after.parts_of["b"] == set()
    assert moved_bytes(parts(48), before, after) == 24 * BYTES
    with pytest.raises(PlacementError, match="2 replicas of every part need 2 shards, there are 1"):
        plan(parts(1), nodes[:2], replicas=2)


def test_the_order_of_parts_and_nodes_makes_no_difference() -> None:
    nodes = [Node(name, (20 + index) * BYTES) for index, name in enumerate("abcde")]
    placement = plan(parts(48), nodes, replicas=2)
    assert plan(parts(48)[::-1], nodes[::-1], replicas=2) == placement


def test_hot_parts_go_to_the_memory_of_gpus() -> None:
    demands = [PartDemand(part.key, part.rows, part.row_bytes, load=part.key.part % 10) for part in parts(40)]
    nodes = [Node("a", 40 * BYTES), Node("b", 40 * BYTES), Node("g", 8 * BYTES, device="cuda")]
    placement = plan(demands, nodes)
    assert {key.part % 10 for key in placement.parts_of["g"]} == {8, 9}
    assert counts(placement) == {"a": 16, "b": 16, "g": 8}


def test_too_little_memory_names_the_missing_bytes() -> None:
    with pytest.raises(PlacementError, match=rf"needs {48 * BYTES:,} bytes .* {36 * BYTES:,} bytes are missing"):
        plan(parts(48), [Node("a", 12 * BYTES)])


def test_a_part_larger_than_any_shard_is_named() -> None:
    with pytest.raises(PlacementError, match=rf"m@1/t/part-00000 needs {BYTES:,} bytes .* offers {BYTES - 1:,}"):
        plan(parts(3), [Node(str(index), BYTES - 1) for index in range(9)])


def test_enough_memory_in_too_small_pieces_is_said() -> None:
    with pytest.raises(PlacementError, match="too small pieces: no shard has"):
        plan(parts(48), [Node(str(index), int(1.9 * BYTES)) for index in range(30)])


def test_fewer_shards_than_replicas_is_said() -> None:
    with pytest.raises(PlacementError, match="3 replicas of every part need 3 shards, there are 2"):
        plan(parts(1), [Node("a", BYTES), Node("b", BYTES)], replicas=3)
