"""The routing as clients and shards read it: which shards hold the parts that a batch of ids lies in.

Light on purpose (numpy and the wire): every client and the controller import it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from embedding_service.errors import InvalidRequest, NotFound, OutOfRange
from embedding_service.wire import embedding_pb2 as wire

if TYPE_CHECKING:
    from embedding_service.ngram import NgramHasher

Ids = npt.NDArray[np.int64]
# Up to this many ids, Python's own numbers take less time than numpy needs to begin.
FEW_IDS = 64
# Where a shard would be and none is. It is worse than all that is known against shards (`client.owners`).
NOBODY = 8
# Where the service says no limit: a message that gRPC could not carry anyway.
_UNLIMITED = 1 << 31


def check_ids(ids: Ids, rows: int, table: str) -> None:
    """Raise OutOfRange unless all of `ids` [n] are in [0, rows); `table` names the table in the message."""
    if not len(ids):
        return
    few = ids.tolist() if len(ids) <= FEW_IDS else None
    # A negative id is a huge unsigned one.
    if (min(few) < 0 or max(few) >= rows) if few else ids.view(np.uint64).max() >= rows:
        position = int(np.flatnonzero((ids < 0) | (ids >= rows))[0])
        raise OutOfRange(
            f"id {int(ids[position])} at position {position} is outside table {table}: ids must be from 0 to {rows - 1}"
        )


@dataclass(frozen=True)
class Table:
    """A table and who holds its parts.

    Attributes:
        owners: int32 [parts, R]: indices into `Routing.addresses`, -1 where a part has fewer than R owners.
    """

    name: str
    rows: int
    dim: int
    dtype: str
    row_bytes: int
    rows_per_part: int
    owners: npt.NDArray[np.int32]

    @cached_property
    def columns(self) -> list[list[int]]:
        """`owners` by copy: R lists of a number for each part."""
        return self.owners.T.tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Model:
    """One served version of a model: its tables in the order of its family's layers.

    Attributes:
        replicated: Parts may have more than one owner.
        base, checkpoint: See `ModelDescription`.
    """

    name: str
    version: str
    family: str
    hash_params: str
    tables: dict[str, Table]
    replicated: bool
    base: str = ""
    checkpoint: str = ""

    @cached_property
    def full_name(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    def table(self, name: str) -> Table:
        """A table by its name; raises NotFound, naming the known ones."""
        if name not in self.tables:
            raise NotFound(f"no table {name!r} in model {self.full_name}; its tables: {', '.join(self.tables)}")
        return self.tables[name]

    def hasher(self) -> NgramHasher:
        """What hashes this model's token ids; raises InvalidRequest for a model without an n-gram family."""
        if not self.family:
            raise InvalidRequest(f"model {self.full_name} has no n-gram family: look its rows up by id")
        from embedding_service.ngram import NgramHasher  # with torch, which the controller does without

        return NgramHasher.from_params(self.family, json.loads(self.hash_params))


class Hashers:
    """Hashers of served models. Those that hash alike (versions, domains) share one, which may take megabytes."""

    def __init__(self) -> None:
        self._made: dict[str, NgramHasher] = {}
        self._alike: WeakValueDictionary[tuple[str, str], NgramHasher] = WeakValueDictionary()

    def of(self, model: Model, routing: Routing | None) -> NgramHasher:
        """A model's. Those of models that `routing`, the current one, has no more go when another one is made."""
        hasher = self._made.get(model.full_name)
        if hasher is None:
            alike = model.family, model.hash_params
            hasher = self._alike[alike] = self._alike.get(alike) or model.hasher()
            served = {each.full_name for each in routing.models} if routing else set()
            kept = {name: made for name, made in self._made.items() if name in served}
            self._made = {**kept, model.full_name: hasher}  # threads may look at the one before
        return hasher


class Routing:
    """An immutable view of a `Routing` message.

    Attributes:
        request_bytes, response_bytes: What a request may ask for: of ids, 8 bytes each, and of rows.
        by_name: Every served version by `name@version`, and the newest of each model by `name`.
        nothing_known: int8 [shards + 1], what the router knows against each shard where it knows nothing: 0, and
            `NOBODY` at index -1.
    """

    def __init__(self, message: wire.Routing) -> None:
        self.message = message
        self.age = (message.term, message.epoch)
        self.request_bytes = message.limits.request_bytes or _UNLIMITED
        self.response_bytes = message.limits.response_bytes or _UNLIMITED
        self.addresses = [shard.address for shard in message.shards]
        self.shard_ids = [shard.id for shard in message.shards]
        self.nothing_known = np.array([0] * len(self.addresses) + [NOBODY], np.int8)
        self.topologies = [shard.topology for shard in message.shards]
        self._farness: dict[str, npt.NDArray[np.int8]] = {}
        self.by_name: dict[str, Model] = {}
        for placement in message.models:
            model = _model(placement)
            self.by_name[model.full_name] = model
            self.by_name[model.name] = model  # the newest version comes last, and stays

    def farness(self, topology: str) -> npt.NDArray[np.int8]:
        """int8 [shards + 1]: 1 for shards of another topology than this. `NOBODY` at index -1."""
        if topology not in self._farness:
            far = [int(each != topology) for each in self.topologies]
            self._farness[topology] = np.array([*far, NOBODY], np.int8)
        return self._farness[topology]

    def only(self, may: Callable[[str, str], bool]) -> Routing:
        """It without the models, by name and version, that somebody may not see."""
        from embedding_service.security.routing import model_digests  # with cryptography, which plain text does without

        message = wire.Routing()
        message.CopyFrom(self.message)
        seen = [each for each in message.models if may(each.model.name, each.model.version)]
        if len(seen) < len(message.models):
            message.digests.extend(model_digests(message))  # the signature is one of all models
            kept = [wire.ModelPlacement.FromString(each.SerializeToString()) for each in seen]
            del message.models[:]
            message.models.extend(kept)
        return Routing(message)

    @property
    def models(self) -> list[Model]:
        """Every served version of every model."""
        return [model for name, model in sorted(self.by_name.items()) if name == model.full_name]

    def model(self, name: str) -> Model:
        """`name` (its newest served version) or `name@version`; raises NotFound, naming the known ones."""
        if name not in self.by_name:
            known = ", ".join(model.full_name for model in self.models) or "none yet"
            branch = "; rows of a branch are read while client.train lasts" if "@" in name else ""
            raise NotFound(f"no model {name!r} is served; served models: {known}{branch}")
        return self.by_name[name]


def _model(placement: wire.ModelPlacement) -> Model:
    info = placement.model
    tables = {
        table.name: Table(
            name=table.name,
            rows=table.rows,
            dim=table.dim,
            dtype=table.dtype,
            row_bytes=table.row_bytes,
            rows_per_part=table.rows_per_part,
            owners=_owner_matrix([part.shards for part in owners.parts]),
        )
        for table, owners in zip(info.tables, placement.tables, strict=True)
    }
    replicated = any(table.owners.shape[1] > 1 for table in tables.values())
    about = {"base": info.base, "checkpoint": info.checkpoint or f"{info.name}@{info.version}"}
    return Model(info.name, info.version, info.family, info.hash_params, tables, replicated, **about)


def _owner_matrix(owners: list[Iterable[int]]) -> npt.NDArray[np.int32]:
    rows = [list(row) for row in owners]
    matrix = np.full((len(rows), max(map(len, rows), default=0) or 1), -1, dtype=np.int32)
    for part, shards in enumerate(rows):
        matrix[part, : len(shards)] = shards
    return matrix
