"""Many seeds of the whole service in one thread, and faults that the simulator must find."""

import os
import subprocess
import sys

import pytest

from simulation.many import run_seeds
from simulation.mutants import MUTANTS
from simulation.run import EVENTS, Simulation, explain, run, shorten
from simulation.schedule import draw_schedule

SEEDS = 1000
# Beyond those: they found faults. Two controllers without a store (5416, 13962, 18154), a restart beside new shards
# (12774), a client that started over with the routing that it had (19217), and one that asked a shard that came back
# without the rows again and again, for the other owner had been late once (52162).
FOUND = (5416, 12774, 13962, 18154, 19217, 52162)
# Seeds within which each mutant is found. They are many fewer than a rare fault needs.
ENOUGH = 60


# Half a minute on two free cores; a bound for busy ones.
@pytest.mark.timeout(1500)
def test_no_promise_is_broken_by_any_of_a_thousand_seeds() -> None:
    summary = run_seeds(0, SEEDS, min(2, os.cpu_count() or 1))
    for promise, found in summary.broken.items():
        told = explain(min(found))
        print("\n".join(told.trace), told.details, sep="\n")
        pytest.fail(f"{promise}: seeds {sorted(found)[:10]}; the first one is told above, made short")
    assert summary.events >= SEEDS * EVENTS
    assert summary.answers > 5 * SEEDS


@pytest.mark.parametrize("seed", FOUND)
def test_a_seed_that_found_a_fault_finds_it_no_more(seed: int) -> None:
    outcome = run(draw_schedule(seed))
    assert not outcome.broken, outcome.details


@pytest.mark.parametrize("promise", MUTANTS)
def test_a_rule_that_is_broken_is_found(promise: str) -> None:
    mutant, broken = MUTANTS[promise], set()
    with mutant():
        for seed in range(ENOUGH):
            broken.add(run(draw_schedule(seed)).broken)
            if promise in broken:
                return
    pytest.fail(f"{mutant.__name__} broke only {broken} within {ENOUGH} seeds")


def test_shards_that_leave_are_not_waited_for_in_the_end() -> None:
    """Others are started in their place, or nobody would be left to serve."""
    simulation = Simulation(draw_schedule(1)._replace(steps=()))
    while simulation.world.now < 10:
        simulation.world.step()
    shards = simulation.live()
    assert shards and all(shard.holdings.held for shard in shards)
    for shard in shards:
        shard.drain(60)
    simulation.end_faults()
    assert len([shard for shard in simulation.live() if not shard.duties.draining]) >= len(shards)


@pytest.mark.slow
def test_a_failing_seed_is_made_short_and_still_fails() -> None:
    promise, mutant = next(iter(MUTANTS.items()))
    with mutant():
        schedule = next(each for each in map(draw_schedule, range(ENOUGH)) if run(each).broken == promise)
        short = shorten(schedule, promise, most_runs=60)
        told = run(short, tracing=True)
    assert told.broken == promise
    assert len(short.steps) < len(schedule.steps) / 2
    assert promise in told.details and len(told.trace) > 5


TRACE = """
import hashlib, logging
logging.disable(logging.CRITICAL)
from simulation.run import run
from simulation.schedule import draw_schedule
lines = [line for seed in range(8) for line in run(draw_schedule(seed), tracing=True).trace]
print(len(lines), hashlib.sha256("\\n".join(lines).encode()).hexdigest())
"""


@pytest.mark.slow
def test_a_seed_is_the_same_run_in_every_process() -> None:
    """Whatever order its sets have."""
    said = set()
    for hash_seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", TRACE], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    [trace] = said
    assert int(trace.split()[0]) > 100
