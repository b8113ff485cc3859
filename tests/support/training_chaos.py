"""Shards, controllers and trainers that are killed, hang, leave and are replaced, while branches are trained.

    python -m support.training_chaos FOLDER [--seconds N] [--seed N] [--copies N]

Some die at points of their code (`support.mortal`), each point in turn, others at drawn moments. `support.trainer`
checks what the shards have each time it begins, and at the end.
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
from support.mortal import arm, points
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
        self.process(name).end(signal.SIGKILL)

    def dead(self) -> list[str]:
        """Those that died where they were told to. Fails if one ended otherwise."""
        found = [name for name, process in self.cluster.processes.items() if not process.runs]
        for name in found:
            process = self.process(name)
            assert process.wait() == -signal.SIGKILL, f"{name} ended by itself:\n{process.output()[-5000:]}"
        return found

    # Failpoints

    def arm(self, kind: str, point: str, times: int = 1) -> None:
        """Have the next process of a kind die there."""
        self._armed[kind] = point
        arm(self.folder / kind, point, times)

    def waits_at(self, kind: str) -> str:
        """Where one of a kind is to die and has not yet; or empty."""
        return self._armed.get(kind, "") if (self.folder / kind).exists() else ""

    def reap(self) -> list[str]:
        """Note which points were reached. Returns who died there."""
        found = self.dead()
        for name in found:
            kind = name if name in (TRAINER, CONTROLLER) else "shard"
            if not (self.folder / kind).exists() and (point := self._armed.pop(kind, "")):
                self.died[f"{kind} {point}"] += 1
        return found

    def disarm(self) -> None:
        """Nobody is to die any more."""
        for kind in list(self._armed):
            (self.folder / kind).unlink(missing_ok=True)
        for name in self.reap():
            self.start(name)
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
            for name in self.reap():
                self.start(name)
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
            for name in self.reap():
                self.start(name)
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
            self.died["a joining copy"] += 1

    def kill_trainer(self) -> None:
        """The trainer dies, and another one begins."""
        self.kill(TRAINER)
        self.start(TRAINER)

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

    def hang_primary(self) -> None:
        """A shard that leads hangs until the trainer goes on without it."""
        self.wait_whole()
        process = self.process(self.seats()[0].primary).popen
        process.send_signal(signal.SIGSTOP)
        try:
            self.goes_on()
        finally:
            process.send_signal(signal.SIGCONT)

    def drain_shard(self) -> None:
        """A shard hands all over, ends, and another one starts."""
        name = self._chance.choice(self.names)
        self.process(name).popen.terminate()
        self.wait(lambda: not self.process(name).runs, f"{name} to hand over and end")
        del self.cluster.processes[name]
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
    Run.kill_joining: 3,
    Run.kill_trainer: 2,
    Run.kill_controller: 1,
    Run.hang_shard: 2,
    Run.hang_primary: 1,
    Run.drain_shard: 1,
    Run.replace_shard: 1,
}
NEED_COPIES = (Run.hang_primary, Run.replace_shard)


def chaos(run: Run, seconds: float, chance: random.Random) -> None:
    """Events in drawn order for a time, each with points where somebody dies besides."""
    left: dict[str, list[str]] = {}
    deadline = time.monotonic() + seconds
    run.goes_on()
    while time.monotonic() < deadline:
        for kind, share in (("shard", 1.0), (TRAINER, 0.5), (CONTROLLER, 0.2)):
            queue = left.setdefault(kind, [])
            if point := run.waits_at(kind):  # nobody has come there yet
                if chance.random() < 0.7:
                    continue
                queue.insert(0, point)
            if chance.random() < share:
                if not queue:
                    queue += chance.sample(points(kind), len(points(kind)))
                run.arm(kind, queue.pop(), chance.choice((1, 1, 2, 5)))
        if chance.random() < 0.5:  # where they die is enough
            run.goes_on(2)
            continue
        events = EVENTS if run.copies > 1 else {each: EVENTS[each] for each in EVENTS if each not in NEED_COPIES}
        [event] = chance.choices(list(events), [*events.values()])
        for name in run.reap():
            run.start(name)
        print(f"{time.monotonic() - deadline + seconds:5.0f} s, step {run.progress()}: {event.__name__}", flush=True)
        run.died[event.__name__] += 1
        event(run)
        run.goes_on(chance.choice((1, 5, 30)))
        if chance.random() < 0.3:
            run.wait_whole()


def main(
    folder: Path,
    seconds: Annotated[float, typer.Option(min=0)] = 120,
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
    for what, count in sorted(run.died.items()):
        print(f"{count:4} {what}")
    print(f"right at step {run.progress()}, {sum(run.died.values())} events", flush=True)


if __name__ == "__main__":
    typer.run(main)
