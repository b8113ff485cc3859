"""Deciding which shards hold which parts, with TorchRec's EmbeddingShardingPlanner.

To TorchRec a copy of a part is a table of its own, placed table-wise. So a large table is spread row-wise over the
shards. A shard is a rank that offers either host memory (`ddr_cap`) or, on a GPU, device memory (`hbm_cap`).
`StablePartitioner` is plugged in at the planner's own extension point. It puts copies on ranks by the rules of
`packing`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    CustomTopologyData,
    Partitioner,
    Perf,
    ShardEstimator,
    ShardingOption,
    Storage,
)
from torchrec.distributed.quant_embedding import QuantEmbeddingCollectionSharder
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.quant.embedding_modules import EmbeddingCollection

from embedding_service.placement.demand import CUDA, Node, PartDemand, Placement
from embedding_service.placement.packing import check_fit, pack

__all__ = ["Node", "PartDemand", "Placement", "StablePartitioner", "plan"]

# TorchRec warns at every plan that the topology is not from its factory for training jobs. That knows none of ours.
logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)


def plan(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int = 1) -> Placement:
    """Place `replicas` copies of every part on different nodes, and move little. `packing` states the rules.

    The order of `parts` and of `nodes` makes no difference. Nodes that drain get nothing.

    Raises:
        PlacementError: they do not fit. The message says how many bytes are missing, or which part fits nowhere.
    """
    parts = sorted(parts, key=lambda part: part.key)
    staying = sorted((node for node in nodes if not node.draining), key=lambda node: node.shard)
    placement = Placement(parts_of={node.shard: set() for node in nodes})
    if not parts:
        return placement
    check_fit(parts, staying, replicas)
    copies = {f"{index}_{copy}": part for index, part in enumerate(parts) for copy in range(replicas)}
    planner = EmbeddingShardingPlanner(
        topology=(topology := _topology(staying)),
        batch_size=1,
        enumerator=EmbeddingEnumerator(
            topology,
            batch_size=1,
            constraints=(constraints := _table_wise(copies)),
            estimator=_KnownCosts(copies),
        ),
        partitioner=StablePartitioner(parts, staying, replicas),
        proposer=[GreedyProposer()],
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints=constraints,
        stats=[],
        debug=False,
    )
    sharding = planner.plan(_as_module(copies), [QuantEmbeddingCollectionSharder()])
    parameters = [item for module in sharding.plan.values() for item in module.items()]  # type: ignore[attr-defined]
    for name, parameter in parameters:
        shard = staying[parameter.ranks[0]].shard
        key = copies[name].key
        placement.shards_of.setdefault(key, []).append(shard)
        placement.parts_of[shard].add(key)
    return placement


def _topology(nodes: Sequence[Node]) -> Topology:
    memory = {
        "ddr_cap": [0 if node.device == CUDA else node.memory_limit for node in nodes],
        "hbm_cap": [node.memory_limit if node.device == CUDA else 0 for node in nodes],
    }
    return Topology(
        world_size=len(nodes),
        compute_device="cpu",  # for a mixed topology it only decides which sharding types are known
        local_world_size=1,
        custom_topology_data=CustomTopologyData(memory, len(nodes)),
    )


def _table_wise(copies: Mapping[str, PartDemand]) -> dict[str, ParameterConstraints]:
    return {name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["quant"]) for name in copies}


def _as_module(copies: Mapping[str, PartDemand]) -> torch.nn.ModuleDict:
    """Tables on the meta device, in one collection for each row size. Tables of a collection must agree in that."""
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


class _KnownCosts(ShardEstimator):
    """A part costs its own bytes and the measured accesses. TorchRec's own estimators are for training's buffers."""

    def __init__(self, copies: Mapping[str, PartDemand]) -> None:
        self._copies = copies

    def estimate(self, sharding_options: list[ShardingOption], *_: object, **__: object) -> None:
        for option in sharding_options:
            part = self._copies[option.name]
            for shard in option.shards:
                shard.storage = Storage(hbm=0, ddr=part.nbytes)
                shard.perf = Perf(fwd_compute=part.load, fwd_comms=0, bwd_compute=0, bwd_comms=0)


class StablePartitioner(Partitioner):
    """Gives every copy, an option named PARTINDEX_COPY, its rank by the rules of `packing`.

    Raises PlacementError. TorchRec lets it through, because no other proposal could fit better.
    """

    def __init__(self, parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> None:
        self._parts, self._nodes, self._replicas = parts, nodes, replicas

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Set the rank of every shard of the proposal, in place as TorchRec's contract has it."""
        devices = [device.storage for device in storage_constraint.devices]
        nodes = [
            replace(node, memory_limit=storage.hbm + storage.ddr)
            for node, storage in zip(self._nodes, devices, strict=True)
        ]
        ranks = pack(self._parts, nodes, self._replicas)
        for option in proposal:
            index, copy = map(int, option.name.split("_"))
            (shard,) = option.shards
            shard.rank = ranks[index][copy]
            if nodes[shard.rank].device == CUDA:
                shard.storage = Storage(hbm=self._parts[index].nbytes, ddr=0)
        return proposal
