"""The row cache under any order of lookups and versions, beside a plain dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from embedding_service.client.kept import _SLOT_BYTES, WAYS, KeptRows, Kind, _Slots

WIDTHS = (16, 24, 1 << 20)
KINDS = st.builds(
    Kind, st.sampled_from(["m@1", "m@2", "n@1"]), st.sampled_from("tu"), st.integers(0, 1), st.sampled_from(WIDTHS)
)
# Few, so that sets of a cache of 1 MiB never overflow: what was kept must be there.
IDS = st.lists(st.integers(0, 20) | st.sampled_from([2**39, 2**40 - 1]), unique=True, max_size=6)


class CacheStates(RuleBasedStateMachine):
    """What is found is what was kept last for that kind and id, and nothing that was kept is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KeptRows(1 << 20)
        self.kept: dict[Kind, dict[int, np.ndarray]] = {}
        self.widths: set[int] = set()
        self.hits = self.misses = self.saved = 0
        self.count = 0

    @rule(kind=KINDS, ids=IDS)
    def keep(self, kind: Kind, ids: list[int]) -> None:
        rows = np.stack([self._fresh(kind.row_bytes) for _ in ids]) if ids else np.empty((0, kind.row_bytes), np.uint8)
        self.cache.keep(kind, np.array(ids, np.int64), rows)
        if not ids or kind.row_bytes == WIDTHS[-1]:
            return  # a set of such rows does not fit
        if kind.row_bytes not in self.widths:  # all widths begin empty, with even shares
            self.widths = {kind.row_bytes, *(each.row_bytes for each in self.kept)}
            for each in self.kept.values():
                each.clear()
        known = self.kept.setdefault(kind, {})
        for id, row in zip(ids, rows, strict=True):
            known.setdefault(id, row)  # rows of a version do not change, so the first stays

    @rule(kind=KINDS, ids=IDS)
    def find(self, kind: Kind, ids: list[int]) -> None:
        here, rows = self.cache.find(kind, np.array(ids, np.int64))
        known = self.kept.get(kind, {})
        assert here.tolist() == [id in known for id in ids]
        assert np.array_equal(rows, np.array([known[id] for id in ids if id in known]).reshape(rows.shape))
        self.hits += len(rows)
        self.misses += len(ids) - len(rows)
        self.saved += rows.nbytes

    @rule(models=st.sets(st.sampled_from(["m@1", "m@2", "n@1"])))
    def retain(self, models: set[str]) -> None:
        self.cache.retain(models)
        self.kept = {kind: rows for kind, rows in self.kept.items() if kind.model in models}

    @invariant()
    def stats_say_what_happened(self) -> None:
        held = sum(len(rows) for rows in self.kept.values())
        assert self.cache.stats == (self.hits, self.misses, self.saved, held)

    def _fresh(self, row_bytes: int) -> np.ndarray:
        self.count += 1
        row = np.zeros(row_bytes, np.uint8)
        row[:8] = np.array([self.count], np.int64).view(np.uint8)
        return row


class OneSet(RuleBasedStateMachine):
    """Of one set, the row that was asked for longest ago gives way, and the first of many newcomers stay."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = _Slots(WAYS * (8 + _SLOT_BYTES), 8)
        self.ways: list[tuple[int, int]] = [(-1, 0)] * WAYS  # key, when it was asked for
        self.now = 0

    @rule(keys=st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=12))
    def keep(self, keys: list[int]) -> None:
        self.now += 1
        self.slots.keep(*self._rows(keys))
        newcomers = [key for key in keys if key not in dict(self.ways)]
        for key in newcomers[:WAYS]:
            oldest = min(range(WAYS), key=lambda way: self.ways[way][1])
            self.ways[oldest] = (key, self.now)

    @rule(keys=st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=12))
    def find(self, keys: list[int]) -> None:
        self.now += 1
        array, rows = self._rows(keys)
        here, found = self.slots.find(array)
        held = dict(self.ways)
        assert here.tolist() == [key in held for key in keys]
        assert np.array_equal(found, rows[here])
        self.ways = [(key, self.now if key in keys else asked) for key, asked in self.ways]

    @rule()
    def drop(self) -> None:
        self.slots.drop(0)
        self.ways = [(-1, 0)] * WAYS

    @invariant()
    def as_many_are_held(self) -> None:
        assert self.slots.count == sum(key >= 0 for key, _ in self.ways)

    @staticmethod
    def _rows(keys: list[int]) -> tuple[Any, Any]:
        array = np.array(keys, np.int64)
        return array, array.view(np.uint8).reshape(-1, 8)


TestCacheStates = CacheStates.TestCase
TestCacheStates.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestOneSet = OneSet.TestCase
TestOneSet.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
