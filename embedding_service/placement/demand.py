"""The parts to place, the nodes to place them on, and the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from embedding_service.placement.parts import PartKey

CUDA = "cuda"
# The most that one node may offer. Sums over thousands of nodes stay within the planner's int64.
MOST_MEMORY = 1 << 50


@dataclass(frozen=True)
class Node:
    """A shard as the planner sees it.

    Attributes:
        shard: Its name.
        memory_limit: Bytes it offers for rows: of GPU memory if `device` is "cuda", else of host memory.
        held: Parts it holds already, or was told to hold.
        device: "cpu" or "cuda".
        topology: Value of the topology key (a zone, a rack, a machine). Copies of a part go to nodes of different
            values while there are enough. Empty: a place of its own.
        draining: It is about to leave. It gets nothing, and what it holds goes elsewhere.
    """

    shard: str
    memory_limit: int
    held: frozenset[PartKey] = frozenset()
    device: str = "cpu"
    topology: str = ""
    draining: bool = False


@dataclass(frozen=True)
class PartDemand:
    """A part to place: its rows, the bytes of one row, and the measured accesses (in any unit of time).

    `more`: bytes of what lies with it, which are rows that versions replace in it.
    """

    key: PartKey
    rows: int
    row_bytes: int
    load: float = 0.0
    more: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        return self.rows * self.row_bytes + self.more


@dataclass
class Placement:
    """Each part's shards, and each shard's parts."""

    shards_of: dict[PartKey, list[str]] = field(default_factory=dict)
    parts_of: dict[str, set[PartKey]] = field(default_factory=dict)


def moved_bytes(parts: Sequence[PartDemand], before: Placement, after: Placement) -> int:
    """Bytes that shards must load to go from one placement to the other."""
    size = {part.key: part.nbytes for part in parts}
    return sum(
        size[key] for shard, held in after.parts_of.items() for key in held - before.parts_of.get(shard, frozenset())
    )
