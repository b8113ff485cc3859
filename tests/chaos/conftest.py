"""What tests of failures share."""

from pathlib import Path

import pytest
from support.chaos import chaos_store


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with model "m", for tests that change nothing there."""
    return chaos_store(tmp_path_factory.mktemp("small"))
