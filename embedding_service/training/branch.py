"""What a branch is, and its folder in the store: STORE/MODEL/.BRANCH.branch/.

branch.json says what the branch is and never changes. Whoever writes it first has made the branch. Beside it are a file
for each shard that says where it runs, one for each share that says who has it (`seats`), checkpoints, and shards' logs
unless they lie elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedding_service.errors import InvalidRequest, NotFound, StoreError, Unavailable
from embedding_service.machine import write_durably, write_synced
from embedding_service.store.draft import set_aside
from embedding_service.store.manifest import Manifest, check_name
from embedding_service.store.store import Store
from embedding_service.training.optimizers import optimizer_of
from embedding_service.wire import training_pb2 as wire

DEFAULT_CHECKPOINT_EVERY = 1000
# What is stored as it was trained. Rows of other formats lost something when they were encoded.
_EXACT = ("fp32", "fp16", "bf16")
# So long after its last push a branch counts as being trained.
_TRAINED_SECONDS = 30
# For how long a lock is waited for, which is held for a few milliseconds, and how often it is looked.
_LOCK_SECONDS, _LOCK_TICK = 10.0, 0.005
_FOLDER = re.compile(r"\.(.+)\.branch")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))


class BranchTable(_Frozen):
    """A table, and the share that each part is in."""

    name: str
    rows: int
    dim: int
    rows_per_part: int
    shares: tuple[str, ...]

    @property
    def parts(self) -> int:
        """How many."""
        return len(self.shares)

    def part_rows(self, part: int) -> int:
        """Rows of a part."""
        return min(self.rows_per_part, self.rows - part * self.rows_per_part)

    def parts_of(self, share: str) -> list[int]:
        """The parts that are in a share."""
        return [part for part, each in enumerate(self.shares) if each == share]


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
    """A branch of a model, which began from a version of it.

    Attributes:
        made: Sets it apart from another branch that had its name.
        homes: The shard that has each share at first.
        copies: How many shards are to have each share.
    """

    format_version: Literal[1] = 1
    model: str
    name: str
    made: str
    base: str
    family: str
    hash_params: dict[str, Any]
    tables: tuple[BranchTable, ...]
    optimizer: OptimizerNumbers
    checkpoint_every: int = Field(ge=1)
    homes: dict[str, str]
    copies: int = Field(default=1, ge=1)

    @property
    def full_name(self) -> str:
        """`model@branch`."""
        return f"{self.model}@{self.name}"

    @cached_property
    def shares(self) -> list[str]:
        """The names of the shares."""
        return sorted(self.homes)


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

    owners: of each table the shard that is to have each part at first; `shards` take turns where there is none.
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
    homes: dict[str, str] = {}
    about = Branch(
        model=model,
        name=branch,
        made=secrets.token_hex(4),
        base=manifest.version,
        family=manifest.family,
        hash_params=manifest.hash_params,
        tables=tuple(
            BranchTable(
                name=table.name,
                rows=table.rows,
                dim=table.dim,
                rows_per_part=table.rows_per_part,
                shares=_shares(owners.get(table.name) or [""] * len(table.parts), shards, request.shares, homes),
            )
            for table in manifest.tables
        ),
        homes=homes,
        copies=request.copies or 1,
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


def _shares(owners: Sequence[str], shards: Sequence[str], wanted: int, homes: dict[str, str]) -> tuple[str, ...]:
    """The share of each part. Each shard has one, which bears its name, or as many as `wanted` takes."""
    of_a_shard, counts = max(1, -(-wanted // len(shards))), dict.fromkeys(shards, 0)
    named = []
    for part, owner in enumerate(owners):
        shard = owner or shards[part % len(shards)]
        number = counts[shard] = counts.get(shard, 0) + 1
        named.append(f"{shard}.{number % of_a_shard}" if of_a_shard > 1 else shard)
        homes[named[-1]] = shard
    return tuple(named)


def say_trained(folder: Path) -> None:
    """Say that somebody trains the branch."""
    (folder / "trained").touch()


def remove_branch(store: Store, name: str) -> None:
    """Remove a branch with its checkpoints. Shards give its memory and its logs back within seconds.

    What was published of it stays. Raises NotFound, and InvalidRequest while somebody trains it.
    """
    read_branch(store, name)
    folder = branch_folder(store, *split_name(name))
    trained = folder / "trained"
    if trained.exists() and (ago := time.time() - trained.stat().st_mtime) < _TRAINED_SECONDS:
        raise InvalidRequest(
            f"{name} was trained {max(ago, 0):.0f} s ago: end its trainer, and ask again after {_TRAINED_SECONDS} s"
        )
    shutil.rmtree(set_aside(folder), ignore_errors=True)  # `gc` removes what is left


def _check_trainable(manifest: Manifest, dequantize: bool) -> None:
    quantized = [table for table in manifest.tables if table.dtype not in _EXACT]
    if quantized and not dequantize:
        raise InvalidRequest(
            f"{manifest.full_name} stores table {quantized[0].name} as {quantized[0].dtype}, which steps would be lost "
            "in: begin from an fp32 version (base=...), or from these rows as float32 with dequantize=True"
        )


def _write_first(path: Path, text: str) -> None:
    """Write a file unless it is there. At any moment it is whole or not there."""
    own = path.with_name(path.name + _own())
    write_synced(own, text.encode())
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()


def next_session(folder: Path) -> int:
    """A number that no session of the branch had. The first one is 1."""
    with locked(folder / "sessions.lock"):
        path = folder / "sessions"
        number = int(path.read_text()) + 1 if path.exists() else 1
        replace(path, f"{number}\n".encode())
    return number


def write_address(folder: Path, shard: str, address: str) -> None:
    """Say where a shard of the branch is reached."""
    (folder / "shards").mkdir(exist_ok=True)
    replace(folder / "shards" / shard, address.encode())


def read_address(folder: Path, shard: str) -> str:
    """What a shard said last. Nothing yet: empty."""
    path = folder / "shards" / shard
    return path.read_text() if path.exists() else ""


def say_leaving(folder: Path, shard: str, leaving: bool) -> None:
    """Say whether a shard wants to end, so that others give it nothing and take what it has."""
    mark = folder / "shards" / f"{shard}.leaving"
    if leaving:
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
    else:
        mark.unlink(missing_ok=True)


def leaving_shards(folder: Path) -> set[str]:
    """The shards that want to end."""
    return {path.stem for path in (folder / "shards").glob("*.leaving")}


def replace(path: Path, data: bytes) -> None:
    """`write_durably`, where several shards write to one folder, and several threads of each."""
    write_durably(path, data, own=_own())


def _own() -> str:
    """What sets this thread's file apart from others' of the same name."""
    return f".{os.getpid()}.{threading.get_ident()}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else is in here with the same file, on any machine that sees the folder.

    Raises Unavailable if somebody is for long. A process that hangs in here keeps others out for good.
    """
    with path.open("wb") as lock:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _lock(lock):
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"another process has had {path} locked for {_LOCK_SECONDS:g} s: end the one that hangs, ask again"
                )
            time.sleep(_LOCK_TICK)
        yield


def _lock(file: IO[bytes]) -> bool:
    """Whether it was had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
