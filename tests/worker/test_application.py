"""The application of a Serve config file: built as Ray builds it, from the arguments that the file gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_as_ray_does

from model_worker.application import build
from model_worker.worker import WorkerConfig

pytestmark = pytest.mark.slow


def test_is_built_from_the_arguments_of_a_config_file(model_folder: Path, embeddings: str) -> None:
    arguments = {"checkpoint": str(model_folder), "embeddings": embeddings, "max_batch": 3, "cache_bytes": "2MiB"}
    where = {"near": False, "topology": "zone-a"}
    for more in ({}, where):
        bound = build_as_ray_does(build, arguments | more)._bound_deployment  # type: ignore[arg-type]
        expected: Any = {"imported_as": "small@1", "prefix_bytes": 256 << 20, **more}
        config = WorkerConfig(str(model_folder), embeddings, "small", "1", 3, 64, 2 << 20, **expected)
        assert bound.init_args == (config,)


def test_an_argument_that_is_wrong_is_named() -> None:
    with pytest.raises(ValidationError, match="batch_size"):
        build_as_ray_does(build, {"checkpoint": "/c", "embeddings": "localhost:1", "batch_size": 3})  # type: ignore[arg-type]
