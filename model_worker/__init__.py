"""The transformer worker: a language model whose n-gram tables stay in the embedding service.

`load_model` loads a checkpoint without its tables. `attach` puts the service's rows into a transformers model in place.
`model-worker serve` puts such a model behind an OpenAI-compatible HTTP server, as a Ray Serve application.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from embedding_service import EmbeddingClient
    from model_worker.rows import RowSource

__all__ = ["attach", "load_model"]


def load_model(checkpoint: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The dense part of a LongCat, Qwen4-Exp or Gemma checkpoint as a transformers model, ready for `attach`.

    The n-gram tables are never read nor allocated, so tables of any size need no memory here.

    checkpoint: the whole checkpoint's folder, or the "dense" half that `embedding-service split` makes.
    dtype: of the weights. None takes the stored dtype of the word embeddings.
    Raises InvalidRequest: another architecture.
    StoreError: tensors are missing, have other shapes than the config says, or are not known.
    """
    from model_worker import families

    return families.load_model(checkpoint, dtype)


def attach(hf_model: PreTrainedModel, client: EmbeddingClient | RowSource, name: str) -> None:
    """Feed a transformers model from the n-gram tables that the embedding service holds, in place.

    Afterwards `hf_model(input_ids=...)` and `hf_model.generate(...)` work as before: with or without a KV cache, in
    batches, with left padding given by `attention_mask`. The look-back of the n-grams travels in the KV cache. If a
    call fails because rows did not come, a Qwen4-Exp model's cache is unusable: start with a new one. `backward`
    gives the tables' gradients to the client's session of the branch `name` (docs/training.md). Without one it raises
    NoGradients and says which module to freeze, so that the rest of the model can be trained.

    hf_model: loaded by `load_model` or `from_pretrained`. It is a `LongcatFlashForCausalLM` of a LongCat n-gram
        checkpoint (projections are read from the folder that it was loaded from), or any transformers model of
        Qwen4-Exp, Gemma 3n or Gemma 4 (tables that it holds are given up).
    client: an `EmbeddingClient`, or tables in this process with the same methods.
    name: the model's name in the service, `name` or `name@version`.

    Raises InvalidRequest: the model is of another family or attached already, or its hash parameters or dimensions are
        not those of the service's tables.
    NotFound: the service has no such model.
    Unavailable: it does not answer.
    """
    from model_worker import families

    families.attach(hf_model, client, name)
