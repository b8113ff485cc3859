"""A model on a GPU, fed by shards or by tables in its process: the same bits."""

from pathlib import Path

import pytest
import torch
from small_model import VOCAB
from transformers import LongcatFlashForCausalLM

from embedding_service import EmbeddingClient
from model_worker import attach
from model_worker.longcat import LocalTables, load_model

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_tokens_on_a_gpu_are_identical(
    model_folder: Path, remote: EmbeddingClient, dtype: torch.dtype
) -> None:
    here, there = load_model(model_folder), load_model(model_folder)
    attach(here, LocalTables(model_folder), "local")
    attach(there, remote, "small")
    for model in (here, there):
        torch.nn.Module.to(model, "cuda", dtype)
    ids = torch.randint(3, VOCAB, (4, 50), generator=torch.Generator().manual_seed(3)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :20] = mask[2, :1] = 0
    logits = there(ids, attention_mask=mask).logits
    assert logits.is_cuda
    assert torch.equal(logits, here(ids, attention_mask=mask).logits)
    tokens = [generate(model, ids, mask) for model in (here, there)]
    assert torch.equal(*tokens)


def generate(model: LongcatFlashForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)  # type: ignore[misc]
    return torch.as_tensor(tokens)
