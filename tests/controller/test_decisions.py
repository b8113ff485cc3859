"""What the controller decides, from given states."""

from typing import Any

import pytest
from support.manifests import manifest

from embedding_service.controller import decisions
from embedding_service.controller.fleet import ALIVE_SECONDS, MOST_UNREAD, REFUSAL_SECONDS, Fleet, IdTaken, Shard
from embedding_service.errors import InvalidRequest
from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import Base, Manifest, Overlay, overlay_file
from embedding_service.store.store import Catalogue
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire


def test_a_model_is_served_once_all_its_parts_are_held() -> None:
    one = manifest("1")
    assert decisions.choose_versions({"m": [one]}, [], {("m", "1")}) == ([one], [one])
    assert decisions.choose_versions({"m": [one]}, [], {}) == ([one], [])


def test_copies_are_counted_part_by_part() -> None:
    one = manifest("1")
    first, second, _ = decisions.part_keys(one)
    other = PartKey("m", "1", "t", 3)  # which the store does not have
    assert decisions.copies_held(one, {first: ["a", "b"], second: ["a"], other: ["a"]}) == {0: 1, 1: 1, 2: 1}
    assert decisions.copies_held(one, {}) == {0: 3}


def test_a_served_model_stays_served_when_a_part_is_lost() -> None:
    one = manifest("1")
    assert decisions.choose_versions({"m": [one]}, [("m", "1")], {}) == ([one], [one])


def test_the_old_version_is_served_until_the_new_one_is_whole() -> None:
    one, two = manifest("1"), manifest("2")
    catalog = {"m": [one, two]}
    assert decisions.choose_versions(catalog, [("m", "1")], {("m", "1")}) == ([one, two], [one])
    assert decisions.choose_versions(catalog, [("m", "1")], {("m", "1"), ("m", "2")}) == ([two], [two])


def test_the_old_version_is_served_until_all_copies_of_the_new_one_are_there() -> None:
    one, two = manifest("1"), manifest("2")
    catalog, held, copying = {"m": [one, two]}, {("m", "1"), ("m", "2")}, {("m", "2")}
    assert decisions.choose_versions(catalog, [("m", "1")], held, copying) == ([one, two], [one])
    assert decisions.choose_versions(catalog, [], held, copying) == ([two], [two])
    held.remove(("m", "1"))  # then one copy of all is better than what is served
    assert decisions.choose_versions(catalog, [("m", "1")], held, copying) == ([two], [two])


def test_copies_are_waited_for_at_shards_that_can_be_counted_on() -> None:
    key = PartKey("m", "1", "t", 0)
    target = {key: ["a", "b"]}
    assert decisions.still_copied(target, {key: ["a"]}, {"a", "b", "c"}) == {key}
    assert decisions.still_copied(target, {key: ["a", "c"]}, {"a", "b", "c"}) == set()
    assert decisions.still_copied(target, {key: ["a"]}, {"a"}) == set()
    assert decisions.still_copied(target, {key: ["a"]}, {"b"}) == {key}
    assert decisions.still_copied(target, {key: ["a"]}, {"a", "b"}, {("b", key)}) == set()


def test_assignments_that_a_shard_does_not_follow_are_kept_together() -> None:
    one, two, three = decisions.part_keys(manifest("1"))
    fleet = Fleet(60, lambda: 0.0)
    parts = [key.to_wire() for key in (one, two, three)]
    shard = join(fleet, control.ShardReport(shard_id="a", has_parts=True, parts=parts))
    for assigned in ([one, three], [one, two], *[[one, two, three]] * 2 * MOST_UNREAD):
        shard.assigned = frozenset(assigned)
        shard.tell()
    assert (len(shard.unread), shard.keeps) == (MOST_UNREAD, {one})
    fleet.hear(shard, control.ShardReport(shard_id="a", obeyed=shard.told))
    assert (shard.unread, shard.keeps) == ({}, {one, two, three})


def test_versions_never_served_are_skipped() -> None:
    versions = [manifest(version) for version in ("1", "2", "10")]
    assert decisions.choose_versions({"m": versions}, [], {}) == ([versions[2]], [])


def test_a_plan_is_needed_when_copies_are_missing_or_their_shard_is_gone() -> None:
    one = manifest("1")
    target = {key: ["a", "b"] for key in decisions.part_keys(one)}
    assert not decisions.needs_plan(one, target, {"a", "b"}, 2)
    assert decisions.needs_plan(one, target, {"a"}, 2)
    assert not decisions.needs_plan(one, target, {"a"}, 1)
    assert decisions.needs_plan(manifest("2"), target, {"a", "b"}, 1)


def test_a_shards_place_and_topology_are_in_the_routing() -> None:
    near = wire.NearPlace(path="/run/near", boot_id="this", incarnation=7)
    report = control.ShardReport(shard_id="a", address="h:1", topology="zone", near=near)
    assert decisions.shard_address(report) == wire.ShardAddress(id="a", address="h:1", topology="zone", near=near)
    report.ClearField("near")
    assert not decisions.shard_address(report).HasField("near")


def test_routing_names_holders_until_the_planned_ones_hold() -> None:
    one = manifest("1")
    keys = decisions.part_keys(one)
    holders = {keys[0]: ["a", "b"], keys[1]: ["b"]}
    target = {keys[0]: ["b"], keys[1]: ["a"], keys[2]: ["a"]}
    placement = decisions.place_version(one, target, holders, ["a", "b"])
    owners = [["ab"[index] for index in part.shards] for part in placement.tables[0].parts]
    # moving: the old holder answers until the new one has it; lost: nobody, and clients wait
    assert owners == [["b"], ["b"], []]
    assert decisions.placed_parts(placement, ["a", "b"]) == {"b": {keys[0], keys[1]}}
    routing = wire.Routing(shards=[wire.ShardAddress(id=name) for name in "ab"], models=[placement])
    assert decisions.routed_parts(routing) == {"a": set(), "b": {keys[0], keys[1]}}


def test_a_copy_that_moves_is_asked_at_its_old_place_until_all_copies_are_at_their_new_ones() -> None:
    one = manifest("1", parts=1)
    [key] = decisions.part_keys(one)

    def owners(target: list[str], holders: list[str]) -> list[str]:
        placement = decisions.place_version(one, {key: target}, {key: holders}, ["a", "b", "c"])
        return ["abc"[index] for index in placement.tables[0].parts[0].shards]

    assert owners(target=["a", "c"], holders=["a", "b"]) == ["a", "b"]
    assert owners(target=["a", "c"], holders=["a", "b", "c"]) == ["a", "c"]
    assert owners(target=["a"], holders=["a", "b"]) == ["a"]
    assert owners(target=[], holders=["b"]) == ["b"]


def test_a_move_to_a_shard_that_cannot_load_the_part_costs_no_copy() -> None:
    one = manifest("1", parts=1)
    [key] = decisions.part_keys(one)
    shards = ["a", "b", "c"]

    def owners(holders: list[str], draining: str = "", unable: str = "c", copies: int = 2, away: str = "") -> list[str]:
        cannot, target = {(name, key) for name in unable}, {key: ["a", "c"]}
        placement = decisions.place_version(one, target, {key: holders}, shards, cannot, set(draining), copies, away)
        return [shards[index] for index in placement.tables[0].parts[0].shards]

    assert owners(["a", "b"]) == ["a", "b"]  # b stands in for c
    assert owners(["a", "b"], draining="b") == ["a"]  # and need not, where it wants to leave
    assert owners(["b"], draining="b") == ["b"]
    assert owners(["a", "b"], draining="b", unable="") == ["a", "b"]  # c can load it, and has not yet
    assert owners(["a", "b", "c"], unable="") == ["a", "c"]
    assert owners(["a", "b", "c"], unable="", copies=3) == ["a", "b", "c"]  # planned for two, and b came since
    assert owners(["a", "b", "c"], unable="", away="c") == ["a", "b", "c"]  # c may be dead
    assert owners(["a", "b", "c"], unable="", away="c", draining="b") == ["a", "c"]
    shards.remove("c")  # gone, and no new plan was made yet
    assert owners(["a", "b"], unable="") == ["a", "b"]


def join(fleet: Fleet, report: control.ShardReport) -> Shard:
    """On a stream of its own."""
    fleet.join(object(), report)
    return fleet.shards[report.shard_id]


def test_a_fleet_adds_up_who_holds_and_who_was_asked() -> None:
    keys = decisions.part_keys(manifest("1"))

    def report(name: str, held: list[PartKey], accesses: list[int], **fields: Any) -> control.ShardReport:
        parts = [key.to_wire() for key in held]
        return control.ShardReport(shard_id=name, has_parts=True, parts=parts, part_accesses=accesses, **fields)

    fleet = Fleet(60, lambda: 0.0)
    first = join(fleet, report("a", keys[:2], [5, 7]))
    join(fleet, report("b", keys[1:], [3, 4]))
    assert fleet.holders() == {("m", "1"): {keys[0]: ["a"], keys[1]: ["a", "b"], keys[2]: ["b"]}}
    assert fleet.accesses() == {keys[0]: 5, keys[1]: 10, keys[2]: 4}
    assert not fleet.hear(first, report("a", keys[:2], [50, 7]))  # more accesses alone call for nothing
    assert fleet.accesses()[keys[0]] == 50
    assert fleet.hear(first, report("a", keys[:1], [50]))
    assert fleet.hear(first, report("a", keys[:1], [50], draining=True))


@pytest.mark.parametrize("dropped", [True, False])
def test_a_part_that_was_to_be_dropped_counts_as_held_only_by_a_report_from_after_that(dropped: bool) -> None:
    """A shard that is told to drop a part and then to hold it again may have dropped it."""
    one, two, three = decisions.part_keys(manifest("1"))

    def report(obeyed: int, *held: PartKey) -> control.ShardReport:
        parts = [key.to_wire() for key in held]
        return control.ShardReport(shard_id="a", has_parts=bool(parts), parts=parts, obeyed=obeyed)

    fleet = Fleet(60, lambda: 0.0)
    shard = join(fleet, report(0, one, two))
    shard.assigned = frozenset([one, two])
    assert shard.tell() == 1
    shard.assigned = frozenset([one])
    assert fleet.holders()["m", "1"].keys() == {one}
    assert shard.tell() == 2
    shard.assigned = frozenset([one, two, three])
    assert shard.tell() == 3
    assert fleet.holders()["m", "1"].keys() == {one}
    fleet.hear(shard, report(1, one, two, three))  # it was on its way, and three was loaded by an earlier assignment
    assert fleet.holders()["m", "1"].keys() == {one}
    if not dropped:
        assert fleet.hear(shard, report(2))
        assert fleet.holders()["m", "1"].keys() == {one, two, three}
        return
    assert fleet.hear(shard, report(2, one))
    assert fleet.holders()["m", "1"].keys() == {one}
    fleet.hear(shard, report(3, one, two))
    assert fleet.holders()["m", "1"].keys() == {one, two}


def test_silence_counts_only_while_the_controller_listens() -> None:
    now = 100.0
    fleet = Fleet(5, lambda: now)
    talking, silent = (join(fleet, control.ShardReport(shard_id=name)) for name in ("talking", "silent"))
    now += 60  # held up: what both said since waits to be read
    assert fleet.forget_lost() == []
    for _ in range(5):
        now += 0.9
        fleet.hear(talking, talking.report)
        lost = fleet.forget_lost()
    assert lost == [silent]
    assert fleet.shard_of(silent.stream) is None
    assert list(fleet.shards) == ["talking"]


def test_a_routing_is_sent_once_to_who_has_not_seen_it() -> None:
    shard = join(Fleet(5, lambda: 0.0), control.ShardReport(shard_id="a", term=7, epoch=2))
    assert shard.knows == (7, 2)
    shard.sent = (7, 3)
    assert shard.knows == (7, 3)
    shard.report = control.ShardReport(shard_id="a", term=8, epoch=1)  # another controller's
    assert shard.knows == (8, 1)


def test_the_first_holders_of_all_parts_are_of_one_topology() -> None:
    keys, fleet = decisions.part_keys(manifest("1")), Fleet(5, lambda: 0.0)
    for name, topology, held in (("a", "y", keys), ("b", "x", keys[:2]), ("c", "x", keys[2:])):
        parts = [key.to_wire() for key in held]
        join(fleet, control.ShardReport(shard_id=name, topology=topology, has_parts=True, parts=parts))
    assert fleet.holders() == {("m", "1"): {keys[0]: ["b", "a"], keys[1]: ["b", "a"], keys[2]: ["c", "a"]}}


def names(catalog: decisions.Catalog) -> dict[str, list[str]]:
    return {model: [each.version for each in versions] for model, versions in catalog.items()}


def test_a_version_leaves_only_where_the_store_could_be_read_and_has_it_no_more() -> None:
    one, two, other = manifest("9"), manifest("10"), manifest("1", "other")
    before = {"m": [one, two], "other": [other]}
    nothing = Catalogue(is_empty=True)
    assert names(decisions.known_versions(Catalogue({"m": [two]}), before, {})) == {"m": ["10"]}
    assert names(decisions.known_versions(Catalogue(), before, {})) == {}  # folders without a version
    assert decisions.known_versions(None, before, {}) == before
    assert decisions.known_versions(nothing, before, {}) == before
    bad_version, bad_folder = {("m", "9"): "torn"}, {("other", ""): "denied"}
    assert names(decisions.known_versions(Catalogue({"m": [two]}, bad_version), before, {})) == {"m": ["9", "10"]}
    assert names(decisions.known_versions(Catalogue({"m": [two]}, bad_folder), before, {})) == {
        "m": ["10"],
        "other": ["1"],
    }


def test_a_controller_that_has_never_seen_the_store_goes_by_what_shards_serve() -> None:
    one, two = manifest("1"), manifest("2")
    served = {("m", "1"): one}
    assert decisions.known_versions(None, {}, served) == {"m": [one]}
    assert decisions.known_versions(Catalogue(is_empty=True), {}, served) == {"m": [one]}
    assert decisions.known_versions(Catalogue({"m": [two]}), {}, served) == {"m": [two]}
    assert decisions.known_versions(Catalogue({"m": [two]}, {("m", "1"): "torn"}), {}, served) == {"m": [one, two]}
    assert decisions.known_versions(Catalogue(is_empty=True), {}, {}) == {}


def test_a_version_as_shards_know_it_is_placed_and_routed_as_the_stores_own() -> None:
    one = manifest("1")
    again = decisions.manifest_of(decisions.model_info(one))
    assert decisions.part_keys(again) == decisions.part_keys(one)
    assert decisions.model_info(again) == decisions.model_info(one)
    assert [part.bytes for part in again.tables[0].parts] == [part.bytes for part in one.tables[0].parts]
    info = decisions.model_info(one)
    info.hash_params = "[" * 100_000
    with pytest.raises(InvalidRequest):
        decisions.manifest_of(info)


def test_an_import_that_is_not_the_newest_is_named() -> None:
    first, late = manifest("v1", imported_at="2026-01-01"), manifest("2", imported_at="2026-01-02")
    [message] = decisions.never_served({"m": [late, first], "n": [manifest("1"), manifest("2")]})
    assert message.startswith("m@2 was imported after m@v1 and is not served")
    assert "sorts after 'v1'" in message
    assert not list(decisions.never_served({"m": [first, manifest("v2", imported_at="2026-01-03")]}))


@pytest.mark.parametrize(
    ("shards", "expected", "waited", "quiet", "returning", "enough"),
    [
        (0, 0, 100, 100, False, False),  # nobody is there
        (1, 0, 3, 1, False, False),
        (1, 0, 3, 2.5, False, True),
        (1, 0, 61, 0.5, False, True),  # there is always another one that comes
        (1, 2, 3, 3, False, False),
        (2, 2, 3, 0, False, True),
        (2, 2, 3, 0, True, False),  # a restart: there may be more
        (2, 2, 3, 2.5, True, True),
        (1, 2, 9, 7, True, False),  # the other one may come back, too
        (1, 2, 9, 9, True, True),
        (1, 2, 9, 9, False, False),
        (1, 2, 61, 61, False, True),
    ],
)
def test_settling(shards: int, expected: int, waited: float, quiet: float, returning: bool, enough: bool) -> None:
    assert decisions.settled(shards, expected, waited, quiet, returning, settle=2, patience=60, lost=8) is enough


def test_a_shard_that_registers_again_and_again_does_not_look_like_new_ones() -> None:
    now = 100.0
    fleet = Fleet(5, lambda: now)
    for _ in range(10):
        now += 0.5
        join(fleet, control.ShardReport(shard_id="a", incarnation=1))
    assert fleet.joined == 100.5


def test_what_is_served_is_placed_first_and_then_the_smallest() -> None:
    served, small, large = manifest("1", "s", 9), manifest("1", "a", 1), manifest("1", "b", 2)
    assert decisions.by_importance([large, small, served], {("s", "1")}) == [served, small, large]


def test_of_two_shards_with_one_id_the_first_stays_while_it_is_heard_of() -> None:
    now = 100.0
    fleet = Fleet(60, lambda: now)

    def report(incarnation: int) -> control.ShardReport:
        return control.ShardReport(shard_id="a", address=f"h:{incarnation}", incarnation=incarnation)

    def pass_time(seconds: float) -> None:
        nonlocal now
        for _ in range(round(seconds * 4)):
            now += 0.25
            fleet.forget_lost()

    first = join(fleet, report(1))
    for _ in range(20):  # both live, and neither gives up
        pass_time(1)
        fleet.hear(first, report(1))
        with pytest.raises(IdTaken, match=r"a of h:2 is taken by the shard at h:1.*--id of its own") as refusal:
            join(fleet, report(2))
        is_news = not fleet.refusals()
        assert fleet.refuse("a", refusal.value) is is_news  # said once
    assert fleet.shards == {"a": first}
    again = join(fleet, report(1))  # a connection that broke
    assert fleet.shards == {"a": again}
    assert fleet.shard_of(first.stream) is None
    pass_time(ALIVE_SECONDS)  # its connection hangs: the machine is gone
    second = join(fleet, report(2))
    assert fleet.shards == {"a": second}
    assert fleet.shard_of(again.stream) is None
    with pytest.raises(IdTaken):  # it was only held up, and is back
        join(fleet, report(1))
    fleet.leave(second)
    assert join(fleet, report(3)) is fleet.shards["a"]  # a restart: its connection ended with it
    pass_time(REFUSAL_SECONDS)
    assert fleet.refusals() == []


def overlaid(version: str, model: str = "m", rows: dict[int, int] | None = None, base: str = "1") -> Manifest:
    """A version over m@`base` that replaces so many rows in each of these parts of its table."""
    table = manifest(base).tables[0]
    overlays = tuple(
        Overlay(
            part=part,
            rows=count,
            file=overlay_file("t", part),
            bytes=count * (8 + table.row_bytes),
            checksum="xxh3-128:" + "0" * 32,
        )
        for part, count in (rows or {}).items()
    )
    fields = {"format_version": 2, "version": version, "model": model, "tables": (table,)}
    return manifest(base).model_copy(update={**fields, "base": Base(model="m", version=base, overlays={"t": overlays})})


def test_t12_a_version_with_a_base_as_shards_know_it_takes_what_the_stores_takes() -> None:
    two = overlaid("2", rows={0: 3, 2: 1})
    assert two.base
    two = two.model_copy(update={"base": two.base.model_copy(update={"checkpoint": "m@1"})})
    again = decisions.manifest_of(decisions.model_info(two))
    assert (again.root, again.checkpoint, again.replaced_rows) == (("m", "1"), "m@1", 4)
    assert again.replaced_bytes == two.replaced_bytes
    assert decisions.model_info(again) == decisions.model_info(two)
    info = decisions.model_info(two)
    info.tables[0].replaced_rows = -5
    with pytest.raises(InvalidRequest):
        decisions.manifest_of(info)


def test_t12_rows_that_versions_share_are_placed_once() -> None:
    one, two, legal = manifest("1"), overlaid("2", rows={0: 3, 2: 1}), overlaid("1", "m+legal", rows={1: 2})
    keys = [key for each in (one, two, legal) for key in decisions.part_keys(each)]
    alone = decisions.part_demands([one], {})
    together = decisions.part_demands([one, two, legal], dict.fromkeys(keys, 2))
    assert [each.key for each in together] == [each.key for each in alone] == decisions.part_keys(one)
    row_bytes = one.tables[0].row_bytes
    assert {each.more for each in together} == {(3 + 2) * (8 + row_bytes)}  # alike, so that no part moves for it
    assert {each.load for each in together} == {6.0}
    assert [each.key for each in decisions.part_demands([two], {})] == decisions.part_keys(one)


def test_what_takes_little_is_placed_before_what_takes_much() -> None:
    one, legal, whole = manifest("1"), overlaid("1", "m+legal", rows={0: 1}), manifest("1", "a")
    assert decisions.by_importance([whole, legal, one], {("m", "1")}) == [one, legal, whole]
    assert decisions.by_importance([whole, legal], set()) == [whole, legal]


def test_a_base_is_told_to_clients_and_told_back() -> None:
    two = overlaid("2", rows={0: 3})
    info = decisions.model_info(two)
    assert info.base == "m@1"
    assert not decisions.model_info(manifest("1")).base
    back = decisions.manifest_of(info)
    assert back.root == ("m", "1") and decisions.part_demands([back], {})[0].key == PartKey("m", "1", "t", 0)
    info.base = "m"
    with pytest.raises(InvalidRequest, match="what is said of m@2"):
        decisions.manifest_of(info)
