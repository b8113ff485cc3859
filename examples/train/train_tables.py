"""A small LongCat learns, with its tables in the service, as `make train-demo` runs it.

    python examples/train/train_tables.py [FOLDER]      (default .train-demo)

The tables are trained in two shards, and one of them is killed on the way. The losses are those of training in this
process. Then a worker serves what was published, and larger tables are shown to learn more. Everything runs on this
machine, listens on loopback only, and has ended when this ends.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
import make_checkpoint as demo
from run import HOST, command, process, step

from embedding_service import EmbeddingClient, NgramHasher, RowwiseAdagrad
from embedding_service.client.gradients import summed
from embedding_service.client.status import get_status
from embedding_service.machine import free_port
from embedding_service.training.optimizers import optimizer_of
from model_worker import attach, load_model
from model_worker.longcat import LocalTables

# Four heads of so many times the vocabulary.
RATIO = 40
SMALL = {"vocab_size": 512, "hidden_size": 96, "ffn_hidden_size": 192, "emb_neighbor_num": 3, "emb_split_num": 2}
STEPS, KILLED_AT, BATCH, LENGTH = 120, 40, 8, 64
SHOWN_EVERY = 20
# Rows of a head, for the last figure.
SIZES = (0, 512, 5_120, 20_480)
ADAGRAD = RowwiseAdagrad(lr=0.1)
MODEL, BRANCH = "small", "small@tuning"
PROMPT = "A function definition"

console = Console(highlight=False)


class TablesHere(LocalTables):
    """The tables in this process, trained by the operator that shards use. `rows`: of a head; 0 for none at all."""

    def __init__(self, checkpoint: Path, rows: int | None = None) -> None:
        super().__init__(checkpoint)
        self._most = rows
        head_rows = self._hasher.tables[0].head_rows
        self._first = torch.tensor([0, *itertools.accumulate(head_rows[:-1])])
        self._optimizer = optimizer_of(ADAGRAD.message())
        self._state = {
            name: torch.zeros(each) for name, each in self._optimizer.state_shapes(*self._rows.shape).items()
        }
        self._ids: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._steps = 0

    def session_of(self, name: str) -> TablesHere:
        """It is its own session."""
        return self

    def lookup_ngrams(
        self, model: str, token_ids: Tensor, context: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """See `LocalTables`."""
        return nn.functional.embedding(self._ids_of(token_ids, context), self._rows).to(dtype) * (self._most != 0)

    def _ids_of(self, token_ids: Tensor, context: Tensor | None) -> Tensor:
        ids = self._hasher.row_ids(token_ids, context)
        return self._first + (ids - self._first) % self._most if self._most else ids

    def add_ngram_gradients(self, token_ids: Tensor, context: Tensor | None, gradients: Tensor) -> None:
        """As `Session` does."""
        ids = self._ids_of(token_ids, context).reshape(-1)
        self._ids.append(ids)
        self._gradients.append(gradients.reshape(len(ids), -1))

    def step(self) -> None:
        """As `Session` does."""
        self._steps += 1
        if self._most != 0:
            ids, sums = summed(self._ids, self._gradients)
            self._optimizer.step(self._rows, self._state, ids, sums, ADAGRAD.lr, self._steps)
        self._ids, self._gradients = [], []


def main(folder: Path) -> None:
    """Show every step of the way."""
    began = time.monotonic()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # two threads wait for each other on a busy machine; and bits are the same
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    step("1. A small LongCat that has learnt nothing; its tables become version 1 in the store, as float32")
    demo.CONFIG.update(SMALL, ngram_vocab_size_ratio=RATIO)
    checkpoint = demo.make_checkpoint(folder / "checkpoint", steps=0)
    store, dense = folder / "store", folder / "split/dense"
    command("embedding-service", "split", str(checkpoint), str(folder / "split"))
    command("embedding-service", "import", str(folder / "split/tables"), f"--store={store}", f"--name={MODEL}",
            "--dtype=fp32", "--part-size=256KiB")  # fmt: skip
    stream, held_out = texts(checkpoint)
    service, http = f"{HOST}:{free_port(HOST)}", free_port(HOST)
    up = ("embedding-service", "up", f"--store={store}", "--shards=2", f"--port={service.rpartition(':')[2]}")
    with process(folder / "up.log", "ready: ", *up):
        step(f"2. {STEPS} steps, tables in two shards; one is killed after step {KILLED_AT}")
        with (
            EmbeddingClient(service, timeout=60) as client,
            client.train(BRANCH, optimizer=ADAGRAD, checkpoint_every=50) as session,
        ):
            model = load_model(dense)
            attach(model, client, BRANCH)
            losses = train(model, session, stream, lambda number: kill_one(service) if number == KILLED_AT else None)
            remote = held_out_loss(model, held_out)
            save_dense(model, dense, folder / "trained")
            compare(losses, remote, dense, checkpoint, stream, held_out)
            step("4. A worker on the trained model, with tables that have learnt nothing; then those are published")
            serve = ("model-worker", "serve", str(folder / "trained"), f"--embeddings={service}",
                     f"--name={MODEL}", f"--port={http}")  # fmt: skip
            with process(folder / "worker.log", "ready at", *serve):
                before = completion(http)
                console.print(f"before: {PROMPT}[dim]{before}[/]", soft_wrap=True)
                console.print(f"served: {client.publish(BRANCH, version='2', base='1')}")
                after = completion(http)
                console.print(f"after:  {PROMPT}[green]{after}[/]", soft_wrap=True)
                if before == after:
                    sys.exit("the worker's answer must change with the tables")
    step("5. Held-out loss against the size of the tables, trained in this process")
    plot({size: learnt(size, dense, checkpoint, stream, held_out) for size in SIZES[:-1]} | {SIZES[-1]: remote})
    console.print(f"\n[bold green]Done in {time.monotonic() - began:.0f} s. Everything that was started has ended.[/]")


def texts(checkpoint: Path) -> tuple[Tensor, Tensor]:
    """Tokens to learn from, and some that are kept back: int64 [n] each."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    tokens = torch.tensor(tokenizer.encode("\n\n".join(demo.read_documents())))
    kept_back = len(tokens) // 10
    return tokens[:-kept_back], tokens[-kept_back:]


def train(
    model: PreTrainedModel, tables: Any, stream: Tensor, after: Callable[[int], None] = lambda number: None
) -> list[float]:
    """Train the dense half here, and its tables wherever `tables` has them. Returns the losses."""
    chance = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.004, betas=(0.9, 0.95))
    model.train()
    losses = []
    for number in range(1, STEPS + 1):
        starts = torch.randint(len(stream) - LENGTH, (BATCH,), generator=chance)
        tokens = stream[starts[:, None] + torch.arange(LENGTH)]
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tables.step()
        losses.append(loss.item())
        after(number)
        if number % SHOWN_EVERY == 0:
            console.print(f"step {number}: loss {losses[-1]:.4f}")
    return losses


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Nats a token, over windows of text that was not trained on."""
    model.eval()
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:64]
    return float(model(input_ids=windows, labels=windows, use_cache=False).loss)


def kill_one(service: str) -> None:
    """SIGKILL for a shard. `up` starts it again."""
    [shard] = [each for each in get_status(service).shards if each.shard_id == "shard-1"]
    os.kill(shard.stats.pid, signal.SIGKILL)
    console.print(f"[red]shard-1 (pid {shard.stats.pid}) is killed[/]")


def compare(
    losses: list[float], remote: float, dense: Path, checkpoint: Path, stream: Tensor, held_out: Tensor
) -> None:
    """Train again with the tables in this process."""
    step("3. The same with the tables in this process")
    model, tables = load_model(dense), TablesHere(checkpoint)
    attach(model, tables, MODEL)
    here = train(model, tables, stream)
    same = sum(ours == theirs for ours, theirs in zip(here, losses, strict=True))
    console.print(f"{same} of {STEPS} losses are equal, bit for bit; held out {held_out_loss(model, held_out):.4f}")
    if here != losses or held_out_loss(model, held_out) != remote:
        sys.exit("losses must be equal")


def save_dense(model: PreTrainedModel, dense: Path, out: Path) -> None:
    """Save the trained half as the split gave it: under the published names, with a projection for each head."""
    model.save_pretrained(out)
    fused = "model.ngram_embeddings.projection.weight"
    tensors = {name: each for file in out.glob("*.safetensors") for name, each in load_file(file).items()}
    heads = NgramHasher.from_config(json.loads((dense / "config.json").read_text())).num_heads
    for head, projection in enumerate(tensors.pop(fused).chunk(heads, 1)):
        tensors[f"model.ngram_embeddings.post_projs.{head}.weight"] = projection.contiguous()
    shutil.rmtree(out)
    shutil.copytree(dense, out)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def completion(port: int) -> str:
    """What the worker says."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    answer = httpx.post(f"http://{HOST}:{port}/v1/completions", json=body, timeout=120, trust_env=False)
    answer.raise_for_status()
    return json.dumps(answer.json()["choices"][0]["text"])


def learnt(rows: int, dense: Path, checkpoint: Path, stream: Tensor, held_out: Tensor) -> float:
    """The held-out loss with heads of so many rows."""
    model, tables = load_model(dense), TablesHere(checkpoint, rows)
    attach(model, tables, MODEL)
    train(model, tables, stream)
    return held_out_loss(model, held_out)


def plot(found: dict[int, float]) -> None:
    """Bars, longer for a larger loss."""
    lowest = min(found.values()) - 0.2
    for rows, loss in found.items():
        bar = "█" * round((loss - lowest) * 30)
        console.print(f"{f'{rows:,} rows a head' if rows else 'no tables':>18}  {loss:.3f} nats  [cyan]{bar}[/]")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".train-demo"))
