"""What a routing says, and which ids are in its tables."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from embedding_service.errors import OutOfRange
from embedding_service.placement.routing import FEW_IDS, Hashers, Routing, check_ids
from embedding_service.store.store import Store
from embedding_service.wire import embedding_pb2 as wire


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


def test_hashers_are_shared_by_models_that_hash_alike_and_go_with_the_last_of_them(store: Path) -> None:
    manifest = Store(store).manifest("fp32")
    params = [json.dumps(manifest.hash_params), json.dumps(manifest.hash_params, indent=1)]

    def served(*versions: int) -> Routing:
        message = wire.Routing()
        for version in versions:
            placement = message.models.add()
            placement.model.name, placement.model.version = "m", str(version)
            placement.model.family, placement.model.hash_params = manifest.family, params[version // 3]
        return Routing(message)

    hashers, routing = Hashers(), served(1, 2, 3)
    first, second, third = (hashers.of(routing.model(f"m@{version}"), routing) for version in (1, 2, 3))
    assert first is second and first is not third
    assert hashers.of(routing.model("m"), served()) is third
    gone = [weakref.ref(each) for each in (first, third)]
    del first, second, third
    routing = served(4, 5)
    kept = hashers.of(routing.model("m@4"), routing)
    assert gone[0]() is None and gone[1]() is kept  # 4 hashes as 3 does
    assert list(hashers._made) == ["m@4"]
