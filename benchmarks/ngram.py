"""Row ids of LongCat-Flash-Lite's geometry: `python -m benchmarks.ngram`.

The floor is the least that any hasher does: copy each token id to its twelve places, the same bytes in and out.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from embedding_service.ngram import NgramHasher

LITE = {"vocab_size": 131072, "ngram_vocab_size_ratio": 78, "emb_neighbor_num": 4, "emb_split_num": 4}


def seconds(call: Callable[[], object], budget: float = 0.2, rounds: int = 5) -> float:
    """The best round's mean time of a call: what the code costs when the machine leaves it alone."""
    call()
    start = perf_counter()
    call()
    repeats = max(1, int(budget / (perf_counter() - start)))
    best = float("inf")
    for _ in range(rounds):
        start = perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (perf_counter() - start) / repeats)
    return best


def copy_to_heads(tokens: Tensor, heads: int) -> Tensor:
    """The floor: int64 [B, S] -> [B, S, heads]."""
    return tokens[..., None].expand(-1, -1, heads).contiguous()


def main() -> None:
    torch.set_num_threads(1)
    hasher = NgramHasher.from_config(LITE)
    generator = torch.Generator().manual_seed(0)
    table = Table(title=f"longcat row ids, {hasher.num_heads} heads, one thread")
    for column in ("B x S", "M tokens/s", "us a call", "us floor", "ratio"):
        table.add_column(column, justify="right")
    for batch, length in ((1, 1), (32, 1), (1, 512), (8, 8192)):
        tokens = torch.randint(LITE["vocab_size"], (batch, length), generator=generator)
        context = torch.randint(LITE["vocab_size"], (batch, hasher.context_length), generator=generator)
        hashing = seconds(partial(hasher.row_ids, tokens, context))
        copying = seconds(partial(copy_to_heads, tokens, hasher.num_heads))
        table.add_row(
            f"{batch} x {length}",
            f"{tokens.numel() / hashing / 1e6:.2f}",
            f"{hashing * 1e6:,.1f}",
            f"{copying * 1e6:,.1f}",
            f"{hashing / copying:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
