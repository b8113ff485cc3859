"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for.

    max_tokens: the most new tokens, an EOS included.
    temperature: 0 takes the likeliest token. 1 samples from the model's own distribution.
    top_p: sample from the likeliest tokens that together reach this probability (nucleus sampling, arXiv 1904.09751).
    seed: the same seed gives the same tokens in any batch. None draws one.
    stop: text ends before the first of these.
    ignore_eos: go on after an EOS, to max_tokens or a stop string.
    logprobs: how many likeliest tokens to tell with each token's log probability. None tells nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def generator(self) -> torch.Generator:
        """The request's own source of chance."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its log probability, and the likeliest tokens at its place with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_probability(logits: Tensor, token: int, most: int) -> TokenLogprob:
    """A token's log probability by float32 [V] logits: the model's own, before temperature and top_p."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(most, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def choose(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """The next token from float32 [V] logits on the CPU. Raises FloatingPointError: some are NaN or infinite."""
    greatest = logits.max()
    if not greatest.isfinite():
        raise FloatingPointError(
            "the model's logits are not finite: the rows of the tables that the request names, or the weights, hold "
            "NaN or values that are too large; correct those and publish them again"
        )
    if params.temperature == 0:
        return int(logits.argmax())
    # The greatest becomes 0 first, so that a tiny temperature cannot overflow. It must not be 0 in float32.
    temperature = max(params.temperature, _TINY)
    probabilities = ((logits - greatest) / temperature).softmax(-1)
    if params.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        outside = before >= params.top_p
        outside[0] = False
        probabilities[tokens[outside]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
