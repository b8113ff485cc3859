"""What rounds gave, as rows for a table, JSON and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.data import HEADS
from benchmarks.rounds import Outcome, Outcomes, Slice

# What all ratios are to: the fastest simple thing one can write with grpcio.
FLOOR = "raw gRPC stream"
Record = dict[str, Any]
COLUMNS = {
    "peer": "peer",
    "shards": "shards",
    "ids": "ids",
    "tokens": "tokens",
    "clients": "clients",
    "rate": "due/s",
    "unsent": "unsent",
    "p50_ms": "p50 ms",
    "p90_ms": "p90 ms",
    "p99_ms": "p99 ms",
    "rows_per_second": "rows/s",
    "p50_ratio": "p50 to floor",
    "rate_ratio": "rows/s to floor",
    "client_cpu_ms": "client CPU ms",
    "server_cpu_ms": "server CPU ms",
    "cpu_ratio": "CPU to floor",
}


def records(outcomes: Outcomes, **more: Any) -> list[Record]:
    """One for each peer and slice. Ratios are medians of the rounds' ratios to the floor. CPU is that of one lookup."""
    return [_record(name, what, rounds, outcomes.get((FLOOR, what)), more) for (name, what), rounds in outcomes.items()]


def _record(name: str, what: Slice, rounds: list[Outcome], floor: list[Outcome] | None, more: Record) -> Record:
    latencies = np.concatenate([outcome.load.latencies for outcome in rounds])
    p50, p90, p99 = (float(value) for value in np.percentile(latencies, (50, 90, 99)) * 1e3)
    seconds = sum(outcome.load.seconds for outcome in rounds)
    record = {
        "peer": name,
        "ids": what.ids,
        "tokens": what.tokens,
        "clients": what.clients,
        "rate": what.rate,
        "lookups": len(latencies),
        "unsent": sum(outcome.load.errors["unsent"] for outcome in rounds),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "rows_per_second": len(latencies) * what.tokens * HEADS / seconds,
        "client_cpu_ms": 1e3 * sum(outcome.client_cpu for outcome in rounds) / len(latencies),
        "server_cpu_ms": 1e3 * sum(outcome.server_cpu for outcome in rounds) / len(latencies),
        **more,
    }
    if floor:
        pairs = list(zip(rounds, floor, strict=True))
        record["p50_ratio"] = float(np.median([a.load.percentile(50) / b.load.percentile(50) for a, b in pairs]))
        record["rate_ratio"] = float(np.median([_throughput(a) / _throughput(b) for a, b in pairs]))
        record["cpu_ratio"] = float(np.median([_cpu(a) / _cpu(b) for a, b in pairs]))
    return record


def plot_all(found: Mapping[str, Sequence[Record]], folder: Path) -> None:
    """Plots of the sections that there are: latency, batch, shards, clients and open, each a .png."""
    import matplotlib as mpl

    mpl.use("Agg")
    if "peers" in found:
        _save(folder / "latency.png", _latencies, found["peers"])
        _save(folder / "batch.png", _lines, found["peers"], "tokens", "rows_per_second", "tokens a lookup")
    if "shards" in found:
        chosen = [record for record in found["shards"] if record["tokens"] == 64 and record["clients"] == 4]
        _save(folder / "shards.png", _lines, chosen, "shards", "rows_per_second", "shards (4 clients, 64 tokens)")
    if "clients" in found:
        _save(folder / "clients.png", _lines, found["clients"], "clients", "rows_per_second", "clients (64 tokens)")
    if "open" in found:
        chosen = [record for record in found["open"] if record["tokens"] == 64]
        _save(folder / "open.png", _lines, chosen, "rate", "p99_ms", "lookups due a second (64 tokens)")


def _save(path: Path, draw: Callable[..., None], *arguments: Any) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 6), layout="constrained")
    draw(axes, *arguments)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(axes: Any, found: Sequence[Record], over: str, what: str, label: str) -> None:
    for name in dict.fromkeys(record["peer"] for record in found):
        mine = sorted((record[over], record[what]) for record in found if record["peer"] == name)
        axes.plot(*zip(*mine, strict=True), marker="o", label=name)
    axes.set(xlabel=label, ylabel=COLUMNS[what], xscale="log", yscale="log")
    axes.set_xticks(sorted({record[over] for record in found}), [f"{x:g}" for x in sorted({r[over] for r in found})])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def _latencies(axes: Any, found: Sequence[Record]) -> None:
    """p50, p90 and p99 of each peer, side by side for each batch."""
    names = list(dict.fromkeys(record["peer"] for record in found))
    batches = sorted({record["tokens"] for record in found})
    width = 0.8 / len(batches)
    for index, tokens in enumerate(batches):
        mine = {record["peer"]: record for record in found if record["tokens"] == tokens}
        places = [place + index * width for place, name in enumerate(names) if name in mine]
        for key, alpha in (("p99_ms", 0.25), ("p90_ms", 0.5), ("p50_ms", 1.0)):
            heights = [mine[name][key] for name in names if name in mine]
            label = f"{tokens} tokens" if key == "p50_ms" else None
            axes.bar(places, heights, width * 0.9, color=f"C{index}", alpha=alpha, label=label)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names, rotation=20, ha="right")
    axes.set(yscale="log", ylabel="ms: p50, p90 (paler), p99 (palest)")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()


def _throughput(outcome: Outcome) -> float:
    return len(outcome.load.latencies) / outcome.load.seconds


def _cpu(outcome: Outcome) -> float:
    return (outcome.client_cpu + outcome.server_cpu) / len(outcome.load.latencies)


def show(title: str, found: Sequence[Record], console: Console) -> str:
    """Print a table and return the same in Markdown. Columns that say the same in every row are left out."""
    found = sorted(found, key=lambda record: (record["tokens"], record["clients"], record["rate"] or 0))
    telling = ("shards", "ids", "tokens", "clients", "rate", "unsent")
    columns = [
        key
        for key in COLUMNS
        if any(record.get(key) is not None for record in found)
        and (key not in telling or len({record.get(key) for record in found}) > 1)
    ]
    table = Table(title=title, title_justify="left")
    for key in columns:
        table.add_column(COLUMNS[key], no_wrap=key == "peer", justify="left" if key in ("peer", "ids") else "right")
    rows = [[_text(key, record.get(key)) for key in columns] for record in found]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [[COLUMNS[key] for key in columns], ["---" if key in ("peer", "ids") else "---:" for key in columns], *rows]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _text(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "rows_per_second" or key == "rate":
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:.2f}" if key.endswith("ratio") else f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return str(value)
