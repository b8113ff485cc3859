"""A Ray that is started here, on a machine that may be too busy for it."""

from __future__ import annotations

from typing import Any

import pytest

from embedding_service import local_ray
from embedding_service.errors import Unavailable
from embedding_service.local_ray import LOCAL_RAY, start_ray


class Busy:
    """Takes the place of `ray`, whose processes do not start for some tries."""

    def __init__(self, tries: int) -> None:
        self.tries = tries
        self.called: list[dict[str, Any] | str] = []

    def init(self, **options: Any) -> None:
        self.called.append(options)
        if len([each for each in self.called if each != "shutdown"]) <= self.tries:
            raise Exception("The current node timed out\nduring startup.")

    def shutdown(self) -> None:
        self.called.append("shutdown")


@pytest.mark.parametrize("tries", [0, 1, 2])
def test_a_ray_that_does_not_start_is_tried_once_more_and_then_told(
    tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Busy(tries)
    monkeypatch.setattr(local_ray, "ray", busy)
    if tries == 2:
        with pytest.raises(Unavailable, match=r"does not start on this machine \(The current node timed out.*logs has"):
            start_ray(num_cpus=3)
    else:
        start_ray(num_cpus=3)
    assert busy.called.count("shutdown") == tries
    given = busy.called[-1 if tries < 2 else 0]
    assert isinstance(given, dict) and given.items() >= {"address": "local", "num_cpus": 3, **LOCAL_RAY}.items()
