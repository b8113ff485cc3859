"""The worker as an application of a Serve config file. KubeRay's RayService and `serve deploy` start it so.

import_path: model_worker.application:build
args: {checkpoint: /checkpoint, embeddings: embedding:7070, name: model}
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from embedding_service.commands.text import parse_bytes
from model_worker.cli import POLICY_VARIABLE, Engine, engine_words, resolve_model
from model_worker.drafts import Speculate
from model_worker.serving import APP, Scaling, replica_class


def _policy_of_environment() -> Path | None:
    """Where pods have it mounted. A component of the manifests cannot change a Serve config, which is one string."""
    given = os.environ.get(POLICY_VARIABLE)
    return Path(given) if given else None


class Arguments(BaseModel):
    """What the config file gives under `args`. The names are those of the options of `model-worker serve`."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: Path
    embeddings: str
    name: str | None = None
    max_batch: int = 32
    max_queue: int = 64
    cache_bytes: str = "0"
    prefix_bytes: str = "256MiB"
    near: bool = True
    topology: str | None = None
    policy: Path | None = Field(default_factory=_policy_of_environment)
    speculate: Speculate = "off"
    draft_tokens: int = 4
    engine: Engine = "embedded"
    engine_args: str = ""


def build(args: dict[str, Any]) -> Application:
    """The application. Replicas and their resources are the config file's, under `deployments`.

    Raises pydantic's ValidationError, which names a wrong argument. Raises Unavailable while the embedding service
    cannot be reached, and NotFound if it has no such model.
    """
    given = Arguments.model_validate(args)
    config = resolve_model(
        given.checkpoint,
        given.embeddings,
        given.name,
        cache_bytes=parse_bytes(given.cache_bytes),
        prefix_bytes=parse_bytes(given.prefix_bytes),
        engine_args=engine_words(given.engine, given.engine_args),
        **given.model_dump(exclude={"checkpoint", "embeddings", "name", "cache_bytes", "prefix_bytes", "engine_args"}),
    )
    deployment: Any = serve.deployment(replica_class(config), name=APP, **Scaling().options(config))
    return deployment.bind(config)
