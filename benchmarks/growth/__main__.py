"""How cost grows with shards, parts, tables and clients, and what breaks first: `python -m benchmarks.growth`.

    python -m benchmarks.growth --quick         three sizes of service, smaller fleets; under three minutes

1. Lookups: 1 to 16 clients ask `up` with 1 to 16 shards. CPU of clients and shards is counted for each lookup. A model
   (`benchmarks/growth/model.py` has its formula) is fitted to a few of the points, and predicts the others.
2. Connections: one shard with up to 1,000.
3. Controller: a real one, with up to 1,000 registrations of shards that hold nothing.
4. Extrapolation: the model at 1,000 shards and 10,000 workers.

Every slice of a point runs beside one of a yardstick, the 12-row lookup of one shard, and counts in its units. What
makes the machine slow for one does so for the other. Writes growth.md, growth.json and plots into --out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.growth import connections, extrapolation, report, swarm
from benchmarks.growth.lookups import make_store, running
from benchmarks.growth.prediction import FIT_SHARDS, POINTS, QUICK_POINTS, in_seconds, measure, predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes of service, smaller fleets")
    parser.add_argument("--shards", type=int, nargs="+", help="sizes of service; 1 and 8 are always among them")
    parser.add_argument("--rounds", type=int, help="slices of each point; default 4, quick: 2")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a slice")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for what is written")
    arguments = parser.parse_args()
    sizes = sorted({*FIT_SHARDS, *(arguments.shards or ((2,) if arguments.quick else (2, 4, 16)))})
    rounds = arguments.rounds or (2 if arguments.quick else 4)
    points = QUICK_POINTS if arguments.quick else POINTS
    console = Console(highlight=False, width=150)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="growth-") as work:
        folder = Path(work)
        store = make_store(folder)
        measured = []
        (folder / "yardstick").mkdir()
        with running(store, folder / "yardstick", 1, 1) as yardstick:
            for shards in sizes:
                with running(store, folder, shards, max(point.clients for point in points)) as service:
                    measured += measure(service, yardstick, points, rounds, arguments.seconds)
                console.print(f"{shards} shards measured after {time.monotonic() - begun:.0f} s")
        counts, idle_seconds = ((1, 200), 3.0) if arguments.quick else ((1, 250, 1000), 12.0)
        held = connections.measure(store, folder, counts, idle_seconds)
        fleets = [
            swarm.measure(folder, shards, parts)
            for shards, parts in (((200, 2000),) if arguments.quick else ((100, 1000), (1000, 10_000)))
        ]
    results = in_seconds(measured)
    model = predict(results)
    future = extrapolation.table(model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "lookups": [asdict(each) for each in results],
        "model": {"client": model.client.tolist(), "shards": model.shards.tolist()},
        "connections": [asdict(each) for each in held],
        "controller": [asdict(each) for each in fleets],
        "extrapolation": [asdict(each) for each in future],
    }
    (arguments.out / "growth.json").write_text(json.dumps(found, indent=1))
    text = report.text(results, model, held, fleets, future)
    console.print(text, markup=False)
    (arguments.out / "growth.md").write_text(text)
    report.plots(results, model, arguments.out)
    console.print(f"{time.monotonic() - begun:.0f} s; tables, JSON and plots are in {arguments.out}")


if __name__ == "__main__":
    main()
