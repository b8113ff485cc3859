"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for.

    max_tokens: at most so many new tokens, an EOS included.
    temperature: 0 takes the likeliest token; 1 samples from the model's own distribution.
    top_p: sample from the likeliest tokens that together reach this probability (nucleus sampling, arXiv 1904.09751).
    seed: the same seed gives the same tokens, whoever shares the batch; None draws one.
    stop: text ends before the first of these.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def generator(self) -> torch.Generator:
        """The request's own source of chance."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """The next token from float32 [V] logits on the CPU."""
    if params.temperature == 0:
        return int(logits.argmax())
    # The greatest becomes 0 first, so that a tiny temperature cannot overflow.
    probabilities = ((logits - logits.max()) / params.temperature).softmax(-1)
    if params.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        outside = before >= params.top_p
        outside[0] = False
        probabilities[tokens[outside]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
