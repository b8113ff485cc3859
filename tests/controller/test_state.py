"""The controller's state machine by itself: events in, instructions out, at a time that the test says."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
from support.manifests import manifest
from support.planner import plan

from embedding_service.controller import decisions
from embedding_service.controller.events import (
    Dismiss,
    End,
    Event,
    Instruction,
    Joined,
    Left,
    Looked,
    NoteTerm,
    Plan,
    Planned,
    Publish,
    ReadTerm,
    Renew,
    Reported,
    Tell,
    TermNoted,
    TermRead,
    Tick,
)
from embedding_service.controller.fleet import IdTaken
from embedding_service.controller.placing import REPLAN_SECONDS
from embedding_service.controller.presenter import problems_of
from embedding_service.controller.state import (
    NOTE_SECONDS,
    RETURN_SECONDS,
    TERM_SPREAD,
    TICK_SECONDS,
    ControllerState,
    Phase,
    Settings,
)
from embedding_service.errors import InvalidRequest, PlacementError
from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import Manifest
from embedding_service.store.store import Catalogue
from embedding_service.wire import control_pb2 as control

CLOCK_US = 5_000


class NoChance(random.Random):
    """The least of all that it may be."""

    def randrange(self, *bounds: int, **_: int) -> int:  # type: ignore[override]
        return 0


class World:
    """Answers what a state asks, and lets shards obey at once; `noted` is the term in the store."""

    def __init__(self, answers: bool = True, **settings: float) -> None:
        self.now = 100.0
        self.answers = answers
        self.noted = 0
        self.takes_notes = True
        self.settings = Settings("h:9", **{"settle": 1.0, "lost_after": 5.0, "grace": 2.0, **settings})  # type: ignore[arg-type]
        self.state = ControllerState(self.settings, lambda: self.now, NoChance())
        self.done: list[Instruction] = []
        self.reports: dict[str, control.ShardReport] = {}

    def feed(self, event: Event) -> list[Instruction]:
        """What the state has done, with what follows from the answers."""
        done: list[Instruction] = []
        events = [event]
        while events:
            for instruction in self.state.handle(events.pop(0)):
                done.append(instruction)
                answer = self.answer(instruction) if self.answers else None
                events += [answer] if answer else []
        self.done += done
        return done

    def answer(self, instruction: Instruction) -> Event | None:
        match instruction:
            case ReadTerm():
                return TermRead(self.noted, CLOCK_US)
            case NoteTerm(term):
                if self.takes_notes:
                    self.noted = max(self.noted, term)
                return TermNoted(self.noted == term)
            case Plan(parts, nodes, replicas):
                try:
                    return Planned(plan(parts, nodes, replicas))
                except PlacementError as error:
                    return Planned(error)
        return None

    def join(self, name: str, held: Iterable[PartKey] = (), **fields: Any) -> list[Instruction]:
        """A shard registers on a stream of its name."""
        fields = {"memory_limit": 1 << 30, "device": "cpu", "address": f"h:{ord(name[0])}", **fields}
        parts = [key.to_wire() for key in held]
        self.reports[name] = control.ShardReport(shard_id=name, has_parts=True, parts=parts, **fields)
        return self.feed(Joined(name, self.reports[name]))

    def report(self, name: str, **fields: Any) -> list[Instruction]:
        report = control.ShardReport()
        report.CopyFrom(self.reports[name])
        report.MergeFrom(control.ShardReport(**fields))
        return self.feed(Reported(name, report))

    def obey(self, name: str) -> None:
        """A shard holds what it was told to hold, and says so."""
        message = self.state.message(name)
        assert message is not None
        del self.reports[name].parts[:]
        self.reports[name].parts.extend(message.parts)
        self.reports[name].obeyed = message.number
        self.report(name)

    def learn(self, name: str) -> None:
        """A shard takes the routing that it was told, if it was told one, and reports that from now on."""
        message = self.state.message(name)
        if message and message.HasField("routing"):
            report = self.reports[name]
            report.term, report.epoch = message.routing.term, message.routing.epoch
            report.served[:] = [f"{each.model.name}@{each.model.version}" for each in message.routing.models]
            report.ClearField("models")

    def pass_time(self, seconds: float, step: float = 0.25) -> list[Instruction]:
        """With a tick each quarter of a second, and a heartbeat of each shard each second."""
        done: list[Instruction] = []
        for number in range(round(seconds / step)):
            self.now += step
            if number % 4 == 0:
                for name in self.state.fleet.shards:
                    done += self.report(name)
            done += self.feed(Tick())
        return done

    def serve(self, *versions: Manifest, shards: str = "ab") -> None:
        """Until these shards hold all that they were told."""
        for name in shards:
            self.join(name)
        self.feed(Looked(Catalogue({"m": list(versions)})))
        self.pass_time(2)
        for name in shards:
            self.obey(name)
        self.pass_time(1)

    def owners(self) -> list[list[str]]:
        assert self.state.routing
        message = self.state.routing.message
        [table] = message.models[0].tables
        return [[message.shards[index].id for index in part.shards] for part in table.parts]

    def assigned(self, name: str) -> set[PartKey]:
        message = self.state.message(name)
        assert message is not None
        return {PartKey.from_wire(part) for part in message.parts}


ONE, TWO = manifest("1"), manifest("2")
KEYS = decisions.part_keys(ONE)


def kinds(instructions: Iterable[Instruction]) -> list[str]:
    return [type(each).__name__ for each in instructions]


def test_from_its_first_shards_to_a_served_model() -> None:
    world = World(answers=False)
    assert world.join("a") == [] == world.join("b")
    assert world.state.phase is Phase.SETTLING
    assert world.pass_time(RETURN_SECONDS) == []
    assert world.state.phase is Phase.LOOKING and world.state.message("a") is None
    assert world.feed(Looked(Catalogue({"m": [ONE]}))) == []
    assert world.feed(Tick()) == [ReadTerm()]
    assert world.pass_time(1) == [] and world.state.phase is Phase.QUIET
    assert world.feed(TermRead(7, CLOCK_US)) == [NoteTerm(CLOCK_US)]
    assert world.feed(TermNoted(True)) == []
    [question] = world.feed(Tick())
    assert world.state.phase is Phase.DECIDING
    assert isinstance(question, Plan) and len(question.parts) == 3 and question.replicas == 1
    done = world.feed(Planned(plan(question.parts, question.nodes, question.replicas)))
    assert kinds(done) == ["Publish", "Tell", "Tell"]
    assert world.state.routing and world.state.routing.age == (CLOCK_US, 1) and not world.state.routing.models
    assert world.assigned("a") | world.assigned("b") == set(KEYS)
    assert not world.assigned("a") & world.assigned("b")
    for name in "ab":
        world.obey(name)
    assert kinds(world.pass_time(0.25)) == ["Publish", "Tell", "Tell"]
    assert world.state.routing.age == (CLOCK_US, 2)
    assert sorted(name for [name] in world.owners()) in (["a", "a", "b"], ["a", "b", "b"])


def test_a_decision_works_out_only_the_versions_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a hundred domains would take seconds, in which no shard is heard."""
    functions = ("copies_held", "still_copied", "needs_plan", "place_version", "placed_parts", "planned_parts")
    worked_out: list[str] = []

    def noting(name: str) -> Any:
        function = getattr(decisions, name)

        def note(*arguments: Any) -> Any:
            worked_out.append(name)
            return function(*arguments)

        return note

    for name in functions:
        monkeypatch.setattr(decisions, name, noting(name))
    world, others = World(), [manifest("1", f"m{number}") for number in range(5)]
    world.join("a")
    found = Looked(Catalogue({each.model: [each] for each in (ONE, *others)}))
    world.feed(found)
    world.pass_time(2)
    world.obey("a")
    world.pass_time(1)
    assert set(worked_out) == set(functions) and world.state.routing and len(world.state.routing.models) == 6
    worked_out.clear()
    world.feed(found)
    world.pass_time(1)
    assert worked_out == []
    del world.reports["a"].parts[[PartKey.from_wire(part) for part in world.reports["a"].parts].index(KEYS[0])]
    world.pass_time(1)
    assert sorted(worked_out) == ["copies_held", "place_version", "placed_parts", "still_copied"]
    assert world.state.routing.model("m").table("t").owners.tolist() == [[-1], [0], [0]]


def test_a_routing_travels_once_to_each_shard() -> None:
    world = World()
    world.serve(ONE)
    messages = [world.state.message("a") for _ in range(2)]
    assert [message.HasField("routing") for message in messages if message] == [True, False]
    world.join("a")  # on a connection that knows nothing of what was sent on the one before
    world.pass_time(1)
    message = world.state.message("a")
    assert message and message.HasField("routing")


def test_s6_a_routing_that_is_to_be_signed_again_is_published_once_more_and_sent_to_all() -> None:
    world = World()
    world.serve(ONE)
    assert world.state.message("a")
    before = world.state.routing
    assert before
    world.feed(Renew())
    done = world.pass_time(3)
    after = world.state.routing
    assert after and after.age == (before.age[0], before.age[1] + 1)
    assert kinds(done).count("Publish") == 1
    message = world.state.message("a")
    assert message and (message.routing.term, message.routing.epoch) == after.age
    assert world.pass_time(3) == []


def test_it_stays_quiet_where_nothing_changes() -> None:
    world = World()
    world.serve(ONE)
    assert world.pass_time(30) == []


@pytest.mark.parametrize("noted", [0, CLOCK_US + 1000])
def test_its_term_is_above_the_clock_the_note_and_what_shards_know(noted: int) -> None:
    for known in (0, CLOCK_US + 2000):
        world = World()
        world.noted = noted
        world.join("a", term=known, epoch=3)
        world.feed(Looked(Catalogue({"m": [ONE]})))
        world.pass_time(3)
        assert world.state.term == max(CLOCK_US, noted + 1 if noted else 0, known + 1 if known else 0)
        assert world.noted == world.state.term


def test_a_controller_that_came_later_ends_it() -> None:
    world = World()
    world.serve(ONE)
    world.noted = world.state.term + 5
    world.reports["a"].term = world.noted
    assert world.report("a") == []
    [end] = [each for each in world.pass_time(0.5) if isinstance(each, End)]
    assert f"a controller of term {world.noted} is there" in str(end.why)
    assert world.state.phase is Phase.ENDED
    assert world.feed(Tick()) == world.join("c") == []


def test_a_controller_learns_from_the_store_that_another_one_came_and_lets_its_shards_go() -> None:
    """Though none of its shards knows: the later one waits for them."""
    world = World()
    world.serve(ONE)
    later = World(expect_shards=2)
    later.noted = world.noted
    later.feed(Looked(Catalogue({"m": [ONE]}), noted=later.noted))
    later.pass_time(1)
    assert later.state.phase is Phase.SETTLING and later.noted > world.noted
    [end] = world.feed(Looked(Catalogue({"m": [ONE]}), noted=later.noted))
    assert isinstance(end, End)


def test_a_term_that_the_store_did_not_take_or_lost_is_noted_again() -> None:
    world = World()
    world.takes_notes = False
    world.serve(ONE)
    assert world.noted == 0
    world.takes_notes = True
    world.pass_time(NOTE_SECONDS + 1)
    assert world.noted == world.state.term
    world.noted = 0
    world.feed(Looked(Catalogue({"m": [ONE]})))
    world.pass_time(1)
    assert world.noted == world.state.term
    assert "NoteTerm" not in kinds(world.pass_time(60))


def test_without_a_shard_there_is_no_routing() -> None:
    """Clients would take one that names nothing for news."""
    world = World(expect_shards=2, patience=10.0)
    world.feed(Looked(Catalogue({"m": [ONE]})))
    world.pass_time(20)
    assert world.state.routing is None
    assert "waiting for shards: 0 registered, 2 expected" in [each.message for each in problems_of(world.state, "s")]
    world.join("a")
    world.pass_time(0.5)
    assert world.state.routing is not None


def test_a_term_that_no_controller_noted_ends_nobody() -> None:
    world = World()
    world.serve(ONE)
    higher = world.state.term + 5
    world.reports["a"].term = higher
    world.report("a")
    assert kinds(world.pass_time(0.5)) == ["ReadTerm", "NoteTerm", "Publish", "Tell", "Tell"]
    assert world.state.term == world.noted == higher + 1


def test_two_controllers_that_go_above_one_term_take_two() -> None:
    """The store cannot be read, so none of them learns of the other."""
    terms = set()
    for seed in range(2):
        world = World()
        world.state = ControllerState(world.settings, lambda world=world: world.now, random.Random(seed))  # type: ignore[misc]
        world.feed(Looked(None))
        world.feed(Tick())
        world.join("a", term=CLOCK_US + TERM_SPREAD)
        world.pass_time(RETURN_SECONDS)
        assert world.state.routing and world.state.term > CLOCK_US + TERM_SPREAD
        terms.add(world.state.term)
    assert len(terms) == 2


def test_a_term_that_a_shard_knows_already_is_not_this_controllers() -> None:
    """Two controllers may have taken the same one, where neither could note it."""
    world = World(expect_shards=2)
    world.join("a")
    world.feed(Looked(Catalogue({"m": [ONE]})))
    world.pass_time(0.5)
    taken = world.state.term
    world.join("b", term=taken, epoch=3)
    world.pass_time(3)
    assert world.state.routing is not None
    assert world.state.routing.age == (taken + 1, 1)


def test_shards_that_all_drain_are_released_with_their_parts() -> None:
    world = World()
    world.serve(ONE)
    for name in "ab":
        world.reports[name].draining = True
        world.report(name)
    world.pass_time(0.5)
    for name in "ab":
        told = world.state.message(name)
        assert told and told.released and told.parts


@pytest.mark.parametrize("readable", [True, False])
def test_parts_of_a_version_that_nobody_knows_go_where_the_store_is_sure(readable: bool) -> None:
    unknown = KEYS[0]._replace(version="0")
    world = World()
    world.join("a", held=[*KEYS, unknown])
    world.feed(Looked(Catalogue({"m": [ONE]}, problems={} if readable else {("m", "0"): "torn"})))
    world.pass_time(12)
    assert world.assigned("a") == {*KEYS} | (set() if readable else {unknown})


def test_a_shard_that_is_lost_while_a_plan_is_made_is_not_in_the_routing_after_it() -> None:
    world = World(replicas=2)
    world.serve(ONE)
    assert world.owners() == [["a", "b"]] * 3
    world.answers = False
    world.join("c")
    world.now += 0.25
    [question] = world.feed(Tick())
    assert isinstance(question, Plan)
    for _ in range(24):  # a says no more
        world.now += 0.25
        for name in "bc":
            world.report(name)
        lost = world.feed(Tick())
        if lost:
            break
    assert lost == [Dismiss("a")]
    assert kinds(world.feed(Planned(plan(question.parts, question.nodes, 2)))) == ["Publish", "Tell", "Tell"]
    assert world.owners() == [["b"]] * 3
    world.answers = True
    assert "Plan" in kinds(world.pass_time(1))
    assert world.assigned("c") == set(KEYS)


def test_with_a_copy_on_every_shard_one_that_joins_gets_all_and_one_that_leaves_costs_nothing() -> None:
    world = World(replicas=0)
    world.serve(ONE)
    assert world.owners() == [["a", "b"]] * 3
    world.join("c")
    world.pass_time(1)
    assert world.assigned("c") == set(KEYS)
    assert world.owners() == [["a", "b"]] * 3
    world.obey("c")
    world.pass_time(1)
    assert world.owners() == [["a", "b", "c"]] * 3
    world.reports["a"].draining = True
    world.pass_time(1)
    assert world.owners() == [["b", "c"]] * 3
    assert world.assigned("b") == world.assigned("c") == set(KEYS)
    world.feed(Left("a"))
    world.pass_time(6)
    assert world.owners() == [["b", "c"]] * 3
    assert not list(problems_of(world.state, "store"))


def test_1000_shards_are_heard_while_a_plan_is_made_and_told_once_a_second() -> None:
    world = World(answers=False, expect_shards=1000)
    names = [f"s{number}" for number in range(1000)]
    for name in names:
        world.join(name)
    world.feed(Looked(Catalogue({"m": [ONE]})))
    world.pass_time(0.5)
    world.feed(TermRead(0, CLOCK_US))
    world.feed(TermNoted(True))
    [question] = world.feed(Tick())
    assert isinstance(question, Plan)
    assert world.pass_time(10) == []  # it takes long: all are heard, and none is lost
    for name, key in zip(names, KEYS, strict=False):
        assert world.report(name, has_parts=True, parts=[key.to_wire()]) == []
    done = world.feed(Planned(plan(question.parts, question.nodes, 1)))
    assert kinds(done) == ["Publish"] + ["Tell"] * 1000
    assert [each.full_name for each in world.state.routing.models] == ["m@1"] if world.state.routing else False
    assert world.state.tick_in() == TICK_SECONDS
    world.answers = True
    for name in names[10:20]:  # what happens now waits for a second, and is told at once then
        world.now += 0.09
        world.report(name, draining=True)
        assert "Publish" not in kinds(world.feed(Tick())) and not [each for each in world.done if isinstance(each, End)]
    assert world.state.tick_in() == pytest.approx(0.1)
    world.now += 0.101
    world.feed(Tick())
    shards = world.state.fleet.shards
    assert all(shards[name].released for name in names[10:20]) and not shards[names[20]].released


def test_what_a_shard_leaves_is_kept_for_the_grace_time_after_all_new_copies_are_there() -> None:
    world = World()
    world.serve(ONE, shards="a")
    world.report("a", draining=True)
    world.reports["a"].draining = True
    world.join("b")
    world.pass_time(1)
    assert world.owners() == [["a"]] * 3 and world.assigned("a") == set(KEYS)
    world.obey("b")
    world.pass_time(0.25)
    assert world.owners() == [["b"]] * 3
    assert world.assigned("a") == set(KEYS)
    world.pass_time(1.5)
    assert world.assigned("a") == set(KEYS)
    world.pass_time(1)
    message = world.state.message("a")
    assert message and not message.parts and message.released
    assert world.feed(Left("a")) == [Dismiss("a")]
    assert "a" not in world.state.fleet.shards


def test_a_copy_in_its_grace_time_stays_as_long_as_the_new_one_is_not_connected() -> None:
    """The new one may have died. Then the old one is all that is left."""
    world = World(lost_after=60.0)
    world.serve(ONE, shards="a")
    world.join("b")
    world.pass_time(1)
    world.obey("b")
    world.pass_time(0.5)
    [moved] = [key for key, owners in zip(KEYS, world.owners(), strict=True) if owners == ["b"]]
    world.feed(Left("b"))
    world.pass_time(0.5)
    assert world.owners()[KEYS.index(moved)] == ["a", "b"]
    world.pass_time(10)
    assert moved in world.assigned("a")
    world.join("b", held=[moved])
    world.pass_time(1)
    assert world.owners()[KEYS.index(moved)] == ["b"] and moved in world.assigned("a")
    world.pass_time(2)
    assert moved not in world.assigned("a")


def test_a_shard_that_is_not_connected_keeps_what_it_was_not_told_to_drop() -> None:
    world = World(lost_after=60.0)
    world.serve(ONE, shards="a")
    world.join("b")
    world.pass_time(1)
    world.obey("b")
    world.pass_time(1)
    a = world.state.fleet.shards["a"]
    [moved] = a.grace
    world.feed(Left("a"))
    world.pass_time(0.5)
    assert world.pass_time(10) == []  # its grace time is over, and it cannot be told
    world.reports["b"].failures.add(part=KEYS[0].to_wire(), message="torn")
    world.report("b")
    world.pass_time(0.5)  # which calls for a decision
    assert a.keeps == set(KEYS)
    world.feed(Left("b"))
    world.pass_time(1)
    assert world.owners()[KEYS.index(moved)] == ["a", "b"]


def test_a_part_that_a_shard_was_told_to_drop_is_not_routed_to_it_though_it_reports_it() -> None:
    """What was told may be on its way still."""
    world = World()
    world.serve(ONE, shards="a")
    world.reports["a"].draining = True
    world.report("a")
    world.join("b")
    world.pass_time(1)
    world.obey("b")
    world.pass_time(4)
    assert world.owners() == [["b"]] * 3 and world.state.fleet.shards["a"].assigned == frozenset()
    assert len(world.reports["a"].parts) == 3
    world.report("b", has_parts=True)
    del world.reports["b"].parts[:]
    world.report("b")
    world.pass_time(0.5)
    assert world.owners() == [[]] * 3


@pytest.mark.parametrize("found", [Catalogue({"m": [ONE, TWO]}), Catalogue({"m": [ONE]}, {("m", "2"): "torn"}), None])
@pytest.mark.parametrize("planning", [False, True])
def test_what_shards_serve_that_come_after_the_first_routing_is_served_on(
    found: Catalogue | None, planning: bool
) -> None:
    """A controller starts again beside new shards, and hears those that served before only then."""
    world = World()
    world.join("b")
    world.feed(Looked(found))
    world.pass_time(0.75)
    world.answers = not planning
    world.pass_time(RETURN_SECONDS)
    serves = {"term": CLOCK_US - 1, "epoch": 7, "served": ["m@1"], "models": [decisions.model_info(ONE)]}
    world.join("a", held=KEYS[:2], **serves)  # the third part was lost with its shard
    world.answers = True
    if planning:
        plans = world.done[-1]
        assert isinstance(plans, Plan)
        world.feed(Planned(plan(plans.parts, plans.nodes, plans.replicas)))
    for _ in range(20):
        for name in "ab":
            world.learn(name)
        world.pass_time(0.25)
    assert world.state.routing and [each.full_name for each in world.state.routing.models] == ["m@1"]
    assert world.owners() == [["a"], ["a"], []]
    assert world.assigned("a") >= set(KEYS[:2])


def come_back(world: World) -> None:
    """A shard that served before registers, and is served from."""
    world.join("a", held=KEYS, term=7, epoch=7, served=["m@1"], models=[decisions.model_info(ONE)])
    world.pass_time(RETURN_SECONDS)
    assert world.state.routing and [each.full_name for each in world.state.routing.models] == ["m@1"]


@pytest.mark.parametrize("noted", [0, 7])
def test_a_controller_that_was_restarted_waits_for_shards_that_served(noted: int) -> None:
    """New ones are there first, as many as are expected. A routing of theirs would serve nothing."""
    world = World(expect_shards=1)
    world.noted = noted
    world.join("b")
    world.feed(Looked(Catalogue({"m": [ONE]}), noted=noted))
    world.pass_time(1)
    assert (world.state.routing is None) == (noted > 0)
    come_back(world)


def test_a_controller_that_was_restarted_gives_a_shard_up_as_the_one_before_would_have() -> None:
    """One that hangs does not come back. Those that are there have its copies."""
    world = World(expect_shards=2)
    world.noted = 7
    world.join("a", held=KEYS, term=CLOCK_US - 1, epoch=7, served=["m@1"], models=[decisions.model_info(ONE)])
    world.feed(Looked(Catalogue({"m": [ONE]}), noted=7))
    world.pass_time(RETURN_SECONDS)
    assert world.state.routing is None
    world.pass_time(world.state.settings.lost_after + 1)
    assert world.state.routing and [each.full_name for each in world.state.routing.models] == ["m@1"]


def test_a_controller_that_finds_an_empty_store_waits_for_shards_that_served() -> None:
    """It may be a folder that nothing is mounted on."""
    world = World(expect_shards=1)
    world.join("b")
    world.feed(Looked(Catalogue(is_empty=True)))
    world.pass_time(2 * RETURN_SECONDS)
    assert world.state.routing is None
    come_back(world)


def test_a_store_that_is_back_gives_shards_time_to_leave_the_controller_before() -> None:
    world = World(expect_shards=1)
    world.join("b")
    world.feed(Looked(Catalogue(is_empty=True)))
    world.pass_time(2 * RETURN_SECONDS)
    world.feed(Looked(Catalogue({"m": [ONE]}), noted=7))
    world.pass_time(RETURN_SECONDS)
    assert world.state.routing is None
    come_back(world)


def test_a_term_is_above_what_was_noted_though_the_store_is_away_when_it_is_taken() -> None:
    world = World()
    world.noted = 0
    world.feed(Looked(Catalogue({"m": [ONE]}), noted=2 * CLOCK_US))
    world.pass_time(1)
    assert world.state.term > 2 * CLOCK_US


def test_a_version_that_the_store_has_no_more_is_not_served_for_a_late_shard() -> None:
    world = World()
    world.serve(TWO)
    world.join("c", held=KEYS, term=CLOCK_US - 1, epoch=7, served=["m@1"], models=[decisions.model_info(ONE)])
    world.pass_time(1)
    assert world.state.routing and [each.full_name for each in world.state.routing.models] == ["m@2"]
    world.feed(Looked(Catalogue({"n": [manifest("1", "n")]})))
    world.pass_time(1)
    assert not world.state.routing.models


def test_a_new_version_takes_over_whole_and_in_one_routing() -> None:
    world = World()
    world.serve(ONE)
    world.feed(Looked(Catalogue({"m": [ONE, TWO]})))
    world.pass_time(0.5)
    assert world.state.routing and [each.full_name for each in world.state.routing.models] == ["m@1"]
    world.obey("a")
    world.pass_time(0.5)
    assert [each.full_name for each in world.state.routing.models] == ["m@1"]
    world.obey("b")
    world.pass_time(0.5)
    assert [each.full_name for each in world.state.routing.models] == ["m@2"]
    assert {key.version for name in "ab" for key in world.assigned(name)} == {"1", "2"}  # the grace time
    world.pass_time(3)
    assert {key.version for name in "ab" for key in world.assigned(name)} == {"2"}


def test_a_store_that_goes_away_changes_nothing() -> None:
    world = World()
    world.serve(ONE)
    before = world.state.routing
    for found in (None, Catalogue(is_empty=True)):
        world.feed(Looked(found, "" if found else "gone"))
        world.pass_time(5)
        assert world.state.routing is before
        assert world.assigned("a") | world.assigned("b") == set(KEYS)
    world.feed(Looked(Catalogue({"n": [manifest("1", "n")]})))  # there, and without m
    world.pass_time(5)
    assert world.state.routing and not world.state.routing.models


@pytest.mark.parametrize("found", [None, Catalogue(is_empty=True), Catalogue({"m": [ONE]})])
def test_the_last_holders_of_a_part_stay_named_while_nobody_can_load_it(found: Catalogue | None) -> None:
    """They may be cut off from this controller alone. Where the store can be read, others load the part."""
    world = World()
    world.serve(ONE)
    lost = [key for key, owners in zip(KEYS, world.owners(), strict=True) if owners == ["b"]]
    assert 0 < len(lost) < len(KEYS)
    before = world.owners()
    world.feed(Looked(found))
    for _ in range(32):
        world.now += 0.25
        world.report("a")
        world.feed(Tick())
    assert "b" not in world.state.fleet.shards
    is_away = found is None or found.is_empty
    assert world.owners() == (before if is_away else [[] if owners == ["b"] else owners for owners in before])
    world.join("b")  # it was started again, and has nothing: it says so itself
    world.pass_time(1)
    assert ["b"] not in world.owners()


def test_a_planner_that_failed_is_asked_again_later() -> None:
    world = World(answers=False)
    world.join("a")
    world.feed(Looked(Catalogue({"m": [ONE]})))
    world.pass_time(2)
    world.feed(TermRead(0, CLOCK_US))
    world.feed(TermNoted(True))
    world.feed(Tick())
    assert world.state.phase is Phase.DECIDING
    world.now += 100  # it took that long to fail
    world.feed(Planned(RuntimeError("died")))
    assert "planning failed, and is tried again: RuntimeError: died" in world.state.placing.problem
    assert "died" in "".join(problem.message for problem in problems_of(world.state, "store"))
    assert "Plan" not in kinds(world.pass_time(REPLAN_SECONDS - 1))
    world.pass_time(2)  # though nothing changed
    assert kinds(world.done)[-1] == "Plan"


def test_a_stranger_of_the_same_name_is_refused_and_later_takes_over() -> None:
    world = World()
    world.join("a", incarnation=1)
    second = control.ShardReport()
    second.CopyFrom(world.reports["a"])
    second.incarnation = 2
    [refusal] = world.feed(Joined("second", second))
    assert isinstance(refusal, Dismiss) and refusal.stream == "second" and isinstance(refusal.why, IdTaken)
    for _ in range(16):
        world.now += 0.25
        world.feed(Tick())
    [taken_over] = world.feed(Joined("second", second))
    assert isinstance(taken_over, Dismiss) and taken_over.stream == "a" and isinstance(taken_over.why, IdTaken)
    assert world.feed(Reported("a", world.reports["a"])) == []
    assert world.state.fleet.shards["a"].stream == "second"


def test_a_connection_that_broke_is_replaced_without_a_word() -> None:
    world = World()
    world.join("a", incarnation=1)
    assert world.feed(Joined("again", world.reports["a"])) == [Dismiss("a")]
    assert world.feed(Left("a")) == []
    assert world.state.fleet.shards["a"].connected


def test_a_report_that_contradicts_the_first_ends_the_stream() -> None:
    world = World()
    world.join("a")
    [dismissed] = world.report("a", address="h:1")
    assert isinstance(dismissed, Dismiss) and isinstance(dismissed.why, InvalidRequest)
    assert "address must stay" in str(dismissed.why)
    assert not world.state.fleet.shards


def test_decisions_are_a_while_apart_where_there_are_many_shards() -> None:
    world = World(expect_shards=1)
    world.feed(Looked(Catalogue({"m": [ONE]})))
    for number in range(200):
        world.join(f"s{number}")
    world.feed(Tick())
    assert isinstance(world.feed(Tick())[-1], Tell)
    world.report("s3", failures=[control.PartFailure(part=KEYS[0].to_wire(), message="torn")])
    assert 0 < world.state.tick_in() <= 0.2001
    assert world.feed(Tick()) == []
    world.now += 0.21
    assert world.state.tick_in() == 0
    assert kinds(world.feed(Tick())) != []
    assert isinstance(world.done[-1], Tell | Publish)


def test_no_more_parts_than_fit_beside_branches_stay_with_a_shard() -> None:
    world = World()
    world.serve(ONE)
    assert world.assigned("a") and world.assigned("b")
    world.reports["a"].memory_limit = 0  # a share of a branch came
    world.report("a")
    world.pass_time(2)
    assert world.assigned("b") == set(KEYS)
    world.reports["a"].memory_limit = 1 << 30
    world.obey("b")
    world.report("a")
    world.pass_time(2)
    [target] = world.state.placing.target.values()
    assert len(target) == len(KEYS) and not world.state.placing.problem
    assert {shard for shards in target.values() for shard in shards} == {"a", "b"}
