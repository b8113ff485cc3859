"""SIGKILL at every operation on a file: a share trains in a child that dies at its n-th one, and another child goes on.

    python -m support.crashes FOLDER [EVERY]

With EVERY, one of so many is tried, and each one of going back that is more than a write. What the second child finds
is checked before it goes on: a step and a session that the first one was at, or was on its way to.

One process imports torch and forks a child for each try. The children work on one thread.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from embedding_service.store.store import Store
from embedding_service.training.branch import Branch, read_branch
from embedding_service.training.log import ALWAYS
from embedding_service.training.share import Share
from support.training import MODEL, ROWS, TABLE, InProcess, changes, new_branch, pieces_of, store_to_train

STEPS, BACK_TO, EVERY_STEPS = 11, 7, 3
# What changes files. What is written is cut in half first, as a process dies in the middle of it.
_CALLS = ("write", "pwrite", "fdatasync", "fsync", "ftruncate", "rename", "replace", "unlink", "rmdir", "link", "open")


class Deadline:
    """Kills this process at its n-th operation on a file, and says in `told` which that was.

    Attributes:
        going_back: The numbers of those in `Share.rewind`, but for writes.
    """

    def __init__(self, number: int | None, told: Path) -> None:
        self.left, self.seen, self._told = number, 0, told
        self.going_back: list[int] = []
        for name in _CALLS:
            setattr(os, name, self._counted(getattr(os, name), name))

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.seen += 1
            if self.left is None:
                self._note(name)
            elif self.seen == self.left:
                self._tell(name)
                if name in ("write", "pwrite"):
                    file, data, *where = arguments
                    call(file, bytes(data)[: len(data) // 2], *where)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    def _note(self, name: str) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame and frame.f_code is not Share.rewind.__code__:
            frame = frame.f_back
        if frame and name not in ("write", "pwrite"):
            self.going_back.append(self.seen)

    def _tell(self, name: str) -> None:
        """Note the operation, and which of the package's functions asked for it."""
        frame = sys._getframe(2)
        while frame.f_back and "/embedding_service/" not in frame.f_code.co_filename:
            frame = frame.f_back
        where = f"{Path(frame.f_code.co_filename).stem}:{frame.f_code.co_qualname}"
        with self._told.open("a") as told:  # opens by `io`, not by os.open
            told.write(f"{name} in {where}\n")


class Ledger:
    """What may be found where a share was killed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def on_the_way(self, share: Share, session: int, step: int) -> Iterator[None]:
        """The share comes to a session and a step in here."""
        self._note([share.session, session], [share.applied, step])
        yield
        self._note([session], [step])

    def _note(self, sessions: list[int], steps: list[int]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([sessions, steps]) + "\n")

    def check(self, share: Share, references: list[Tensor]) -> None:
        """What is there now."""
        if self._path.exists():
            sessions, steps = json.loads(self._path.read_text().splitlines()[-1])
            assert share.session in sessions, f"session {share.session} is there, of {sessions}"
            assert share.applied in steps, f"step {share.applied} is there, of {steps}"
        rows, step = share.rows(TABLE, torch.arange(ROWS).numpy())
        assert torch.equal(rows, references[step]), f"other bits at step {step}"


def train(store: Path, branch: Branch, logs: Path, references: list[Tensor]) -> Share:
    """Do all steps, go back, and do them again: as a trainer that begins where the share is."""
    ledger, back = Ledger(logs.parent / "ledger"), logs.parent / "went-back"
    share = Share(Store(store), branch, "s", logs, ALWAYS)
    ledger.check(share, references)
    for session in (2 * share.session + 1, 2 * share.session + 2):
        with ledger.on_the_way(share, session, share.applied):
            share.begin(session, 1)
        for step in range(share.applied + 1, STEPS + 1):
            with ledger.on_the_way(share, session, step):
                share.accept(share.read(pieces_of(branch, session, step, *changes(step))))
            share._wait_for_writer()  # the same operations in the same order each time
        if not back.exists():
            with ledger.on_the_way(share, session, BACK_TO):
                share.rewind(BACK_TO)
            back.touch()
    return share


def child(work: Callable[[], None]) -> int:
    """Run it in a child. Returns how that ended, negative for a signal."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def main(folder: Path, every: int) -> None:
    """Try each operation, or some, and say how many there were."""
    torch.set_num_threads(1)
    store = store_to_train(folder)
    one = InProcess("rowwise_adagrad")
    references = [one.until(step).clone() for step in range(STEPS + 1)]
    told, counted = folder / "told", folder / "counted"
    numbers, number, died = [0], 0, 0  # 0: nothing is killed, and all is counted
    while numbers:
        number = numbers.pop(0)
        branch = new_branch(store, "rowwise_adagrad", ["s"], EVERY_STEPS, f"b{number}")
        logs = folder / "logs" / str(number) / "s"
        logs.mkdir(parents=True)

        def dies(number: int = number, branch: Branch = branch, logs: Path = logs) -> None:
            deadline = Deadline(number or None, told)
            train(store, branch, logs, references)
            if not number:
                counted.write_text(json.dumps([deadline.seen, deadline.going_back]))

        def goes_on(branch: Branch = branch, logs: Path = logs) -> None:
            share = train(store, read_branch(Store(store), branch.full_name), logs, references)
            rows, step = share.rows(TABLE, torch.arange(ROWS).numpy())
            assert step == STEPS and torch.equal(rows, references[STEPS]), f"other bits at step {step}"

        how = child(dies)
        if number:
            assert how == -signal.SIGKILL, f"operation {number}: the child ended with {how}"
            assert child(goes_on) == 0, f"operation {number}: what came back is not right"
            died += 1
        else:
            assert how == 0, f"nobody was killed, and the child ended with {how}"
            operations, going_back = json.loads(counted.read_text())
            numbers = sorted({*range(1, operations + 1, every), *going_back})
        shutil.rmtree(logs.parent)
        shutil.rmtree(store / MODEL / f".b{number}.branch")
    for operation, count in sorted(Counter(told.read_text().splitlines()).items()):
        print(f"{count:4} {operation}")
    print(f"killed {died} times", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
