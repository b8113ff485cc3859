"""What was found, as Markdown and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.growth.connections import Held
from benchmarks.growth.extrapolation import SHARDS, STEPS, WORKERS, Future
from benchmarks.growth.model import CLIENT_TERMS, SHARD_TERMS, Model
from benchmarks.growth.prediction import FIT_SHARDS, GOAL, Result
from benchmarks.growth.swarm import Fleet


def text(
    results: Sequence[Result], model: Model, held: Sequence[Held], fleets: Sequence[Fleet], future: Sequence[Future]
) -> str:
    """All sections in Markdown."""
    sections = {
        "Constants of the model": _constants(model),
        "Predicted and seen": _accuracy(results) + "\n\n" + _by_shards(results),
        "All points": _points(results),
        "Connections of one shard": _connections(held),
        "A controller and its shards": _fleets(fleets),
        f"{SHARDS:,} shards and {WORKERS:,} workers, {STEPS} decode steps a second each": _future(future),
    }
    return "\n\n".join(f"### {title}\n\n{body}" for title, body in sections.items()) + "\n"


def _sheet(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _constants(model: Model) -> str:
    """Microseconds, or nanoseconds for a byte."""
    rows = [
        (who, term, f"{value * (1e9 if 'byte' in term else 1e6):.3g}", "ns" if "byte" in term else "µs")
        for who, terms, values in (("client", CLIENT_TERMS, model.client), ("shards", SHARD_TERMS, model.shards))
        for term, value in zip(terms, values, strict=True)
    ]
    return _sheet(("of", "a", "CPU", ""), rows)


def _accuracy(results: Sequence[Result]) -> str:
    fitted = sum(result.fitted for result in results)
    unseen = [result for result in results if not result.fitted]
    off = np.abs(np.array([result.ratios for result in unseen]) - 1)
    worst = max(unseen, key=lambda result: abs(result.ratios[2] - 1))
    requests = [each.load.requests / each.seen.requests for each in results]
    nbytes = [each.load.nbytes / each.seen.nbytes for each in results]
    share = ", ".join(
        f"{name} {np.count_nonzero(column <= GOAL)} (median {np.median(column):.0%} off)"
        for name, column in zip(("client", "shards", "both together"), off.T, strict=True)
    )
    return (
        f"Fitted to {fitted} points with {' and '.join(map(str, FIT_SHARDS))} shards; of {len(unseen)} others, within "
        f"{GOAL:.0%}: {share}. The worst of both together: {_name(worst)}, predicted {worst.ratios[2]:.2f} of what was "
        f"seen. Requests a lookup, expected over sent: {min(requests):.3f} to {max(requests):.3f} in all "
        f"{len(results)} points; bytes {min(nbytes):.3f} to {max(nbytes):.3f}."
    )


def _name(result: Result) -> str:
    point = result.point
    return f"{point.model}, {point.tokens} tokens, {result.shards} shards, {point.clients} clients"


def _by_shards(results: Sequence[Result]) -> str:
    """Predicted over seen, by services, for points that the model was not fitted to."""
    rows = []
    for shards in sorted({result.shards for result in results}):
        ratios = np.array([each.ratios for each in results if each.shards == shards and not each.fitted])
        within = np.abs(ratios - 1) <= GOAL
        spread = [f"{low:.2f} to {high:.2f}" for low, high in zip(ratios.min(0), ratios.max(0), strict=True)]
        rows.append((shards, len(ratios), *spread, *within.sum(0)))
    head = (
        "shards",
        "points",
        "client",
        "shards' CPU",
        "both",
        *(f"{who} within" for who in ("client", "shards", "both")),
    )
    return _sheet(head, rows)


def _points(results: Sequence[Result]) -> str:
    rows = [
        (
            each.shards,
            each.point.model,
            each.point.tokens,
            each.point.clients,
            "fitted" if each.fitted else "",
            f"{each.load.requests:.2f}",
            f"{each.seen.requests:.2f}",
            f"{1e3 * (each.seen.client - each.seen.hashing):.3f}",
            f"{each.ratios[0]:.2f}",
            f"{1e3 * each.seen.shards:.3f}",
            f"{each.ratios[1]:.2f}",
            f"{each.ratios[2]:.2f}",
            f"{1e3 * each.seen.p50:.3f}",
            f"{each.seen.rate:,.0f}",
            f"{each.seen.cores:.2f}",
        )
        for each in results
    ]
    head = (
        "shards",
        "model",
        "tokens",
        "clients",
        "",
        "requests expected",
        "sent",
        "client CPU ms",
        "predicted / seen",
    )
    return _sheet((*head, "shards' CPU ms", "predicted / seen", "both", "p50 ms", "lookups/s", "cores"), rows)


def _connections(held: Sequence[Held]) -> str:
    first, kib = held[0], 1 << 10
    rows = [
        (
            f"{each.connections:,}",
            f"{each.resident / kib / kib:.0f}",
            f"{(each.resident - first.resident) / kib / max(each.connections - first.connections, 1):.0f}",
            each.files,
            f"{1e3 * each.idle:.1f}",
            f"{1e6 * each.per_lookup:.0f}",
            f"{1e6 * each.turns:.0f}",
            f"{each.client_bytes / kib:.0f}",
        )
        for each in held
    ]
    head = ("connections", "shard's memory MiB", "KiB each", "open files", "idle: CPU ms a second")
    tail = ("12-row lookup: CPU µs", "on all connections in turn: CPU µs", "KiB each at the client")
    return _sheet((*head, *tail), rows)


def _fleets(fleets: Sequence[Fleet]) -> str:
    rows = [
        (
            f"{each.shards:,}",
            f"{each.parts:,}",
            f"{each.served:.1f}",
            each.lost,
            f"{each.cpu:.1f}",
            f"{each.routings:,}",
            f"{each.routing_bytes / 1024:.0f}",
            f"{1e3 * each.parse:.1f}",
            f"{each.idle:.3f}",
            f"{each.whole_again:.1f}",
            f"{1e3 * each.get_routing:.2f}, {1e3 * each.get_known:.2f}",
            f"{each.slowest_status:.1f}",
        )
        for each in fleets
    ]
    head = ("shards", "parts", "served after s", "taken for dead", "CPU s until then", "routings sent", "routing KiB")
    tail = ("client reads it in ms", "idle cores", "whole after 1 % died, s", "CPU ms of a GetRouting: all, known")
    return _sheet((*head, *tail, "slowest status s"), rows)


def _future(future: Sequence[Future]) -> str:
    rows = [
        (
            each.model,
            each.workload,
            each.groups,
            f"{each.requests:.1f}",
            f"{1e3 * each.client:.2f}",
            f"{1e3 * each.shards:.2f}",
            f"{each.rate:,.0f}",
            f"{each.cores:.2f}",
        )
        for each in future
    ]
    head = ("model", "lookup", "shards it lies on", "requests a lookup", "client CPU ms", "shards' CPU ms")
    return _sheet((*head, "requests/s a shard", "cores a shard"), rows)


def plots(results: Sequence[Result], model: Model, folder: Path) -> None:
    """growth_shards.png, growth_clients.png: CPU and lookups/s; growth_predicted.png: predicted against seen."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    for name, over, chosen in (
        ("shards", lambda each: each.shards, [each for each in results if each.point.clients == 1]),
        ("clients", lambda each: each.point.clients, [each for each in results if each.point.model == "wide"]),
    ):
        figure, (costs, rates) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
        for index, (label, line) in enumerate(_lines(chosen, name, over)):
            at = [over(each) for each in line]
            both = [1e3 * (each.seen.client + each.seen.shards) for each in line]
            foretold = [1e3 * (each.predicted_client + each.seen.hashing + each.predicted_shards) for each in line]
            costs.plot(at, both, "o", color=f"C{index}", label=label)
            costs.plot(at, foretold, "-", color=f"C{index}", linewidth=0.8)
            rates.plot(at, [each.seen.rate for each in line], "o-", color=f"C{index}", label=label)
        costs.set(ylabel="CPU ms a lookup, clients and shards; lines: predicted")
        rates.set(ylabel="lookups a second")
        for axes in (costs, rates):
            axes.set(xlabel=name, xscale="log", yscale="log")
            axes.set_xticks(ticks := sorted({over(each) for each in chosen}), ticks)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        rates.legend()
        figure.savefig(folder / f"growth_{name}.png", dpi=110)
        pyplot.close(figure)
    figure, axes = pyplot.subplots(figsize=(6, 6), layout="constrained")
    for fitted, marker in ((False, "o"), (True, "x")):
        mine = [each for each in results if each.fitted == fitted]
        seen = [1e3 * (each.seen.client - each.seen.hashing + each.seen.shards) for each in mine]
        foretold = [1e3 * (each.predicted_client + each.predicted_shards) for each in mine]
        axes.plot(seen, foretold, marker, label="fitted to" if fitted else "predicted")
    ends = np.array(axes.get_xlim())
    for factor in (1 - GOAL, 1, 1 + GOAL):
        axes.plot(ends, ends * factor, "-", color="grey", linewidth=0.8)
    axes.set(xlabel="CPU ms a lookup, seen", ylabel="predicted", xscale="log", yscale="log")
    axes.legend()
    figure.savefig(folder / "growth_predicted.png", dpi=110)
    pyplot.close(figure)


def _lines(results: Sequence[Result], name: str, over: Any) -> list[tuple[str, list[Result]]]:
    """Lines of results that differ in one thing only, in its order. Lines of one point are left out."""
    lines: dict[str, list[Result]] = {}
    for each in sorted(results, key=over):
        other = f"{each.shards} shards" if name == "clients" else each.point.model
        lines.setdefault(f"{other}, {each.point.tokens} tokens", []).append(each)
    return [(label, line) for label, line in lines.items() if len({over(each) for each in line}) > 1]
