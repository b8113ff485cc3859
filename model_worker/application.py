"""The worker as an application of a Serve config file. KubeRay's RayService and `serve deploy` start it so.

import_path: model_worker.application:build
args: {checkpoint: /checkpoint, embeddings: embedding:7070, name: model}
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from ray import serve
from ray.serve import Application

from model_worker.cli import resolve_model
from model_worker.options import POLICY_VARIABLE, Options, Scaling
from model_worker.serving import APP, deployment_options, replica_class

# What the config file gives under `args`.
ARGUMENTS = TypeAdapter(with_config(ConfigDict(extra="forbid"))(Options))


def build(args: dict[str, Any]) -> Application:
    """The application. Replicas and their resources are the config file's, under `deployments`.

    args: `Options`, by their names. Raises pydantic's ValidationError, which names a wrong one. Raises Unavailable
    while the embedding service cannot be reached, and NotFound if it has no such model.
    """
    options = ARGUMENTS.validate_python(args)
    if not options.policy and (given := os.environ.get(POLICY_VARIABLE)):
        # Where pods have it mounted. A component of the manifests cannot change a Serve config, which is one string.
        options = replace(options, policy=Path(given))
    config = resolve_model(options)
    settings = deployment_options(Scaling(), config)
    deployment: Any = serve.deployment(replica_class(config), name=APP, **settings)
    return deployment.bind(config)
