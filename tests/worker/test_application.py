"""The application of a Serve config file: built as Ray builds it, from the arguments that the file gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_as_ray_does
from support.security import write_policy

from embedding_service.errors import InvalidRequest
from model_worker.application import build
from model_worker.options import POLICY_VARIABLE
from model_worker.worker import WorkerConfig

pytestmark = pytest.mark.slow


def test_is_built_from_the_arguments_of_a_config_file(model_folder: Path, embeddings: str) -> None:
    arguments = {"checkpoint": str(model_folder), "embeddings": embeddings, "max_batch": 3, "cache_bytes": "2MiB"}
    where = {"near": False, "topology": "zone-a"}
    for more in ({}, where):
        bound = build_as_ray_does(build, arguments | more)._bound_deployment  # type: ignore[arg-type]
        expected: Any = {"imported_as": "small@1", "cache_bytes": "2MiB", **more}
        config = WorkerConfig(model_folder, embeddings, name="small", version="1", max_batch=3, **expected)
        assert bound.init_args == (config,)


def test_s8_the_policy_is_where_the_pod_says_it_is(
    model_folder: Path, embeddings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POLICY_VARIABLE, str(tmp_path / "policy.toml"))
    arguments = {"checkpoint": str(model_folder), "embeddings": embeddings}
    with pytest.raises(InvalidRequest, match=r"the policy .*policy.toml cannot be read"):  # nobody serves without it
        build_as_ray_does(build, arguments)  # type: ignore[arg-type]
    policy = write_policy(tmp_path, {"user": {"tokens": ["user"], "read": ["small"]}})
    [config] = build_as_ray_does(build, arguments)._bound_deployment.init_args  # type: ignore[arg-type]
    assert config.policy == policy


def test_an_argument_that_is_wrong_is_named() -> None:
    with pytest.raises(ValidationError, match="batch_size"):
        build_as_ray_does(build, {"checkpoint": "/c", "embeddings": "localhost:1", "batch_size": 3})  # type: ignore[arg-type]
