"""One seed, from its first event to a quiet end; and a failing one made short."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from embedding_service.controller.decisions import part_keys
from embedding_service.controller.state import Phase, Settings
from embedding_service.placement.parts import PartKey
from simulation.checks import Broken, Checks
from simulation.clients import Client
from simulation.cluster import CONTROLLER, PART_BYTES, Controller, Shard
from simulation.schedule import Schedule, draw_schedule
from simulation.store import MODELS, Store, manifest, root_of
from simulation.world import Process, World

EVENTS = 500
# Shorter than the service's own, so that more happens in as many events.
LOST_AFTER, GRACE = 3.0, 1.0
# Longer than it takes a shard to find out that its controller hangs.
PATIENCE = 20.0
DRAIN_SECONDS = 15.0
LOOKUP_SECONDS = 10.0
# After the last fault everything must be in order within this time.
QUIET_SECONDS = 90.0


class Outcome(NamedTuple):
    """Of a run. `broken`: the promise that was not kept, or ""."""

    seed: int
    broken: str
    details: str
    events: int
    answers: int
    failures: int
    trace: list[str]


class Simulation:
    """A service, its clients, and what the schedule has befall them."""

    def __init__(self, schedule: Schedule, tracing: bool = False) -> None:
        self.schedule = schedule
        self.world = World(schedule.seed, tracing)
        self.store = Store({model: ["1"] for model in sorted(MODELS)[: schedule.models]})
        self.checks = Checks(self.world, schedule.calm, GRACE)
        self.settings = Settings(
            CONTROLLER,
            replicas=schedule.replicas,
            expect_shards=schedule.shards,
            settle=0.5,
            patience=PATIENCE,
            lost_after=LOST_AFTER,
            grace=GRACE,
        )
        self.shards: list[Shard] = []
        self.controllers: list[Controller] = []
        self.drained: set[str] = set()
        self._newest = 1
        self._busy_until = 0.0
        self._served = False
        self.start_controller()
        for _ in range(schedule.shards):
            self.start_shard()
        seeds = [CONTROLLER, *(shard.address for shard in self.shards[:2])]
        self.clients = [Client(self.world, f"client{number}", seeds, self.checks) for number in range(2)]
        for client in self.clients:
            self.checks.watch(client.name, client.router)

    def run(self) -> None:
        """Until the events are used up, then until all is in order. Raises Broken."""
        steps = list(self.schedule.steps)
        while self.world.events < EVENTS:
            if steps and steps[0].at <= self.world.next_time():
                step = steps.pop(0)
                self.world.now = max(self.world.now, step.at)
                self.world.events += 1
                getattr(self, step.kind)(random.Random(step.draw))
            else:
                self.world.step()
            self.checks.after_event()
        self.end_faults()
        self._until(self.disorder, QUIET_SECONDS, "not in order after the last fault")
        self.checks.calm = True  # from here on nothing may fail
        for client in self.clients:
            client.ask("m", "", random.Random(0), LOOKUP_SECONDS)
        self._until(lambda: "lookups run" if self.checks.run_on else "", LOOKUP_SECONDS + 1, "lookups do not end")

    def _until(self, reason: Callable[[], str], seconds: float, promise: str) -> None:
        deadline, looks_at = self.world.now + seconds, 0.0
        while True:
            if self.world.now >= looks_at:
                why, looks_at = reason(), self.world.now + 0.5
                if not why:
                    return
                if self.world.now > deadline:
                    raise Broken(promise, why)
            self.world.step()
            self.checks.after_event()

    # The cast

    def start_controller(self) -> None:
        """One more, at the address of all."""
        controller = Controller(
            self.world, f"controller{len(self.controllers)}", self.store, self.settings, self.checks
        )
        controller.start_again = self._replace_controller
        self.controllers.append(controller)
        controller.begin()
        self.world.say("%s: begins", controller.name)

    def start_shard(self) -> None:
        """One more."""
        schedule, number = self.schedule, len(self.shards)
        parts = sum(sum(tables.values()) for tables in MODELS.values())
        limit = int(max(schedule.room * schedule.replicas * parts / schedule.shards, 1)) * PART_BYTES
        topology = f"zone{number % schedule.zones}" if schedule.zones else ""
        shard = Shard(self.world, "abcdefghijklmnopqrstuvwxyz"[number], self.store, limit, topology, self.checks)
        self.shards.append(shard)
        self.restart(shard)

    def restart(self, shard: Shard) -> None:
        """Unless it runs."""
        if not shard.is_there:
            self.world.say("%s: begins", shard.name)
            shard.begin()

    def live(self) -> list[Shard]:
        """Shards that run, be it that they hang."""
        return [shard for shard in self.shards if shard.is_there]

    @property
    def controller(self) -> Controller:
        """The newest one."""
        return self.controllers[-1]

    # Asking

    def look_up(self, draw: random.Random) -> None:
        if self.schedule.calm and not self._is_served():
            return
        draw.choice(self.clients).ask(self._model(draw), "", draw, self._patience(draw))

    def look_up_pinned(self, draw: random.Random) -> None:
        model = self._model(draw)
        draw.choice(self.clients).ask(
            model, draw.choice(self.store.versions[model] or ["1"]), draw, self._patience(draw)
        )

    def look_up_thinly(self, draw: random.Random) -> None:
        shard = draw.choice(self.shards)
        draw.choice(self.clients).ask_thinly(self._model(draw), shard.address, draw, self._patience(draw))

    def _model(self, draw: random.Random) -> str:
        return draw.choice(sorted(self.store.versions))

    def _is_served(self) -> bool:
        """Whether all models were ever served: before that a lookup rightly fails at once."""
        routing = self.controller.state.routing
        if routing and {model.name for model in routing.models} == self.store.versions.keys():
            self._served = True
        return self._served

    def _patience(self, draw: random.Random) -> float:
        return LOOKUP_SECONDS if self.schedule.calm else draw.choice((0.05, 1.0, 3.0, LOOKUP_SECONDS))

    # What an operator does

    def publish(self, draw: random.Random) -> None:
        """A new version: of parts of its own, or of the newest one's base and other rows over it."""
        versions = self.store.versions[self._model(draw)]
        if len(versions) < 3:
            self._newest += 1
            is_overlay = versions and draw.random() < 0.5
            versions.append(f"{self._newest}b{root_of(versions[-1])}" if is_overlay else str(self._newest))
            self.world.say("store: publishes version %s", versions[-1])

    def retire(self, draw: random.Random) -> None:
        """The oldest version is removed, unless it is a base."""
        model = self._model(draw)
        versions = self.store.versions[model]
        if len(versions) > 1 and not self.store.is_needed(model, versions[0]):
            self.world.say("store: removes version %s", versions.pop(0))

    def remove_newest(self, draw: random.Random) -> None:
        """Somebody thinks better of it."""
        versions = self.store.versions[self._model(draw)]
        if len(versions) > 1:
            self.world.say("store: removes version %s", versions.pop())

    def join(self, draw: random.Random) -> None:
        """Another shard."""
        if len(self.live()) < 6 and len(self.shards) < 20:
            self.start_shard()

    def drain(self, draw: random.Random) -> None:
        """A shard is told to end."""
        if len(self.live()) > 2 and self._may_harm():
            shard = draw.choice(self.live())
            if not shard.duties.draining and not shard.hangs:
                self.world.say("%s: is told to end", shard.name)
                self.drained.add(shard.name)
                shard.drain(DRAIN_SECONDS)

    # What happens to controllers

    def restart_controller(self, draw: random.Random) -> None:
        """It is killed, and started again."""
        if self.controller.is_there:
            self.world.say("%s: is killed", self.controller.name)
            self.controller.end()
            self.world.after(draw.uniform(0.05, 4.0), self._replace_controller, self.controller)

    def _replace_controller(self, old: Controller) -> None:
        if self.controller is old:
            self.start_controller()

    def second_controller(self, draw: random.Random) -> None:
        """Another one is started while it runs, and takes some of the shards.

        The one before learns that from the store. Until it can be read both lead, and each misses the other's shards.
        """
        if len([each for each in self.controllers if each.is_there]) < 3:
            self.start_controller()
            for stream in list(self.world.streams):
                if draw.random() < 0.5:
                    stream.break_()

    def hang_controller(self, draw: random.Random) -> None:
        """It is held up; somebody may start another one."""
        controller = self.controller
        if controller.is_there and not controller.hangs:
            self.world.say("%s: hangs", controller.name)
            controller.hang()
            self.world.after(draw.uniform(0.5, 8.0), self._wake, controller, controller.life)
            if draw.random() < 0.5:
                self.world.after(draw.uniform(0.5, 8.0), self._replace_controller, controller)

    def _wake(self, process: Process, life: int) -> None:
        if process.life == life and process.hangs:
            self.world.say("%s: goes on", process.name)
            process.wake()

    def set_clock(self, draw: random.Random) -> None:
        """By up to an hour, ahead or back."""
        self.world.clock_us += 1000 * draw.randint(-3_600_000, 3_600_000)

    def planner_fails(self, draw: random.Random) -> None:
        """Once."""
        self.controller.planner_fails = True

    # What happens to the store

    def store_away(self, draw: random.Random) -> None:
        """For a while."""
        self._for_a_while(draw, "is_away", "store: is away", "store: is back")

    def store_bare(self, draw: random.Random) -> None:
        """Nothing is mounted there for a while."""
        self._for_a_while(draw, "is_bare", "store: is bare", "store: is back")

    def _for_a_while(self, draw: random.Random, name: str, begins: str, ends: str) -> None:
        def back() -> None:
            self.world.say(ends)
            setattr(self.store, name, False)

        self.world.say(begins)
        setattr(self.store, name, True)
        self.world.after(draw.uniform(0.5, 8.0), back)

    def store_takes_no_notes(self, draw: random.Random) -> None:
        """It cannot be written to any more, or it can again."""
        self.store.takes_notes = not self.store.takes_notes

    def lose_note(self, draw: random.Random) -> None:
        """The term is deleted."""
        self.world.say("store: the note of the term is lost")
        self.store.noted = 0

    def tear_manifest(self, draw: random.Random) -> None:
        """A manifest cannot be read for a while."""
        model = self._model(draw)
        torn = (model, draw.choice(self.store.versions[model]))
        self.world.say("store: the manifest of %s@%s is torn", *torn)
        self.store.torn.add(torn)
        self.world.after(draw.uniform(1.0, 8.0), self.store.torn.discard, torn)

    def corrupt(self, draw: random.Random) -> None:
        """A part's file is not what it should be, for a while."""
        model = self._model(draw)
        key = draw.choice(part_keys(manifest(model, draw.choice(self.store.versions[model]))))
        self.world.say("store: %s is corrupt", key)
        self.store.corrupt.add(key)
        self.world.after(draw.uniform(1.0, 8.0), self.store.corrupt.discard, key)

    # What happens to shards and the network

    def kill_shard(self, draw: random.Random) -> None:
        """It is gone, and back after a while."""
        if self._may_harm() and self.live():
            shard = draw.choice(self.live())
            self.world.say("%s: is killed", shard.name)
            shard.end()
            self._busy_for(0.5)
            self.world.after(draw.uniform(0.2, 8.0), self.restart, shard)

    def hang_shard(self, draw: random.Random) -> None:
        """It is held up."""
        if self._may_harm() and self.live():
            shard = draw.choice(self.live())
            seconds = draw.uniform(0.3, 8.0)
            self.world.say("%s: hangs", shard.name)
            shard.hang()
            self._busy_for(seconds)
            self.world.after(seconds, self._wake, shard, shard.life)

    def cut_off_shard(self, draw: random.Random) -> None:
        """From all, from controllers alone, or from a few."""
        if self._may_harm() and self.live():
            shard = draw.choice(self.live())
            others = [each for each in self._processes() if each is not shard]
            kept = draw.choice((0.0, 0.0, 0.5))
            only = draw.choice((None, None, Controller, Client))
            for other in others:
                if draw.random() >= kept and (only is None or isinstance(other, only)):
                    self._cut(draw, shard.name, other.name)

    def cut_one_way(self, draw: random.Random) -> None:
        """What one process sends to another gets lost."""
        if self._may_harm():
            one, other = draw.sample(self._processes(), 2)
            self._cut(draw, one.name, other.name, both_ways=False)

    def cut_client(self, draw: random.Random) -> None:
        """A client does not get through to one shard."""
        if self._may_harm() and self.live():
            self._cut(draw, draw.choice(self.clients).name, draw.choice(self.live()).name)

    def _cut(self, draw: random.Random, one: str, other: str, both_ways: bool = True) -> None:
        seconds = draw.uniform(0.3, 8.0)
        self.world.say("network: %s and %s are cut off for %.1f s", one, other, seconds)
        self.world.cut(one, other, both_ways)
        self._busy_for(seconds)
        self.world.after(seconds, self.world.heal, one, other)

    def break_stream(self, draw: random.Random) -> None:
        """A registration's connection breaks."""
        if self.world.streams:
            draw.choice(self.world.streams).break_()

    def slow_network(self, draw: random.Random) -> None:
        """For a while."""
        self.world.slowness = draw.choice((5.0, 30.0) if self.schedule.calm else (5.0, 30.0, 300.0))
        self.world.after(draw.uniform(1.0, 5.0), setattr, self.world, "slowness", 1.0)

    def lossy_network(self, draw: random.Random) -> None:
        """For a while."""
        self.world.loss = draw.choice((0.02, 0.3))
        self.world.after(draw.uniform(1.0, 5.0), setattr, self.world, "loss", 0.0)

    def restart_all(self, draw: random.Random) -> None:
        """Everything is killed and started again; the clock may be set back, and the term lost."""
        self.world.say("everything is killed")
        for process in (*self.live(), *(each for each in self.controllers if each.is_there)):
            process.end()
        if draw.random() < 0.5:
            self.world.clock_us -= 86_400_000_000
        if draw.random() < 0.5:
            self.store.noted = 0
        self.start_controller()
        for shard in self.shards:
            if shard.name not in self.drained:
                self.world.after(draw.uniform(0.1, 2.0), self.restart, shard)

    def _processes(self) -> list[Process]:
        return [*self.live(), *self.clients, *(each for each in self.controllers if each.is_there)]

    # One thing at a time

    def _busy_for(self, seconds: float) -> None:
        self._busy_until = max(self._busy_until, self.world.now + seconds)

    def _may_harm(self) -> bool:
        """In a calm run, only where everything is there twice and nothing else is amiss."""
        if not self.schedule.calm:
            return True
        controller = self.controller
        routing = controller.state.routing
        if self.world.now < self._busy_until or not controller.is_there or controller.hangs or routing is None:
            return False
        if any(shard.duties.draining for shard in self.live()):
            return False
        served = [key for model in routing.models for key in part_keys(manifest(model.name, model.version))]
        return all(len(self.checks.holders(key)) >= 2 for key in served) and bool(served)

    # The end

    def end_faults(self) -> None:
        """Nothing breaks any more, and what was broken is whole."""
        world = self.world
        world.say("no more faults")
        world.loss, world.slowness = 0.0, 1.0
        world.heal()
        self.store.mend()
        for process in self._processes():
            process.wake()
        if not self.controller.is_there:
            self.start_controller()
        for shard in self.shards:
            if shard.name not in self.drained:
                self.restart(shard)
        wanted = max(self.schedule.shards, self.schedule.replicas)
        while sum(not shard.duties.draining for shard in self.live()) < wanted:
            self.start_shard()

    def disorder(self) -> str:
        """What is not settled yet. "": all is."""
        controllers = [each for each in self.controllers if each.is_there]
        if len(controllers) > 1:
            return f"{len(controllers)} controllers"
        if not controllers:
            return "no controller"
        [controller] = controllers
        state = controller.state
        if state.phase is not Phase.QUIET or state.routing is None or not state.settings:
            return f"{controller.name} is {state.phase.value}"
        if "planning failed" in state.placing.problem:
            return state.placing.problem
        live = self.live()
        if {shard.name for shard in live} != set(state.fleet.shards):
            return f"{[shard.name for shard in live]} run, {controller.name} knows {sorted(state.fleet.shards)}"
        for shard in live:
            known = state.fleet.shards[shard.name]
            if shard.duties.draining:
                return f"{shard.name} drains"
            if shard.stream is None or not known.connected or known.stream is not shard.stream:
                return f"{shard.name} is not connected"
            if shard.router.current is None or shard.router.current.age != state.routing.age:
                return f"{shard.name} does not know the routing"
            if known.assigned != shard.holdings.held or known.held != shard.holdings.held or known.grace:
                return f"{shard.name} holds {len(shard.holdings.held)} parts, should hold {len(known.assigned or ())}"
        return self._not_served(controller) or ("lookups run" if self.checks.run_on else "")

    def _not_served(self, controller: Controller) -> str:
        routing = controller.state.routing
        assert routing is not None
        copies = min(self.schedule.replicas, len(self.live()))
        for model, versions in self.store.versions.items():
            served = routing.by_name.get(model)
            if served is None or (served.version != versions[-1] and not controller.state.placing.problem):
                return f"{model}@{versions[-1]} is not served, but {served and served.version}"
            for table in served.tables.values():
                for part, owners in enumerate(table.owners.tolist()):
                    key = PartKey(model, served.version, table.name, part)
                    names = {routing.shard_ids[owner] for owner in owners if owner >= 0}
                    if len(names) < copies and not controller.state.placing.problem:
                        return f"{key} is at {names} alone"
                    if not names <= self.checks.holders(key):
                        return f"{key} should be at {names}, and is at {self.checks.holders(key)}"
        return ""


def run(schedule: Schedule, tracing: bool = False) -> Outcome:
    """Run a schedule."""
    simulation = Simulation(schedule, tracing)
    broken, details = "", ""
    try:
        simulation.run()
    except Broken as error:
        broken, details = error.promise, str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        broken = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
        details = traceback.format_exc()
    world, checks = simulation.world, simulation.checks
    return Outcome(schedule.seed, broken, details, world.events, checks.answers, checks.failures, world.trace or [])


def shorten(schedule: Schedule, broken: str, most_runs: int = 400) -> Schedule:
    """Leave out what is not needed for the same promise to be broken: half of the steps, a quarter, ... one."""
    runs = 0
    size = len(schedule.steps)
    while size >= 1 and runs < most_runs:
        start, went = 0, False
        while start < len(schedule.steps) and runs < most_runs:
            steps = schedule.steps[:start] + schedule.steps[start + size :]
            runs += 1
            if run(shorter := schedule._replace(steps=steps)).broken == broken:
                schedule, went = shorter, True
            else:
                start += size
        size = size if went and size == 1 else size // 2
    return schedule


def explain(seed: int) -> Outcome:
    """A failing seed made short, with its trace."""
    schedule = draw_schedule(seed)
    broken = run(schedule).broken
    return run(shorten(schedule, broken) if broken else schedule, tracing=True)
