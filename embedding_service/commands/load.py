"""Load on a service, in a closed loop (a request follows an answer) or an open one (requests fall due by the clock)."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass
class Load:
    """The outcome of a load: the latency of every answer in seconds, errors by kind, and the seconds it ran."""

    latencies: npt.NDArray[np.float64]
    errors: Counter[str]
    seconds: float

    def percentile(self, share: float) -> float:
        """Seconds within which `share` (0 to 100) of the answers came. NaN if none did."""
        return float(np.percentile(self.latencies, share)) if len(self.latencies) else float("nan")


def run_load(
    calls: Sequence[Callable[[int], Any]], seconds: float, *, rate: float | None = None, begin: float = 0.0
) -> Load:
    """Call each of `calls` with 0, 1, 2, ... in a thread of its own, in a closed loop or, with `rate`, an open one.

    In the open loop a latency counts from when its call was due. A call that had to wait for late answers is late too
    (Gil Tene's "coordinated omission"). Calls due and not begun after twice the time count as errors, "unsent".

    Args:
        calls: Their results are ignored. What they raise is counted.
        seconds: How long calls are begun.
        rate: Calls a second in all, due at even distances and dealt to the threads in turn.
        begin: When to begin, by time.perf_counter. A time in the past means now.
    """
    begin = max(begin, time.perf_counter())
    latencies: list[list[float]] = [[] for _ in calls]
    errors: Counter[str] = Counter()

    def work(index: int) -> None:
        call, mine, turn = calls[index], latencies[index], 0
        turns = _turns(seconds, rate, index, len(calls))
        _sleep_until(begin)
        while turn < turns:
            now = time.perf_counter()
            due = now if rate is None else begin + (index + turn * len(calls)) / rate
            if now >= begin + (seconds if rate is None else 2 * seconds):
                break
            _sleep_until(due)
            try:
                call(turn)
            except Exception as error:  # any error counts: what is measured here may fail in any way
                errors[type(error).__name__] += 1
            else:
                mine.append(time.perf_counter() - due)
            turn += 1
        if rate is not None and turn < turns:
            errors["unsent"] += int(turns - turn)

    if len(calls) == 1:
        work(0)  # without a hand-over between threads
    else:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return Load(np.concatenate([np.array(mine) for mine in latencies]), errors, time.perf_counter() - begin)


def _turns(seconds: float, rate: float | None, index: int, threads: int) -> float:
    """How many calls fall due to one of the threads. Without a rate there is no end to them."""
    return math.inf if rate is None else max(0, math.ceil((seconds * rate - index) / threads))


def together(loads: Sequence[Load]) -> Load:
    """Loads of several clients that ran at the same time, as one."""
    errors = sum((load.errors for load in loads), Counter[str]())
    return Load(np.concatenate([load.latencies for load in loads]), errors, max(load.seconds for load in loads))


def _sleep_until(due: float) -> None:
    if (wait := due - time.perf_counter()) > 0:
        time.sleep(wait)
