"""A vLLM plugin: models with n-gram tables look their rows up in the embedding service instead of holding them.

vLLM finds it by the entry point group `vllm.general_plugins`. Without `additional_config["embedding_service"]`, models
are as vLLM has them. `docs/vllm.md` tells how to serve with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from embedding_service.errors import InvalidRequest
from embedding_service.foreign import shown
from embedding_service.registry import Registry

if TYPE_CHECKING:
    from model_worker.vllm.tables import TablesElsewhere

MODELS: Registry[TablesElsewhere] = Registry(
    "vLLM model",
    "model_worker.vllm.tables:TablesElsewhere",
    {
        "DeepseekV41ForCausalLM": "model_worker.vllm.deepseek_v41:DeepseekV41ForCausalLM",
        "LongcatFlashNgramForCausalLM": "model_worker.vllm.longcat:LongcatFlashNgramForCausalLM",
        "Qwen4ExpForCausalLM": "model_worker.vllm.qwen4_exp:Qwen4ExpForCausalLM",
        "Qwen4ExpForConditionalGeneration": "model_worker.vllm.qwen4_exp:Qwen4ExpForConditionalGeneration",
    },
)


def check(checkpoint: str | Path) -> None:
    """Check that vLLM would take a checkpoint's tables from the service, without reading a weight.

    Raises InvalidRequest: another architecture. StoreError: a file is missing or damaged.
    """
    from model_worker.checkpoint import CheckpointTensors

    files = CheckpointTensors(checkpoint)
    if MODELS.homes.keys().isdisjoint(files.architectures):
        raise InvalidRequest(
            f"{files.folder} is a checkpoint of {shown(files.config.get('architectures'))}; with --engine vllm this "
            f"worker serves {', '.join(MODELS.homes)}"
        )


def register() -> None:
    """Called by vLLM in each of its processes. It only names the classes. vLLM imports the one that it runs."""
    from vllm import ModelRegistry

    for architecture, model_class in MODELS.homes.items():
        ModelRegistry.register_model(architecture, model_class)
