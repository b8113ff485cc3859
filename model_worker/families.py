"""The model families the worker knows, a file for each. See `family.WorkerFamily`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from embedding_service.errors import EmbeddingServiceError, InvalidRequest, StoreError
from embedding_service.foreign import one_line, shown
from embedding_service.registry import Registry
from model_worker.checkpoint import CheckpointTensors
from model_worker.drafts import Speculate
from model_worker.ends import end_tokens
from model_worker.family import WorkerFamily
from model_worker.rows import Lookups
from model_worker.slot_cache import SlotCache
from model_worker.text import load_tokenizer

if TYPE_CHECKING:
    from model_worker.longcat_mtp import LongcatDrafter

FAMILIES: Registry[WorkerFamily] = Registry(
    "worker family",
    "model_worker.family:WorkerFamily",
    {
        "gemma3n": "model_worker.gemma:Gemma3nFamily",
        "gemma4": "model_worker.gemma:Gemma4Family",
        "longcat": "model_worker.longcat:LongcatFamily",
        "qwen4_exp": "model_worker.qwen4_exp:Qwen4ExpFamily",
    },
)


def check(checkpoint: str | Path, speculate: Speculate = "off") -> None:
    """Check that a worker can load a checkpoint, without reading a weight. This takes a second or so.

    Raises InvalidRequest: another architecture, or quantized, or it cannot speculate so.
    StoreError: a file is missing or damaged, or the files do not fit each other.
    """
    files = CheckpointTensors(checkpoint)
    family, config = _family_and_config(files)
    family.dense_tensors(files, config)
    generation = files.generation_config() or GenerationConfig.from_model_config(config)
    end_tokens(config, generation, load_tokenizer(files.folder))
    if speculate != "off":
        SlotCache.check_fits(config)
    layer = family.draft_tensors
    if speculate == "mtp" and not (layer and any(name.startswith(layer) for name in files.names)):
        raise InvalidRequest(
            f"{files.folder} has no draft layer that this worker knows: use --speculate prompt, or off"
        )


def load_model(checkpoint: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """See `model_worker.load_model`."""
    family, _ = _family_and_config(CheckpointTensors(checkpoint))
    return family.load_model(checkpoint, dtype)


def attach(hf_model: PreTrainedModel, client: Any, name: str) -> Lookups:
    """See `model_worker.attach`. Returns the counters of the model's lookups."""
    return _family_of(hf_model).attach(hf_model, client, name)


def drafter(hf_model: PreTrainedModel) -> LongcatDrafter:
    """What drafts with the draft layer of an attached model.

    Raises InvalidRequest: it has none. StoreError: that is not whole.
    """
    check(str(hf_model.config.name_or_path), "mtp")
    return _family_of(hf_model).drafter(hf_model)


def table_bytes(hf_model: PreTrainedModel) -> int:
    """Bytes of n-gram tables among a model's own tensors: 0 where they are served elsewhere."""
    tables = _family_of(hf_model).table_tensors
    return sum(tensor.nbytes for name, tensor in hf_model.state_dict().items() if tables.search(name))


def _family_of(hf_model: PreTrainedModel) -> type[WorkerFamily]:
    for family in FAMILIES.values():
        if isinstance(hf_model, family.models):
            return family
    known = ", ".join(family.models.__name__ for family in FAMILIES.values())
    raise InvalidRequest(f"cannot attach to a {type(hf_model).__name__}: only to {known}")


def _family_and_config(files: CheckpointTensors) -> tuple[type[WorkerFamily], PreTrainedConfig]:
    family = _family(files)
    if files.config.get("quantization_config"):
        raise InvalidRequest(
            f"{files.folder} is quantized (quantization_config in its config.json), which this worker does not read: "
            "give the checkpoint in bfloat16, float16 or float32"
        )
    try:
        config: PreTrainedConfig = family.read_config(files)
    except EmbeddingServiceError:
        raise
    except Exception as error:
        raise StoreError(f"transformers refuses the config.json of {files.folder}: {one_line(error)}") from error
    layers = config.get_text_config().num_hidden_layers
    if layers > len(files.names):
        raise StoreError(
            f"{files.folder} does not fit its config.json: that has {layers:,} layers, for {len(files.names)} tensors"
        )
    return family, config


def _family(files: CheckpointTensors) -> type[WorkerFamily]:
    for family in FAMILIES.values():
        if not set(family.architectures).isdisjoint(files.architectures):
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise InvalidRequest(
        f"{files.folder} is a checkpoint of {shown(files.config.get('architectures'))}; this worker serves {known}"
    )
