"""The main job end to end, as `make demo` runs it: import, serve on four shards, generate from a Ray worker, compare.

    python examples/demo/run.py [FOLDER]      (default .demo; a checkpoint that is there is used again)

Everything runs in processes of its own on this machine, listens on loopback only, and has ended when this ends.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from embedding_service.machine import free_port

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SHARDS = 4
PROMPT = "A function definition"
TOKENS = 60
# Many parts, so that four shards have something to share. The default of 256 MiB suits much larger tables.
PART_SIZE = "4MiB"
START_SECONDS = 300
HOST = "127.0.0.1"

console = Console(highlight=False)


def main(folder: Path) -> None:
    """Show every step of the way."""
    began = time.monotonic()
    checkpoint = folder / "checkpoint"
    step("1. A small LongCat-Flash-Lite, trained here on the language reference that Python ships")
    command(sys.executable, str(HERE / "make_checkpoint.py"), str(checkpoint))

    step("2. Split: tables for the service, the dense rest for the worker; then import the tables, as int8 and as fp32")
    for old in ("split", "store"):
        shutil.rmtree(folder / old, ignore_errors=True)
    command("embedding-service", "split", str(checkpoint), str(folder / "split"))
    tables, dense, store = folder / "split/tables", folder / "split/dense", folder / "store"
    for name, dtype in (("demo", "int8"), ("demo-fp32", "fp32")):
        command("embedding-service", "import", str(tables), f"--store={store}", f"--name={name}", f"--dtype={dtype}",
                f"--part-size={PART_SIZE}")  # fmt: skip

    step(f"3. The service: a controller and {SHARDS} shards")
    service, http = f"{HOST}:{free_port(HOST)}", free_port(HOST)
    up = ("embedding-service", "up", f"--store={store}", f"--shards={SHARDS}", f"--port={service.partition(':')[2]}")
    worker = ("model-worker", "serve", str(dense), f"--embeddings={service}", "--name=demo", f"--port={http}")
    with process(folder / "up.log", "ready: ", *up):
        step("4. The worker: Ray Serve, transformers' LongcatFlashForCausalLM without its tables")
        with process(folder / "worker.log", "ready at", *worker):
            step("5. A completion, streamed over HTTP")
            stream_completion(f"http://{HOST}:{http}")
            step("6. Who did what")
            time.sleep(1.5)  # the shards report once a second
            show_shards(service)
            show_worker(f"http://{HOST}:{http}", checkpoint)
        step("7. The same logits as with the tables in the model's own process?")
        show_difference(service, checkpoint, dense)
    console.print(f"\n[bold green]Done in {time.monotonic() - began:.0f} s. Everything that was started has ended.[/]")


def step(title: str) -> None:
    """A heading."""
    console.print(f"\n[bold cyan]{title}[/]")


def installed(name: str) -> str:
    """A console script of this environment, or a path as it is."""
    return str(BIN / name) if (BIN / name).exists() else name


def command(name: str, *arguments: str) -> None:
    """Run one command to its end, with its output shown."""
    console.print(f"[dim]$ {' '.join((Path(name).name, *arguments))}[/]", soft_wrap=True)
    done = subprocess.run([installed(name), *arguments], check=False)
    if done.returncode:
        sys.exit(f"{name} failed with exit code {done.returncode}")


@contextmanager
def process(log: Path, ready: str, name: str, *arguments: str) -> Iterator[None]:
    """Run a process within the `with`, entered when it printed `ready`. SIGTERM ends it."""
    console.print(f"[dim]$ {' '.join((name, *arguments))}[/]", soft_wrap=True)
    with log.open("w") as output:
        running = subprocess.Popen([installed(name), *arguments], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while ready not in log.read_text():
            if running.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name} did not start; it said:\n{log.read_text()}")
            time.sleep(0.1)
        console.print(next(line for line in log.read_text().splitlines() if ready in line))
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait()


def stream_completion(url: str) -> None:
    """Print the text as its pieces come."""
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    console.print(f"[bold]{PROMPT}[/]", end="")
    began = time.monotonic()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                console.print(json.loads(line[6:])["choices"][0]["text"], end="", markup=False, soft_wrap=True)
    console.print(f"\n[dim]({TOKENS} tokens at most, {time.monotonic() - began:.1f} s)[/]")


def show_shards(service: str) -> None:
    """Rows and bytes that each shard served, and its memory."""
    from embedding_service.client.status import get_status

    table = Table("shard", "parts", "bytes held", "rows served", "bytes served", "memory: anonymous + mapped files")
    for shard in get_status(service).shards:
        stats = shard.stats
        table.add_row(
            shard.shard_id,
            str(shard.parts),
            mib(stats.held_bytes),
            f"{stats.rows:,}",
            f"{stats.row_bytes:,}",
            f"{mib(stats.anonymous_bytes)} + {mib(stats.file_bytes)}",
        )
    console.print(table)


def show_worker(url: str, checkpoint: Path) -> None:
    """The worker's memory: parameters, and no tables."""
    info: dict[str, Any] = httpx.get(f"{url}/v1/worker", timeout=30, trust_env=False).json()
    table = Table(
        "worker", "memory: anonymous + mapped files", "parameters", "of them tables", "tables it uses", "lookups"
    )
    table.add_row(
        f"pid {info['pid']}",
        f"{mib(info['anonymous_bytes'])} + {mib(info['file_bytes'])}",
        mib(info["parameter_bytes"]),
        mib(info["table_bytes"]),
        f"{info['remote_table_values']:,} values",
        f"{info['lookups']} in {info['lookup_wait_seconds'] * 1000:.0f} ms",
    )
    console.print(table)
    whole = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    console.print(f"The whole checkpoint holds {mib(whole)}.")


def show_difference(service: str, checkpoint: Path, dense: Path) -> None:
    """Greatest difference of logits: rows from the service against tables in this process."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from embedding_service import EmbeddingClient
    from model_worker import attach
    from model_worker.longcat import LocalTables, load_model

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    tokens = torch.tensor([tokenizer.encode(PROMPT + " defines a user-defined function object.")])

    def logits(source: Any, name: str) -> torch.Tensor:
        model = load_model(dense)
        attach(model, source, name)
        with torch.no_grad():
            return model(tokens).logits

    with EmbeddingClient(service) as client:
        local = logits(LocalTables(checkpoint), "demo")
        table = Table("tables in the service", "greatest difference of logits", "same most likely tokens")
        for name, dtype in (("demo-fp32", "fp32"), ("demo", "int8")):
            remote = logits(client, name)
            same = (remote.argmax(-1) == local.argmax(-1)).float().mean().item()
            difference = (remote - local).abs().max().item()
            table.add_row(f"{name} ({dtype})", f"{difference:.3g} (of {local.abs().max().item():.1f})", f"{same:.0%}")
            if dtype == "fp32" and difference:
                sys.exit("fp32 tables must give the very same logits")
    console.print(table)


def mib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB"


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".demo")
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
