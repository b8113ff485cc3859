"""Speculative decoding in the worker: tokens a second with drafts over those without.

    python -m benchmarks.speculation --checkpoint FOLDER --out FOLDER

The checkpoint is the demo's (`python examples/demo/make_checkpoint.py FOLDER`). Its draft layer is trained here first,
on what the model itself has read. Engines that draft by it, by prompt look-up, or not at all take turns with the same
prompts and seeds. Texts are `code` (a module to be continued), `chat` (a passage, then a question on it) and `prose`.
Tables are in this process, near (read in place), or sent over the wire. A batch is of 1 or 8 requests.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from pydoc_data import topics
from queue import SimpleQueue
from subprocess import run
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from embedding_service import EmbeddingClient
from model_worker import families
from model_worker.engine import Engine, Event
from model_worker.longcat import LocalTables
from model_worker.longcat_mtp import DraftLayer, published_name
from model_worker.rows import Lookups
from model_worker.sampling import SamplingParams

WAYS = ("off", "prompt", "mtp")
TABLES = ("process", "near", "wire")
BATCHES = (1, 8)
ANSWER, LENGTH = 48, 96
WAIT_SECONDS = 300


def texts() -> dict[str, list[str]]:
    """Prompts of each kind."""
    passages = [text[:1200] for text in topics.topics.values() if len(text) > 1500]
    modules = [asyncio.locks, asyncio.queues, asyncio.streams, asyncio.tasks, json.decoder, json.encoder, argparse]
    return {
        "code": [inspect.getsource(module)[2000:2900] for module in modules],
        "chat": [f"{each[:700]}\n\nWhat does this say of the language?\n\n{each[:40]}" for each in passages],
        "prose": [each[:400] for each in passages],
    }


def train_draft_layer(folder: Path, tokenizer: Any, steps: int) -> None:
    """Add `model.mtp.*` to a checkpoint: trained to guess the token after the next, the model itself unchanged."""
    torch.manual_seed(1)
    model: Any = families.load_model(folder)
    families.attach(model, LocalTables(folder), "here")
    tokens = torch.tensor(tokenizer("\n\n".join(topics.topics.values()))["input_ids"])
    layer: Any = DraftLayer(model.config)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    layer.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3)
    rotary = model.model.rotary_emb(torch.zeros(1), torch.arange(LENGTH)[None])
    for _ in track(range(steps), "training the draft layer", console=Console(stderr=True)):
        begins = torch.randint(len(tokens) - LENGTH - 2, (8, 1))
        batch = tokens[begins + torch.arange(LENGTH + 2)]
        with torch.no_grad():
            states = model.model(batch[:, :LENGTH], use_cache=False).last_hidden_state
        guessed = model.lm_head(layer(batch[:, 1 : LENGTH + 1], states, rotary, None, None))
        loss = cross_entropy(guessed.flatten(0, 1), batch[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = {published_name(name): tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(tensors, folder / "draft.safetensors", {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(tensors, "draft.safetensors")
    index.write_text(json.dumps(content))


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
    checkpoint: Path, tables: list[str], temperature: float, rounds: int, most: int, steps: int
) -> list[dict[str, Any]]:
    """A record for each table, text, batch and way."""
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        copy = Path(shutil.copytree(checkpoint, folder / "model"))
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(copy)
        train_draft_layer(copy, tokenizer, steps)
        address = served(stack, folder, copy) if tables != ["process"] else ""
        sides = {where: Side(stack, copy, address, where, tokenizer, most) for where in tables}
        prompts = {kind: [tokenizer(each)["input_ids"] for each in some] for kind, some in texts().items()}
        for side in sides.values():
            side.measure(prompts["prose"][:2], temperature, 1)
        cells = list(product(tables, prompts, BATCHES))
        for where, kind, batch in track(cells, "measuring", console=Console(stderr=True)):
            some = [prompts[kind][row % len(prompts[kind])] for row in range(batch)]
            for way, seen in sides[where].measure(some, temperature, rounds).items():
                found.append({"tables": where, "text": kind, "batch": batch, "speculate": way, **seen})
    return found


def show(found: list[dict[str, Any]]) -> None:
    """The records as a table."""
    table = Table("tables", "text", "batch", "speculate", "tokens/s", "over off", "right", "lookups a token")
    for each in found:
        right = f"{each['accepted'] / each['drafted']:.0%} of {each['drafted']}" if each["drafted"] else ""
        table.add_row(
            *(str(each[name]) for name in ("tables", "text", "batch", "speculate")),
            *(f"{each['tokens_per_second']:.0f}", f"{each['ratio']:.2f}", right, f"{each['lookups_a_token']:.2f}"),
        )
    Console(width=110).print(table)


def main() -> None:
    """Measure, print and write `speculation.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the demo's")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for the figures")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="where they are")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 for greedy answers, which repeat themselves")
    parser.add_argument("--rounds", type=int, default=5, help="of each cell")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="of training the draft layer")
    parser.add_argument("--threads", type=int, default=1, help="of the model; the worker's default is 1, too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.checkpoint, given.tables, given.temperature, given.rounds, given.draft_tokens, given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "speculation.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
