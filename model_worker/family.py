"""What the worker must know of a model family."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from model_worker.checkpoint import CheckpointTensors
from model_worker.rows import Lookups

if TYPE_CHECKING:
    from model_worker.longcat_mtp import LongcatDrafter


class WorkerFamily(ABC):
    """A family of models, in a file of its own and named in `families.FAMILIES`.

    Attributes:
        architectures: What checkpoints of the family call themselves in config.json.
        models: The class of transformers that its models are of.
        table_tensors: Finds the names of tables among a model's tensors. An attached model has none.
        draft_tensors: How the names of the draft layer's tensors begin. None: the worker runs no draft layer of it.
    """

    architectures: ClassVar[tuple[str, ...]]
    models: ClassVar[type[PreTrainedModel]]
    table_tensors: ClassVar[re.Pattern[str]]
    draft_tensors: ClassVar[str | None] = None

    @staticmethod
    @abstractmethod
    def read_config(files: CheckpointTensors) -> PreTrainedConfig:
        """The config that transformers has for the dense part. Raises InvalidRequest: another architecture."""

    @staticmethod
    @abstractmethod
    def dense_tensors(files: CheckpointTensors, config: Any) -> dict[str, Any]:
        """The tensors of the dense part by transformers' names, not read yet. Raises StoreError: some are missing."""

    @staticmethod
    @abstractmethod
    def load_model(checkpoint: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """See `model_worker.load_model`."""

    @staticmethod
    @abstractmethod
    def attach(hf_model: PreTrainedModel, client: Any, name: str) -> Lookups:
        """See `model_worker.attach`. Returns what the model will have asked of the client."""

    @staticmethod
    def drafter(hf_model: PreTrainedModel) -> LongcatDrafter:
        """What drafts with the draft layer of an attached model. Only where there are `draft_tensors`."""
        raise NotImplementedError
