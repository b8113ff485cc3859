"""How the next token is chosen."""

from __future__ import annotations

import pytest
import torch

from model_worker.sampling import SamplingParams, choose

LOGITS = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()


def frequencies(params: SamplingParams, logits: torch.Tensor = LOGITS, draws: int = 4000) -> list[float]:
    generator = params.generator()
    counts = torch.zeros(len(logits))
    for _ in range(draws):
        counts[choose(logits, params, generator)] += 1
    return (counts / draws).tolist()


def test_temperature_0_takes_the_likeliest() -> None:
    assert frequencies(SamplingParams(1, temperature=0), draws=5) == [1, 0, 0, 0]


def test_temperature_1_samples_from_the_model() -> None:
    assert frequencies(SamplingParams(1, seed=1)) == pytest.approx([0.5, 0.1, 0.25, 0.15], abs=0.03)


def test_temperature_sharpens() -> None:
    expected = LOGITS.mul(2).softmax(0).tolist()
    assert frequencies(SamplingParams(1, temperature=0.5, seed=1)) == pytest.approx(expected, abs=0.03)
    assert frequencies(SamplingParams(1, temperature=1e-30, seed=1), draws=50) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, [0]), (0.5, [0]), (0.51, [0, 2]), (0.76, [0, 2, 3]), (0.95, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: list[int]) -> None:
    seen = frequencies(SamplingParams(1, top_p=top_p, seed=1), draws=500)
    assert [token for token, share in enumerate(seen) if share] == kept


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    params = SamplingParams(1, temperature=temperature)
    with pytest.raises(FloatingPointError, match="publish them again"):
        choose(torch.tensor([0.5, bad, 0.1]), params, params.generator())
    # A token that is never to come may have minus infinity.
    assert choose(torch.tensor([0.5, -float("inf")]), params, params.generator()) == 0


def test_a_seed_decides() -> None:
    def draw(seed: int | None) -> list[int]:
        params = SamplingParams(1, seed=seed)
        generator = params.generator()
        return [choose(torch.zeros(1000), params, generator) for _ in range(8)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)
    assert draw(-1) == draw(-1)
