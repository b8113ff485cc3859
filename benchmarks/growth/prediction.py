"""Which points are measured, which of them the model is fitted to, and how well it predicts the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.growth.lookups import Point, Seen, Service
from benchmarks.growth.model import Load, Model, fit

YARDSTICK = Point("wide", 1)
# Shards of the services that the model is fitted to, and the points. It predicts all others.
FIT_SHARDS = (1, 8)
FIT_POINTS = (
    Point("wide", 1),
    Point("wide", 512),  # the largest that one answer holds
    Point("wide", 1024),
    Point("narrow", 1),
    Point("narrow", 1024),
    Point("layers", 1),
    Point("wide", 1, clients=8),
)
POINTS = (
    *(Point(model, tokens) for model in ("wide", "narrow", "coarse") for tokens in (1, 8, 64, 512, 1024)),
    *(Point("layers", tokens) for tokens in (1, 8, 64)),
    *(Point("wide", tokens, clients) for tokens in (1, 64) for clients in (2, 4, 8, 16)),
)
QUICK_POINTS = (*FIT_POINTS, Point("wide", 64), Point("coarse", 8), Point("layers", 64), Point("wide", 64, clients=2))
GOAL = 0.25


@dataclass
class Result:
    """A point on a service of `shards` shards: its lookup, what was seen, and whether the model was fitted to it."""

    shards: int
    point: Point
    load: Load
    seen: Seen
    fitted: bool
    predicted_client: float = 0.0
    predicted_shards: float = 0.0

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Predicted over seen: client, shards, both."""
        client, shards = self.seen.client - self.seen.hashing, self.seen.shards
        return (
            self.predicted_client / client,
            self.predicted_shards / shards,
            (self.predicted_client + self.predicted_shards) / (client + shards),
        )


def measure(
    service: Service, yardstick: Service, points: Sequence[Point], rounds: int, seconds: float
) -> list[tuple[Result, list[tuple[float, float]]]]:
    """Measure every point in every round. Returns results in units of the yardstick, and the yardstick's CPU seconds.

    A result's p50 and rate are medians of what was seen.
    """
    slices: dict[Point, list[tuple[Seen, Seen]]] = {point: [] for point in points}
    for turn in range(rounds):
        for point in points:
            unit = yardstick.measure(YARDSTICK, seconds / 2, turn)
            slices[point].append((service.measure(point, seconds, turn), unit))
    results = []
    for point, both in slices.items():
        middle = {
            key: float(np.median([getattr(seen, key) for seen, _ in both]))
            for key in ("p50", "rate", "cores", "requests", "nbytes")
        }
        seen = Seen(
            client=float(np.median([seen.client / unit.client for seen, unit in both])),
            shards=float(np.median([seen.shards / unit.shards for seen, unit in both])),
            hashing=float(np.median([seen.hashing / unit.client for seen, unit in both])),
            **middle,
        )
        fitted = service.shards in FIT_SHARDS and point in FIT_POINTS
        result = Result(service.shards, point, service.expected(point), seen, fitted)
        results.append((result, [(unit.client, unit.shards) for _, unit in both]))
    return results


def in_seconds(measured: Sequence[tuple[Result, list[tuple[float, float]]]]) -> list[Result]:
    """Results in seconds, by the yardstick's median over the whole run."""
    client, shards = np.median([unit for _, units in measured for unit in units], axis=0)
    return [
        replace(
            result,
            seen=replace(
                result.seen,
                client=float(result.seen.client * client),
                shards=float(result.seen.shards * shards),
                hashing=float(result.seen.hashing * client),
            ),
        )
        for result, _ in measured
    ]


def predict(results: Sequence[Result]) -> Model:
    """Fit the model to its results, and put its predictions into all of them."""
    chosen = [result for result in results if result.fitted]
    model = Model(
        fit([each.load.of_client() for each in chosen], [each.seen.client - each.seen.hashing for each in chosen]),
        fit([each.load.of_shards() for each in chosen], [each.seen.shards for each in chosen]),
    )
    for result in results:
        result.predicted_client, result.predicted_shards = model.of_client(result.load), model.of_shards(result.load)
    return model
