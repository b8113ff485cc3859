"""The packing: which nodes hold the copies of each part. It is pure and deterministic. `planner` puts it into TorchRec.

Rules, in the order of their force:

1. No node holds more than its memory limit, nor two copies of a part.
2. Copies of a part lie in different places (values of the topology key) while there are enough places with room.
3. Parts with the most measured accesses a byte lie in GPU memory, as far as it holds. The rest lie in host memory. A
   part in GPU memory counts a quarter more, so that two of equal heat do not take turns. Parts without accesses come
   last. Those in GPU memory stay there, and others go there only if host memory does not hold them.
4. A part stays where it is held.
5. A node's fair share of its device's bytes is by its memory limit. (It is less if that would need two copies of a part
   in one place.) The tolerance is the largest part or 5 % of the share, the larger of the two. A node that is further
   off is brought to its share. Parts move for nothing else, so memory limits may waver between two plans without moving
   a byte. Afterwards every node is within the tolerance, unless rule 1 or 2 stands in the way.
6. Of equally empty nodes, a copy goes to the one with the fewest parts in common with the part's other nodes.

So a joining node loads at most about its fair share, and no other node loads anything. What a leaving node held is all
that moves. More moves only if memory is so tight that held parts block others (rule 1). Then single parts make room
first. If that does not help, everything is packed again, the largest parts first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from embedding_service.errors import PlacementError
from embedding_service.placement.demand import CUDA, Node, PartDemand
from embedding_service.placement.parts import PartKey

TOLERANCE = 0.05
STAYING_HOT = 1.25

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def pack(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int = 1) -> list[list[int]]:
    """For each part the indices in `nodes` of its `replicas` different nodes.

    Raises:
        PlacementError: they do not fit.
    """
    check_fit(parts, nodes, replicas)
    problem: PlacementError | None = None
    for keep_first, mind_held in ((True, True), (False, True), (False, False)):
        packing = _Packing(parts, nodes, replicas, mind_held)
        try:
            packing.fill(keep_first)
        except PlacementError as error:
            problem = problem or error
            continue
        packing.even_out()
        return packing.ranks
    assert problem
    raise problem


def check_fit(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> None:
    """Raise PlacementError if the nodes cannot hold the parts by any plan."""
    if not parts:
        return
    if replicas > len(nodes):
        raise PlacementError(f"{replicas} replicas of every part need {replicas} shards, there are {len(nodes)}")
    largest_part = max(parts, key=lambda part: part.nbytes)
    largest_node = max(nodes, key=lambda node: node.memory_limit)
    if largest_part.nbytes > largest_node.memory_limit:
        raise PlacementError(
            f"part {largest_part.key} needs {largest_part.nbytes:,} bytes and the largest shard, {largest_node.shard}, "
            f"offers {largest_node.memory_limit:,}: raise its --memory or import with a smaller --part-size"
        )
    once = sum(part.nbytes for part in parts)
    usable = sum(min(node.memory_limit, once) for node in nodes)
    if once * replicas > usable:
        offered = sum(node.memory_limit for node in nodes)
        idle = (
            f", of which {offered - usable:,} are of no use because a shard holds a part once"
            if offered > usable
            else ""
        )
        raise PlacementError(
            f"{_demand(parts, nodes, replicas)}{idle}: {once * replicas - usable:,} bytes are missing; "
            "add shards or raise --memory"
        )


def more_needed(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int, like: Node) -> int | None:
    """The smallest number of further nodes like `like` with which the parts fit. None if no number would do."""
    per_node = like.memory_limit // max(part.nbytes for part in parts)
    if per_node == 0:
        return None

    def fits(more: int) -> bool:
        added = [replace(like, shard=f"{like.shard}+{index}", held=frozenset()) for index in range(more)]
        try:
            pack(parts, [*nodes, *added], replicas)
        except PlacementError:
            return False
        return True

    enough = -(-len(parts) // per_node) * replicas  # would hold everything alone, each copy on nodes of its own
    return bisect_left(range(enough), True, key=fits)


def _demand(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> str:
    needed = sum(part.nbytes for part in parts) * replicas
    offered = sum(node.memory_limit for node in nodes)
    times = f" {replicas} times" if replicas > 1 else ""
    return f"holding {len(parts)} parts{times} needs {needed:,} bytes and {len(nodes)} shards offer {offered:,}"


class _Packing:
    """Copies on nodes while the packing is made. Parts and nodes are named by their index (a node's is its rank)."""

    def __init__(self, parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int, mind_held: bool) -> None:
        self.ranks: list[list[int]] = [[] for _ in parts]
        self._parts, self._nodes, self._replicas = parts, nodes, replicas
        self._size = [part.nbytes for part in parts]
        self._holders = _holders(parts, nodes) if mind_held else [[] for _ in parts]
        self._limit = np.array([node.memory_limit for node in nodes], dtype=np.int64)
        self._free = self._limit.copy()
        self._on_cuda = np.array([node.device == CUDA for node in nodes])
        self._place_of = _places(nodes)
        self._in_place = [np.flatnonzero(np.equal(self._place_of, place)) for place in range(len(nodes))]
        # For each node its parts by size. All of one size move equally well, and the last that came goes first.
        self._contents: list[dict[int, dict[int, None]]] = [{} for _ in nodes]
        self._in_common = np.zeros((len(nodes), len(nodes)), dtype=np.int32)
        self._cuda_copies = _cuda_copies(parts, nodes, replicas, self._holders)
        self._share = self._fair_shares(self._cuda_copies)

    def fill(self, keep_first: bool) -> None:
        """Put every copy somewhere. `keep_first`: held parts stay before anything else gets a place."""
        everything = range(len(self._parts))
        if keep_first:
            # A part may be held by more nodes than need to. It stays on the emptiest of them, which come last.
            surplus = [len(holders) > self._replicas for holders in self._holders]
            for part in sorted(everything, key=lambda part: (surplus[part], -self._size[part])):
                self._keep(part)
        for part in sorted(everything, key=self._urgency):
            while len(self.ranks[part]) < self._replicas:
                if not self._place(part) and not self._make_room(part):
                    raise PlacementError(
                        f"{_demand(self._parts, self._nodes, self._replicas)}, but in too small pieces: no shard has "
                        f"{self._size[part]:,} bytes free for {self._parts[part].key}; add shards, raise --memory or "
                        "import with a smaller --part-size"
                    )

    def even_out(self) -> None:
        """Bring nodes to their fair share that are off it by more than the tolerance."""
        self._share = self._fair_shares([int(self._on_cuda[ranks].sum()) for ranks in self.ranks])
        tolerance = np.maximum(max(self._size, default=0), (self._share * TOLERANCE).astype(np.int64))
        moved = True
        while moved:
            moved = False
            for rank in np.argsort(-np.abs(self._excess), kind="stable").tolist():
                if abs(self._excess[rank]) >= tolerance[rank]:
                    moved |= self._settle(rank)

    # Placing

    @property
    def _excess(self) -> Int64s:
        """Bytes each node holds above its fair share."""
        return self._limit - self._free - self._share

    def _urgency(self, part: int) -> tuple[float, int]:
        """Sorts the parts for GPU memory before the others, hottest first, and then the largest first."""
        return (-_heat(self._parts[part]) if self._cuda_copies[part] else 0.0, -self._size[part])

    def _keep(self, part: int) -> None:
        """Leave copies on nodes that hold the part, up to the number for each device."""
        on_cuda = self._cuda_copies[part]
        for device, copies in ((True, on_cuda), (False, self._replicas - on_cuda)):
            for _ in range(copies):
                open_ = self._open(part) & (self._on_cuda == device)
                staying = [rank for rank in self._holders[part] if open_[rank]]
                if staying:
                    self._put(part, self._emptiest(part, staying))

    def _place(self, part: int) -> bool:
        """Put one more copy on the best node that has room: right place, right device, holds it, the emptiest."""
        wants_cuda = self._on_cuda[self.ranks[part]].sum() < self._cuda_copies[part]
        right_device = self._on_cuda == wants_cuda
        for open_ in (self._open(part), self._open(part, spread=False)):
            for candidates in (open_ & right_device, open_):
                if candidates.any():
                    holding = [rank for rank in self._holders[part] if candidates[rank]]
                    self._put(part, self._emptiest(part, holding or np.flatnonzero(candidates)))
                    return True
        return False

    def _make_room(self, part: int) -> bool:
        """Move one other part away, so that a node has room for a copy. Returns whether it did."""
        for rank in np.argsort(-self._free, kind="stable").tolist():
            if rank in self.ranks[part]:
                continue
            least = self._size[part] - int(self._free[rank])
            for size in sorted(size for size, held in self._contents[rank].items() if held and size >= least):
                if not (self._free >= size).any():
                    break
                for other in self._contents[rank][size]:
                    if self._place(other):
                        self._take(other, rank)
                        self._put(part, rank)
                        return True
        return False

    def _open(self, part: int, spread: bool = True) -> Bools:
        """Nodes with room for a copy that hold none. With `spread`, no node in the same place holds one either."""
        open_ = self._free >= self._size[part]
        for rank in self.ranks[part]:
            open_[self._in_place[self._place_of[rank]] if spread else rank] = False
        return open_

    def _emptiest(self, part: int, ranks: Sequence[int] | Int64s) -> int:
        """Of equally empty nodes, the one with the fewest parts in common with the nodes that have the part already.

        So when a node dies, many nodes share its reads and the bytes to be moved.
        """
        excess = self._excess[ranks]
        tied = np.asarray(ranks)[excess == excess.min()]
        return int(tied[np.argmin(self._in_common[self.ranks[part]][:, tied].sum(axis=0))])

    def _put(self, part: int, rank: int) -> None:
        self._in_common[self.ranks[part], rank] += 1
        self._in_common[rank, self.ranks[part]] += 1
        self.ranks[part].append(rank)
        self._contents[rank].setdefault(self._size[part], {})[part] = None
        self._free[rank] -= self._size[part]

    def _take(self, part: int, rank: int) -> None:
        self.ranks[part].remove(rank)
        self._in_common[self.ranks[part], rank] -= 1
        self._in_common[rank, self.ranks[part]] -= 1
        del self._contents[rank][self._size[part]][part]
        self._free[rank] += self._size[part]

    # Evening out

    def _settle(self, rank: int) -> bool:
        """Move parts off a node above its share, or onto one below, until it is there. Returns whether any moved."""
        too_full = bool(self._excess[rank] > 0)
        moved = False
        while (self._excess[rank] > 0 if too_full else self._excess[rank] < 0) and self._improve(rank, too_full):
            moved = True
        return moved

    def _improve(self, rank: int, too_full: bool) -> bool:
        """Move one part between the node and the one of its device that is farthest on the other side."""
        excess = self._excess
        device = np.flatnonzero(self._on_cuda == self._on_cuda[rank])
        others = device[np.argsort(excess[device] if too_full else -excess[device], kind="stable")].tolist()
        for other in others:
            source, target = (rank, other) if too_full else (other, rank)
            if excess[source] <= excess[target]:
                return False
            part = self._movable(source, target)
            if part is not None:
                self._take(part, source)
                self._put(part, target)
                return True
        return False

    def _movable(self, source: int, target: int) -> int | None:
        """A part whose move brings the two nodes closer: the largest that overshoots neither share, or the smallest."""
        over, under = int(self._excess[source]), -int(self._excess[target])
        room = int(self._free[target])
        sizes = [size for size, held in self._contents[source].items() if held and size < over + under and size <= room]
        wish = min(over, under)
        for size in sorted(sizes, key=lambda size: (size > wish, size if size > wish else -size)):
            for part in reversed(self._contents[source][size]):
                if self._may_move(part, source, target):
                    return part
        return None

    def _may_move(self, part: int, source: int, target: int) -> bool:
        """Whether the copies stay on different nodes, and in as many places."""
        others = [rank for rank in self.ranks[part] if rank != source]
        place = self._place_of[target]
        return target not in others and (
            self._place_of[source] == place or all(self._place_of[rank] != place for rank in others)
        )

    # Shares

    def _fair_shares(self, cuda_copies: Sequence[int]) -> Int64s:
        """Bytes that each node should hold, given the number of copies of each part in GPU memory."""
        shares = np.zeros(len(self._nodes), dtype=np.int64)
        for device in (True, False):
            copies = [count if device else self._replicas - count for count in cuda_copies]
            ranks = np.flatnonzero(self._on_cuda == device).tolist()
            once = sum(size for size, count in zip(self._size, copies, strict=True) if count)
            total = sum(size * count for size, count in zip(self._size, copies, strict=True))
            groups: dict[int, list[int]] = {}
            for rank in ranks:
                groups.setdefault(self._place_of[rank], []).append(rank)
            if len(groups) < max(copies):
                groups = {rank: [rank] for rank in ranks}
            for rank, share in self._split(total, once, groups.values()):
                shares[rank] = share
        return shares

    def _split(self, total: int, most: int, groups: Iterable[list[int]]) -> Iterator[tuple[int, int]]:
        """Split bytes by memory limit. No group of nodes gets more than `most`, and the others take the rest over."""
        weights = {tuple(group): sum(int(self._limit[rank]) for rank in group) for group in groups}
        weight = sum(weights.values())
        for group, own in sorted(weights.items(), key=lambda item: (-item[1], item[0])):
            capped = weight > 0 and total * own > most * weight
            part, of = (most, own) if capped else (total, max(weight, 1))
            yield from ((rank, part * int(self._limit[rank]) // of) for rank in group)
            if capped:
                total, weight = total - most, weight - own


def _holders(parts: Sequence[PartDemand], nodes: Sequence[Node]) -> list[list[int]]:
    """For each part the ranks of the nodes that hold it."""
    ranks: dict[PartKey, list[int]] = {part.key: [] for part in parts}
    for rank, node in enumerate(nodes):
        for key in node.held & ranks.keys():
            ranks[key].append(rank)
    return [ranks[part.key] for part in parts]


def _places(nodes: Sequence[Node]) -> list[int]:
    """For each node the number of its place. Nodes of one topology value share it. A node without one has its own."""
    numbers: dict[tuple[str, str], int] = {}
    return [numbers.setdefault((node.topology, "" if node.topology else node.shard), len(numbers)) for node in nodes]


def _heat(part: PartDemand) -> float:
    return part.load / part.nbytes


def _cuda_copies(
    parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int, holders: Sequence[Sequence[int]]
) -> list[int]:
    """The number of copies of each part that belong in GPU memory (rule 3)."""
    cuda = {rank for rank, node in enumerate(nodes) if node.device == CUDA}
    room = sum(nodes[rank].memory_limit for rank in cuda)
    host_room = sum(node.memory_limit for node in nodes) - room
    most, least = min(replicas, len(cuda)), max(0, replicas - (len(nodes) - len(cuda)))
    if most == least:
        return [most] * len(parts)
    copies = [least] * len(parts)
    once = sum(part.nbytes for part in parts)
    room, rest = room - least * once, (replicas - least) * once
    there = [not cuda.isdisjoint(ranks) for ranks in holders]
    heat = [_heat(part) * (STAYING_HOT if stays else 1) for part, stays in zip(parts, there, strict=True)]
    for index in sorted(range(len(parts)), key=lambda index: (-heat[index], not there[index])):
        taken = (most - least) * parts[index].nbytes
        if taken <= room and (heat[index] or there[index] or rest > host_room):
            copies[index] = most
            room, rest = room - taken, rest - taken
    return copies
