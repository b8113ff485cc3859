"""`make simulate SEEDS=n FIRST=seed`: runs seeds on all cores; a failing one is made short and told step by step."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from simulation.many import run_seeds
from simulation.run import explain

# Failing seeds that are told in the end: one of each kind.
TOLD = 5


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    console, began = Console(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[found]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        summary = run_seeds(options.first, options.seeds, options.workers, progress)
    console.print(
        f"{summary.seeds:,} seeds, {summary.events:,} events, {summary.answers:,} lookups answered and "
        f"{summary.failures:,} given up, {time.monotonic() - began:.0f} s",
        highlight=False,
    )
    for promise, seeds in sorted(summary.broken.items())[:TOLD]:
        console.print(f"\n{len(seeds)} times: {promise}; the first is seed {min(seeds)}, made short:", markup=False)
        logging.disable(logging.CRITICAL)
        told = explain(min(seeds))
        for line in told.trace:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(told.details, highlight=False, markup=False, soft_wrap=True)
    return 1 if summary.broken else 0


if __name__ == "__main__":
    sys.exit(main())
