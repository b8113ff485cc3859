"""The model fed by real shards over gRPC is the model with its tables in the process, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_model import VOCAB
from transformers import LongcatFlashForCausalLM

from embedding_service import EmbeddingClient
from embedding_service.errors import NotFound, Unavailable
from model_worker import attach
from model_worker.longcat import load_model


@pytest.fixture(scope="module")
def remote_model(model_folder: Path, remote: EmbeddingClient) -> LongcatFlashForCausalLM:
    loaded = load_model(model_folder)
    attach(loaded, remote, "small")
    return loaded


def test_logits_are_identical(model: LongcatFlashForCausalLM, remote_model: LongcatFlashForCausalLM) -> None:
    ids = torch.randint(0, VOCAB, (4, 50), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :20] = mask[2, :1] = 0
    here = model(ids, attention_mask=mask).logits
    there = remote_model(ids, attention_mask=mask).logits
    assert torch.equal(here, there)


def test_greedy_tokens_are_identical(model: LongcatFlashForCausalLM, remote_model: LongcatFlashForCausalLM) -> None:
    ids = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    here = model.generate(ids, return_dict_in_generate=True, **options)
    there = remote_model.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(here.sequences, there.sequences)
    assert all(torch.equal(a, b) for a, b in zip(here.logits, there.logits, strict=True))


def test_attach_says_what_is_wrong_with_the_service(model_folder: Path, remote: EmbeddingClient) -> None:
    with pytest.raises(NotFound, match="small@1"):
        attach(load_model(model_folder), remote, "large")
    with EmbeddingClient("127.0.0.1:1", timeout=1) as nobody, pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        attach(load_model(model_folder), nobody, "small")
