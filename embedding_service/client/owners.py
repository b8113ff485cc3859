"""Which shard is asked for which rows. Pure: it goes by a routing and what is known against its shards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedding_service.client.wants import Want
from embedding_service.placement.routing import FEW_IDS, NOBODY, Ids, Model, Routing, Table

# More bytes of rows that must be decoded are asked of a shard in pieces. It gathers one while others travel and are
# decoded.
PIECE_BYTES = 2 << 20

# What is known against a shard that failed this lookup: in a round before, or in the last one.
FAILED, JUST_FAILED = 4, 6

# By the index of each want: the positions of the ids that are still wanted. None: all of them.
Missing = dict[int, Ids | None]


class Leg(NamedTuple):
    """What one shard, by its index in the routing, is asked of one want.

    `positions` are those of the ids whose rows are asked for. None: all, in their order.
    """

    want: int
    shard: int
    positions: Ids | None


class Standing(NamedTuple):
    """What is known against the shards of a routing.

    Attributes:
        badness: int8 [shards + 1]: 0 good, 2 failed others of late, `FAILED`, `JUST_FAILED`; `NOBODY` at index -1.
            What is in another topology than the client has 1 more.
        due: Addresses that this lookup is to try again. Their badness is -2, or 1 in another topology.
        calm: Nothing is known against anybody.
    """

    badness: npt.NDArray[np.int8]
    due: Set[str]
    calm: bool

    @property
    def best(self) -> int:
        """No badness is below it."""
        return -2 if self.due else 0


def standing_of(
    routing: Routing, avoid: Mapping[str, int], resting: Set[str], due: Set[str], topology: str = ""
) -> Standing:
    """From addresses that failed this lookup, that rest, and whose rest is over, for a client of this topology.

    They must not be alike: a shard that was killed and started again is worth asking before one that hangs. Those that
    are due come first, or a turn that passes them by would leave them unused for long. In another topology they
    wait until one there is wanted.
    """
    far = routing.farness(topology) if topology else routing.nothing_known
    if not resting and not due and not avoid:
        return Standing(far, due, True)
    known = {**dict.fromkeys(due, -2), **dict.fromkeys(resting, 2), **avoid}
    badness = np.array([*(known.get(address, 0) for address in routing.addresses), 0], np.int8) + far
    return Standing(np.where(badness == -1, np.int8(1), badness), due, False)


def share_out(
    wants: Sequence[Want], missing: Missing, model: Model, standing: Standing, turn: int
) -> tuple[list[Leg], Missing]:
    """Share what is missing out among owners: a leg for each shard and want, and what nobody holds at the moment.

    One `turn` serves all tables. If the n-th owners of all parts are one group, that group is asked alone.
    """
    legs: list[Leg] = []
    nowhere: Missing = {}
    for index, positions in missing.items():
        ids, table = wants[index].ids, model.tables[wants[index].table.name]
        ids = ids if positions is None else ids[positions]
        shares: Iterable[tuple[int, Ids | None]] | None = None
        if len(ids) <= FEW_IDS:
            shares = _shares_of_few(table, ids, positions, turn, standing)
        if shares is None:
            shares = _by_owner(_choose(table.owners, ids // table.rows_per_part, turn, standing), positions)
        for shard, where in shares:
            if shard < 0:
                nowhere[index] = where
            else:
                legs.append(Leg(index, shard, where))
    return legs, nowhere


def cut(legs: Sequence[Leg], wants: Sequence[Want], routing: Routing) -> tuple[list[Leg], int]:
    """Legs within the service's limits, and the bytes of all their rows.

    Rows that are decoded as they come are cut into pieces, of about one size.
    """
    pieces: list[Leg] = []
    nbytes = 0
    for leg in legs:
        want = wants[leg.want]
        count = len(want.ids) if leg.positions is None else len(leg.positions)
        nbytes += count * want.row_bytes
        most = max(1, min(routing.response_bytes // want.row_bytes, routing.request_bytes // 8))
        if want.sink.decodes:
            most = min(most, max(1, PIECE_BYTES // want.row_bytes))
        if count <= most:
            pieces.append(leg)
            continue
        positions = np.arange(count) if leg.positions is None else leg.positions
        pieces += [leg._replace(positions=piece) for piece in np.array_split(positions, -(-count // most))]
    return pieces, nbytes


def has_other(leg: Leg, wants: Sequence[Want], model: Model, standing: Standing) -> bool:
    """Whether every row of a leg has another owner that is worth asking.

    For a good shard that is one of no other topology that did not fail this lookup. For others it is any: one that
    failed may have come back since.
    """
    want = wants[leg.want]
    ids, table = want.ids if leg.positions is None else want.ids[leg.positions], model.tables[want.table.name]
    owners = table.owners[ids // table.rows_per_part]
    badness = standing.badness[owners]
    is_good = standing.badness[leg.shard] == 0
    worth = (badness < FAILED) & (badness % 2 == 0) if is_good else badness < NOBODY
    return bool((worth & (owners != leg.shard)).any(1).all())


def still_missing(failed: Sequence[Leg], nowhere: Missing) -> Missing:
    """What is to be asked for again."""
    pieces: dict[int, list[Ids]] = {}
    for index, positions in (*nowhere.items(), *((leg.want, leg.positions) for leg in failed)):
        pieces.setdefault(index, []).extend([] if positions is None else [positions])
    return {index: np.concatenate(positions) if positions else None for index, positions in pieces.items()}


def _shares_of_few(
    table: Table, ids: Ids, positions: Ids | None, turn: int, standing: Standing
) -> list[tuple[int, Ids | None]] | None:
    """`_by_owner` of `_choose`, where the owners whose turn it is will do. None: others have to be looked at."""
    column = table.columns[turn % len(table.columns)]
    owners = [column[each // table.rows_per_part] for each in ids.tolist()]
    different = sorted(set(owners))
    if len(table.columns) > 1 and any(standing.badness[owner] > standing.best for owner in different):
        return None
    if len(different) == 1:
        return [(owners[0], positions)]
    places: dict[int, list[int]] = {owner: [] for owner in different}
    for place, owner in enumerate(owners):
        places[owner].append(place)
    return [(owner, np.array(where) if positions is None else positions[where]) for owner, where in places.items()]


def _choose(owners: npt.NDArray[np.int32], parts: Ids, turn: int, standing: Standing) -> npt.NDArray[np.int32]:
    """For each part the best of its owners, in turn among equals; -1 where there is none."""
    copies, badness = owners.shape[1], standing.badness
    chosen = owners[parts, turn % copies]
    for column in range(1, copies):
        if (badness[chosen] <= standing.best).all():
            break
        other = owners[parts, (turn + column) % copies]
        chosen = np.where(badness[other] < badness[chosen], other, chosen)
    return chosen


def _by_owner(owners: npt.NDArray[np.int32], positions: Ids | None) -> Iterator[tuple[int, Ids | None]]:
    """Each owner and its positions, in their order."""
    if np.count_nonzero(owners == owners[0]) == len(owners):
        yield int(owners[0]), positions
        return
    order = np.argsort(owners, kind="stable")
    owners = owners[order]
    positions = order if positions is None else positions[order]
    starts = [0, *(np.flatnonzero(np.diff(owners)) + 1), len(owners)]
    for start, end in itertools.pairwise(starts):
        yield int(owners[start]), positions[start:end]
