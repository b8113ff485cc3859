"""A checkpoint's tensors for a worker, read one at a time. A tensor that nobody asks for is never read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel

from embedding_service.checkpoint import read_config, read_json, tensor_files
from embedding_service.errors import InvalidRequest, StoreError
from embedding_service.foreign import one_line, printable

GENERATION = "generation_config.json"
WORDS = "embed_tokens.weight"


class CheckpointTensors:
    """The tensors of a Hugging Face checkpoint folder by name, each from the file that an import would take it from.

    folder: holds config.json and either model.safetensors or several files with model.safetensors.index.json.
    Raises StoreError: config.json or the safetensors files are missing or unreadable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_config(self.folder)
        self._files = tensor_files(self.folder, self.config)
        self._open_files: dict[Path, Any] = {}

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    @property
    def architectures(self) -> list[str]:
        """The model classes that its config names."""
        named = self.config.get("architectures")
        return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []

    def generation_config(self) -> GenerationConfig | None:
        """How the model is to generate, and what ends a sequence. None if the checkpoint leaves that to its config.

        Raises StoreError: the file is unreadable.
        """
        if not (self.folder / GENERATION).exists():
            return None
        keys = read_json(self.folder, GENERATION)
        try:
            return GenerationConfig.from_dict(keys)
        except Exception as error:
            raise StoreError(f"cannot use {GENERATION} in {self.folder} ({one_line(error)}): correct it") from error

    def slice(self, name: str) -> Any:
        """A tensor not read yet (safetensors' slice): `[...]` reads it, `get_shape()` tells its shape.

        Raises StoreError: there is no such tensor, or its file is missing or damaged.
        """
        if name not in self._files:
            raise StoreError(f"{self.folder} has no tensor {name!r}: the checkpoint is not complete")
        file = self._files[name]
        try:
            return self._open(file).get_slice(name)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"cannot read {name!r} from {file}: {error}; fetch the checkpoint again") from error

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, read. Raises what `slice` raises."""
        return self.slice(name)[...]

    def _open(self, file: Path) -> Any:
        if file not in self._open_files:
            self._open_files[file] = safe_open(str(file), framework="pt")
        return self._open_files[file]


def published_classes(files: CheckpointTensors, known: Mapping[str, tuple[Any, Any]]) -> tuple[Any, Any]:
    """The model's class and its config's, by the architecture. Raises InvalidRequest: it is none of those known."""
    found = [name for name in files.architectures if name in known]
    if not found:
        raise InvalidRequest(f"{files.folder} is a checkpoint of {files.architectures}; expected {' or '.join(known)}")
    return known[found[0]]


def tensors_but(files: CheckpointTensors, is_left_out: Callable[[str], object]) -> dict[str, Any]:
    """All tensors but some, not read yet. Raises StoreError: the word embeddings are not there."""
    names = [name for name in files.names if not is_left_out(name)]
    refuse_tensors(files.folder, "missing", set() if any(name.endswith(WORDS) for name in names) else {WORDS})
    return {name: files.slice(name) for name in names}


def load_published(
    files: CheckpointTensors, model_class: Any, config: Any, tensors: dict[str, Any], dtype: torch.dtype | None
) -> PreTrainedModel:
    """A model of transformers' own class from a checkpoint's tensors.

    dtype: of the weights. None takes the stored dtype of the word embeddings.
    Raises StoreError: tensors are missing, have other shapes than the config says, or are not known.
    """
    words = next(tensor for name, tensor in tensors.items() if name.endswith(WORDS))
    loaded: Any = model_class.from_pretrained(
        None,
        generation_config=files.generation_config(),
        config=config,
        state_dict=tensors,
        dtype=dtype or words[:1].dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        refuse_tensors(files.folder, kind, report[f"{kind}_keys"])
    model.config.name_or_path = str(files.folder)
    return model


def refuse_tensors(checkpoint: str | Path, kind: str, tensors: Collection[object]) -> None:
    """Raises StoreError naming some of them, if there are any. kind: missing, unexpected or mismatched."""
    if tensors:
        names = printable(", ".join(sorted(map(str, tensors))[:8]))
        raise StoreError(f"{checkpoint} does not fit its config.json: {len(tensors)} {kind} tensors: {names}")
