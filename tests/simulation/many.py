"""Many seeds, on several processes."""

from __future__ import annotations

import gc
import logging
import multiprocessing
from collections import Counter
from typing import NamedTuple

from rich.progress import Progress

from simulation.run import Outcome, run
from simulation.schedule import draw_schedule

# Seeds that a process takes at a time.
TAKEN = 20


class Summary(NamedTuple):
    """Of many seeds. `broken`: for each promise that was not kept the seeds that show it."""

    seeds: int
    events: int
    answers: int
    failures: int
    broken: dict[str, list[int]]


def outcome_of(seed: int) -> Outcome:
    """Of one seed."""
    return run(draw_schedule(seed))


def begin() -> None:
    """In a process of many seeds: what the service logs is not for the console, and modules are no garbage."""
    logging.disable(logging.CRITICAL)
    gc.freeze()


def run_seeds(first: int, seeds: int, workers: int, progress: Progress | None = None) -> Summary:
    """Run this many seeds, from the first on."""
    totals: Counter[str] = Counter()
    broken: dict[str, list[int]] = {}
    task = progress.add_task("seeds", total=seeds, found="") if progress else None
    # Not forked: the caller may have threads, and each process imports what it needs in a second or two.
    with multiprocessing.get_context("spawn").Pool(workers, begin) as pool:
        for outcome in pool.imap_unordered(outcome_of, range(first, first + seeds), chunksize=TAKEN):
            totals.update(events=outcome.events, answers=outcome.answers, failures=outcome.failures)
            if outcome.broken:
                broken.setdefault(outcome.broken, []).append(outcome.seed)
                if progress:
                    progress.console.print(f"seed {outcome.seed}: {outcome.broken}", highlight=False, markup=False)
            if progress and task is not None:
                progress.update(task, advance=1, found=f"{sum(map(len, broken.values()))} broken")
    return Summary(seeds, totals["events"], totals["answers"], totals["failures"], broken)
