"""Shards, controllers and trainers that are killed, hang, leave and are replaced, while branches are trained.

    python -m support.training_chaos FOLDER [--seconds N] [--seed N] [--copies N]

Some die at points of their code (`support.mortal`), each point in turn, others at drawn moments. What leads to a point
is done until somebody died there. `support.trainer` checks what the shards have each time it begins, and at the end.
Then it is told how often somebody died at which point, and which points nobody came to.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from embedding_service.store.store import Store
from embedding_service.training.branch import branch_folder, read_branch
from embedding_service.training.seats import Seat, read_seats
from support.cluster import Cluster, Process, cluster, until
from support.mortal import FUNCTIONS, arm, passed, points
from support.trainer import BITS, LEDGER, stores

SHARDS, SHARES, LOST_AFTER = 3, 6, 2.0
TRAINER, CONTROLLER = "trainer", "controller"


class Run:
    """A cluster of three shards, and a trainer once it is started.

    Attributes:
        died: How often processes died, by where.
    """

    def __init__(self, folder: Path, running: Cluster, copies: int, chance: random.Random) -> None:
        self.folder, self.cluster, self.copies, self._chance = folder, running, copies, chance
        self.died: Counter[str] = Counter()
        self.names = [f"s{number}" for number in range(SHARDS)]
        self._armed: dict[str, str] = {}
        for name in self.names:
            self.start(name)
        running.wait_serving(2)

    # Processes

    def start(self, name: str) -> None:
        """Start a process, again too."""
        if name == CONTROLLER:
            self.cluster.start_controller()
        elif name != TRAINER:
            self.cluster.start_shard(name, f"--log={self._logs(name)}")
        else:
            told = str(self.folder / TRAINER), TRAINER, "support.trainer"
            about = str(self.folder), str(self.copies), str(SHARES), *self.cluster.addresses.values()
            log = self.folder / "trainer.log"
            self.cluster.processes[TRAINER] = Process(log, *told, *about, module="support.mortal")

    def _logs(self, name: str) -> Path:
        return self.folder / "logs" / name

    def process(self, name: str) -> Process:
        """The one that runs by a name."""
        return self.cluster.processes[name]

    def kill(self, name: str) -> None:
        """SIGKILL."""
        if not self.process(name).runs:  # it died where it was told to
            self.reap()
        self.process(name).end(signal.SIGKILL)

    def dead(self, but: str = "") -> list[str]:
        """Those that died where they were told to. Fails if one ended otherwise, other than `but`."""
        found = [name for name, process in self.cluster.processes.items() if not process.runs and name != but]
        for name in found:
            process = self.process(name)
            code = process.wait()
            assert code == -signal.SIGKILL, f"{name} ended by itself with {code}:\n{process.output()[-5000:]}"
        return found

    # Failpoints

    def arm(self, kind: str, point: str, times: int = 1) -> None:
        """Have the next process of a kind die there."""
        self._armed[kind] = point
        arm(self.folder / kind, point, times)

    def waits_at(self, kind: str) -> str:
        """Where one of a kind is to die and has not yet; or empty."""
        return self._armed.get(kind, "") if (self.folder / kind).exists() else ""

    def reap(self, but: str = "") -> list[str]:
        """Note which points were reached. Returns who died, other than `but`."""
        found = self.dead(but)
        for name in found:
            kind = name if name in (TRAINER, CONTROLLER) else "shard"
            if not (self.folder / kind).exists() and (point := self._armed.pop(kind, "")):
                self.died[f"{kind} {point}"] += 1
        return found

    def bring_back(self, but: str = "") -> None:
        """Start those again who died, other than `but`."""
        for name in self.reap(but):
            self.start(name)

    def disarm(self) -> None:
        """Nobody is to die any more."""
        for kind in list(self._armed):
            (self.folder / kind).unlink(missing_ok=True)
        self.bring_back()
        self._armed.clear()

    # What is looked at

    def progress(self) -> int:
        """Steps that all shards have."""
        path = self.folder / "progress"
        return int(path.read_text()) if path.exists() else 0

    def goes_on(self, steps: int = 5) -> None:
        """The trainer does some more steps. What dies on the way is started again."""
        trainer, target = self.process(TRAINER), self.progress() + steps

        def done() -> bool:
            nonlocal trainer, target
            self.bring_back()
            if self.process(TRAINER) is not trainer:  # it may go back
                trainer, target = self.process(TRAINER), -1
            if target < 0 and "begins at" in trainer.output().rpartition("dies")[2]:
                target = self.progress() + steps
            return 0 <= target <= self.progress()

        self.wait(done, f"{steps} more steps")

    def seats(self) -> list[Seat]:
        """Of all shares of both branches."""
        store = Store(self.cluster.store)
        known = [read_branch(store, name) for name in (BITS, LEDGER)]
        return [
            seat
            for branch in known
            for seat in read_seats(branch_folder(store, branch.model, branch.name), branch).values()
        ]

    def is_whole(self) -> bool:
        """Whether each share has all of its copies in sync, with shards that run."""
        return all(
            len(seat.in_sync) == self.copies and set(seat.holders) <= set(self.names) and not seat.joining
            for seat in self.seats()
        )

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Until it is so. Says what all printed if it never is."""
        try:
            until(condition, what)
        except AssertionError as error:
            said = [f"{name}: {each.output()[-3000:]}" for name, each in self.cluster.processes.items()]
            raise AssertionError("\n".join([str(error), *map(str, self.seats()), *said])) from None

    def wait_whole(self) -> None:
        """Until all copies are in sync."""

        def whole() -> bool:
            self.bring_back()
            return self.is_whole()

        self.wait(whole, "all copies in sync")

    # Events

    def kill_shard(self) -> None:
        """A shard dies, and comes back at once or when it was missed."""
        name = self._chance.choice(self.names)
        self.kill(name)
        self._pause()
        self.start(name)

    def kill_joining(self) -> None:
        """A shard dies that is on its way into sync, if there is one."""
        joining = [shard for seat in self.seats() for shard in seat.joining if shard in self.names]
        if joining:
            self.kill(joining[0])
            self.start(joining[0])
            self.died["joining_copy"] += 1

    def fail_over(self) -> None:
        """A shard that leads dies, and comes back when another one leads in its place."""
        self.wait_whole()
        number = self._chance.randrange(len(self.seats()))
        dead = self.seats()[number].primary
        self.kill(dead)

        def led_by_another() -> bool:
            self.bring_back(but=dead)
            return self.seats()[number].primary != dead

        self.wait(led_by_another, f"another shard to lead than {dead}")
        self.start(dead)

    def kill_trainer(self) -> None:
        """The trainer dies, and another one begins."""
        self.kill(TRAINER)
        self.start(TRAINER)

    def go_back(self) -> None:
        """The trainer dies, and another one begins some steps before."""
        (self.folder / "back").touch()
        self.kill_trainer()

    def kill_controller(self) -> None:
        """The controller dies, and comes back."""
        self.kill(CONTROLLER)
        self._pause()
        self.start(CONTROLLER)

    def hang_shard(self) -> None:
        """A shard says nothing for a while."""
        process = self.process(self._chance.choice(self.names)).popen
        process.send_signal(signal.SIGSTOP)
        time.sleep(self._chance.uniform(0.5, 3 * LOST_AFTER))
        process.send_signal(signal.SIGCONT)

    def hang_primary(self, steps: int = 5) -> None:
        """A shard that leads hangs until the trainer goes on without it."""
        self.wait_whole()
        process = self.process(self.seats()[0].primary).popen
        process.send_signal(signal.SIGSTOP)
        try:
            self.goes_on(steps)
        finally:
            process.send_signal(signal.SIGCONT)

    def drain_shard(self) -> None:
        """A shard hands all over, ends, and another one starts."""
        name = self._chance.choice(self.names)
        self.process(name).popen.terminate()

        def ended() -> bool:
            self.bring_back(but=name)
            return not self.process(name).runs

        self.wait(ended, f"{name} to hand over and end")
        if self.process(name).wait() in (0, -signal.SIGTERM):  # one that is just starting ends at once
            del self.cluster.processes[name]
        else:
            self.reap()
        self.start(name)

    def replace_shard(self) -> None:
        """A shard dies with its disk, and another one takes its place."""
        self.wait_whole()
        name = self._chance.choice(self.names)
        self.kill(name)
        del self.cluster.processes[name], self.cluster.addresses[name]
        shutil.rmtree(self._logs(name))
        self.names[self.names.index(name)] = new = f"s{sum(self.died.values()) + SHARDS}"
        self.start(new)
        self.wait_whole()

    def _pause(self) -> None:
        if self._chance.random() < 0.5:
            time.sleep(self._chance.uniform(0, 2 * LOST_AFTER))

    def end(self) -> None:
        """All come back, and the trainer checks what it has."""
        self.disarm()
        self.goes_on()
        (self.folder / "end").touch()
        trainer = self.process(TRAINER)
        assert trainer.wait() == 0, trainer.output()[-5000:]


EVENTS = {
    Run.kill_shard: 4,
    Run.fail_over: 1,
    Run.kill_joining: 3,
    Run.kill_trainer: 1,
    Run.go_back: 1,
    Run.kill_controller: 1,
    Run.hang_shard: 2,
    Run.hang_primary: 1,
    Run.drain_shard: 1,
    Run.replace_shard: 1,
}
NEED_COPIES = (Run.fail_over, Run.hang_primary, Run.replace_shard)
JOINING = ("_open_copy", "Share.source", "Share.restart", "Share.do", "Log.clear", "_admit", "change_seat")
# What leads to a point. To others somebody comes while the trainer goes on.
LEADS_TO: dict[Callable[[Run], None], tuple[str, ...]] = {
    Run.kill_trainer: ("Share.begin", "Session.begin", "_read"),
    Run.go_back: ("Share.rewind", "Log.rewrite", "load_checkpoint", "forget_checkpoints"),
    Run.kill_shard: ("_open_primary", "_recover", "_send_again", "_find", "._join", "._publish", "._assign", *JOINING),
    Run.fail_over: ("Share.lead", "Shares._lead", "_take_over", "._leave"),
    Run.drain_shard: ("_hand_over", *JOINING),
}
# After so many rounds somebody else is to die somewhere else.
PATIENCE = 4
# What nobody comes to with one copy: no copy is in sync but while a share moves.
NEEDS_COPIES = ("Shares._take_over",)


class Tour:
    """Which point is next for each kind of process: all in drawn order, those first at which fewest died."""

    def __init__(self, run: Run, chance: random.Random) -> None:
        self._run, self._chance = run, chance
        self._rounds: Counter[str] = Counter()
        self._tried: Counter[str] = Counter()

    def arm(self) -> list[str]:
        """Arm a point for each kind that has none. Returns those where nobody has died yet."""
        waiting = []
        for kind in FUNCTIONS:
            point = self._run.waits_at(kind)
            self._rounds[kind] += 1
            if not point or self._rounds[kind] > PATIENCE:
                point = self._next(kind)
                self._rounds[kind] = 0
                often = not any(_leads_to(event, point) for event in LEADS_TO)
                self._run.arm(kind, point, self._chance.choice((1, 2, 5)) if often else 1)
            waiting.append(point)
        return waiting

    def _next(self, kind: str) -> str:
        could = [each for each in points(kind) if self._run.copies > 1 or not each.endswith(NEEDS_COPIES)]
        self._chance.shuffle(could)
        found = min(could, key=lambda point: (self._run.died[f"{kind} {point}"], self._tried[f"{kind} {point}"]))
        self._tried[f"{kind} {found}"] += 1
        return found


def _leads_to(event: Callable[[Run], None], point: str) -> bool:
    return any(each in point for each in LEADS_TO[event])


def chaos(run: Run, seconds: float, chance: random.Random) -> None:
    """Events for a time, each with points where somebody dies besides: what leads to those, or a drawn one."""
    tour = Tour(run, chance)
    deadline = time.monotonic() + seconds
    events = EVENTS if run.copies > 1 else {each: EVENTS[each] for each in EVENTS if each not in NEED_COPIES}
    run.goes_on()
    while time.monotonic() < deadline:
        waiting = tour.arm()
        leading = [event for event in LEADS_TO if event in events and any(_leads_to(event, each) for each in waiting)]
        drawn = chance.random()
        if drawn < 0.3 and not leading:  # where they die is enough
            run.goes_on(2)
            continue
        event = chance.choice(leading) if drawn < 0.8 and leading else chance.choices([*events], [*events.values()])[0]
        run.bring_back()
        print(f"{time.monotonic() - deadline + seconds:5.0f} s, step {run.progress()}: {event.__name__}", flush=True)
        run.died[event.__name__] += 1
        event(run)
        run.goes_on(chance.choice((1, 2, 10)))
        if chance.random() < 0.2:
            run.wait_whole()


def report(run: Run) -> list[str]:
    """How often somebody died at each point and how many processes came there, and how often what happened."""
    lines, died = [], 0
    for kind in FUNCTIONS:
        came = passed(run.folder / kind)
        for point in points(kind):
            times = run.died[f"{kind} {point}"]
            died += times > 0
            why = "" if times else ": nobody was to die here in the time" if came[point] else ": nobody came here"
            if run.copies == 1 and point.endswith(NEEDS_COPIES):
                why = ": needs --copies 2"
            lines.append(f"{times:4} died of {came[point]:4} that came: {kind} {point}{why}")
    of = sum(len(points(kind)) for kind in FUNCTIONS)
    lines += [f"{count:4} {what}" for what, count in sorted(run.died.items()) if " " not in what]
    return [*lines, f"{died} of {of} points reached"]


def main(
    folder: Path,
    seconds: Annotated[float, typer.Option(min=0)] = 600,
    seed: int = 1,
    copies: Annotated[int, typer.Option(min=1, max=SHARDS)] = 2,
) -> None:
    """Run it, and say how often what died."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    store = stores(folder)
    options = (f"--expect-shards={SHARDS}", f"--lost-after={LOST_AFTER}")
    chance = random.Random(seed)
    with cluster(folder, store, *options, mortal=folder) as running:
        run = Run(folder, running, copies, chance)
        run.start(TRAINER)
        chaos(run, seconds, chance)
        run.wait_whole()
        run.end()
    print(*report(run), sep="\n")
    print(f"right at step {run.progress()}, {sum(run.died.values())} events", flush=True)


if __name__ == "__main__":
    typer.run(main)
