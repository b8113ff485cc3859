"""What a budget for near copies of parts would bring: the share of a text's rows that lies in the hottest parts.

    python -m benchmarks.near_heat

No service. Heads have LongCat-Flash-Lite's size (10.2 M rows of 260 bytes each, 12 heads, 31.9 GB). A shard would learn
the parts' heat from the first half of a text and hold the hottest ones that its budget allows. The share is of the rows
of the second half. "known" is the same with the second half's own heat: no planner can do better. A budget that is
filled at random answers its own share of the rows. Only a token whose rows are all near needs no call.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cache import STORED_BYTES, full_size_hasher, streams
from embedding_service.ngram import NgramHasher

MIB = 1 << 20
PART_MIB = (256, 16, 1)
BUDGETS = (0.01, 0.05, 0.1, 0.25, 0.5)

Ids = npt.NDArray[np.int64]


def families() -> dict[str, NgramHasher]:
    """A hasher of each kind: sums modulo the rows keep neighbours together, xor of products does not."""
    qwen: dict[str, Any] = {
        "model_type": "qwen4_exp",
        "vocab_size": 8192,
        "eos_token_id": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 3072,
        "ngram_size": 3,
        "heads_per_ngram": 6,
        "ngram_vocab_size_base": 10_200_000,
        "make_ngram_vocab_size_divisible_by": 128,
        "seed": 1234,
    }
    return {"longcat": full_size_hasher(), "qwen4_exp": NgramHasher.from_config(qwen)}


def near_shares(learnt: Ids, asked: Ids, rows_per_part: int, parts: int, budget: float) -> tuple[float, float]:
    """Of `asked` [tokens, heads]: the share of rows in the hottest parts by `learnt`, and of tokens whose rows all are.

    There are as many hot parts as the budget holds.
    """
    heat = np.bincount(learnt.ravel() // rows_per_part, minlength=parts)
    hottest = np.argsort(-heat, kind="stable")[: int(budget * parts)]
    near = np.isin(asked // rows_per_part, hottest)
    return float(near.mean()), float(near.all(1).mean())


def main() -> None:
    """Print a table for each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each stream")
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    texts = streams(options.tokens)
    for family, hasher in families().items():
        rows = sum(hasher.tables[0].head_rows)
        table = Table("stream", "part MiB", title=f"{family}: rows near (known), tokens wholly near")
        for budget in BUDGETS:
            table.add_column(f"{budget:.0%} of the model", justify="right")
        for stream, tokens in texts.items():
            ids = hasher.row_ids(torch.tensor([tokens])).view(len(tokens), -1).numpy()
            learnt, asked = ids[: len(ids) // 2], ids[len(ids) // 2 :]
            for part_mib in PART_MIB:
                rows_per_part = part_mib * MIB // STORED_BYTES
                parts = -(-rows // rows_per_part)
                cells = []
                for budget in BUDGETS:
                    rows_near, tokens_near = near_shares(learnt, asked, rows_per_part, parts, budget)
                    known, _ = near_shares(asked, asked, rows_per_part, parts, budget)
                    cells.append(f"{rows_near:.2f} ({known:.2f}) {tokens_near:.3f}")
                table.add_row(stream, str(part_mib), *cells)
        console.print(table)


if __name__ == "__main__":
    main()
