"""Few ids are shared out by Python, many by numpy: both ways ask the same shards for the same rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_service.client import owners
from embedding_service.client.owners import Standing, share_out
from embedding_service.client.wants import StoredRows, Want
from embedding_service.placement.routing import FEW_IDS, Model, Table
from embedding_service.wire import embedding_pb2 as wire

PARTS, ROWS_PER_PART, SHARDS = 5, 7, 4


@given(st.data())
def test_few_ids_are_shared_out_as_many_are(data: st.DataObject) -> None:
    copies = data.draw(st.integers(1, 3))
    holders = st.lists(st.integers(-1, SHARDS - 1), min_size=copies, max_size=copies)
    held = np.array(data.draw(st.lists(holders, min_size=PARTS, max_size=PARTS)), np.int32)
    rows = PARTS * ROWS_PER_PART
    table = Table("t", rows, 2, "fp32", 8, ROWS_PER_PART, held)
    ids = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=FEW_IDS)), np.int64)
    positions = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    missing = {0: positions if len(positions) else None}
    badness = data.draw(st.lists(st.sampled_from([-2, 0, 1, 2, 4]), min_size=SHARDS, max_size=SHARDS))
    due = {"somebody"} if -2 in badness else set()
    standing = Standing(np.array([*badness, 6], np.int8), due, calm=False)
    wants = [Want(table, ids, wire.ROW_ENCODING_STORED, 8, StoredRows(len(ids), 8))]
    model, turn = Model("m", "1", "", "", {"t": table}, copies > 1), data.draw(st.integers(0, 100))

    few = share_out(wants, missing, model, standing, turn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "FEW_IDS", 0)
        many = share_out(wants, missing, model, standing, turn)
    for mine, theirs in zip(few, many, strict=True):
        assert _plain(mine) == _plain(theirs)


def _plain(shared: object) -> object:
    """Positions as lists."""
    if isinstance(shared, np.ndarray):
        return shared.tolist()
    if isinstance(shared, dict):
        return {key: _plain(value) for key, value in shared.items()}
    return [_plain(each) for each in shared] if isinstance(shared, (list, tuple)) else shared
