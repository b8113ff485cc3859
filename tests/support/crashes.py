"""SIGKILL at every operation on a file: a share trains in a child that dies at its n-th one, and another child goes on.

    python -m support.crashes FOLDER [EVERY]

One process imports torch and forks a child for each try. The children work on one thread.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embedding_service.store.store import Store
from embedding_service.training.branch import Branch, read_branch
from embedding_service.training.log import ALWAYS
from embedding_service.training.share import Share
from support.training import MODEL, ROWS, TABLE, InProcess, changes, new_branch, pieces_of, store_to_train

STEPS, BACK_TO, EVERY_STEPS = 11, 7, 3
# What changes files. What is written is cut in half first, as a process dies in the middle of it.
_CALLS = ("write", "pwrite", "fdatasync", "fsync", "ftruncate", "rename", "replace", "unlink", "rmdir", "link", "open")


class Deadline:
    """Kills this process at its n-th operation on a file, and says in `told` which that was."""

    def __init__(self, number: int, told: Path) -> None:
        self.left, self.seen, self._told = number, 0, told
        for name in _CALLS:
            setattr(os, name, self._counted(getattr(os, name), name))

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.seen += 1
            if self.seen == self.left:
                self._tell(name)
                if name in ("write", "pwrite"):
                    file, data, *where = arguments
                    call(file, bytes(data)[: len(data) // 2], *where)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    def _tell(self, name: str) -> None:
        """Note the operation, and which of the package's functions asked for it."""
        frame = sys._getframe(2)
        while frame.f_back and "/embedding_service/" not in frame.f_code.co_filename:
            frame = frame.f_back
        where = f"{Path(frame.f_code.co_filename).stem}:{frame.f_code.co_qualname}"
        with self._told.open("a") as told:  # opens by `io`, not by os.open
            told.write(f"{name} in {where}\n")


def train(store: Path, branch: Branch, logs: Path) -> Share:
    """Do all steps, go back, and do them again: as a trainer that begins where the share is."""
    share = Share(Store(store), branch, "s", logs, ALWAYS)
    back = logs.parent / "went-back"
    for session in (2 * share.session + 1, 2 * share.session + 2):
        share.begin(session, 1)
        for step in range(share.applied + 1, STEPS + 1):
            share.accept(share.read(pieces_of(branch, session, step, *changes(step))))
            share._wait_for_writer()  # the same operations in the same order each time
        if not back.exists():
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
    """Try each operation, or one of `every`, and say how many there were."""
    torch.set_num_threads(1)
    store = store_to_train(folder)
    expected = InProcess("rowwise_adagrad").until(STEPS)
    died = number = 0
    told = folder / "told"
    while True:
        number += every if number else 1
        branch = new_branch(store, "rowwise_adagrad", ["s"], EVERY_STEPS, f"b{number}")
        logs = folder / "logs" / str(number) / "s"
        logs.mkdir(parents=True)

        def dies(number: int = number, branch: Branch = branch, logs: Path = logs) -> None:
            Deadline(number, told)
            train(store, branch, logs)

        def goes_on(branch: Branch = branch, logs: Path = logs) -> None:
            share = train(store, read_branch(Store(store), branch.full_name), logs)
            rows, step = share.rows(TABLE, torch.arange(ROWS).numpy())
            assert step == STEPS and torch.equal(rows, expected), f"other bits at step {step}"

        how = child(dies)
        assert how in (0, -signal.SIGKILL), f"operation {number}: the child ended with {how}"
        assert child(goes_on) == 0, f"operation {number}: what came back is not right"
        shutil.rmtree(logs.parent)
        shutil.rmtree(store / MODEL / f".b{number}.branch")
        if how == 0:
            break
        died += 1
    for operation, count in sorted(Counter(told.read_text().splitlines()).items()):
        print(f"{count:4} {operation}")
    print(f"killed {died} times", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
