"""What a routing says, and which ids are in its tables."""

import numpy as np
import pytest

from embedding_service.errors import OutOfRange
from embedding_service.placement.routing import FEW_IDS, check_ids


@pytest.mark.parametrize("count", [3, FEW_IDS + 1])
def test_ids_from_0_to_the_last_row_are_in_the_table(count: int) -> None:
    ids = np.zeros(count, np.int64)
    ids[1] = 9
    check_ids(ids, 10, "m@1/t")
    check_ids(ids[:0], 10, "m@1/t")
    for bad in (10, -1, 1 << 62):
        ids[2] = bad
        with pytest.raises(OutOfRange, match=f"id {bad} at position 2 is outside table m@1/t: ids must be from 0 to 9"):
            check_ids(ids, 10, "m@1/t")
