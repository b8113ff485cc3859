"""The model families the worker knows, each a module with ARCHITECTURES, MODELS, `load_model` and `attach`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from embedding_service.errors import InvalidRequest
from model_worker import longcat, qwen4_exp
from model_worker.checkpoint import Checkpoint
from model_worker.rows import Lookups

FAMILIES: tuple[ModuleType, ...] = (longcat, qwen4_exp)


def load_model(checkpoint: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """See `model_worker.load_model`."""
    architectures = Checkpoint(checkpoint).config.get("architectures") or []
    for family in FAMILIES:
        if not set(family.ARCHITECTURES).isdisjoint(architectures):
            return family.load_model(checkpoint, dtype)
    known = ", ".join(name for family in FAMILIES for name in family.ARCHITECTURES)
    raise InvalidRequest(f"{checkpoint} is a checkpoint of {architectures}; this worker serves {known}")


def attach(hf_model: PreTrainedModel, client: Any, name: str) -> Lookups:
    """See `model_worker.attach`. Returns what the model will have asked of the client."""
    for family in FAMILIES:
        if isinstance(hf_model, family.MODELS):
            return family.attach(hf_model, client, name)
    known = ", ".join(family.MODELS.__name__ for family in FAMILIES)
    raise InvalidRequest(f"cannot attach to a {type(hf_model).__name__}: only to {known}")
