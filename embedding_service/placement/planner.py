"""Deciding which shards hold which parts, with TorchRec's EmbeddingShardingPlanner.

A part is to TorchRec a table of its own that is placed table-wise; a large table is thereby spread row-wise over the
shards. `StablePartitioner`, plugged in at the planner's own extension point, leaves parts where they are held and puts
the copies of a part on different shards.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    CustomTopologyData,
    Partitioner,
    PlannerError,
    ShardEstimator,
    ShardingOption,
    Storage,
)
from torchrec.distributed.quant_embedding import QuantEmbeddingCollectionSharder
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.quant.embedding_modules import EmbeddingCollection

from embedding_service.errors import PlacementError
from embedding_service.placement.parts import PartKey

# TorchRec warns at every plan that the topology is not from its factory for training jobs, which knows none of ours.
logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Node:
    """A shard as the planner sees it: its name, the bytes it offers for rows and the parts it holds already."""

    shard: str
    memory_limit: int
    held: frozenset[PartKey] = frozenset()


@dataclass(frozen=True)
class PartDemand:
    """A part to be placed: its rows, the bytes of one row, and their product, the memory it takes."""

    key: PartKey
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        return self.rows * self.row_bytes


@dataclass
class Placement:
    """Each part's shards, and each shard's parts."""

    shards_of: dict[PartKey, list[str]] = field(default_factory=dict)
    parts_of: dict[str, set[PartKey]] = field(default_factory=dict)


def plan(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int = 1) -> Placement:
    """Place `replicas` copies of every part on different nodes.

    Parts stay where they are held; the others go to the emptiest nodes, by the share of their memory in use.

    Raises:
        PlacementError: they do not fit; the message says how many bytes are missing, or which part fits nowhere.
    """
    check_fit(parts, nodes, replicas)
    placement = Placement(parts_of={node.shard: set() for node in nodes})
    if not parts:
        return placement
    copies = {f"{index}_{copy_}": part for index, part in enumerate(parts) for copy_ in range(replicas)}
    planner = EmbeddingShardingPlanner(
        topology=(topology := _topology(nodes)),
        batch_size=1,
        enumerator=EmbeddingEnumerator(
            topology,
            batch_size=1,
            constraints=(constraints := _table_wise(copies)),
            estimator=[EmbeddingPerfEstimator(topology, constraints), _ExactStorage(copies)],
        ),
        partitioner=StablePartitioner(copies, nodes),
        proposer=[GreedyProposer()],
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints=constraints,
        stats=[],
        debug=False,
    )
    try:
        sharding = planner.plan(_as_module(copies), [QuantEmbeddingCollectionSharder()])
    except PlannerError as error:
        # TorchRec wraps the partitioner's reason in advice about training jobs; the reason itself comes last.
        reason = str(error).rsplit("Last planner error:", 1)[-1].strip()
        raise PlacementError(
            f"{_demand(parts, nodes, replicas)}, but in too small pieces: {reason}; "
            "add shards, raise --memory or import with a smaller --part-size"
        ) from error
    parameters = [item for module in sharding.plan.values() for item in module.items()]  # type: ignore[attr-defined]
    for name, parameter in parameters:
        shard = nodes[parameter.ranks[0]].shard
        key = copies[name].key
        placement.shards_of.setdefault(key, []).append(shard)
        placement.parts_of[shard].add(key)
    return placement


def check_fit(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> None:
    """Raise PlacementError if the nodes cannot hold the parts, whatever the plan."""
    if not parts:
        return
    if replicas > len(nodes):
        raise PlacementError(f"{replicas} replicas of every part need {replicas} shards, there are {len(nodes)}")
    needed = sum(part.nbytes for part in parts) * replicas
    offered = sum(node.memory_limit for node in nodes)
    if needed > offered:
        raise PlacementError(
            f"{_demand(parts, nodes, replicas)}: {needed - offered:,} bytes are missing; add shards or raise --memory"
        )
    largest_part = max(parts, key=lambda part: part.nbytes)
    largest_node = max(nodes, key=lambda node: node.memory_limit)
    if largest_part.nbytes > largest_node.memory_limit:
        raise PlacementError(
            f"part {largest_part.key} needs {largest_part.nbytes:,} bytes and the largest shard, {largest_node.shard}, "
            f"offers {largest_node.memory_limit:,}: raise its --memory or import with a smaller --part-size"
        )


def _demand(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> str:
    needed = sum(part.nbytes for part in parts) * replicas
    offered = sum(node.memory_limit for node in nodes)
    times = f" {replicas} times" if replicas > 1 else ""
    return f"holding {len(parts)} parts{times} needs {needed:,} bytes and {len(nodes)} shards offer {offered:,}"


def _topology(nodes: Sequence[Node]) -> Topology:
    memory = {"ddr_cap": [node.memory_limit for node in nodes], "hbm_cap": [0] * len(nodes)}
    return Topology(
        world_size=len(nodes),
        compute_device="cpu",
        local_world_size=1,
        custom_topology_data=CustomTopologyData(memory, len(nodes)),
    )


def _table_wise(copies: Mapping[str, PartDemand]) -> dict[str, ParameterConstraints]:
    return {name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["quant"]) for name in copies}


def _as_module(copies: Mapping[str, PartDemand]) -> torch.nn.ModuleDict:
    """On the meta device; one collection for each row size, for the tables of a collection must agree in it."""
    tables: dict[str, list[EmbeddingConfig]] = {}
    for name, part in copies.items():
        config = EmbeddingConfig(
            name=name,
            feature_names=[name],
            num_embeddings=part.rows,
            embedding_dim=part.row_bytes,
            data_type=DataType.INT8,
        )
        tables.setdefault(str(part.row_bytes), []).append(config)
    meta = torch.device("meta")
    return torch.nn.ModuleDict({size: EmbeddingCollection(configs, meta) for size, configs in tables.items()})


class _ExactStorage(ShardEstimator):
    """A part takes its own bytes and nothing else: TorchRec's estimate adds padding and training's buffers."""

    def __init__(self, copies: Mapping[str, PartDemand]) -> None:
        self._copies = copies

    def estimate(self, sharding_options: list[ShardingOption], **_: object) -> None:
        for option in sharding_options:
            for shard in option.shards:
                shard.storage = Storage(hbm=0, ddr=self._copies[option.name].nbytes)


class StablePartitioner(Partitioner):
    """Parts stay where they are held; the others fill the nodes evenly, copies of a part apart."""

    def __init__(self, copies: Mapping[str, PartDemand], nodes: Sequence[Node]) -> None:
        self._copies = copies
        self._limit = [max(node.memory_limit, 1) for node in nodes]
        self._holders: dict[PartKey, list[int]] = {}
        for rank, node in enumerate(nodes):
            for key in node.held:
                self._holders.setdefault(key, []).append(rank)

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Give every shard of the proposal a rank; raises PlannerError where none has room."""
        options = copy.deepcopy(proposal)
        free = [device.storage.ddr for device in storage_constraint.devices]
        taken: dict[PartKey, set[int]] = {}

        def place(option: ShardingOption, candidates: Sequence[int]) -> bool:
            """On the candidate that is left the emptiest, if any has room and no copy of the part yet."""
            part = self._copies[option.name]
            others = taken.setdefault(part.key, set())
            ranks = [rank for rank in candidates if rank not in others and free[rank] >= part.nbytes]
            if not ranks:
                return False
            rank = max(ranks, key=lambda rank: ((free[rank] - part.nbytes) / self._limit[rank], -rank))
            option.shards[0].rank = rank
            free[rank] -= part.nbytes
            others.add(rank)
            return True

        def part_of(option: ShardingOption) -> PartDemand:
            return self._copies[option.name]

        unplaced = [option for option in options if not place(option, self._holders.get(part_of(option).key, ()))]
        everywhere = range(len(free))
        for option in sorted(unplaced, key=lambda option: -part_of(option).nbytes):
            if not place(option, everywhere):
                raise PlannerError(f"no shard has {part_of(option).nbytes:,} bytes free for {part_of(option).key}")
        return options
