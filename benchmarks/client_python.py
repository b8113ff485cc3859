"""What the client's own Python costs a lookup: no service, no socket, and answers that are there at once.

    python -m benchmarks.client_python
    python -m benchmarks.client_python --beside FOLDER      another checkout of this repository, in turns with this one
    python -m benchmarks.client_python --profile            where the time of one kind goes, function by function

A lookup of a token (12 rows) goes its whole way through `EmbeddingClient`. Only the stream is another one: it knows
every request, and its answer is ready. "warm" runs one lookup after the other. "cold" empties the core's caches before
each, as gRPC and the other processes of a real lookup do. Times are microseconds, medians of rounds.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from embedding_service import EmbeddingClient
from embedding_service.client import trips
from embedding_service.client.streams import Ended, Stream
from embedding_service.formats import get_format
from embedding_service.placement.routing import Routing
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import Shape, allocate_streamed

ROWS, DIM, HEADS, LOOKUPS = 1 << 16, 256, 12, 64
# More than a core's own caches hold.
CACHES = np.zeros(4 << 20, np.uint8)


class Kind(NamedTuple):
    """A client and what it asks for: rows stored as `stored`, on so many shards, kept in so many bytes."""

    name: str
    stored: str
    shards: int = 1
    cache_bytes: int = 0


KINDS = (
    Kind("fp16", "fp16"),
    Kind("int8 as fp16", "int8"),
    Kind("fp16, 4 shards", "fp16", shards=4),
    Kind("int8 as fp16, from the client's cache", "int8", cache_bytes=16 << 20),
)


class _Ready(Stream):
    """Answers at once. It makes each answer once."""

    def __init__(self, stored: Any, row_bytes: int) -> None:
        self._stored, self._row_bytes = stored, row_bytes
        self._answers: dict[bytes, bytes] = {}
        self._sent = b""
        self._ended: Ended | None = None

    def send(self, message: bytes) -> None:
        self._sent = message

    def receive(self) -> bytes | Ended:
        if self._ended is not None:
            return self._ended
        answer = self._answers.get(self._sent)
        if answer is None:
            request = wire.StreamLookupRequest.FromString(self._sent).lookup
            ids = np.frombuffer(request.ids_uint32, "<u4")
            answer, rows = allocate_streamed(Shape(len(ids), self._row_bytes, DIM, request.encoding, "1"), 0)
            rows[:] = self._stored[ids]
            self._answers[self._sent] = answer
        return answer

    def cancel(self, code: Any, message: str) -> None:
        self._ended = Ended(code, message)


@contextmanager
def client_of(kind: Kind) -> Iterator[Callable[[int], torch.Tensor]]:
    """Looks up the n-th token's rows. Its rows are right: the first of them are compared."""
    row_format = get_format(kind.stored)
    row_bytes = row_format.row_bytes(DIM)
    random = np.random.default_rng(1)
    stored = random.integers(0, 60, (ROWS, row_bytes)).astype(np.uint8)  # 60: finite, whatever is read as fp16
    ids = [torch.from_numpy(random.integers(0, ROWS, HEADS)) for _ in range(LOOKUPS)]
    with (
        mock.patch.object(trips, "open_stream", lambda channel: _Ready(stored, row_bytes)),
        EmbeddingClient("127.0.0.1:1", near=False, cache_bytes=kind.cache_bytes) as client,
    ):
        # It never asks for a newer routing: nobody is there.
        client._router.adopt(_routing(kind, row_bytes))
        client._router._looks_at = float("inf")
        for each in ids[:4]:
            expected = row_format.decode(torch.from_numpy(stored[each.numpy()]), DIM, dtype=torch.float16)
            if not torch.equal(client.lookup("m@1/t", each, dtype=torch.float16), expected):
                raise SystemExit(f"{kind.name}: wrong rows")
        yield lambda turn: client.lookup("m@1/t", ids[turn % LOOKUPS], dtype=torch.float16)


def _routing(kind: Kind, row_bytes: int) -> Routing:
    part = ROWS // kind.shards
    table = wire.TableInfo(name="t", rows=ROWS, dim=DIM, dtype=kind.stored, row_bytes=row_bytes, rows_per_part=part)
    routing = wire.Routing(term=1, epoch=1)
    for shard in range(kind.shards):
        routing.shards.add(id=f"s{shard}", address=f"127.0.0.1:{1 + shard}")
    owners = wire.TablePlacement(parts=[wire.PartOwners(shards=[shard]) for shard in range(kind.shards)])
    routing.models.add(model=wire.ModelInfo(name="m", version="1", tables=[table]), tables=[owners])
    return Routing(routing)


def measure(lookup: Callable[[int], object], warm: int, cold: int) -> tuple[float, float]:
    """Microseconds of a lookup: warm, the best of `warm` turns of all lookups; cold, the median of so many."""
    best, took = float("inf"), []
    for _ in range(1 + warm):
        begin = time.process_time()
        for turn in range(LOOKUPS):
            lookup(turn)
        best = min(best, (time.process_time() - begin) / LOOKUPS)
    for turn in range(cold):
        CACHES[:] += 1
        begin = time.process_time()
        lookup(turn)
        took.append(time.process_time() - begin)
    return 1e6 * best, 1e6 * float(np.median(took))


def rounds_here() -> None:
    """A child: measures all kinds whenever a line comes, and answers with a line."""
    torch.set_num_threads(1)
    for _ in sys.stdin:
        found = {}
        for kind in KINDS:
            with client_of(kind) as lookup:
                found[kind.name] = measure(lookup, warm=40, cold=150)
        print(json.dumps(found), flush=True)


def in_turns(folders: dict[str, str], rounds: int) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """By checkout and kind: float [rounds, 2], microseconds warm and cold. Another checkout comes first each time."""
    command = [sys.executable, "-m", "benchmarks.client_python", "--child"]
    children = {
        name: subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--child"] if name != "here" else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": folder},
        )
        for name, folder in folders.items()
    }
    found: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in children}
    try:
        for turn in range(rounds):
            for name in sorted(children, reverse=bool(turn % 2)):
                pipe = children[name]
                assert pipe.stdin and pipe.stdout
                pipe.stdin.write("\n")
                pipe.stdin.flush()
                found[name].append(json.loads(pipe.stdout.readline()))
    finally:
        for child in children.values():
            child.communicate()
    return {
        name: {kind.name: np.array([each[kind.name] for each in rounds]) for kind in KINDS}
        for name, rounds in found.items()
    }


def profile() -> None:
    """Print where each kind's time goes."""
    torch.set_num_threads(1)
    for kind in KINDS:
        with client_of(kind) as lookup:
            measure(lookup, warm=10, cold=1)
            profiler = cProfile.Profile()
            profiler.enable()
            for turn in range(5000):
                lookup(turn)
            profiler.disable()
            print(f"\n{kind.name}: 5,000 lookups")
            pstats.Stats(profiler).sort_stats("tottime").print_stats(28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--beside", metavar="FOLDER", help="another checkout, whose client takes turns with this one")
    parser.add_argument("--profile", action="store_true", help="print a profile in place of the table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return rounds_here()
    if options.profile:
        return profile()
    folders = {"here": str(Path.cwd())} | ({"beside": str(Path(options.beside).resolve())} if options.beside else {})
    found = in_turns(folders, options.rounds)
    table = Table("rows", title=f"The client's Python for {HEADS} rows, microseconds", show_lines=False)
    for column in ("warm", "cold", *(("beside: warm", "cold", "here to beside: warm", "cold") * bool(options.beside))):
        table.add_column(column, justify="right")
    for kind in KINDS:
        here = found["here"][kind.name]
        cells = [*np.median(here, 0)]
        if options.beside:
            other = found["beside"][kind.name]
            cells += [*np.median(other, 0), *np.median(here / other, 0)]
        table.add_row(kind.name, *(f"{cell:.{1 if index < 4 else 2}f}" for index, cell in enumerate(cells)))
    Console(highlight=False).print(table)
    return None


if __name__ == "__main__":
    main()
