"""Planning: how long it takes, and the bytes it moves: `python -m benchmarks.planning`.

When a shard joins, the least possible is its fair share. When one leaves, it is what that one held.
"""

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

from rich.console import Console
from rich.table import Table

from embedding_service.placement.demand import Node, PartDemand, Placement, moved_bytes
from embedding_service.placement.parts import PartKey
from embedding_service.placement.planner import plan

LIMIT_SECONDS = 20
LIMIT_RATIO = 1.2
ROWS, ROW_BYTES = 1 << 20, 256
LITE_ROWS, LITE_ROW_BYTES, LITE_PART_ROWS = 122_683_536, 260, 1_032_192


def demands(count: int) -> list[PartDemand]:
    return [PartDemand(PartKey("model", "1", "table", index), ROWS, ROW_BYTES) for index in range(count)]


def lite() -> list[PartDemand]:
    """LongCat-Flash-Lite's rows in int8, in parts of 256 MiB."""
    return [
        PartDemand(PartKey("lite", "1", "ngrams", index), min(LITE_PART_ROWS, LITE_ROWS - first), LITE_ROW_BYTES)
        for index, first in enumerate(range(0, LITE_ROWS, LITE_PART_ROWS))
    ]


def shards(count: int, before: Placement | None = None) -> list[Node]:
    held = before.parts_of if before else {}
    names = [f"shard-{index:04d}" for index in range(count)]
    return [Node(name, 64 << 30, frozenset(held.get(name, ()))) for name in names]


def times() -> tuple[Table, float]:
    """A table, and the longest time."""
    table = Table("parts", "shards", "copies", "seconds", title="planning", title_justify="left")
    longest = 0.0
    for parts, count, replicas in ((120, 8, 1), (10_000, 1_000, 1), (5_000, 1_000, 2)):
        begun = perf_counter()
        plan(demands(parts), shards(count), replicas)
        seconds = perf_counter() - begun
        longest = max(longest, seconds)
        table.add_row(f"{parts:,}", f"{count:,}", str(replicas), f"{seconds:.2f}")
    return table, longest


def moves(parts: Sequence[PartDemand]) -> tuple[Table, float]:
    """A table, and the greatest ratio."""
    table = Table("shards", "copies", title="bytes moved, LongCat-Flash-Lite in int8", title_justify="left")
    for heading in ("moved MiB", "least MiB", "ratio", "fullest of fair share"):
        table.add_column(heading, justify="right")
    size = {part.key: part.nbytes for part in parts}
    worst = 0.0
    for first, then in ((4, 5), (5, 4), (8, 9), (9, 8)):
        for replicas in (1, 2):
            before = plan(parts, shards(first), replicas)
            after = plan(parts, shards(then, before), replicas)
            fair = sum(size.values()) * replicas / then
            left = sum(size[key] for name in list(before.parts_of)[then:] for key in before.parts_of[name])
            least = left or fair
            moved = moved_bytes(parts, before, after)
            fullest = max(sum(size[key] for key in keys) for keys in after.parts_of.values())
            worst = max(worst, moved / least)
            mib = 2**20
            row = (f"{moved / mib:,.0f}", f"{least / mib:,.0f}", f"{moved / least:.3f}", f"{fullest / fair:.3f}")
            table.add_row(f"{first} -> {then}", str(replicas), *row)
    return table, worst


def wavering(parts: Sequence[PartDemand]) -> int:
    """Bytes moved when every memory limit is reported 2 % larger or smaller."""
    before = plan(parts, shards(8))
    nodes = [
        replace(node, memory_limit=node.memory_limit * (98 if index % 2 else 102) // 100)
        for index, node in enumerate(shards(8, before))
    ]
    return moved_bytes(parts, before, plan(parts, nodes))


def main() -> None:
    console = Console(highlight=False)
    table, longest = times()
    console.print(table)
    table, worst = moves(lite())
    console.print(table)
    console.print(f"memory limits that waver by 2 % move {wavering(lite()):,} bytes")
    if longest > LIMIT_SECONDS or worst > LIMIT_RATIO:
        raise SystemExit(f"over the limits of {LIMIT_SECONDS} s and {LIMIT_RATIO} times the least possible")


if __name__ == "__main__":
    main()
