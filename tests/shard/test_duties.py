"""A shard's duties by themselves: what it reports, and what it does when it is told."""

from collections.abc import Iterable

from embedding_service.client.router import Router
from embedding_service.placement.parts import PartKey
from embedding_service.shard.duties import Duties
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire

ONE, TWO = PartKey("m", "1", "t", 0), PartKey("m", "1", "t", 1)


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
