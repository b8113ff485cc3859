"""A Llama of vLLM's with vLLM's n-gram embedding: what LongCat's attention cannot do on a CPU, its embedding can show.

On a CPU vLLM neither chunks nor caches prompts of models with latent attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.model_executor.models import longcat_flash_ngram as published
from vllm.model_executor.models.llama import LlamaForCausalLM

from model_worker.vllm.longcat import NgramTablesElsewhere


class _NgramLlama(LlamaForCausalLM):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.model.ngram_embeddings = published.NgramEmbedding(self.config, self.model.embed_tokens)

    @staticmethod
    def get_model_state_cls() -> type[published.LongcatNgramModelState]:
        return published.LongcatNgramModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        ngrams: list[tuple[str, Tensor]] = []
        rest: list[tuple[str, Tensor]] = []
        for name, weight in weights:
            (ngrams if "ngram_embeddings" in name else rest).append((name, weight))
        loaded = {f"model.{self.model.ngram_embeddings.load_weight(name, weight)}" for name, weight in ngrams}
        # The words are a submodule of the n-gram embedding, too.
        return loaded | super().load_weights(rest) | {"model.ngram_embeddings.word_embeddings.weight"}


class NgramLlama(NgramTablesElsewhere, _NgramLlama):
    """Served as LongCat's model is."""
