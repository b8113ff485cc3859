"""Who has each share of a branch: its primary, the copies in sync, and those that join.

A seat is a file in the branch's folder. It changes by compare-and-set, so all shards agree on it without a message. A
primary answers a push when all copies in sync have it. So each of them may take the primary's place at any time. One
that was deposed learns so from its copies, which follow another one, or from the seat when it wants to drop them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from embedding_service.errors import Unavailable
from embedding_service.training.branch import Branch, locked, replace


class Seat(BaseModel):
    """Who has a share.

    Attributes:
        epoch: Grows with each change.
        primary: Takes pushes.
        in_sync: The shards that have all that was accepted, the primary among them, and the identities of their logs.
        joining: Are to be in sync.
        timeline: How often updates that were accepted were lost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = 0
    primary: str
    in_sync: dict[str, str]
    joining: tuple[str, ...] = ()
    timeline: int = 0

    @property
    def holders(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.in_sync, *self.joining)

    def without(self, *shards: str) -> dict[str, Any]:
        """What changes if these have it no more."""
        return {
            "in_sync": {shard: log for shard, log in self.in_sync.items() if shard not in shards},
            "joining": tuple(shard for shard in self.joining if shard not in shards),
        }

    def demoting(self, shard: str) -> dict[str, Any]:
        """What changes if this one is to come into sync again."""
        without = self.without(shard)
        return {**without, "joining": (*without["joining"], shard)}


def read_seat(folder: Path, branch: Branch, share: str) -> Seat:
    """A share's seat as it is now."""
    try:
        return Seat.model_validate_json((folder / "seats" / f"{share}.json").read_bytes())
    except FileNotFoundError:  # as it was at first
        home = branch.homes[share]
        return Seat(primary=home, in_sync={home: ""})


def read_seats(folder: Path, branch: Branch) -> dict[str, Seat]:
    """The seats of all shares."""
    return {share: read_seat(folder, branch, share) for share in branch.shares}


def change_seat(folder: Path, branch: Branch, share: str, before: Seat, **changes: Any) -> Seat:
    """Change a seat that is still as it was before. Raises Unavailable if it is not."""
    with _alone(folder, share):
        now = read_seat(folder, branch, share)
        if now != before:
            raise Unavailable(f"share {share} of {branch.full_name} is at shard {now.primary} by now: ask again")
        after = now.model_copy(update={**changes, "epoch": now.epoch + 1})
        replace(folder / "seats" / f"{share}.json", after.model_dump_json().encode())
    return after


@contextmanager
def leading(folder: Path, branch: Branch, share: str, shard: str) -> Iterator[None]:
    """Nobody else becomes the share's primary in here. Raises Unavailable if somebody has."""
    with _alone(folder, share):
        if (now := read_seat(folder, branch, share).primary) != shard:
            raise Unavailable(f"share {share} of {branch.full_name} is at shard {now} by now")
        yield


@contextmanager
def _alone(folder: Path, share: str) -> Iterator[None]:
    (folder / "seats").mkdir(exist_ok=True)
    with locked(folder / "seats" / f"{share}.lock"):
        yield


class Duty(NamedTuple):
    """What a shard does about a share: changes its seat, or hands it over."""

    kind: Literal["recruit", "drop", "hand over", "take over"]
    shard: str


def duty_of(
    share: str,
    seats: Mapping[str, Seat],
    me: str,
    there: Collection[str],
    able: Collection[str],
    copies: int,
    *,
    draining: bool,
) -> Duty | None:
    """What `me` does next about a share of a branch, or None.

    A primary sees to it that there are `copies`, and that no shard leads two shares more than another one.

    seats: Of all shares of the branch. there: The shards that are there. able: Those of them that may have shares.
    """
    seat = seats[share]
    if me != seat.primary:
        return Duty("take over", me) if me in seat.in_sync and seat.primary not in there else None
    others = sorted(set(able) - {me}, key=lambda shard: (_load(seats)[shard], shard))
    if draining and not others:
        return None
    if gone := [shard for shard in seat.holders if shard not in (me, *others)]:
        return Duty("drop", gone[0])
    target = _successor(seats, seat, me, others, draining)
    if target in seat.in_sync:
        return Duty("hand over", target)
    if target and target not in seat.joining:
        return Duty("recruit", target)
    if not target and len(seat.holders) > copies:
        return Duty("drop", max((shard for shard in seat.holders if shard != me), key=others.index))
    if len(seat.holders) < copies and (free := [shard for shard in others if shard not in seat.holders]):
        return Duty("recruit", free[0])
    return None


def _successor(seats: Mapping[str, Seat], seat: Seat, me: str, others: list[str], draining: bool) -> str:
    """Who is to lead in my place; empty if I stay. others: Who may, those with the fewest copies first."""
    if draining:  # to one that has all, or soon has
        in_sync = [shard for shard in others if shard in seat.in_sync]
        joining = [shard for shard in others if shard in seat.joining]
        return next(iter([*in_sync, *joining, *others]), "")
    leads = Counter(each.primary for each in seats.values())
    for shard in seat.joining:
        if leads[me] - leads[shard] >= 2:
            return shard
    joins = Counter(shard for each in seats.values() for shard in each.joining)
    may_lead = {shard: leads[shard] + joins[shard] for shard in others}
    fewest = min(others, key=lambda shard: (may_lead[shard], shard), default="")
    return fewest if fewest and leads[me] - may_lead[fewest] >= 2 else ""


def _load(seats: Mapping[str, Seat]) -> Counter[str]:
    return Counter(shard for each in seats.values() for shard in each.holders)
