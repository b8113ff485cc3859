"""The formulas that predict what a lookup costs."""

import numpy as np
import pytest

from benchmarks.growth.extrapolation import head_shares
from benchmarks.growth.model import Load, fan_out, fit, shares_of


def test_fan_out_is_how_many_shards_random_rows_meet() -> None:
    random = np.random.default_rng(1)
    owners, head_rows, rows_per_part, tokens = np.array([0, 3, 1, 0, 2, 1]), [25, 20, 10], 10, 2
    first_rows = np.cumsum([0, *head_rows[:-1]])
    met = [
        len(set(owners[(random.integers(0, head_rows, (tokens, 3)) + first_rows).ravel() // rows_per_part]))
        for _ in range(20_000)
    ]
    assert fan_out(shares_of(owners, rows_per_part, head_rows, 5), tokens) == pytest.approx(np.mean(met), rel=0.01)


def test_equal_shards_follow_the_known_formula() -> None:
    assert fan_out(np.full((1, 16), 1 / 16), 12) == pytest.approx(16 * (1 - (1 - 1 / 16) ** 12))
    assert np.allclose(head_shares(12, 5).sum(1), 1)
    assert np.allclose(head_shares(12, 5).sum(0), 12 / 5)


def test_fitting_finds_what_costs_were_made_of_and_none_below_zero() -> None:
    loads = [Load(1, requests, rows, rows * 100) for requests in (1, 3, 7) for rows in (1, 50, 2000)]
    costs = np.array([5.0, 0.0, 0.0, 2.0, 0.5, 0.0, 0.0])
    seconds = [float(np.dot(costs, load.of_client())) for load in loads]
    terms = np.array([load.of_client() for load in loads])
    assert np.allclose(terms @ fit(terms, seconds), seconds)
    assert (fit([[1.0, 1.0], [1.0, 3.0], [1.0, 2.0]], [3.0, 2.0, 2.5]) >= 0).all()
    with pytest.raises(ValueError, match="2 points do not tell 3 coefficients"):
        fit(np.ones((2, 3)), [1.0, 1.0])
