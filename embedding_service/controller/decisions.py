"""What follows from the store's models and the shards' reports. Pure functions: state in, decision out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from embedding_service.errors import InvalidRequest, StoreError
from embedding_service.placement.demand import PartDemand
from embedding_service.placement.parts import PartKey
from embedding_service.store.manifest import ID_BYTES, MOST_PARTS, Manifest, overlay_file, part_file
from embedding_service.store.store import Catalogue, natural_order
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire

_NO_CHECKSUM = "xxh3-128:" + "0" * 32

# For each model its versions, oldest first.
Catalog = Mapping[str, Sequence[Manifest]]
# A model and its version.
Version = tuple[str, str]
# For each version, for each of its parts the shards that hold it or are to hold it.
Holders = Mapping[Version, Mapping[PartKey, Sequence[str]]]


def part_keys(manifest: Manifest) -> list[PartKey]:
    """Every part of a model version, in table and row order."""
    return [
        PartKey(manifest.model, manifest.version, table.name, part.index)
        for table in manifest.tables
        for part in table.parts
    ]


def shared_part(key: PartKey, manifest: Manifest) -> PartKey:
    """The part that a version's part has its rows from: its base's, or itself. A shard holds it once for all versions.

    So versions of one base are placed together, part by part.
    """
    return PartKey(*manifest.root, key.table, key.part)


def part_demands(manifests: Iterable[Manifest], accesses: Mapping[PartKey, int]) -> list[PartDemand]:
    """What there is to place: each shared part once, with what versions replace in it.

    All parts of a table count as many replaced bytes as the one that has most, so that they stay of one size.
    """
    demands: dict[PartKey, PartDemand] = {}
    replaced: Counter[tuple[str, str, str]] = Counter()
    for manifest in manifests:
        for table in manifest.tables:
            overlays = manifest.overlays(table.name).values()
            replaced[(*manifest.root, table.name)] += max((overlay.bytes for overlay in overlays), default=0)
            for part in table.parts:
                key = PartKey(manifest.model, manifest.version, table.name, part.index)
                shared = shared_part(key, manifest)
                load = accesses.get(key, 0) + (demands[shared].load if shared in demands else 0.0)
                demands[shared] = PartDemand(shared, part.rows, table.row_bytes, float(load))
    return [replace(demand, more=replaced[key[:3]]) if replaced[key[:3]] else demand for key, demand in demands.items()]


def is_away(found: Catalogue | None, served: Iterable[object]) -> bool:
    """Whether the store counts as away: it could not be read, or is empty like a folder with nothing mounted on it.

    While nothing is served, an empty store is just empty.
    """
    return found is None or (found.is_empty and any(True for _ in served))


def known_versions(found: Catalogue | None, before: Catalog, served: Mapping[tuple[str, str], Manifest]) -> Catalog:
    """The known versions of the store's models: those found, and those known before that could not be looked at.

    A version leaves only if the store could be read and does not have it any more. `served` is what the shards say of
    the versions that they serve, for a controller that has never seen the store.
    """
    kept = {**served, **{(each.model, each.version): each for versions in before.values() for each in versions}}
    known = {
        (each.model, each.version): each
        for versions in (found.manifests if found else {}).values()
        for each in versions
    }
    away = is_away(found, kept)
    for name, manifest in kept.items():
        if away or (found and found.cannot_tell(*name)):
            known.setdefault(name, manifest)
    catalog: dict[str, list[Manifest]] = {}
    for model, version in sorted(known, key=lambda name: (name[0], natural_order(name[1]))):
        catalog.setdefault(model, []).append(known[model, version])
    return catalog


def never_served(catalog: Catalog) -> Iterator[str]:
    """Versions imported after the newest one that are not served, because their names sort before its name."""
    for model, versions in catalog.items():
        newest = versions[-1]
        for each in versions[:-1]:
            if newest.provenance and each.provenance and each.provenance.imported_at > newest.provenance.imported_at:
                yield (
                    f"{model}@{each.version} was imported after {model}@{newest.version} and is not served: the "
                    f"version whose name sorts last is; import it under a name that sorts after {newest.version!r}"
                )


def settled(
    shards: int,
    expected: int,
    waited: float,
    quiet: float,
    returning: bool,
    settle: float,
    patience: float,
    lost: float,
    awaited: bool = False,
) -> bool:
    """Whether to place now, or to wait for more shards first.

    Args:
        shards: Shards that are there.
        expected: Shards to wait for. 0: until no more come.
        waited: Seconds since the start.
        quiet: Seconds since a shard came that was not there before.
        returning: Shards are there that served before. There may be more of them by now than were expected.
        settle: Seconds without a new shard that are enough.
        patience: The most seconds to wait in all.
        lost: Seconds after which those that served before and have not come are gone. A controller that had gone on
            would have given them up by then.
        awaited: Shards that served before are to be expected now. A routing without them would serve nothing.
    """
    if not shards:
        return False
    if waited > patience:
        return True
    if awaited and not returning:
        return False
    if shards < expected:
        return returning and min(waited, quiet) > lost
    return quiet > settle or bool(expected and not returning)


def copies_held(manifest: Manifest, holders: Mapping[PartKey, Sequence[str]]) -> Counter[int]:
    """Of how many parts of a version there are how many copies. None of 0 copies: all parts are held."""
    return Counter(len(holders.get(key, ())) for key in part_keys(manifest))


def still_copied(
    target: Mapping[PartKey, Sequence[str]],
    holders: Mapping[PartKey, Sequence[str]],
    able: Container[str],
    unable: Container[tuple[str, PartKey]] = frozenset(),
) -> set[PartKey]:
    """Parts that fewer shards hold than the plan gives them to.

    Only shards that are `able` to hold parts count, and not for the parts that they are `unable` to load.
    """

    def count(names: Iterable[str], key: PartKey) -> int:
        return sum(name in able and (name, key) not in unable for name in names)

    return {key for key, planned in target.items() if count(holders.get(key, ()), key) < count(planned, key)}


def choose_versions(
    catalog: Catalog,
    served: Iterable[Version],
    held: Container[Version],
    copying: Container[Version] = frozenset(),
) -> tuple[list[Manifest], list[Manifest]]:
    """Which versions are wanted, and which of them are served.

    The newest version of each model is wanted. It is served once all copies of every part of it are held, and from then
    on. Until that moment the version served before it is wanted and served too. If that one is not whole, or there is
    none, one copy of every part is enough.

    Args:
        catalog: The known versions.
        served: Those that are served now.
        held: Those of which every part is held.
        copying: Those with parts whose copies are not all there. A sudden death might lose them.

    Returns:
        (wanted, to be served), each model's versions oldest first.
    """
    served = set(served)
    wanted: list[Manifest] = []
    serving: list[Manifest] = []
    for _, versions in sorted(catalog.items()):
        newest = versions[-1]
        name = newest.model, newest.version
        before = [manifest for manifest in versions[:-1] if (manifest.model, manifest.version) in served]
        may_wait = before and all((manifest.model, manifest.version) in held for manifest in before)
        if name in served or (name in held and not (may_wait and name in copying)):
            wanted.append(newest)
            serving.append(newest)
            continue
        wanted += [*before, newest]
        serving += before
    return wanted, serving


def by_importance(wanted: Iterable[Manifest], served: Container[tuple[str, str]]) -> list[Manifest]:
    """What is served comes first, then what takes least. If not all fits, the last ones are left out."""
    wanted = list(wanted)
    shared = {each.root for each in wanted if (each.model, each.version) in served}

    def order(each: Manifest) -> tuple[bool, int, str, str]:
        takes = each.replaced_bytes + (0 if each.base and each.root in shared else each.bytes)
        return (each.model, each.version) not in served, takes, each.model, each.version

    return sorted(wanted, key=order)


def too_few_shards(wanted: int, replicas: int) -> str:
    """A message if there are fewer copies than wanted, which is better than none. Otherwise an empty text."""
    if replicas >= wanted:
        return ""
    return (
        f"{wanted} copies of every part need {wanted} shards; {replicas} can hold any, so {replicas} are held: "
        "add shards"
    )


def needs_plan(
    manifest: Manifest, target: Mapping[PartKey, Sequence[str]], shards: Container[str], replicas: int
) -> bool:
    """Whether fewer copies of a part of a version are planned on present shards than are wanted."""
    return any(sum(shard in shards for shard in target.get(key, ())) < replicas for key in part_keys(manifest))


def place_version(
    manifest: Manifest,
    target: Mapping[PartKey, Sequence[str]],
    holders: Mapping[PartKey, Sequence[str]],
    shards: Sequence[str],
    unable: Container[tuple[str, PartKey]] = frozenset(),
    draining: Container[str] = frozenset(),
    copies: int = 1,
    away: Container[str] = frozenset(),
) -> wire.ModelPlacement:
    """What the routing says of a version: the holders of each part.

    Old holders are named until all of its `target` hold it. If they were left out sooner, a copy that moves would be
    one copy less to survive a shard's death.

    Args:
        manifest: The version.
        target: The shards that the plan gives each part.
        holders: The shards that hold each part.
        shards: The names of all that are there, in the order of the routing.
        unable: Shards with parts that they cannot load. A shard that drains does not wait for them.
        draining: Shards that want to leave.
        copies: Wanted of each part. The plan may be from when there were fewer shards.
        away: Shards without a connection. They are named, and do not count as copies, for they may be dead.
    """
    index = {name: position for position, name in enumerate(shards)}
    placement = wire.ModelPlacement(model=model_info(manifest))
    for table in manifest.tables:
        owners = placement.tables.add()
        for part in table.parts:
            key = PartKey(manifest.model, manifest.version, table.name, part.index)
            holding, planned = holders.get(key, ()), target.get(key, ())
            chosen = {name for name in planned if name in index and (name, key) not in unable}
            others = [name for name in holding if name not in chosen]
            if chosen and len(holding) - len(others) == len(chosen):
                sure = sum(name not in away for name in chosen)
                staying = [name for name in others if name not in draining][: max(len(planned), copies) - sure]
                holding = [name for name in holding if name in chosen or name in staying]
            owners.parts.add(shards=[index[name] for name in holding])
    return placement


def name_lost_holders(
    routing: wire.Routing,
    named: Mapping[Version, Mapping[str, frozenset[PartKey]]],
    holders: Holders,
    shards: Mapping[str, wire.ShardAddress],
) -> tuple[Holders, dict[str, wire.ShardAddress]]:
    """Give parts without a holder the shards that are lost and held them by the last routing, where they may be alive.

    While the store cannot be read nobody else can load these parts. The shards may be cut off from this controller
    alone, or be with another one.

    Args:
        routing: The last routing.
        named: For each version in it, for each shard the parts that it names.
        holders: The shards that hold each part.
        shards: All that are there, as clients see them.

    Returns:
        `holders` and `shards` with them.
    """
    lost = {shard.id: shard for shard in routing.shards if shard.id not in shards}
    more: dict[Version, dict[PartKey, Sequence[str]]] = {}
    there = dict(shards)
    for version, parts in named.items() if lost else ():
        held = holders.get(version, {})
        missing = {name: parts[name] - held.keys() for name in lost if name in parts}
        for name, keys in missing.items():
            there |= {name: lost[name]} if keys else {}
            for key in keys:
                add = more.setdefault(version, dict(held))
                add[key] = [*add.get(key, ()), name]
    return {**holders, **more}, there


def shard_address(report: control.ShardReport) -> wire.ShardAddress:
    """How clients reach a shard, as it reported."""
    shard = wire.ShardAddress(id=report.shard_id, address=report.address, topology=report.topology)
    if report.near.path:
        shard.near.CopyFrom(report.near)
    return shard


def routed_parts(routing: wire.Routing) -> dict[str, set[PartKey]]:
    """For each shard the parts that clients may ask it for by this routing."""
    parts: dict[str, set[PartKey]] = {shard.id: set() for shard in routing.shards}
    names = [shard.id for shard in routing.shards]
    for placement in routing.models:
        for name, keys in placed_parts(placement, names).items():
            parts[name] |= keys
    return parts


def placed_parts(placement: wire.ModelPlacement, shards: Sequence[str]) -> dict[str, frozenset[PartKey]]:
    """For each shard that it names the parts of one version. `shards`: the names in the order of the routing."""
    model = placement.model
    parts: dict[int, list[PartKey]] = {}
    for table, owners in zip(model.tables, placement.tables, strict=True):
        for index, part in enumerate(owners.parts):
            key = PartKey(model.name, model.version, table.name, index)
            for shard in part.shards:
                parts.setdefault(shard, []).append(key)
    return {shards[shard]: frozenset(keys) for shard, keys in parts.items()}


def planned_parts(manifest: Manifest, target: Mapping[PartKey, Sequence[str]]) -> dict[str, frozenset[PartKey]]:
    """For each shard the parts of a version that the plan gives it."""
    parts: dict[str, list[PartKey]] = {}
    for key in part_keys(manifest):
        for name in target.get(key, ()):
            parts.setdefault(name, []).append(key)
    return {name: frozenset(keys) for name, keys in parts.items()}


def manifest_of(info: wire.ModelInfo) -> Manifest:
    """A version as a shard knows it, in a manifest. It has no checksums, which only readers need.

    Of rows that it replaces, it is known how many there are in a table. They are taken to lie evenly.

    Raises InvalidRequest for what no manifest could say.
    """
    source = f"what is said of {info.name}@{info.version}"
    try:
        content: dict[str, object] = {
            "model": info.name,
            "version": info.version,
            "family": info.family,
            "hash_params": json.loads(info.hash_params or "{}"),
            "tables": [_table_of(table) for table in info.tables],
        }
        if info.base:
            model, _, version = info.base.partition("@")
            overlays = {table.name: _overlays_of(table) for table in info.tables}
            base = {"model": model, "version": version, "overlays": overlays, "checkpoint": info.checkpoint or None}
            content.update(format_version=2, base=base)
        return Manifest.from_json(json.dumps(content), source)
    except (StoreError, ValueError, RecursionError) as error:
        raise InvalidRequest(str(error)) from error


def _sizes_of(info: wire.TableInfo) -> list[tuple[int, int]]:
    """First row and rows of each part."""
    step = max(info.rows_per_part, 1)
    if info.rows // step > MOST_PARTS:
        raise InvalidRequest(f"table {info.name} has over {MOST_PARTS:,} parts")
    return [(first, min(step, info.rows - first)) for first in range(0, info.rows, step)]


def _overlays_of(info: wire.TableInfo) -> list[dict[str, object]]:
    sizes = _sizes_of(info)
    each, more = divmod(info.replaced_rows, max(len(sizes), 1))
    counts = [min(each + (part < more), rows) for part, (_, rows) in enumerate(sizes)]
    return [
        {
            "part": part,
            "rows": count,
            "file": overlay_file(info.name, part),
            "bytes": count * (ID_BYTES + info.row_bytes),
            "checksum": _NO_CHECKSUM,
        }
        for part, count in enumerate(counts)
        if count
    ]


def _table_of(info: wire.TableInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "rows": info.rows,
        "dim": info.dim,
        "dtype": info.dtype,
        "row_bytes": info.row_bytes,
        "rows_per_part": info.rows_per_part,
        "parts": [
            {
                "index": index,
                "first_row": first,
                "rows": rows,
                "file": part_file(info.name, index),
                "bytes": rows * info.row_bytes,
                "checksum": _NO_CHECKSUM,
            }
            for index, (first, rows) in enumerate(_sizes_of(info))
        ],
    }


def model_info(manifest: Manifest) -> wire.ModelInfo:
    """A manifest as clients see it."""
    return wire.ModelInfo(
        name=manifest.model,
        version=manifest.version,
        family=manifest.family,
        hash_params=json.dumps(manifest.hash_params, sort_keys=True),
        base="@".join(manifest.root) if manifest.base else "",
        checkpoint="" if manifest.checkpoint == manifest.full_name else manifest.checkpoint,
        tables=[
            wire.TableInfo(
                name=table.name,
                rows=table.rows,
                dim=table.dim,
                dtype=table.dtype,
                row_bytes=table.row_bytes,
                rows_per_part=table.rows_per_part,
                replaced_rows=sum(overlay.rows for overlay in manifest.overlays(table.name).values()),
            )
            for table in manifest.tables
        ],
    )
