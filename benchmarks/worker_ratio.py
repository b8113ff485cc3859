"""The worker's tokens/s with its tables in the service, over the same with its tables in its own process.

    python -m benchmarks.worker_ratio --out FOLDER

For each family it makes a random model of more than 100 M parameters beside its tables. Two of the worker's engines run
it in this process. One looks rows up in `up` with two shards, and reads near rows in place (`--wired`: none). The other
has the tables here: LongCat's as one tensor, Qwen4-Exp's as transformers' own modules. They take turns with the same
prompts and seeds, and must generate the same tokens. "decode" is short prompts and long answers, `batch` of them at
once. "prefill" is one long prompt and one token. Lookup ms is what the model waited for rows, a step.

A family has `--seconds` for its rounds, so that both take four minutes on two quiet cores. Three rounds are made in any
case. Models are float32 unless `--dtype` says otherwise: cores without instructions for bfloat16 take several times as
long with it, and a slow model hides what a lookup costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from subprocess import run
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import LongcatFlashConfig, PreTrainedTokenizerFast, Qwen4ExpForCausalLM, Qwen4ExpTextConfig

from benchmarks.data import VOCAB, text_tokenizer
from benchmarks.peers.base import service
from benchmarks.peers.service import come_near
from benchmarks.rounds import cpu_seconds
from embedding_service import EmbeddingClient
from examples.demo.make_checkpoint import LongcatFlashNgramForCausalLM
from model_worker import families, longcat
from model_worker.engine import Engine, Event
from model_worker.rows import Lookups
from model_worker.sampling import SamplingParams

SHARDS = 2
WAIT_SECONDS = 300
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# 12 rows of 256 a token as in LongCat-Flash-Lite, 16 rows as in Qwen3.8-Flash-Next. The transformers are smaller.
LONGCAT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 3072,
    "num_layers": 1,
    "num_attention_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "head_dim": 32,
    "v_head_dim": 64,
    "ffn_hidden_size": 3072,
    "expert_ffn_hidden_size": 512,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "ngram_vocab_size_ratio": 4,
    "emb_neighbor_num": 4,
    "emb_split_num": 4,
}
QWEN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "ple_layer_ids": [2],
    "ple_embed_dim": 2560,
    "ngram_vocab_size_base": 20_000,
    "split_ngram_parts": 8,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 512,
    "indexer_compress_ratio": 4,
}


@dataclass(frozen=True)
class Work:
    """`batch` requests at once, each with a prompt of `prompt` tokens and an answer of `tokens`."""

    name: str
    batch: int
    prompt: int
    tokens: int


WORKS = (Work("decode", 1, 16, 16), Work("decode", 8, 16, 16), Work("prefill", 1, 128, 1))
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Seen:
    """A turn's seconds, CPU seconds of this process and of the service, the wait for rows, and the tokens."""

    seconds: float
    worker_cpu: float
    service_cpu: float
    waited: float
    completions: list[list[int]]


class Side:
    """An engine over a model. Its tables are here or in the service."""

    def __init__(self, model: Any, tokenizer: Any, lookups: Lookups | None, pids: list[int]) -> None:
        self._engine = Engine(model, tokenizer, max_batch=max(work.batch for work in WORKS))
        self._lookups, self._pids = lookups, pids

    def run(self, work: Work, prompts: list[list[int]]) -> Seen:
        """Run all requests of a turn, from the first one's arrival to the last one's end."""
        service, worker, waited = cpu_seconds(self._pids), time.process_time(), self._waited
        ends = [threading.Event() for _ in prompts]
        errors: list[Exception] = []
        begun = time.perf_counter()
        requests = [
            self._engine.submit(
                prompt,
                SamplingParams(work.tokens, seed=index, ignore_eos=True),
                lambda event, end=end: _heed(event, end, errors),  # type: ignore[misc]
            )
            for index, (prompt, end) in enumerate(zip(prompts, ends, strict=True))
        ]
        for end in ends:
            if not end.wait(WAIT_SECONDS):
                raise RuntimeError(f"no answer within {WAIT_SECONDS} s")
        seconds = time.perf_counter() - begun
        if errors:
            raise errors[0]
        cpu = time.process_time() - worker, cpu_seconds(self._pids) - service
        return Seen(seconds, *cpu, self._waited - waited, [request.completion for request in requests])

    @property
    def _waited(self) -> float:
        return self._lookups.wait_seconds if self._lookups else 0.0

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


def _heed(event: Event, end: threading.Event, errors: list[Exception]) -> None:
    if event.error:
        errors.append(event.error)
    if event.error or event.finish_reason:
        end.set()


def make_checkpoint(family: str, folder: Path, dtype: torch.dtype, tokenizer: Any) -> int:
    """Put a random model into a folder. Returns its parameters without the tables."""
    torch.manual_seed(1)
    with torch.device("cpu"):
        model: Any = (
            LongcatFlashNgramForCausalLM(LongcatFlashConfig(**LONGCAT))
            if family == "longcat"
            else Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**QWEN))
        )
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family == "longcat":  # transformers names the base model's type
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "longcat_flash_ngram"}))
    tables = (".embedders.", ".ngram_embedding.")
    return sum(
        parameter.numel() for name, parameter in model.named_parameters() if not any(part in name for part in tables)
    )


@contextmanager
def served(folder: Path, checkpoint: Path) -> Iterator[tuple[str, list[int]]]:
    """The address of a service with the checkpoint's tables as model "ratio", as they are, and its processes."""
    store = folder / "store"
    importing = [sys.executable, "-m", "embedding_service", "import", str(checkpoint), f"--store={store}"]
    run([*importing, "--name=ratio", "--dtype=keep"], check=True, capture_output=True)
    with service(store, folder / "up.log", f"--shards={SHARDS}") as (address, running):
        children = psutil.Process(running.pid).children(recursive=True)
        yield address, [process.pid for process in children]


def local_model(family: str, checkpoint: Path, dtype: torch.dtype) -> Any:
    """With its tables in this process."""
    if family == "qwen4_exp":
        return Qwen4ExpForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model = longcat.load_model(checkpoint)
    longcat.attach(model, longcat.LocalTables(checkpoint), "ratio")
    return model


def measure(
    family: str, dtype: str, seconds: float, text: list[int], tokenizer: Any, near: bool, progress: Progress
) -> list[dict[str, Any]]:
    """A record for each work."""
    task = progress.add_task(f"{family}: making a model, and a service of its tables", total=seconds)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parameters = make_checkpoint(family, folder / "model", DTYPES[dtype], tokenizer)
        if parameters < 100_000_000:
            raise RuntimeError(f"{family} has {parameters} parameters beside its tables; make it larger")
        address, pids = stack.enter_context(served(folder, folder / "model"))
        client = stack.enter_context(EmbeddingClient(address, near=near))
        if near:
            for table in client.models()[0].tables:
                come_near(client, f"ratio/{table}")
        remote: Any = families.load_model(folder / "model")
        lookups = families.attach(remote, client, "ratio")
        there = Side(remote, tokenizer, lookups, pids)
        stack.callback(there.close)
        here = Side(local_model(family, folder / "model", DTYPES[dtype]), tokenizer, None, pids)
        stack.callback(here.close)
        found: dict[Work, list[tuple[Seen, Seen]]] = {work: [] for work in WORKS}
        progress.update(task, description=f"{family}: the round that warms up")
        for work in WORKS:
            _turn(here, there, work, text, 0)
        before, began, turn = client.statistics, time.monotonic(), 0
        while turn < LEAST_ROUNDS or time.monotonic() - began < seconds:
            turn += 1
            for work in WORKS:
                found[work].append(_turn(here, there, work, text, turn))
            told = ", ".join(
                f"{work.name} {work.batch}: {found[work][-1][0].seconds / found[work][-1][1].seconds:.3f}"
                for work in WORKS
            )
            progress.console.print(f"{family}, round {turn}: {told}")
            progress.update(task, description=f"{family}: round {turn + 1}", completed=time.monotonic() - began)
        had = client.statistics
        near_rows, wired_rows = had.near_rows - before.near_rows, had.wired_rows - before.wired_rows
        progress.console.print(f"{family}: {near_rows:,} rows were read in place, {wired_rows:,} were sent")
    progress.remove_task(task)
    return [_record(family, dtype, parameters, work, pairs) for work, pairs in found.items()]


def _turn(here: Side, there: Side, work: Work, text: list[int], turn: int) -> tuple[Seen, Seen]:
    """Run both sides with the same prompts, now the one first and now the other."""
    begins = np.random.default_rng(turn).integers(0, len(text) - work.prompt, work.batch)
    prompts = [text[begin : begin + work.prompt] for begin in begins]
    sides = (here, there) if turn % 2 else (there, here)
    first, second = (side.run(work, prompts) for side in sides)
    if first.completions != second.completions:
        raise RuntimeError("with remote tables the model generates other tokens: the figures would be void")
    return (first, second) if turn % 2 else (second, first)


def _record(family: str, dtype: str, parameters: int, work: Work, pairs: list[tuple[Seen, Seen]]) -> dict[str, Any]:
    ratios = [here.seconds / there.seconds for here, there in pairs]
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    tokens = work.batch * (work.tokens if work.name == "decode" else work.prompt)
    # A prompt is a step, and so is a token of all requests. The first tokens come from the prompts.
    steps = work.tokens + work.batch - 1
    theirs, ours = [list(side) for side in zip(*pairs, strict=True)]
    return {
        "family": family,
        "dtype": dtype,
        "dense_parameters": parameters,
        "work": work.name,
        "batch": work.batch,
        "rounds": len(pairs),
        "here_tokens_per_second": tokens / float(np.median([seen.seconds for seen in theirs])),
        "remote_tokens_per_second": tokens / float(np.median([seen.seconds for seen in ours])),
        "ratio": float(middle),
        "ratio_quartiles": [float(low), float(high)],
        "cpu_ratio": float(np.median([here.worker_cpu / there.worker_cpu for here, there in pairs])),
        "lookup_ms_a_step": 1e3 * float(np.median([seen.waited for seen in ours])) / steps,
        "step_ms": 1e3 * float(np.median([seen.seconds for seen in ours])) / steps,
        "service_cpu_ms_a_step": 1e3 * float(np.mean([seen.service_cpu for seen in ours])) / steps,
    }


def show(found: list[dict[str, Any]]) -> None:
    """The records as a table."""
    told = ("family", "work", "batch", "here tok/s", "remote tok/s", "ratio", "quartiles", "step ms", "lookup ms")
    columns = (*told, "service CPU ms", "worker CPU ratio")
    table = Table(*columns, title="tables in the service over tables in the process")
    for each in found:
        table.add_row(
            f"{each['family']} {each['dtype']}",
            each["work"],
            str(each["batch"]),
            f"{each['here_tokens_per_second']:.1f}",
            f"{each['remote_tokens_per_second']:.1f}",
            f"{each['ratio']:.3f}",
            "-".join(f"{value:.3f}" for value in each["ratio_quartiles"]),
            f"{each['step_ms']:.1f}",
            f"{each['lookup_ms_a_step']:.2f}",
            f"{each['service_cpu_ms_a_step']:.2f}",
            f"{each['cpu_ratio']:.3f}",
        )
    Console(width=150).print(table)


def main() -> None:
    """Measure, print and write `worker_ratio.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for the figures")
    parser.add_argument("--families", nargs="+", choices=("longcat", "qwen4_exp"), default=["longcat", "qwen4_exp"])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of model and tables")
    parser.add_argument("--seconds", type=float, default=80, help="of rounds, a family")
    parser.add_argument("--wired", action="store_true", help="all rows over the wire")
    parser.add_argument("--threads", type=int, default=1, help="of the model; the worker's default is 1, too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    documents = list(topics.topics.values())
    learnt = text_tokenizer(documents)
    text = [token for document in documents for token in learnt.encode(document).ids]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt)
    given.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for family in given.families:
        with Progress(console=Console(stderr=True)) as progress:
            found += measure(family, given.dtype, given.seconds, text, tokenizer, not given.wired, progress)
        about = {"threads": given.threads, "near": not given.wired, "records": found}
        (given.out / "worker_ratio.json").write_text(json.dumps(about, indent=2) + "\n")
    show(found)


if __name__ == "__main__":
    main()
