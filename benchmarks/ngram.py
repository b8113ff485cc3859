"""Row ids of every family at the geometry of a real model: `python -m benchmarks.ngram`.

The floor is the least that any hasher does: copy each token id to its places, the same bytes in and out.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from embedding_service.ngram import NgramHasher

# The geometries of LongCat-Flash-Lite, Qwen3.8-Flash-Next and DeepSeek-V4.1-Flash.
LITE = {"vocab_size": 131072, "ngram_vocab_size_ratio": 78, "emb_neighbor_num": 4, "emb_split_num": 4}
NEXT = {"model_type": "qwen4_exp", "vocab_size": 248320, "ple_layer_ids": [2], "eos_token_id": 2}
FLASH = {
    "model_type": "deepseek_v41",
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [384006168, 384016682],
    "engram_max_ngram_size": 4,
    "engram_n_heads": 8,
    "engram_vocab_size": 16_000_000,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99092,
}


def flash_token_map() -> Tensor:
    """A compressed vocabulary of the real sizes: 129,280 tokens, 99,092 ids."""
    return torch.arange(129280).clamp_max(99091)


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


def measure(hasher: NgramHasher) -> Table:
    """A table of batches: how long `row_ids` takes, and the floor."""
    generator = torch.Generator().manual_seed(0)
    rows = hasher.num_tables * hasher.num_heads
    table = Table(title=f"{hasher.family} row ids, {hasher.num_tables} x {hasher.num_heads} heads, one thread")
    for column in ("B x S", "M tokens/s", "M ids/s", "us a call", "us floor", "ratio"):
        table.add_column(column, justify="right")
    for batch, length in ((1, 1), (32, 1), (1, 512), (8, 8192)):
        tokens = torch.randint(hasher.vocab_size, (batch, length), generator=generator)
        context = torch.randint(hasher.vocab_size, (batch, hasher.context_length), generator=generator)
        hashing = seconds(partial(hasher.row_ids, tokens, context))
        copying = seconds(partial(copy_to_heads, tokens, rows))
        table.add_row(
            f"{batch} x {length}",
            f"{tokens.numel() / hashing / 1e6:.2f}",
            f"{tokens.numel() * rows / hashing / 1e6:.1f}",
            f"{hashing * 1e6:,.1f}",
            f"{copying * 1e6:,.1f}",
            f"{hashing / copying:.1f}",
        )
    return table


def main() -> None:
    torch.set_num_threads(1)
    console = Console()
    for config, tokenizer in ((LITE, None), (NEXT, None), (FLASH, flash_token_map())):
        console.print(measure(NgramHasher.from_config(config, tokenizer)))


if __name__ == "__main__":
    main()
