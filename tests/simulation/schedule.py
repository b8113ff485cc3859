"""What befalls a service: drawn from the seed before it begins, so that a failing run can be made short."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

# What happens, and how often beside the others. The names are methods of `run.Simulation`.
LOOKUPS = {"look_up": 12.0, "look_up_pinned": 1.0, "look_up_thinly": 2.0}
# What an operator does, and what breaks without anybody's rows in danger.
HARMLESS = {
    "publish": 1.5,
    "join": 1.0,
    "drain": 1.0,
    "restart_controller": 1.0,
    "second_controller": 0.5,
    "hang_controller": 0.5,
    "set_clock": 0.5,
    "store_away": 0.7,
    "store_bare": 0.4,
    "store_takes_no_notes": 0.4,
    "tear_manifest": 0.5,
    "planner_fails": 0.5,
    "slow_network": 0.5,
}
# What takes a shard, or some of its messages, away.
HARMFUL = {
    "kill_shard": 2.0,
    "hang_shard": 1.0,
    "cut_off_shard": 1.0,
    "cut_one_way": 0.7,
    "break_stream": 1.0,
    "cut_client": 0.5,
}
# What takes away what nobody can give back, or so much at a time that lookups may fail.
WILD = {
    "lossy_network": 0.7,
    "retire": 0.5,
    "remove_newest": 0.4,
    "corrupt": 0.5,
    "restart_all": 0.4,
    "lose_note": 0.3,
    "kill_shard": 2.0,
}


class Step(NamedTuple):
    """Something that happens at a time, with numbers to choose by."""

    at: float
    kind: str
    draw: int


class Schedule(NamedTuple):
    """A run: how it begins, and what happens then."""

    seed: int
    calm: bool
    shards: int
    replicas: int
    zones: int
    models: int
    room: float
    steps: tuple[Step, ...]


def draw_schedule(seed: int, seconds: float = 60.0) -> Schedule:
    """The schedule of a seed."""
    draw = random.Random(seed)
    calm = seed % 2 == 0
    shards = draw.randint(3, 5) if calm else draw.randint(1, 5)
    kinds = {**LOOKUPS, **HARMLESS, **HARMFUL}
    if not calm:
        for kind, weight in WILD.items():
            kinds[kind] = kinds.get(kind, 0.0) + weight
    # Each run has its own mixture: most of all kinds, some of none.
    weights = {kind: weight * draw.choice((0, 1, 1, 2)) for kind, weight in kinds.items() if kind not in LOOKUPS}
    weights.update(LOOKUPS)
    names, bounds = list(weights), list(itertools.accumulate(weights.values()))
    pace = draw.uniform(0.1, 0.4)
    steps, at = [], draw.uniform(0.0, 3.0)
    while at < seconds:
        [kind] = draw.choices(names, cum_weights=bounds)
        steps.append(Step(at, kind, draw.getrandbits(32)))
        at += draw.expovariate(1 / pace)
    return Schedule(
        seed,
        calm,
        shards,
        2 if calm else draw.randint(1, 3),
        draw.choice((0, 0, 2, 3)),
        draw.randint(1, 2),
        draw.choice((10.0, 10.0, 2.5)),
        tuple(steps),
    )
