"""A shard's duties by themselves: what it reports, and what it does when it is told."""

from collections.abc import Iterable

from embedding_service.client.router import Router
from embedding_service.placement.parts import PartKey
from embedding_service.shard.duties import ACCESSES_SECONDS, Duties
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire

ONE, TWO, THREE = (PartKey("m", "1", "t", part) for part in range(3))


class Flag:
    """As an asyncio.Event."""

    def __init__(self) -> None:
        self.value = False

    def is_set(self) -> bool:
        return self.value

    def set(self) -> None:
        self.value = True

    def clear(self) -> None:
        self.value = False


class Holdings:
    """Holds at once what it is told to."""

    def __init__(self) -> None:
        self.held: set[PartKey] = set()
        self.failures: dict[PartKey, str] = {}
        self.changed = Flag()
        self.reserved = 0

    def assign(self, wanted: Iterable[PartKey]) -> None:
        self.held = set(wanted)
        self.changed.set()

    def accesses(self, key: PartKey) -> int:
        return 10 + key.part


class Shard:
    """Duties with what they work on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.holdings = Holdings()
        self.router = Router(["h:1"])
        about = control.ShardReport(shard_id="a", address="h:2", memory_limit=7, incarnation=9)
        self.duties = Duties(about, self.holdings, self.router, lambda: self.now)


def routing(term: int, epoch: int = 1) -> wire.Routing:
    message = wire.Routing(term=term, epoch=epoch)
    message.models.add(model=wire.ModelInfo(name="m", version="1"))
    return message


def told(term: int, *parts: PartKey, **fields: object) -> control.Assignment:
    return control.Assignment(term=term, has_parts=True, parts=[part.to_wire() for part in parts], **fields)  # type: ignore[arg-type]


def parts_of(report: control.ShardReport) -> list[PartKey]:
    return [PartKey.from_wire(part) for part in report.parts]


def test_a_report_says_which_assignment_it_was_made_after() -> None:
    shard = Shard()
    assert shard.duties.report().obeyed == 0
    shard.duties.obey(told(5, ONE, number=1))
    shard.duties.obey(told(5, number=2))
    assert shard.duties.report().obeyed == 2
    shard.duties.obey(told(4, number=3))  # it was read, and what is held is as it was before
    assert shard.duties.report().obeyed == 3
    assert shard.duties.first_report().obeyed == 0
    assert shard.duties.report().obeyed == 0


def test_a_shard_obeys_the_latest_controller_and_each_of_its_assignments() -> None:
    shard = Shard()
    shard.duties.obey(told(5, ONE))
    shard.duties.obey(told(5, TWO))
    assert shard.holdings.held == {TWO}
    assert not shard.duties.obey(told(4, ONE, released=True, routing=routing(4)))
    assert shard.holdings.held == {TWO} and not shard.duties.released and shard.router.current is None
    shard.duties.obey(told(6, ONE))
    shard.duties.obey(told(5, TWO))
    assert shard.holdings.held == {ONE}
    shard.duties.obey(control.Assignment(term=6))  # it says nothing of parts
    assert shard.holdings.held == {ONE}
    shard.duties.obey(told(6))
    assert shard.holdings.held == set()


def test_a_report_carries_the_numbers_that_it_is_given() -> None:
    shard, stats = Shard(), control.ShardStats(pid=3, lookups=5)
    assert shard.duties.report(stats).stats == shard.duties.first_report(stats).stats == stats


def test_what_was_released_stays_so() -> None:
    shard = Shard()
    shard.duties.draining = True
    assert shard.duties.report().draining and not shard.duties.released
    shard.duties.obey(told(5, released=True))
    shard.duties.obey(told(5))
    assert shard.duties.released


def test_a_routing_is_adopted_and_reported() -> None:
    shard = Shard()
    assert shard.duties.report() == control.ShardReport(shard_id="a", address="h:2", memory_limit=7, incarnation=9)
    assert shard.duties.obey(told(5, routing=routing(5, 3)))
    assert shard.router.current and shard.router.current.age == (5, 3)
    assert not shard.duties.obey(told(5))
    report = shard.duties.report()
    assert (report.term, report.epoch, list(report.served), list(report.models)) == (5, 3, ["m@1"], [])
    assert [f"{model.name}@{model.version}" for model in shard.duties.first_report().models] == ["m@1"]


def test_parts_are_reported_first_and_whenever_they_changed_and_accesses_now_and_then() -> None:
    shard = Shard()
    assert shard.duties.first_report().has_parts
    assert not shard.duties.report().has_parts
    shard.duties.obey(told(5, TWO, ONE))
    shard.holdings.failures = {THREE: "torn"}
    report = shard.duties.report()
    assert report.has_parts and parts_of(report) == [ONE, TWO] and list(report.part_accesses) == [10, 11]
    assert [(PartKey.from_wire(each.part), each.message) for each in report.failures] == [(THREE, "torn")]
    for _ in range(3):
        shard.now += ACCESSES_SECONDS
        assert not shard.duties.report().has_parts
        shard.now += 0.25
        assert parts_of(shard.duties.report()) == [ONE, TWO]
    shard.now += ACCESSES_SECONDS - 1
    assert shard.duties.first_report().has_parts
    shard.now += 2
    assert not shard.duties.report().has_parts


def test_memory_that_branches_took_is_not_offered_for_parts() -> None:
    shard = Shard()
    assert shard.duties.first_report().memory_limit == 7
    shard.holdings.reserved = 5
    assert shard.duties.report().memory_limit == 2
    shard.holdings.reserved = 0
    assert shard.duties.report().memory_limit == 7
