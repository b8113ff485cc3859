"""A process that dies where it is told to: `python -m support.mortal FILE KIND MODULE ARGUMENT...`.

FILE says where, as `arm` writes it: at the n-th time that a function is entered or left, or in the middle of a write to
a file. Processes may share a FILE. The first one that gets there takes it away, and kills itself. FILE.passed gets a
line for each process and each point that it came to.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import runpy
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

PACKAGE = "embedding_service"
HALF_WRITTEN = "half a record"
# Functions of the package, by module, that each kind of process may die in.
FUNCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "shard": {
        "training.log": ("Log.append", "Log.begin_file", "Log.forget_before", "Log.rewrite", "Log.clear"),
        "training.share": (
            "Share.begin",
            "Share.rewind",
            "Share.admit",
            "Share._apply",
            "Share.source",
            "Share.restart",
            "Share.do",
            "Share.lead",
        ),
        "training.checkpoints": ("write_checkpoint", "load_checkpoint", "forget_checkpoints"),
        "training.seats": ("change_seat",),
        "shard.shares": (
            "Shares.copied",
            "Shares._open_primary",
            "Shares._open_copy",
            "Shares._take_over",
            "Shares._lead",
            "Shares._admit",
            "Shares._hand_over",
        ),
    },
    "trainer": {
        "client.training": (
            "Session.begin",
            "Session.step",
            "Session._end_push",
            "Session._begin_read",
            "Session._end_read",
            "Session.checkpoint",
        ),
        "client.branch_calls": (
            "BranchCalls.begin_push",
            "BranchCalls.end_pushes",
            "BranchCalls._recover",
            "BranchCalls._send_again",
            "BranchCalls._find",
        ),
    },
    "controller": {
        "controller.server": ("Controller._handle", "Controller._do", "Controller._answer_to"),
        "controller.state": (
            "ControllerState._join",
            "ControllerState._leave",
            "ControllerState._publish",
            "ControllerState._assign",
            "ControllerState._tick",
        ),
    },
}


def points(kind: str) -> list[str]:
    """Where a kind of process may die."""
    names = [f"{module}:{name}" for module, each in FUNCTIONS[kind].items() for name in each]
    found = [f"{when} {name}" for name in names for when in ("before", "after")]
    return [*found, HALF_WRITTEN] if kind == "shard" else found


def arm(file: Path, point: str, times: int) -> None:
    """Have one of the processes of a file die when it gets to a point for the n-th time."""
    new = file.with_suffix(".new")
    new.write_text(f"{secrets.token_hex(4)} {times} {point}")
    new.replace(file)


def passed(file: Path) -> Counter[str]:
    """To how many processes of a file each point came."""
    return Counter(_passed(file).read_text().splitlines()) if _passed(file).exists() else Counter()


def _passed(file: Path) -> Path:
    return file.with_suffix(".passed")


class _Fate:
    def __init__(self, file: Path) -> None:
        self._file, self._order, self._left = file, "", 0
        self._passed: set[str] = set()

    def at(self, point: str) -> bool:
        """Whether to die here."""
        if point not in self._passed:
            self._passed.add(point)
            with _passed(self._file).open("a") as passed:
                passed.write(f"{point}\n")
        try:
            order, times, where = self._file.read_text().split(" ", 2)
        except FileNotFoundError:
            return False
        if where != point:
            return False
        if order != self._order:
            self._order, self._left = order, int(times)
        self._left -= 1
        if self._left > 0:
            return False
        try:
            self._file.unlink()
        except FileNotFoundError:  # another process was first
            return False
        return True

    def come_to(self, point: str) -> None:
        if self.at(point):
            print(f"dies {point}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: FunctionType, name: str) -> Callable[..., Any]:
        """The function, with points before and after it."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def later(*arguments: Any, **options: Any) -> Any:
                self.come_to(f"before {name}")
                result = await function(*arguments, **options)
                self.come_to(f"after {name}")
                return result

            return later

        @functools.wraps(function)
        def now(*arguments: Any, **options: Any) -> Any:
            self.come_to(f"before {name}")
            result = function(*arguments, **options)
            self.come_to(f"after {name}")
            return result

        return now

    def half(self, write: Callable[[int, Any, int], int]) -> Callable[[int, Any, int], int]:
        """os.pwrite, which may write half and die. Logs alone write by it."""

        def written(file: int, data: Any, at: int) -> int:
            if len(data) > 100 and self.at(HALF_WRITTEN):
                write(file, bytes(data)[: len(data) // 2], at)
                print(f"dies in {HALF_WRITTEN}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, data, at)

        return written


def make_mortal(file: Path, kind: str) -> None:
    """Put the points of a kind of process into the package."""
    fate = _Fate(file)
    for module_name, names in FUNCTIONS[kind].items():
        module = importlib.import_module(f"{PACKAGE}.{module_name}")
        for name in names:
            owner, _, short = name.rpartition(".")
            holder = getattr(module, owner) if owner else module
            function = inspect.getattr_static(holder, short)
            wrapped = fate.around(function, f"{module_name}:{name}")
            if owner:
                setattr(holder, short, wrapped)
                continue
            for each in list(sys.modules.values()):  # others have imported it by its name
                if getattr(each, "__name__", "").startswith(PACKAGE) and getattr(each, short, None) is function:
                    setattr(each, short, wrapped)
    if kind == "shard":
        os.pwrite = fate.half(os.pwrite)  # type: ignore[assignment]
    be_impatient(kind)


def be_impatient(kind: str) -> None:
    """Have shards and trainers miss those that hang within 2 s, and look at the seats more often."""
    if kind == "shard":
        defaults = importlib.import_module(f"{PACKAGE}.shard.shares").Shares.__init__.__kwdefaults__
        assert {"patience", "look_seconds"} <= defaults.keys()
        defaults.update(patience=2.0, look_seconds=0.25)
    elif kind == "trainer":
        constants = vars(importlib.import_module(f"{PACKAGE}.client.branch_calls"))
        assert "_QUIET" in constants
        constants["_QUIET"] = 1.0


def main() -> None:
    """See the module."""
    _, file, kind, module, *arguments = sys.argv
    if kind == "shard":  # what imports the functions by their names
        importlib.import_module(f"{PACKAGE}.shard.server")
    make_mortal(Path(file), kind)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
