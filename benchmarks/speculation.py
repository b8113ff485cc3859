"""Speculative decoding in the worker: tokens a second with drafts over those without.

    python -m benchmarks.speculation --out FOLDER

The model is that of `benchmarks.speculation_model`, which is made first and kept in build/. Engines that draft by its
draft layer, by prompt look-up, or not at all take turns with the same prompts and seeds. Texts are `code` (a function,
to be written once more), `chat` (a passage, a question on it, an answer that quotes it) and `prose`. The model has not
read them. Tables are in this process, near (read in place), or sent over the wire. A batch is of 1 or 8 requests.
Answers are greedy (temperature 0), or drawn by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from subprocess import run
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from benchmarks.speculation_model import STEPS, make_model, prompts
from embedding_service import EmbeddingClient
from model_worker import families
from model_worker.engine import Engine, Event
from model_worker.longcat import LocalTables
from model_worker.rows import Lookups
from model_worker.sampling import SamplingParams

WAYS = ("off", "prompt", "mtp")
TABLES = ("process", "near", "wire")
BATCHES = (1, 8)
ANSWER = 48
WAIT_SECONDS = 300


def answers(engine: Engine, prompts: list[list[int]], temperature: float, turn: int) -> tuple[float, list[list[int]]]:
    """Seconds of all requests together, and their tokens."""
    ends: SimpleQueue[Event] = SimpleQueue()

    def heed(event: Event) -> None:
        if event.error or event.finish_reason:
            ends.put(event)

    begun = perf_counter()
    params = [SamplingParams(ANSWER, temperature, seed=turn + row, ignore_eos=True) for row in range(len(prompts))]
    requests = engine.submit_all([(prompt, each, heed) for prompt, each in zip(prompts, params, strict=True)])
    for _ in requests:
        event = ends.get(timeout=WAIT_SECONDS)
        if event.error:
            raise event.error
    return perf_counter() - begun, [request.completion for request in requests]


class Side:
    """A model with its tables in one of TABLES, and an engine for each of WAYS."""

    def __init__(self, stack: ExitStack, checkpoint: Path, address: str, where: str, tokenizer: Any, most: int) -> None:
        model: Any = families.load_model(checkpoint)
        source: Any = LocalTables(checkpoint)
        if where != "process":
            source = stack.enter_context(EmbeddingClient(address, near=where == "near"))
        if where == "near":
            from benchmarks.peers.service import come_near

            come_near(source, f"spec/{next(iter(source.models()[0].tables))}")
        self.lookups: Lookups = families.attach(model, source, "spec")
        self.engines = {
            way: Engine(model, tokenizer, max_batch=max(BATCHES), speculate=way, draft_tokens=most)  # type: ignore[arg-type]
            for way in WAYS
        }
        for engine in self.engines.values():
            stack.callback(engine.close)

    def measure(self, prompts: list[list[int]], temperature: float, rounds: int) -> dict[str, dict[str, float]]:
        """What each way of drafting does with these prompts, its tokens/s over those without drafts."""
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        lookups, drafted, accepted = (dict.fromkeys(WAYS, 0) for _ in range(3))
        differing = 0
        for turn in range(rounds):
            said = {}
            for way in WAYS if turn % 2 else reversed(WAYS):
                engine, before = self.engines[way], self.lookups.count
                counts = engine.drafted, engine.accepted
                took, said[way] = answers(engine, prompts, temperature, 100 * turn)
                seconds[way].append(took)
                lookups[way] += self.lookups.count - before
                drafted[way] += engine.drafted - counts[0]
                accepted[way] += engine.accepted - counts[1]
            differing += sum(said[way] != said["off"] for way in WAYS)
        tokens = ANSWER * len(prompts)
        return {
            way: {
                "tokens_per_second": tokens / float(np.median(seconds[way])),
                "ratio": float(np.median([a / b for a, b in zip(seconds["off"], seconds[way], strict=True)])),
                "drafted": drafted[way],
                "accepted": accepted[way],
                "lookups_a_token": lookups[way] / (tokens * rounds),
                "differing": differing,
            }
            for way in WAYS
        }


def served(stack: ExitStack, folder: Path, checkpoint: Path) -> str:
    """The address of a service with the checkpoint's tables as model "spec", as they are."""
    from benchmarks.peers.base import service

    importing = [sys.executable, "-m", "embedding_service", "import", str(checkpoint), f"--store={folder / 'store'}"]
    run([*importing, "--name=spec", "--dtype=keep"], check=True, capture_output=True)
    return stack.enter_context(service(folder / "store", folder / "up.log", "--shards=2"))[0]


def measure(
    checkpoint: Path, tables: list[str], batches: list[int], temperatures: list[float], rounds: int, most: int
) -> list[dict[str, Any]]:
    """A record for each table, text, batch, temperature and way."""
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        address = served(stack, folder, checkpoint) if tables != ["process"] else ""
        sides = {where: Side(stack, checkpoint, address, where, tokenizer, most) for where in tables}
        asked = {kind: [tokenizer(each)["input_ids"] for each in some] for kind, some in prompts().items()}
        for side in sides.values():
            side.measure(asked["prose"][:2], temperatures[0], 1)
        cells = list(product(tables, asked, batches, temperatures))
        for where, kind, batch, temperature in track(cells, "measuring", console=Console(stderr=True)):
            some = [asked[kind][row % len(asked[kind])] for row in range(batch)]
            for way, seen in sides[where].measure(some, temperature, rounds).items():
                cell = {"tables": where, "text": kind, "batch": batch, "temperature": temperature}
                found.append({**cell, "speculate": way, **seen})
    return found


def show(found: list[dict[str, Any]]) -> None:
    """The records as a table."""
    names = ("tables", "text", "batch", "temperature", "speculate")
    table = Table(*names, "tokens/s", "over off", "right", "lookups a token")
    for each in found:
        right = f"{each['accepted'] / each['drafted']:.0%} of {each['drafted']}" if each["drafted"] else ""
        table.add_row(
            *(str(each[name]) for name in names),
            *(f"{each['tokens_per_second']:.0f}", f"{each['ratio']:.2f}", right, f"{each['lookups_a_token']:.2f}"),
        )
    Console(width=110).print(table)


def main() -> None:
    """Measure, print and write `speculation.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/speculation"), help="made where there is none")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for the figures")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="where they are")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="requests at once")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0, 0.7], help="0 for greedy answers")
    parser.add_argument("--rounds", type=int, default=5, help="of each cell")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training the model")
    parser.add_argument("--threads", type=int, default=1, help="of the model; the worker's default is 1, too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    make_model(given.checkpoint, given.steps)
    found = measure(given.checkpoint, given.tables, given.batch, given.temperature, given.rounds, given.draft_tokens)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "speculation.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
