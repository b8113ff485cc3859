"""`plan`: what a set of nodes would hold, without any server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedding_service.commands.cluster import ReplicasOption
from embedding_service.commands.text import JsonOption, format_bytes, parse_bytes, say_json
from embedding_service.errors import InvalidRequest, NotFound, PlacementError

if TYPE_CHECKING:
    import rich.table
    from matplotlib.axes import Axes

    from embedding_service.placement.demand import Node, PartDemand, Placement

NODES_HELP = "COUNTxMEMORY[:cuda], repeatable: 4x16GiB, 2x80GiB:cuda."


def plan(
    nodes: Annotated[list[str], typer.Option(help=f"The nodes, {NODES_HELP}")],
    store: Annotated[str | None, typer.Option(help="Plan for the newest versions in this store.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model of it: NAME or NAME@VERSION.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Without --store: rows of a table yet to be made.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Values a row of that table.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of that table.")] = "int8",
    part_size: Annotated[
        str | None, typer.Option(help="Largest size of a part of that table. Default: as an import makes them.")
    ] = None,
    replicas: ReplicasOption = 1,
    from_nodes: Annotated[
        list[str] | None, typer.Option(help="Show what coming from these nodes moves; equal MEMORY, same nodes.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it, too: a .png, .svg or .pdf file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a set of nodes would hold, without servers. If it does not fit, show what is missing: exit code 1."""
    after = _parse_nodes(nodes)
    before = _parse_nodes(from_nodes or [])
    part_bytes = parse_bytes(part_size) if part_size is not None else None
    if store is not None and rows is None and dim is None:
        parts = _stored_parts(store, model)
    elif store is None and model is None and rows is not None and dim is not None:
        parts = _table_parts(rows, dim, dtype, part_bytes)
    else:
        raise typer.BadParameter("say either --store [--model], or --rows and --dim")
    from embedding_service.commands.console import wide_console

    outlook = _Outlook.of(parts, before, after, replicas)
    console = wide_console(stderr=as_json)
    if as_json:
        say_json({"nodes": outlook.plain()})
    else:
        console.print(outlook.table())
        for line in outlook.summary():
            console.print(line)
    if plot:
        _draw(outlook, plot)
        console.print(f"drawn to {plot}")


@dataclass
class _Outlook:
    """What each node would hold, and how much of that would be moved in.

    Attributes:
        held: For each node (parts, bytes).
        moved: For each node the bytes that it must load. None without nodes before.
    """

    parts: list[PartDemand]
    nodes: list[Node]
    held: list[tuple[int, int]]
    moved: list[int] | None

    @classmethod
    def of(cls, parts: list[PartDemand], before: list[Node], after: list[Node], replicas: int) -> _Outlook:
        """Plan for `after`, coming from `before` if that is not empty. Raises PlacementError."""
        from dataclasses import replace

        from embedding_service.placement.demand import Placement

        old = _plan("--from-nodes", parts, before, replicas) if before else Placement()
        nodes = [replace(node, held=frozenset(old.parts_of.get(node.shard, ()))) for node in after]
        placement = _plan("--nodes", parts, nodes, replicas)
        size = {part.key: part.nbytes for part in parts}
        held = [placement.parts_of[node.shard] for node in nodes]
        return cls(
            parts=parts,
            nodes=nodes,
            held=[(len(keys), sum(size[key] for key in keys)) for keys in held],
            moved=[sum(size[key] for key in keys - node.held) for node, keys in zip(nodes, held, strict=True)]
            if before
            else None,
        )

    def table(self) -> rich.table.Table:
        """A row for each node."""
        from rich.table import Table

        table = Table("node", "device", title="plan", title_justify="left")
        for heading in ("parts", "bytes", "share of limit", *(["moved in"] if self.moved is not None else [])):
            table.add_column(heading, justify="right")
        for index, (node, (count, nbytes)) in enumerate(zip(self.nodes, self.held, strict=True)):
            moved = [format_bytes(self.moved[index])] if self.moved is not None else []
            table.add_row(
                node.shard,
                node.device,
                f"{count:,}",
                format_bytes(nbytes),
                f"{nbytes / max(node.memory_limit, 1):.1%} of {format_bytes(node.memory_limit)}",
                *moved,
            )
        return table

    def plain(self) -> list[dict[str, Any]]:
        """For JSON, an object for each node."""
        moved = self.moved or [0] * len(self.nodes)
        return [
            {
                "node": node.shard,
                "device": node.device,
                "parts": count,
                "bytes": nbytes,
                "limit": node.memory_limit,
                "moved": new,
            }
            for node, (count, nbytes), new in zip(self.nodes, self.held, moved, strict=True)
        ]

    def summary(self) -> list[str]:
        """The whole in a line or two."""
        used, limit = sum(nbytes for _, nbytes in self.held), sum(node.memory_limit for node in self.nodes)
        largest = max(part.nbytes for part in self.parts)
        lines = [
            f"{len(self.parts):,} parts of up to {format_bytes(largest)}; {format_bytes(used)} held on "
            f"{len(self.nodes):,} nodes, {used / limit:.1%} of {format_bytes(limit)}"
        ]
        if self.moved is not None:
            lines.append(f"moves {format_bytes(sum(self.moved))}, {sum(self.moved) / used:.1%} of what is held")
        return lines


def _plan(option: str, parts: list[PartDemand], nodes: list[Node], replicas: int) -> Placement:
    """Plan as the controller would. A PlacementError also says how many more nodes would do."""
    from embedding_service.placement.packing import more_needed
    from embedding_service.placement.planner import plan as make_plan

    try:
        return make_plan(parts, nodes, replicas)
    except PlacementError as error:
        kinds = {(node.memory_limit, node.device): node for node in nodes}
        remedies = [
            f"{more:,} more of {format_bytes(node.memory_limit)} ({node.device})"
            for node in kinds.values()
            if (more := more_needed(parts, nodes, replicas, node))
        ]
        remedy = f". It would fit with {', or '.join(remedies)}" if remedies else ""
        raise PlacementError(f"{option}: {error}{remedy}") from error


def _parse_nodes(texts: Sequence[str]) -> list[Node]:
    """Nodes named by their kind and number, so that equal kinds in two sets are the same nodes."""
    from embedding_service.placement.demand import Node

    nodes: list[Node] = []
    counts: dict[tuple[int, str], int] = {}
    for text in texts:
        match = re.fullmatch(r"(\d{1,5})x([^:]+)(?::(cpu|cuda))?", text.strip())
        if not match or int(match[1]) == 0 or (memory := parse_bytes(match[2])) == 0:
            raise typer.BadParameter(f"{text!r} are no nodes: write {NODES_HELP}")
        device = match[3] or "cpu"
        first = counts.get((memory, device), 0)
        counts[memory, device] = first + int(match[1])
        label = device + "-" + re.sub(r"(\.0+)? ", "", format_bytes(memory))
        nodes += [Node(f"{label}-{index}", memory, device=device) for index in range(first, counts[memory, device])]
    return nodes


def _stored_parts(url: str, name: str | None) -> list[PartDemand]:
    """The parts of the newest version of each model of a store, or of one model."""
    from embedding_service.controller.decisions import part_demands
    from embedding_service.store import Store

    store = Store(url)
    model, _, version = (name or "").partition("@")
    manifests = [store.manifest(model, version or None)] if name else store.newest()
    if not manifests:
        raise NotFound(f"no model in {url}: `embedding-service import` puts one there")
    return part_demands(manifests, {})


def _table_parts(rows: int, dim: int, dtype: str, part_bytes: int | None) -> list[PartDemand]:
    """The parts that an import would make of a table."""
    from embedding_service.formats import get_format
    from embedding_service.placement.demand import PartDemand
    from embedding_service.placement.parts import PartKey
    from embedding_service.store import default_rows_per_part, rows_per_part

    row_bytes = get_format(dtype).row_bytes(dim)
    step = default_rows_per_part(rows, row_bytes) if part_bytes is None else rows_per_part(row_bytes, part_bytes)
    return [
        PartDemand(PartKey("model", "1", "table", index), min(step, rows - first), row_bytes)
        for index, first in enumerate(range(0, rows, step))
    ]


def _draw(outlook: _Outlook, path: Path) -> None:
    """Draw a bar for each node: what it holds, how much would be moved in, and its limit. Raises InvalidRequest."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidRequest("--plot needs matplotlib: pip install matplotlib") from error

    width = min(max(8.0, 0.3 * len(outlook.nodes)), 14.0)
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    _draw_bars(figure.add_subplot(), outlook)
    figure.suptitle("\n".join(outlook.summary()), x=0.01, ha="left", fontsize=10)
    figure.legend(loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise InvalidRequest(f"cannot draw to {path}: {error}") from error


def _draw_bars(axes: Axes, outlook: _Outlook) -> None:
    gib = 2**30
    places = range(len(outlook.nodes))
    moved = [nbytes / gib for nbytes in outlook.moved or [0] * len(outlook.nodes)]
    stays = [nbytes / gib - new for (_, nbytes), new in zip(outlook.held, moved, strict=True)]
    axes.bar(places, [node.memory_limit / gib for node in outlook.nodes], color="#e8e8e8", label="limit")
    for device, color in (("cpu", "#3b6ea5"), ("cuda", "#4c9a2a")):
        of_device = [place for place in places if outlook.nodes[place].device == device]
        if of_device:
            axes.bar(of_device, [stays[place] for place in of_device], color=color, label=f"held, {device}")
    if outlook.moved is not None:
        axes.bar(places, moved, bottom=stays, color="#e08214", label="moved in")
    axes.set_ylabel("GiB")
    few = len(outlook.nodes) <= 40
    axes.set_xticks(list(places) if few else [], [node.shard for node in outlook.nodes] if few else [])
    axes.tick_params(axis="x", labelrotation=45 if len(outlook.nodes) > 6 else 0, labelsize=7)
    axes.set_xlabel("" if few else f"{len(outlook.nodes):,} nodes")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
