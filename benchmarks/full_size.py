"""Tables of real size on this machine: `python -m benchmarks.full_size longcat`, `qwen4` or `longcat2`.

It first writes a store with the model's real geometry, in int4 rows whose codes name the row. (--folder says where. It
takes 16.2, 26.9 or 68.5 GB, and --keep keeps it for the next run. --fraction writes a part of the rows.) Then `up`
serves it, from a cold page cache and from a warm one. A client asks for rows and checks each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Sheet

from benchmarks.data import Ids, text_tokens
from benchmarks.peers.base import service
from embedding_service import EmbeddingClient, NgramHasher
from embedding_service.client.status import get_status
from embedding_service.formats import get_format
from embedding_service.store.draft import open_draft
from embedding_service.store.manifest import Manifest, Table
from embedding_service.store.parts import DEFAULT_PART_BYTES, NewPart, PartWriter, rows_per_part
from embedding_service.store.store import Store

FORMAT = get_format("int4")
# Rows written at a time: 8 MiB or so.
CHUNK_ROWS = 1 << 16
TOKENS = (1, 64, 1024)
HUGE = "AnonHugePages"


@dataclass(frozen=True)
class Geometry:
    """A published model's n-gram tables, and the tier its size asks for here."""

    config: dict[str, Any]
    dim: int
    tier: str


GEOMETRIES = {
    # LongCat-Flash-Lite
    "longcat": Geometry(
        {
            "architectures": ["LongcatFlashNgramForCausalLM"],
            "vocab_size": 131072,
            "hidden_size": 3072,
            "ngram_vocab_size_ratio": 78,
            "emb_neighbor_num": 4,
            "emb_split_num": 4,
            "eos_token_id": 2,
        },
        256,
        "ram",
    ),
    # LongCat-2.0
    "longcat2": Geometry(
        {
            "architectures": ["LongcatCausalLM"],
            "vocab_size": 163840,
            "hidden_size": 8192,
            "oe_vocab_size_ratio": 100.567,
            "oe_neighbor_num": 5,
            "oe_split_num": 4,
            "eos_token_id": 2,
        },
        512,
        "mmap",
    ),
    # Qwen3.8-Flash-Next
    "qwen4": Geometry(
        {
            "model_type": "qwen4_exp_text",
            "ple_layer_ids": [2],
            "num_hidden_layers": 4,
            "ple_embed_dim": 2560,
            "vocab_size": 248320,
            "eos_token_id": 9,
        },
        160,
        "mmap",
    ),
}


def stored_rows(ids: Ids, dim: int) -> torch.Tensor:
    """uint8 [n, row_bytes]: scale 1, bias 0, and codes that are the id and words of its own."""
    words = np.arange(dim // 8, dtype=np.uint32) * np.uint32(2654435761) | np.uint32(1)
    words[0] = 1
    rows = np.empty((len(ids), 1 + dim // 8), np.uint32)
    rows[:, 0] = np.array([1, 0], np.float16).view(np.uint32)[0]
    np.multiply(ids.astype(np.uint32)[:, None], words, out=rows[:, 1:])
    return torch.from_numpy(rows.view(np.uint8))


def write_store(folder: Path, name: str, hasher: NgramHasher, dim: int, rows: int) -> Manifest:
    """Publish one table of such rows as `name@1`, with the hash parameters of the real model."""
    row_bytes, table, store = FORMAT.row_bytes(dim), hasher.tables[0].name, Store(folder)
    count = rows_per_part(row_bytes, DEFAULT_PART_BYTES)
    with open_draft(store, name, "1") as draft, Progress() as progress:
        draft.resume(f"{rows} rows of {dim}")
        task = progress.add_task(f"{rows:,} rows of {row_bytes} bytes", total=rows)
        parts = []
        for index, first_row in enumerate(range(0, rows, count)):
            last_row = min(first_row + count, rows)
            part = NewPart(table, index, first_row, last_row - first_row, dim, FORMAT)
            with PartWriter(draft.folder, part) as writer:
                for begin in range(first_row, last_row, CHUNK_ROWS):
                    ids = np.arange(begin, min(begin + CHUNK_ROWS, last_row))
                    writer.write(stored_rows(ids, dim))
                    progress.advance(task, len(ids))
                parts.append(writer.finish())
        described = Table(
            name=table,
            rows=rows,
            dim=dim,
            dtype=FORMAT.name,
            row_bytes=row_bytes,
            rows_per_part=count,
            parts=tuple(parts),
        )
        manifest = Manifest(
            model=name, version="1", family=hasher.family, hash_params=hasher.params(), tables=(described,)
        )
        draft.publish(manifest)
    return manifest


def forget_pages(folder: Path) -> None:
    """Have the kernel drop what it keeps of these files."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> float:
    """Seconds to read the files once: what any start takes at least."""
    begun = time.perf_counter()
    buffer = bytearray(8 << 20)
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begun


@contextmanager
def serving(folder: Path, tier: str, shards: int, log: Path) -> Iterator[tuple[str, float]]:
    """`up` over the store: its address, and seconds from its start until everything was served."""
    begun = time.perf_counter()
    with service(folder, log, f"--shards={shards}", f"--tier={tier}", seconds=900) as (address, _):
        yield address, time.perf_counter() - begun


def memory(address: str, payload: int) -> dict[str, float]:
    """Resident bytes of all shards over the rows' own, and how much of them lies in huge pages."""
    shards = get_status(address).shards
    anonymous = sum(shard.stats.anonymous_bytes for shard in shards)
    pages = 0
    for shard in shards:
        rollup = Path(f"/proc/{shard.stats.pid}/smaps_rollup").read_text()
        pages += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith(HUGE))
    return {
        "anonymous_to_payload": anonymous / payload,
        "file_to_payload": sum(shard.stats.file_bytes for shard in shards) / payload,
        "huge_pages_to_payload": pages / payload,
    }


def lookups(
    client: EmbeddingClient, manifest: Manifest, requests: Callable[[], Ids], tokens: int, seconds: float
) -> dict[str, Any]:
    """Look up in a closed loop. Every row of every answer is compared, outside of what is timed."""
    [table] = manifest.tables
    times, wrong, end = [], 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        ids = requests()
        begun = time.perf_counter()
        rows = client.lookup(f"{manifest.model}/{table.name}", torch.from_numpy(ids), dtype=torch.float16)
        times.append(time.perf_counter() - begun)
        expected = FORMAT.decode(stored_rows(ids, table.dim), table.dim, dtype=torch.float16)
        wrong += int((rows != expected).any(dim=1).sum())
    p50, p99 = (float(value) for value in np.percentile(times, (50, 99)) * 1e3)
    rate = len(times) * len(ids) / sum(times)
    return {"tokens": tokens, "lookups": len(times), "wrong": wrong, "p50": p50, "p99": p99, "rows_per_second": rate}


def sources(hasher: NgramHasher, rows: int) -> dict[str, Callable[[int], Ids]]:
    """For each kind, a function of a number of tokens that gives row ids: a text's in order, or random ones."""
    heads = hasher.num_heads
    text = hasher.row_ids(torch.tensor([text_tokens()]))[0, :, 0].numpy() % rows
    random, position = np.random.default_rng(0), 0

    def of_text(tokens: int) -> Ids:
        nonlocal position
        position = (position + tokens) % (len(text) - tokens)
        return np.ascontiguousarray(text[position : position + tokens]).reshape(-1)

    return {"text": of_text, "random": lambda tokens: random.integers(0, rows, tokens * heads)}


def main() -> None:
    """Print what was seen, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=GEOMETRIES)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the rows")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--tier", help="default: ram for longcat, mmap for the others")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--folder", type=Path, default=Path("build/full_size"))
    parser.add_argument("--keep", action="store_true", help="leave the store where it is")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for full_size_MODEL.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    geometry, console = GEOMETRIES[arguments.model], Console(highlight=False)
    tier, folder = arguments.tier or geometry.tier, arguments.folder
    hasher = NgramHasher.from_config(geometry.config)
    rows = int(hasher.tables[0].rows * arguments.fraction)
    if not Store(folder).has(arguments.model, "1"):
        begun = time.perf_counter()
        write_store(folder, arguments.model, hasher, geometry.dim, rows)
        console.print(f"written in {time.perf_counter() - begun:.0f} s")
    manifest = Store(folder).manifest(arguments.model, "1")
    [table] = manifest.tables
    found: dict[str, Any] = {"rows": table.rows, "bytes": manifest.bytes, "tier": tier, "shards": arguments.shards}
    found["parameters"] = table.rows * table.dim
    forget_pages(folder)
    found["read_cold_s"] = read_all(folder)
    loads = []
    for state in ("cold", "warm"):
        if state == "cold":
            forget_pages(folder)
        with serving(folder, tier, arguments.shards, folder / "up.log") as (address, seconds):
            found[f"serve_{state}_s"] = seconds
            if state == "warm":
                continue
            found["memory_at_start"] = memory(address, manifest.bytes)
            with EmbeddingClient(address, timeout=60, near=False) as client:
                for kind, ids_of in sources(hasher, table.rows).items():
                    for tokens in TOKENS:
                        for pages in ("cold", "warm") if tier == "mmap" else ("warm",):
                            if pages == "cold":
                                forget_pages(folder)
                            seen = lookups(
                                client,
                                manifest,
                                lambda ids_of=ids_of, tokens=tokens: ids_of(tokens),  # type: ignore[misc]
                                tokens,
                                arguments.seconds,
                            )
                            loads.append({"ids": kind, "pages": pages, **seen})
            found["memory_after"] = memory(address, manifest.bytes)
    found["lookups"] = loads
    found["memory_of_machine"] = psutil.virtual_memory().total
    show(console, found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"full_size_{arguments.model}.json").write_text(json.dumps(found, indent=1))
    if not arguments.keep:
        shutil.rmtree(folder)


def show(console: Console, found: dict[str, Any]) -> None:
    """Two tables."""
    sheet = Sheet(title=f"{found['parameters']:,} parameters, {found['bytes']:,} bytes, {found['tier']}")
    sheet.add_column("what")
    sheet.add_column("seen", justify="right")
    for name in ("read_cold_s", "serve_cold_s", "serve_warm_s"):
        sheet.add_row(name, f"{found[name]:.1f}")
    for when in ("memory_at_start", "memory_after"):
        for name, value in found[when].items():
            sheet.add_row(f"{when}: {name}", f"{value:.3f}")
    console.print(sheet)
    sheet = Sheet(title="lookups, one client, as float16")
    for column in ("ids", "pages", "tokens", "lookups", "wrong rows", "p50 ms", "p99 ms", "rows/s"):
        sheet.add_column(column, justify="right")
    for each in found["lookups"]:
        sheet.add_row(
            each["ids"],
            each["pages"],
            str(each["tokens"]),
            f"{each['lookups']:,}",
            str(each["wrong"]),
            f"{each['p50']:.2f}",
            f"{each['p99']:.2f}",
            f"{each['rows_per_second']:,.0f}",
        )
    console.print(sheet)


if __name__ == "__main__":
    main()
