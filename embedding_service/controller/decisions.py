"""What follows from the store's models and the shards' reports. Pure functions: state in, decision out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import Manifest
from embedding_service.wire import embedding_pb2 as wire


def part_keys(manifest: Manifest) -> list[PartKey]:
    """Every part of a model version, in table and row order."""
    return [
        PartKey(manifest.model, manifest.version, table.name, part.index)
        for table in manifest.tables
        for part in table.parts
    ]


def choose_versions(
    catalog: Mapping[str, Sequence[Manifest]], served: Iterable[tuple[str, str]], holders: Mapping[PartKey, list[str]]
) -> tuple[list[Manifest], list[Manifest]]:
    """Which versions shall be held, and which of them are served.

    Of each model the newest version is wanted. It is served once every part of it is held, and goes on being served
    from then on; until that moment the version served before it is wanted and served too.

    Returns:
        (wanted, to be served), each model's versions oldest first.
    """
    served = set(served)
    wanted: list[Manifest] = []
    serving: list[Manifest] = []
    for _, versions in sorted(catalog.items()):
        newest = versions[-1]
        if (newest.model, newest.version) in served or all(key in holders for key in part_keys(newest)):
            wanted.append(newest)
            serving.append(newest)
            continue
        before = [manifest for manifest in versions[:-1] if (manifest.model, manifest.version) in served]
        wanted += [*before, newest]
        serving += before
    return wanted, serving


def needs_plan(
    wanted: Iterable[Manifest], target: Mapping[PartKey, Sequence[str]], shards: set[str], replicas: int
) -> bool:
    """Whether a part has fewer copies planned on shards that are there than it shall have."""
    return any(
        sum(shard in shards for shard in target.get(key, ())) < replicas
        for manifest in wanted
        for key in part_keys(manifest)
    )


def build_routing(
    serving: Iterable[Manifest],
    target: Mapping[PartKey, Sequence[str]],
    holders: Mapping[PartKey, list[str]],
    addresses: Mapping[str, str],
) -> wire.Routing:
    """The routing without its age: of each part those who hold it.

    Those who shall not go on holding it are named until all of its `target` hold it: were they left out sooner, a
    copy that is moving would be one copy less to survive a shard's death.
    """
    names = sorted(addresses)
    index = {name: position for position, name in enumerate(names)}
    routing = wire.Routing(shards=[wire.ShardAddress(id=name, address=addresses[name]) for name in names])
    for manifest in serving:
        placement = routing.models.add(model=model_info(manifest))
        for table in manifest.tables:
            owners = placement.tables.add()
            for part in table.parts:
                key = PartKey(manifest.model, manifest.version, table.name, part.index)
                holding = holders.get(key, [])
                shall = target.get(key, ())
                staying = [name for name in holding if name in shall]
                complete = staying and len(staying) == len(shall)
                owners.parts.add(shards=[index[name] for name in (staying if complete else holding)])
    return routing


def routed_parts(routing: wire.Routing) -> dict[str, set[PartKey]]:
    """For each shard the parts that clients may ask it for by this routing."""
    parts: dict[str, set[PartKey]] = {shard.id: set() for shard in routing.shards}
    names = [shard.id for shard in routing.shards]
    for placement in routing.models:
        model = placement.model
        for table, owners in zip(model.tables, placement.tables, strict=True):
            for index, part in enumerate(owners.parts):
                for shard in part.shards:
                    parts[names[shard]].add(PartKey(model.name, model.version, table.name, index))
    return parts


def model_info(manifest: Manifest) -> wire.ModelInfo:
    """A manifest as clients see it."""
    return wire.ModelInfo(
        name=manifest.model,
        version=manifest.version,
        family=manifest.family,
        hash_params=json.dumps(manifest.hash_params, sort_keys=True),
        tables=[
            wire.TableInfo(
                name=table.name,
                rows=table.rows,
                dim=table.dim,
                dtype=table.dtype,
                row_bytes=table.row_bytes,
                rows_per_part=table.rows_per_part,
            )
            for table in manifest.tables
        ],
    )
