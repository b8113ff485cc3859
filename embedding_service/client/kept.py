"""Rows that this client has seen, kept in the bytes they came in, and when they may stand for the service's.

N-grams of text repeat, and a row that is here needs no RPC. The slots are set-associative, as in a processor's cache: a
key's hash names a set of `WAYS` slots. In a set the row that was asked for longest ago gives way. numpy does everything
for all ids of a lookup at once, because a lookup of 12 rows must cost far less than the RPC that it saves.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedding_service.errors import InvalidRequest
from embedding_service.placement.routing import Ids, Model, Routing
from embedding_service.wire.lookup_codec import Bytes

WAYS = 8
# A key is a kind's number and, in the low bits, a row id. Tables with more rows than that are not cached.
_ID_BITS = 40
MOST_ROWS = 1 << _ID_BITS
_NOBODY = -1
# What a slot costs besides its row: its key and when it was asked for last, int64 each.
_SLOT_BYTES = 16
# 2^64 divided by the golden ratio, odd: Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4).
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_HIGH = np.uint64(32)
# Seconds for which a version counts as the newest one for kept rows. Then a lookup asks a shard again, which says so if
# the version was replaced.
TRUSTED_SECONDS = 1.0


class Kind(NamedTuple):
    """Rows that their ids tell apart: of one table of one version, in one encoding."""

    model: str
    table: str
    encoding: int
    row_bytes: int


class CacheStats(NamedTuple):
    """`hits` and `misses` count rows since the client began. `saved_bytes` did not cross the wire. `rows` are here."""

    hits: int
    misses: int
    saved_bytes: int
    rows: int


class KeptRows:
    """At most `cache_bytes` of rows with their keys. Thread-safe. Raises InvalidRequest for less than one set."""

    def __init__(self, cache_bytes: int) -> None:
        if cache_bytes < 1 << 20:
            raise InvalidRequest(f"cache_bytes must be 0 (no cache) or at least 1048576 (1 MiB), got {cache_bytes}")
        self._bytes = cache_bytes
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._kinds: dict[Kind, int] = {}
        self._slots: dict[int, _Slots] = {}  # by the bytes of a row
        self._hits = self._misses = self._saved = 0

    @property
    def stats(self) -> CacheStats:
        """What it did so far."""
        with self._lock:
            rows = sum(slots.count for slots in self._slots.values())
            return CacheStats(self._hits, self._misses, self._saved, rows)

    def find(self, kind: Kind, ids: Ids) -> tuple[npt.NDArray[np.bool_], Bytes]:
        """Which of the `ids` int64 [n] in [0, MOST_ROWS) are here, bool [n].

        And a copy of their rows, uint8 [hits, row_bytes].
        """
        with self._lock:
            number = self._kinds.get(kind)
            if number is None:
                here, rows = np.zeros(len(ids), np.bool_), np.empty((0, kind.row_bytes), np.uint8)
            else:
                here, rows = self._slots[kind.row_bytes].find(_keys(number, ids))
            self._hits += len(rows)
            self._misses += len(ids) - len(rows)
            self._saved += rows.nbytes
        return here, rows

    def miss(self, rows: int) -> None:
        """Count rows that were not looked for."""
        with self._lock:
            self._misses += rows

    def keep(self, kind: Kind, ids: Ids, rows: Bytes) -> None:
        """Remember the rows uint8 [n, row_bytes] of different `ids` int64 [n] in [0, MOST_ROWS), if there is room."""
        if not len(ids):
            return
        with self._lock:
            if kind not in self._kinds:
                if not self._make_room(kind.row_bytes):
                    return
                self._kinds[kind] = next(self._numbers)
            self._slots[kind.row_bytes].keep(_keys(self._kinds[kind], ids), rows)

    def retain(self, models: Collection[str]) -> None:
        """Drop the rows of all versions but these (`name@version`)."""
        with self._lock:
            for kind in [kind for kind in self._kinds if kind.model not in models]:
                self._slots[kind.row_bytes].drop(self._kinds.pop(kind))

    def _make_room(self, row_bytes: int) -> bool:
        """Rows of another width need slots of their own. Slots of all widths begin empty, each with an even share.

        False: of the widest rows not even a set would fit into that. Then rows of the other width are not cached.
        """
        if row_bytes in self._slots:
            return True
        widths = {row_bytes, *(kind.row_bytes for kind in self._kinds)}
        share = self._bytes // len(widths)
        if share < WAYS * (max(widths) + _SLOT_BYTES):
            return False
        self._slots.clear()  # before the new ones are made, so never twice the bytes
        self._slots = {width: _Slots(share, width) for width in widths}
        return True


def _keys(number: int, ids: Ids) -> Ids:
    return ids + (number << _ID_BITS)


class Found(NamedTuple):
    """What is kept of the rows of n ids: bool [n] and uint8 [hits, row_bytes]."""

    kind: Kind
    here: npt.NDArray[np.bool_]
    rows: Bytes


class Keeper:
    """Says when kept rows may stand for the service's, and keeps what came.

    Args:
        rows: Where they are kept.
        current: The routing that the client has now.
    """

    def __init__(self, rows: KeptRows, current: Callable[[], Routing | None]) -> None:
        self.rows = rows
        self._current = current
        self._routing: Routing | None = None
        self._confirmed: dict[str, float] = {}

    def trusts(self, model: Model, now: float, *, pinned: bool) -> bool:
        """Whether kept rows of this version count at `now`, on time.monotonic's clock.

        It is `pinned` if the caller named it. Otherwise a shard must have confirmed lately that it is the newest.
        """
        routing = self._current()
        if routing is not None and routing is not self._routing:
            self._routing = routing
            self.rows.retain({each.full_name for each in routing.models})
        return pinned or now < self._confirmed.get(model.full_name, now - TRUSTED_SECONDS) + TRUSTED_SECONDS

    def confirm(self, version: str, began: float) -> None:
        """A shard answered a lookup of this version (`name@version`) that began then."""
        self._confirmed[version] = began

    def find(self, kind: Kind, ids: Ids, trusted: bool) -> Found:
        """What is kept of `ids` int64 [n]. All are in range, since others are no keys."""
        if not trusted:
            self.rows.miss(len(ids))
            return Found(kind, np.zeros(len(ids), np.bool_), np.empty((0, kind.row_bytes), np.uint8))
        return Found(kind, *self.rows.find(kind, ids))

    def merge(self, found: Found, missing: Ids, fetched: Bytes) -> Bytes:
        """All n rows in their order, uint8 [n, row_bytes]. Those of `missing` ids were fetched, and are kept now."""
        if not len(fetched):
            return found.rows
        self.rows.keep(found.kind, missing, fetched)
        if not len(found.rows):
            return fetched
        rows = np.empty((len(found.here), found.kind.row_bytes), np.uint8)
        rows[found.here], rows[~found.here] = found.rows, fetched
        return rows


class _Slots:
    """Slots for rows of one width. Not thread-safe."""

    def __init__(self, total_bytes: int, row_bytes: int) -> None:
        self._sets = total_bytes // (WAYS * (row_bytes + _SLOT_BYTES))
        self._keys = np.full((self._sets, WAYS), _NOBODY, np.int64)
        self._asked = np.zeros((self._sets, WAYS), np.int64)
        # Pages that hold no row yet are no memory yet.
        self._rows = np.empty((self._sets * WAYS, row_bytes), np.uint8)
        self._now = 0

    @property
    def count(self) -> int:
        """Rows held."""
        return int(np.count_nonzero(self._keys != _NOBODY))

    def find(self, keys: Ids) -> tuple[npt.NDArray[np.bool_], Bytes]:
        self._now += 1
        sets = self._set_of(keys)
        same = self._keys[sets] == keys[:, None]
        here = same.any(1)
        slots = sets * WAYS + same.argmax(1)
        if not here.all():
            slots = slots[here]
        self._asked.reshape(-1)[slots] = self._now
        return here, self._rows.take(slots, axis=0)

    def keep(self, keys: Ids, rows: Bytes) -> None:
        self._now += 1
        sets = self._set_of(keys)
        # Two threads may have fetched the same row. Its bytes are the same, so one copy is enough.
        new = ~(self._keys[sets] == keys[:, None]).any(1)
        order = np.flatnonzero(new)[np.argsort(sets[new], kind="stable")]
        sets = sets[order]
        # The first of a set's newcomers takes the slot that was asked for longest ago, the second the next one.
        rank = np.arange(len(sets)) - np.searchsorted(sets, sets)
        room = rank < WAYS
        order, sets, rank = order[room], sets[room], rank[room]
        ways = np.argsort(self._asked[sets], axis=1, kind="stable")[np.arange(len(sets)), rank]
        self._keys[sets, ways] = keys[order]
        self._asked[sets, ways] = self._now
        self._rows[sets * WAYS + ways] = rows[order]

    def drop(self, number: int) -> None:
        """Forget a kind's rows."""
        gone = self._keys >> _ID_BITS == number
        self._keys[gone] = _NOBODY
        self._asked[gone] = 0

    def _set_of(self, keys: Ids) -> Ids:
        spread = (keys.view(np.uint64) * _SPREAD) >> _HIGH
        # The high bits, scaled to the number of sets. A remainder costs more.
        return ((spread * np.uint64(self._sets)) >> _HIGH).view(np.int64)
