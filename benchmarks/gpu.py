"""Rows from a GPU's memory, against what its memory and its bus can do: `python -m benchmarks.gpu`.

The floors: a copy within the device's memory (bytes read and written), and a copy from it to page-locked memory.
FBGEMM's CUDA kernel decodes the same rows beside. The share of its values that differ from its CPU kernel's is shown.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Report

from benchmarks.ngram import seconds
from embedding_service.errors import InvalidRequest
from embedding_service.formats import get_format
from embedding_service.rows.cuda import CudaCachedTable, CudaTable, require_cuda
from embedding_service.rows.pool import Pool
from embedding_service.rows.ram import RamTable
from embedding_service.store.manifest import Table, part_file
from embedding_service.store.parts import NewPart, PartWriter, rows_per_part

DIM, MIB = 256, 1 << 20
BATCHES = (12, 768, 12_288, 98_304)


def make_table(folder: Path, dtype: str, part_bytes: int, parts: int) -> tuple[Table, Path]:
    """A table whose parts all have the same random rows, and the one file they are in."""
    row_format = get_format(dtype)
    rows = rows_per_part(row_format.row_bytes(DIM), part_bytes)
    generator = torch.Generator().manual_seed(0)
    with PartWriter(folder, NewPart(dtype, 0, 0, rows, DIM, row_format)) as writer:
        for begin in range(0, rows, 65_536):
            count = min(65_536, rows - begin)
            writer.write(row_format.encode(torch.randn(count, DIM, generator=generator)))
        first = writer.finish()
    table = Table(
        name=dtype,
        rows=rows * parts,
        dim=DIM,
        dtype=dtype,
        row_bytes=row_format.row_bytes(DIM),
        rows_per_part=rows,
        parts=tuple(
            first.model_copy(update={"index": i, "first_row": i * rows, "file": part_file(dtype, i)})
            for i in range(parts)
        ),
    )
    return table, folder / first.file


def measure(rows: CudaTable, floor: float, skewed: bool) -> Iterator[tuple[str, ...]]:
    """Cells of a line for each batch and encoding. `floor` is bytes a second to the host."""
    generator = np.random.default_rng(1)
    for batch in BATCHES:
        ids = generator.integers(0, rows.table.rows, batch)
        if skewed:  # a thousandth of the rows gets nine tenths of the lookups
            ids = np.where(generator.random(batch) < 0.9, ids % max(1, rows.table.rows // 1000), ids)
        for encoding in ("stored", "fp16", "fp32"):
            taken = seconds(partial(rows.gather, ids, encoding))
            sent = rows.gather(ids[:1], encoding).nbytes * batch / taken
            yield (
                rows.table.dtype,
                f"{batch:,}",
                encoding,
                f"{taken * 1e6:,.0f}",
                f"{batch / taken / 1e6:.2f}",
                f"{sent / 1e9:.2f}",
                f"{sent / floor:.2f}",
            )


def selecting(rows: CudaTable, floor: float) -> str:
    """index_select alone, which leaves the rows on the device, against a copy there. Both read and write."""
    where = torch.randint(len(rows._rows), (1 << 20,), device=rows._rows.device)

    def run() -> None:
        rows._rows.index_select(0, where)
        synchronize(rows._rows)

    rate = 2 * len(where) * rows.table.row_bytes / seconds(run)
    return f"{rows.table.dtype}: {rate / 1e9:,.0f} GB/s of rows on the device, {rate / floor:.2f} of a copy"


def fbgemm_beside(path: Path, table: Table, device: str) -> str:
    """FBGEMM's module for n-bit tables on the device: its time, and how many of its float32 values differ."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    part = table.parts[0]
    ram = RamTable(table)
    ram.load(part, path)
    count = min(part.rows, 12_288)
    exact = torch.from_numpy(ram.gather(np.arange(count), "fp32")).view(torch.float32)
    kinds = {"fp16": SparseType.FP16, "int8": SparseType.INT8, "int4": SparseType.INT4}
    place = EmbeddingLocation.HOST if device == "cpu" else EmbeddingLocation.DEVICE
    kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(table.name, count, DIM, kinds[table.dtype], place)],
        device=device,
        pooling_mode=PoolingMode.NONE,
        output_dtype=SparseType.FP32,
    )
    kernel.initialize_weights()
    stored = torch.from_numpy(ram.gather(np.arange(count), "stored"))
    ((weights, _),) = kernel.split_embedding_weights(split_scale_shifts=False)
    weights[:, : stored.shape[1]].copy_(stored)
    ids = torch.arange(count, dtype=torch.int32, device=device)
    offsets = torch.tensor([0, count], dtype=torch.int32, device=device)

    def run() -> torch.Tensor:
        values = kernel(ids, offsets)
        synchronize(values)
        return values

    differing = (run().cpu() != exact).float().mean().item()
    ram.close()
    return f"{table.dtype}: {count / seconds(run) / 1e6:,.1f} M rows/s on the device, {differing:.1%} of values differ"


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def copying(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes a second of a copy."""

    def run() -> None:
        target.copy_(source, non_blocking=True)
        synchronize(source)

    return source.nbytes / seconds(run)


def run(device: str, cached: bool, part_bytes: int, parts: int, console: Console) -> None:
    """Measure and print everything. On the device "cpu" the figures mean nothing. It shows that this runs."""
    source = torch.empty(part_bytes, dtype=torch.uint8, device=device)
    copies = 2 * copying(source, torch.empty_like(source))
    bus = copying(source, torch.empty(part_bytes, dtype=torch.uint8, pin_memory=device != "cpu"))
    console.print(f"floors: {copies / 1e9:,.0f} GB/s within the device, {bus / 1e9:.1f} GB/s to the host")
    report = Report(title="gathers by one thread, to the host")
    for column in ("dtype", "rows", "encoding", "us", "M rows/s", "GB/s", "to the bus"):
        report.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("fp16", "int8", "int4"):
            table, path = make_table(Path(folder), dtype, part_bytes, parts)
            if cached:
                CudaCachedTable.prepare(table.bytes)
                rows: CudaTable = CudaCachedTable(table)
            else:
                rows = CudaTable(table, pool=Pool(torch.empty(table.bytes, dtype=torch.uint8, device=device)))
            for part in table.parts:
                rows.load(part, path)
            for cells in measure(rows, bus, skewed=cached):
                report.add_row(*cells)
            if not cached:
                console.print("index_select,", selecting(rows, copies))
                console.print("FBGEMM's kernel,", fbgemm_beside(path, table, device))
            rows.close()
    console.print(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=4, help="size of each table")
    parser.add_argument("--cached", action="store_true", help="tier cuda-cached, with skewed ids")
    options = parser.parse_args()
    try:
        require_cuda()
    except InvalidRequest as error:
        raise SystemExit(f"error: {error}") from None
    run("cuda", options.cached, 256 * MIB, options.gib * 4, Console())


if __name__ == "__main__":
    main()
