"""The transformer worker: a language model whose n-gram tables stay in the embedding service.

`attach` puts the service's rows into a transformers model in place; `model-worker serve` puts such a model behind an
OpenAI-compatible HTTP server, as a Ray Serve application.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from model_worker.rows import RowSource

__all__ = ["attach"]


def attach(hf_model: PreTrainedModel, client: RowSource, name: str) -> None:
    """Feed a transformers model from the n-gram tables that the embedding service holds, in place.

    Afterwards `hf_model(input_ids=...)` and `hf_model.generate(...)` work as before: with or without a KV cache, in
    batches, with left padding given by `attention_mask`. The look-back of the n-grams travels in the KV cache.

    hf_model: a `LongcatFlashForCausalLM` loaded from a LongCat n-gram checkpoint (whole, or the "dense" half that
        `embedding-service split` makes), by `model_worker.longcat.load_model` or `from_pretrained`. The projections
        are read from the folder it was loaded from.
    client: an `EmbeddingClient`, or `model_worker.longcat.LocalTables`.
    name: the model's name in the service, `name` or `name@version`.

    Raises InvalidRequest when the model is of another family or attached already, or when its hash parameters or
    dimensions are not those of the service's tables; NotFound when the service has no such model; Unavailable when it
    does not answer.
    """
    from model_worker import longcat

    longcat.attach(hf_model, client, name)
