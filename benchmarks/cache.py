"""What the client's row cache saves on real text: hit rates, and tokens/s with it over tokens/s without.

    python -m benchmarks.cache --out FOLDER

There are three streams of tokens: a long document (Python's language reference), chats (short dialogues of real
questions and answers, with one system prompt) and code (sources of Python's library). `up` with one shard serves one
client for each cache size, in turns. First comes the whole stream in prefill chunks of 512 tokens, into empty caches.
Then come its last tokens one by one, as decoding asks for them. The caches have seen the stream before those.

Hit rates by n-gram order are those of the cache on its own, token by token. Its heads have LongCat-Flash-Lite's size,
because the small table of the first part lets different n-grams share a row.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.data import HEADS, VOCAB, make_data, text_tokenizer
from benchmarks.peers.base import service
from embedding_service import EmbeddingClient, NgramHasher
from embedding_service.client.kept import KeptRows, Kind

MIB = 1 << 20
SIZES = (0, 4, 16, 64, 256)
CHUNK, EOS = 512, 2
MODEL, STORED_BYTES = "int8", 260
# Lengths of a token's n-grams. Each has four heads.
ORDERS = (2, 3, 4)
SYSTEM = topics.topics["naming"][:1500]


def streams(tokens: int) -> dict[str, list[int]]:
    """Token ids of each kind of text, at most `tokens`."""
    texts = {"document": [*topics.topics.values()], "code": list(_code()), "chat": []}
    tokenizer = text_tokenizer([*texts["document"], *texts["code"]])
    texts["chat"] = _chats([*texts["document"], *texts["code"]])
    return {
        name: [token for text in documents for token in [*tokenizer.encode(text).ids, EOS]][:tokens]
        for name, documents in texts.items()
    }


def _code() -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("[a-h]*.py")):
        yield path.read_text(errors="replace")


def _chats(documents: list[str]) -> list[str]:
    """Dialogues of three questions, whose answers are paragraphs and docstrings that occur once."""
    answers = {text.strip() for document in documents for text in [*document.split("\n\n"), *_docstrings(document)]}
    chosen = sorted(text for text in answers if 200 < len(text) < 1200)
    random.Random(1).shuffle(chosen)
    asked = iter(chosen)
    turns = (f"User: What about {' '.join(text.split()[:6])}?\nAssistant: {text}\n" for text in asked)
    return [f"System: {SYSTEM}\n" + "".join(three) for three in zip(turns, turns, turns, strict=False)]


def _docstrings(source: str) -> Iterator[str]:
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # prose
        return
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (text := ast.get_docstring(node)):
            yield text


def full_size_hasher() -> NgramHasher:
    """A hasher of heads with about 10.2 M rows each, as LongCat-Flash-Lite has, over our tokenizer's tokens."""
    return NgramHasher.from_config(
        {
            "architectures": ["LongcatFlashNgramForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": 3072,
            "ngram_vocab_size_ratio": 78 * 131072 / VOCAB,
            "emb_neighbor_num": 4,
            "emb_split_num": 4,
            "eos_token_id": EOS,
        }
    )


def hits_by_order(tokens: list[int], cache_bytes: int) -> list[float]:
    """The hit rate of 2-, 3- and 4-grams' rows, one token a lookup, from an empty cache on."""
    ids = full_size_hasher().row_ids(torch.tensor([tokens])).view(-1, HEADS).numpy()
    cache, kind = KeptRows(cache_bytes), Kind("m@1", "ngram", 0, STORED_BYTES)
    hits, nothing = np.zeros(HEADS), np.zeros((HEADS, STORED_BYTES), np.uint8)
    for token in ids:
        here, _ = cache.find(kind, token)
        hits += here
        missing = token[~here]
        cache.keep(kind, missing, nothing[: len(missing)])
    return [float(share) for share in hits.reshape(len(ORDERS), -1).mean(1) / len(ids)]


def through_service(address: str, tokens: list[int], decoded: int) -> dict[int, dict[str, float]]:
    """For each cache size in MiB: seconds and hit rate of the prefill, then of the last tokens one by one."""
    cut = len(tokens) - decoded
    with ExitStack() as stack:
        clients = {
            size: stack.enter_context(EmbeddingClient(address, timeout=30, cache_bytes=size * MIB, near=False))
            for size in SIZES
        }
        for client in clients.values():
            client.lookup_ngrams(MODEL, torch.tensor([[0]]))
        prefill = _in_turns(clients, tokens[:cut], CHUNK)
        decode = _in_turns(clients, tokens[cut:], 1, tokens[:cut])
    return {
        size: {
            "prefill_seconds": prefill[size][0],
            "prefill_hits": prefill[size][1],
            "prefill_tokens": cut,
            "decode_seconds": decode[size][0],
            "decode_hits": decode[size][1],
            "decode_alone": decode[size][2],
            "decode_tokens": decoded,
        }
        for size in SIZES
    }


def _in_turns(
    clients: dict[int, EmbeddingClient], tokens: list[int], chunk: int, before: list[int] | None = None
) -> dict[int, tuple[float, float, float]]:
    """Send every piece of the stream through every client. Another client comes first each time.

    For each client: seconds, hit rate of rows, and the share of lookups that did no RPC.
    """
    seconds, alone = dict.fromkeys(clients, 0.0), dict.fromkeys(clients, 0)
    began = {size: _counts(client) for size, client in clients.items()}
    length = clients[SIZES[0]].hasher(MODEL).context_length
    history = [*(before or [])[-length:], *tokens]
    offset, order = len(history) - len(tokens), list(clients)
    for turn, begin in enumerate(range(0, len(tokens), chunk)):
        piece = torch.tensor([tokens[begin : begin + chunk]])
        past = history[max(0, begin + offset - length) : begin + offset]
        context = torch.tensor([past]) if past else None
        answers = []
        for size in [*order[turn % len(order) :], *order[: turn % len(order)]]:
            (_, missed), start = _counts(clients[size]), time.perf_counter()
            answers.append(clients[size].lookup_ngrams(MODEL, piece, context))
            seconds[size] += time.perf_counter() - start
            alone[size] += bool(size) and _counts(clients[size])[1] == missed
        if not all(torch.equal(answer, answers[0]) for answer in answers):
            raise SystemExit("the cache changed what a lookup returns")
    rates = {}
    for size, client in clients.items():
        hits, misses = _counts(client)
        hits, misses = hits - began[size][0], misses - began[size][1]
        rates[size] = (seconds[size], hits / ((hits + misses) or 1), alone[size] * chunk / len(tokens))
    return rates


def _counts(client: EmbeddingClient) -> tuple[int, int]:
    return (client.cache.stats.hits, client.cache.stats.misses) if client.cache else (0, 0)


def table(results: dict[str, dict[int, dict[str, float]]]) -> Table:
    """Tokens/s and their ratio to those without a cache."""
    result = Table("stream", "cache MiB", title=f"{MODEL}, {STORED_BYTES} bytes a row; ratios to no cache")
    for column in ("prefill hits", "tokens/s", "ratio", "decode hits", "tokens/s", "ratio", "no RPC"):
        result.add_column(column, justify="right")
    for stream, sizes in results.items():
        for size, seen in sizes.items():
            cells = []
            for kind in ("prefill", "decode"):
                speed = seen[f"{kind}_tokens"] / seen[f"{kind}_seconds"]
                ratio = sizes[0][f"{kind}_seconds"] / seen[f"{kind}_seconds"]
                cells += [f"{seen[f'{kind}_hits']:.3f}", f"{speed:,.0f}", f"{ratio:.2f}"]
            result.add_row(stream, str(size), *cells, f"{seen['decode_alone']:.3f}")
    return result


def orders_table(orders: dict[str, dict[str, list[float]]]) -> Table:
    """Hit rates by n-gram order."""
    result = Table("stream", "cache MiB", title="hit rate by n-gram order, heads of 10.2 M rows, token by token")
    for order in ORDERS:
        result.add_column(f"{order}-grams", justify="right")
    for stream, sizes in orders.items():
        for size, shares in sizes.items():
            result.add_row(stream, size, *(f"{share:.3f}" for share in shares))
    return result


def plot(results: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Ratio of tokens/s to those without a cache, over its size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, kind in zip(both, ("prefill", "decode"), strict=True):
        for stream, sizes in results.items():
            seconds = [sizes[size][f"{kind}_seconds"] for size in SIZES]
            axes.plot(SIZES[1:], [seconds[0] / each for each in seconds[1:]], marker="o", label=stream)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=kind, xlabel="cache MiB", xscale="log")
    both[0].set_ylabel("tokens/s to those without a cache")
    both[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run it, print the tables, and leave cache.json and cache.png in --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--rows", type=int, default=1 << 20, help="of the table that is served")
    parser.add_argument("--tokens", type=int, default=100_000, help="of each stream")
    parser.add_argument("--decode", type=int, default=4_000, help="of them, how many one by one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = streams(options.tokens)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="cache-") as name:
        data = make_data(Path(name) / "data", options.rows)
        for stream, tokens in texts.items():
            with service(data.store, Path(name, "up.log"), "--shards=1") as (address, _):
                results[stream] = through_service(address, tokens, options.decode)
    orders = {
        stream: {str(size): hits_by_order(tokens, size * MIB) for size in (16, 1024)}
        for stream, tokens in texts.items()
    }
    console = Console(width=120)
    console.print(table(results), orders_table(orders))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cache.json").write_text(json.dumps({"service": results, "orders": orders}, indent=1))
    plot(results, options.out / "cache.png")


if __name__ == "__main__":
    main()
