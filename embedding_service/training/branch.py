"""What a branch is, and its folder in the store: STORE/MODEL/.BRANCH.branch/.

branch.json says what the branch is and never changes. Whoever writes it first has made the branch. Beside it are a file
for each shard that says where it runs, checkpoints, and shards' logs unless they lie elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedding_service.errors import InvalidRequest, NotFound, StoreError
from embedding_service.machine import write_durably, write_synced
from embedding_service.store.manifest import Manifest, check_name
from embedding_service.store.store import Store
from embedding_service.training.optimizers import optimizer_of
from embedding_service.wire import training_pb2 as wire

DEFAULT_CHECKPOINT_EVERY = 1000
# What is stored as it was trained. Rows of other formats lost something when they were encoded.
_EXACT = ("fp32", "fp16", "bf16")
_FOLDER = re.compile(r"\.(.+)\.branch")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))


class BranchTable(_Frozen):
    """A table, and the shard that has each part."""

    name: str
    rows: int
    dim: int
    rows_per_part: int
    shards: tuple[str, ...]

    @property
    def parts(self) -> int:
        """How many."""
        return len(self.shards)

    def part_rows(self, part: int) -> int:
        """Rows of a part."""
        return min(self.rows_per_part, self.rows - part * self.rows_per_part)

    def parts_of(self, shard: str) -> list[int]:
        """The parts that a shard has."""
        return [part for part, each in enumerate(self.shards) if each == shard]


class OptimizerNumbers(_Frozen):
    """As on the wire."""

    kind: str
    eps: float
    beta1: float
    beta2: float

    @property
    def message(self) -> wire.Optimizer:
        """As on the wire."""
        return wire.Optimizer(**self.model_dump())


class Branch(_Frozen):
    """A branch of a model, which began from a version of it."""

    format_version: Literal[1] = 1
    model: str
    name: str
    base: str
    family: str
    hash_params: dict[str, Any]
    tables: tuple[BranchTable, ...]
    optimizer: OptimizerNumbers
    checkpoint_every: int = Field(ge=1)

    @property
    def full_name(self) -> str:
        """`model@branch`."""
        return f"{self.model}@{self.name}"

    @cached_property
    def shards(self) -> list[str]:
        """The shards that have parts, by their ids."""
        return sorted({shard for table in self.tables for shard in table.shards})


def split_name(name: str) -> tuple[str, str]:
    """Model and branch of MODEL@BRANCH. Raises InvalidRequest."""
    model, at, branch = name.partition("@")
    if not at:
        raise InvalidRequest(f"a branch is named MODEL@BRANCH, got {name!r}")
    return check_name(model), check_name(branch)


def branch_folder(store: Store, model: str, name: str) -> Path:
    """Where a branch lies. Raises InvalidRequest for a store that is no folder."""
    if not store.is_local:
        raise InvalidRequest(
            f"branches need a store that is a folder, which all shards see and write to; this one is {store.url}"
        )
    return Path(store.location(model, f".{name}.branch"))


def read_branch(store: Store, name: str) -> Branch:
    """A branch by MODEL@BRANCH. Raises NotFound naming the branches that the model has."""
    model, branch = split_name(name)
    path = branch_folder(store, model, branch) / "branch.json"
    try:
        return Branch.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        known = [each for each in branches(store) if each.startswith(f"{model}@")]
        raise NotFound(f"no branch {name!r}; branches of {model!r}: {', '.join(known) or 'none'}") from None
    except ValidationError as error:
        raise StoreError(f"{path} is no branch that this version can read: {error.errors()[0]['msg']}") from error


def branches(store: Store) -> list[str]:
    """The branches that are there, by MODEL@BRANCH. None in a store that is no folder."""
    if not store.is_local:
        return []
    found = Path(store.location()).glob("*/.*.branch/branch.json")
    return sorted(f"{path.parts[-3]}@{_FOLDER.fullmatch(path.parts[-2])[1]}" for path in found)  # type: ignore[index]


def create_branch(
    store: Store, name: str, request: wire.OpenRequest, owners: Mapping[str, Sequence[str]], shards: Sequence[str]
) -> Branch:
    """Make a branch of a version, unless somebody else did by now. Returns what is there.

    owners: of each table the shard that is to have each part; `shards` take turns where there is none.
    """
    model, branch = split_name(name)
    if not request.HasField("optimizer"):
        raise InvalidRequest(
            f"{name} is no branch yet, and a branch needs an optimizer: client.train({name!r}, "
            "optimizer=RowwiseAdagrad(lr=0.05))"
        )
    optimizer_of(request.optimizer)
    manifest = store.manifest(model, request.base or None)
    if branch in store.versions(model):
        raise InvalidRequest(f"{name} is a version, which never changes: choose another name for the branch")
    _check_trainable(manifest, request.dequantize)
    about = Branch(
        model=model,
        name=branch,
        base=manifest.version,
        family=manifest.family,
        hash_params=manifest.hash_params,
        tables=tuple(
            BranchTable(
                name=table.name,
                rows=table.rows,
                dim=table.dim,
                rows_per_part=table.rows_per_part,
                shards=tuple(
                    owner or shards[part % len(shards)]
                    for part, owner in enumerate(owners.get(table.name) or [""] * len(table.parts))
                ),
            )
            for table in manifest.tables
        ),
        optimizer=OptimizerNumbers(
            kind=request.optimizer.kind,
            eps=request.optimizer.eps,
            beta1=request.optimizer.beta1,
            beta2=request.optimizer.beta2,
        ),
        checkpoint_every=request.checkpoint_every or DEFAULT_CHECKPOINT_EVERY,
    )
    folder = branch_folder(store, model, branch)
    folder.mkdir(parents=True, exist_ok=True)
    _write_first(folder / "branch.json", about.model_dump_json(indent=1))
    return read_branch(store, name)


def _check_trainable(manifest: Manifest, dequantize: bool) -> None:
    quantized = [table for table in manifest.tables if table.dtype not in _EXACT]
    if quantized and not dequantize:
        raise InvalidRequest(
            f"{manifest.full_name} stores table {quantized[0].name} as {quantized[0].dtype}, which steps would be lost "
            "in: begin from an fp32 version (base=...), or from these rows as float32 with dequantize=True"
        )


def _write_first(path: Path, text: str) -> None:
    """Write a file unless it is there. At any moment it is whole or not there."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    write_synced(own, text.encode())
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()


def next_session(folder: Path) -> int:
    """A number that no session of the branch had. The first one is 1."""
    with _locked(folder / "sessions.lock"):
        path = folder / "sessions"
        number = int(path.read_text()) + 1 if path.exists() else 1
        replace(path, f"{number}\n".encode())
    return number


class Place(NamedTuple):
    """Where a shard has its share of a branch, as it said itself.

    Attributes:
        address: Where it is reached.
        log: The log's identity.
        timeline: How often its log was lost.
    """

    address: str = ""
    log: str = ""
    timeline: int = 0


def write_place(folder: Path, shard: str, place: Place) -> None:
    """Say where a shard has its share."""
    (folder / "shards").mkdir(exist_ok=True)
    replace(folder / "shards" / f"{shard}.json", json.dumps(place._asdict()).encode())


def read_place(folder: Path, shard: str) -> Place:
    """What a shard said last. Nothing yet: all empty."""
    try:
        return Place(**json.loads((folder / "shards" / f"{shard}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return Place()


def replace(path: Path, data: bytes) -> None:
    """`write_durably`, where several shards write to one folder."""
    write_durably(path, data, own=f".{os.getpid()}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
