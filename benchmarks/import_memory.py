"""How much memory an import takes, and how fast it is beside a plain copy of the same file.

    python -m benchmarks.import_memory --gib 4

Makes a checkpoint with LongCat-Flash-Lite's tensor names and row width, whose tables have at least that size in bf16.
Imports it in a process of its own and watches that process. Memory is what the import adds to a process that has loaded
all its libraries. Anonymous memory is sampled. Resident memory in all (anonymous and mapped files) is the kernel's own
peak. Deletes everything afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from embedding_service.store.parts import DEFAULT_PART_BYTES
from embedding_service.tensorfile import byte_view, header_bytes

HIDDEN, HEADS, VOCAB = 3072, 12, 131072
DIM = HIDDEN // HEADS
LIMIT_PARTS = 4
SAMPLE_SECONDS = 0.02

# Loads and warms everything up, says so, waits for the word, then imports.
CHILD = """
import sys, time, torch
from embedding_service.formats import get_format
from embedding_service.store.importing import import_checkpoint
checkpoint, store, dtype, part_bytes = sys.argv[1:]
get_format("int8").encode(torch.zeros(16, 16))
print("ready", flush=True)
sys.stdin.readline()
begun = time.monotonic()
import_checkpoint(checkpoint, store, "bench", dtype=dtype, part_bytes=int(part_bytes))
print(time.monotonic() - begun, flush=True)
"""


def make_checkpoint(folder: Path, gib: float) -> int:
    """Write config.json and model.safetensors; return the bytes of the tables."""
    ratio = gib * 2**30 / (2 * DIM * HEADS * VOCAB)
    rows = [int(ratio * VOCAB) + 2 * head + 1 for head in range(HEADS)]
    shapes = {f"model.ngram_embeddings.embedders.{head}.weight": (rows[head], DIM) for head in range(HEADS)}
    config = {
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "ngram_vocab_size_ratio": ratio,
        "emb_neighbor_num": 4,
        "emb_split_num": 4,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    # A prime number of rows of noise, over and over: quick to make, and no two heads begin alike.
    block = byte_view(torch.randn(8191, DIM).mul_(0.02).to(torch.bfloat16))
    total = 2 * DIM * sum(rows)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_bytes({name: ("BF16", shape) for name, shape in shapes.items()}))
        for begin in range(0, total, len(block)):
            file.write(block[: total - begin])
        file.flush()
        os.fsync(file.fileno())
    return total


def resident(pid: int) -> dict[str, int]:
    """Bytes of RssAnon, RssFile and VmHWM (the peak of both together) of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "RssFile", "VmHWM", "VmRSS")))
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items()}


def watch_import(
    checkpoint: Path, store: Path, dtype: str, part_bytes: int = DEFAULT_PART_BYTES
) -> tuple[float, dict[str, int]]:
    """Import in a process of its own; return the seconds and the bytes it added at most, by kind."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(checkpoint), str(store), dtype, str(part_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin and child.stdout
        child.stdout.readline()
        Path(f"/proc/{child.pid}/clear_refs").write_text("5")  # the kernel's peak counts from here
        before = peak = resident(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        os.set_blocking(child.stdout.fileno(), False)
        while not (line := child.stdout.readline()) and child.poll() is None:
            now = resident(child.pid)
            peak = {name: max(peak[name], now.get(name, 0)) for name in peak}
            time.sleep(SAMPLE_SECONDS)
    if not line:
        raise SystemExit("the import failed")
    return float(line), {
        "anonymous": peak["RssAnon"] - before["RssAnon"],
        "mapped files": peak["RssFile"] - before["RssFile"],
        "resident in all": peak["VmHWM"] - before["VmRSS"],
    }


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to copy a file to disk."""
    begun = time.monotonic()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the tables in bf16")
    parser.add_argument("--dtype", default="int8", help="dtype to import to")
    parser.add_argument("--folder", help="where to work; needs about 2.6 times the tables' size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="import-memory-", dir=arguments.folder) as work:
        folder = Path(work)
        total = make_checkpoint(folder, arguments.gib)
        seconds, added = watch_import(folder, folder / "store", arguments.dtype)
        copy_seconds = plain_copy(folder / "model.safetensors", folder / "copy")
    print(f"tables of {total / 2**30:.2f} GiB in bf16, imported as {arguments.dtype} in {seconds:.1f} s")
    print(f"  rate: {total / seconds / 2**20:.0f} MiB/s; a plain copy: {total / copy_seconds / 2**20:.0f} MiB/s")
    for kind, count in added.items():
        print(f"  added at most, {kind}: {count / 2**20:.0f} MiB = {count / DEFAULT_PART_BYTES:.2f} parts")
    if added["resident in all"] > LIMIT_PARTS * DEFAULT_PART_BYTES:
        raise SystemExit(f"over the limit of {LIMIT_PARTS} parts")


if __name__ == "__main__":
    main()
