"""What an overlay costs: gathers over it beside the base's, memory, and the time from publishing to being served.

    python -m benchmarks.overlays [--fraction 0.1] [--share 0.04] [--folder build/overlays] [--keep]

Makes a store with LongCat-Flash-Lite's geometry, or a fraction of its rows, in int4. (All rows take 16.2 GB, on disk
and in memory.) First, in this process, it gathers random rows of 1 and of 1,024 tokens: of the base, of a version that
replaces a share of the rows, and of that version folded in. They take turns, and a ratio is the median of all rounds.
Then `up` serves the base, and the share is published over it while it serves.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.full_size import FORMAT, GEOMETRIES, memory, serving, stored_rows, write_store
from embedding_service import EmbeddingClient, NgramHasher
from embedding_service.client.status import get_status
from embedding_service.memory import resident_bytes
from embedding_service.rows.base import Ids, TableRows
from embedding_service.rows.overlaid import OverlaidTable
from embedding_service.rows.ram import RamTable
from embedding_service.store.manifest import Manifest
from embedding_service.store.overlays import read_overlay
from embedding_service.store.publishing import publish_rows
from embedding_service.store.store import Store

MODEL, HEADS = "longcat", 12
# Gathers of a round for each number of tokens, and rounds.
TURNS, ROUNDS = {1: 300, 1024: 5}, 40


def is_replaced(ids: Ids, share: float) -> np.ndarray:
    """Whether a row is one of the share, by its id alone."""
    mixed = ids.astype(np.uint32) * np.uint32(2654435761) ^ (ids.astype(np.uint32) >> np.uint32(7))
    return (mixed * np.uint32(2246822519)) < share * 2**32


def new_rows(ids: Ids, dim: int) -> torch.Tensor:
    """Rows that name another id than their own, as the store has them."""
    return stored_rows(ids ^ 1, dim)


def write_rows(path: Path, manifest: Manifest, share: float) -> int:
    """A file for `publish`. Returns how many rows it has."""
    [table] = manifest.tables
    ids = np.flatnonzero(is_replaced(np.arange(table.rows), share))
    rows = {f"{table.name}.ids": torch.from_numpy(ids), f"{table.name}.rows": new_rows(ids, table.dim)}
    save_file(rows, path)
    return len(ids)


def gathers(store: Store, base: Manifest, over: Manifest) -> None:
    """Print times of gathers in this process, and the memory that the overlay takes."""
    [table] = base.tables
    ground = _ground(store, base)
    before = sum(resident_bytes())
    tables: dict[str, TableRows] = {"base": ground, "overlaid": _held(store, over, ground)}
    took = sum(resident_bytes()) - before
    print(f"memory of the overlay: {took:,} bytes, {took / base.bytes:.4f} of the base's ({over.replaced_rows:,} rows)")
    _compare(tables, table.rows)
    copy = _ground(store, base)
    folded = _held(store, over, copy)
    for part in table.parts:
        folded.fold(part)
    _compare({"base": ground, "folded": folded}, table.rows)
    for each in (ground, copy):
        each.close()


def _ground(store: Store, base: Manifest) -> RamTable:
    [table] = base.tables
    ground = RamTable(table)
    for part in table.parts:
        ground.load(part, store.part_path(base, part))
    return ground


def _held(store: Store, over: Manifest, ground: TableRows) -> OverlaidTable:
    [table] = over.tables
    held, overlays = OverlaidTable(table, ground, over.replaced_rows), over.overlays(table.name)
    for part in table.parts:
        path = store.fetch_overlay(over, table, overlays[part.index], Path())
        held.hold(part, read_overlay(path, table, overlays[part.index]))
    return held


def _compare(tables: dict[str, TableRows], rows: int) -> None:
    """Print what the second takes beside the first."""
    random = np.random.default_rng(3)
    (first, one), (second, other) = tables.items()
    for tokens, turns in TURNS.items():
        for encoding in ("stored", "fp16"):
            times = []
            for _ in range(ROUNDS):
                ids = [random.integers(0, rows, tokens * HEADS) for _ in range(turns)]
                times.append([_seconds(each.gather, ids, encoding) / turns for each in (one, other, one)])
            before, after, again = np.array(times).T * 1e6
            beside = (before + again) / 2
            print(
                f"{tokens} tokens, {encoding}: {first} {np.median(beside):.1f} us, {second} {np.median(after):.1f} us; "
                f"rows/s of {second} over {first} {np.median(beside / after):.2f}, {np.median(after - beside):+.1f} us"
            )


def _seconds(gather: Callable[[Ids, str], object], requests: list[Ids], encoding: str) -> float:
    begun = time.perf_counter()
    for ids in requests:
        gather(ids, encoding)
    return time.perf_counter() - begun


def publishing(folder: Path, base: Manifest, rows: Path, share: float, shards: int) -> None:
    """Print how long it takes from the command to a served version, and what shards hold before and after."""
    [table] = base.tables
    with serving(folder, "ram", shards, folder / "up.log") as (address, _), EmbeddingClient(address) as client:
        before = memory(address, base.bytes)["anonymous_to_payload"]
        begun = time.perf_counter()
        manifest = publish_rows(folder, base.full_name, rows)
        written = time.perf_counter() - begun
        while not _serves(address, manifest.version):
            time.sleep(0.05)
        print(f"published in {written:.1f} s, served by all shards after {time.perf_counter() - begun:.1f} s")
        after = memory(address, base.bytes)["anonymous_to_payload"]
        print(f"memory of all shards over the base's rows: {before:.3f} before, {after:.3f} with the overlay")
        ids = np.random.default_rng(4).integers(0, table.rows, 100_000)
        got = client.lookup(f"{MODEL}@{manifest.version}/{table.name}", torch.from_numpy(ids))
        stored = torch.where(
            torch.from_numpy(is_replaced(ids, share))[:, None], new_rows(ids, table.dim), stored_rows(ids, table.dim)
        )
        wrong = int((got != FORMAT.decode(stored, table.dim)).any(1).sum())
        print(f"{len(ids):,} rows compared, {wrong} wrong")


def _serves(address: str, version: str) -> bool:
    return any(each.serving and each.model.version == version for each in get_status(address).models)


def main() -> None:
    """Print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=0.1, help="of the model's rows")
    parser.add_argument("--share", type=float, default=0.04, help="of rows that are replaced")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build/overlays"))
    parser.add_argument("--keep", action="store_true", help="leave the store where it is")
    parser.add_argument("--only-publish", action="store_true", help="gather nothing in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    geometry, folder = GEOMETRIES[MODEL], arguments.folder
    hasher = NgramHasher.from_config(geometry.config)
    if not Store(folder).has(MODEL, "1"):
        write_store(folder, MODEL, hasher, geometry.dim, int(hasher.tables[0].rows * arguments.fraction))
    base = Store(folder).manifest(MODEL, "1")
    rows = folder / "rows.safetensors"
    count = write_rows(rows, base, arguments.share)
    print(f"{base.tables[0].rows:,} rows, of which {count:,} are replaced")
    if not arguments.only_publish:
        over = publish_rows(folder, base.full_name, rows, name="beside")
        gathers(Store(folder), base, over)
        shutil.rmtree(folder / "beside")
    publishing(folder, base, rows, arguments.share, arguments.shards)
    if not arguments.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
