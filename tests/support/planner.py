"""Plans by `placement.packing` alone, at once and in this process: TorchRec's planner takes seconds to load."""

from collections.abc import Sequence

from embedding_service.placement.demand import Node, PartDemand, Placement
from embedding_service.placement.packing import pack


def plan(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int = 1) -> Placement:
    """What `placement.planner.plan` returns. Raises PlacementError."""
    parts = sorted(parts, key=lambda part: part.key)
    staying = sorted((node for node in nodes if not node.draining), key=lambda node: node.shard)
    placement = Placement(parts_of={node.shard: set() for node in nodes})
    for part, ranks in zip(parts, pack(parts, staying, replicas) if parts else (), strict=True):
        placement.shards_of[part.key] = [staying[rank].shard for rank in ranks]
        for rank in ranks:
            placement.parts_of[staying[rank].shard].add(part.key)
    return placement
