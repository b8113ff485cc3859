"""DeepSeek-V4.1's Engram tables: vLLM's ids are ours, and its layers get the service's rows. Its model needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import interpreted
import pytest
import torch
from engines import needs_vllm
from support.checkpoints import ENGRAM_DIM, ENGRAM_LAYERS, ENGRAM_ROWS, engram_tables
from support.cluster import Up

from embedding_service.errors import InvalidRequest
from embedding_service.ngram import NgramHasher
from embedding_service.ngram.engram import EngramHasher
from model_worker.vllm.tables import ServedTables

pytestmark = needs_vllm


@pytest.fixture(scope="module", autouse=True)
def _on_a_cpu() -> None:
    if not torch.cuda.is_available():
        interpreted.prepare()


@pytest.fixture(scope="module")
def config(engram_folder: Path) -> dict[str, Any]:
    return json.loads((engram_folder / "config.json").read_text())


@pytest.fixture(scope="module")
def layout(config: dict[str, Any]) -> Any:
    from vllm.models.deepseek_v41.common.engram import EngramLayout

    return EngramLayout(SimpleNamespace(**config["text_config"]))


@pytest.fixture(scope="module")
def served(tables: Up, config: dict[str, Any], engram_folder: Path) -> Iterator[ServedTables]:
    served = ServedTables(tables.address, "engram", config, tokenizer=engram_folder)
    yield served
    served.client.close()


def test_the_hash_has_the_same_numbers(layout: Any, engram_folder: Path) -> None:
    from transformers import AutoTokenizer
    from vllm.models.deepseek_v41.common import engram as published

    ours = NgramHasher.from_config(engram_folder)
    assert isinstance(ours, EngramHasher)
    theirs = [tuple(size for order in layer for size in order) for layer in layout.primes]
    assert [table.head_rows for table in ours.tables] == theirs
    tokenizer = AutoTokenizer.from_pretrained(engram_folder)
    token_map, size = published.build_compressed_token_map(tokenizer)
    assert size == layout.compressed_vocab_size
    # Their hash, of windows that begin in the sequence: the xor of products, by each head's prime.
    multipliers = published.compute_hash_multipliers(layout.layer_ids, layout.max_ngram_size, size)
    tokens = torch.randint(0, len(token_map), (1, 40), generator=torch.Generator().manual_seed(1))
    windows = torch.tensor(token_map)[tokens[0]].unfold(0, layout.max_ngram_size, 1).flip(-1)
    products = windows[:, None] * multipliers
    for order in range(1, layout.max_ngram_size):
        rolling = products[..., 0]
        for back in range(1, order + 1):
            rolling = rolling ^ products[..., back]
        heads = slice((order - 1) * layout.n_heads, order * layout.n_heads)
        primes = torch.tensor(layout.primes)[:, order - 1]
        expected = rolling[..., None] % primes + layout.offsets[:, heads]
        assert torch.equal(ours.row_ids(tokens)[0, layout.max_ngram_size - 1 :, :, heads], expected)


def test_a_layer_gets_the_rows_of_the_service(served: ServedTables, layout: Any) -> None:
    """Through vLLM's own `Engram`: the place where it makes a table, and the one where it asks for rows."""
    from vllm.models.deepseek_v41.common import engram as published

    from model_worker.vllm.deepseek_v41 import EngramRows, tables_of

    offload = SimpleNamespace(cpu_offload=True, dp_shared_memory=False, use_thp=False)
    current = SimpleNamespace(engram_config=offload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "get_current_vllm_config", lambda: current)
        for index, layer in enumerate(ENGRAM_LAYERS):
            module: Any = published.Engram.__new__(published.Engram)
            torch.nn.Module.__init__(module)
            with tables_of(served):
                module.embed_tokens = module._create_embedding(layout, index)
            assert isinstance(module.embed_tokens, EngramRows)
            module._init_staging(8, ENGRAM_DIM)
            module.use_sequence_parallel = False
            heads = module.embed_tokens.n_hash_cols
            ids = torch.randint(0, ENGRAM_ROWS[index], (5, heads), generator=torch.Generator().manual_seed(layer))
            ids[3, 1] = published.DEAD_ID
            module.prepare_embeddings(ids)
            rows = module.embed(ids)
            expected = engram_tables()[f"layer_{layer}"].to(torch.bfloat16)[ids.clamp(min=0)]
            expected[3, 1] = 0
            assert torch.equal(rows, expected)


def test_the_plugin_has_vllms_class_and_leaves_its_tables_unread() -> None:
    from model_worker.vllm import MODELS
    from model_worker.vllm.deepseek_v41 import DeepseekV41ForCausalLM

    assert MODELS["DeepseekV41ForCausalLM"] is DeepseekV41ForCausalLM
    tables = [f"layers.1.engram.embed.{name}" for name in ("weight", "scale")]
    assert all(DeepseekV41ForCausalLM.table_tensors.search(name) for name in tables)
    assert not DeepseekV41ForCausalLM.table_tensors.search("layers.1.engram.wkv.weight")


def test_a_tokenizer_of_another_model(tables: Up, config: dict[str, Any], models: dict[str, Any]) -> None:
    other = {**config, "text_config": {**config["text_config"], "engram_pad_token_id": 3}}
    with pytest.raises(InvalidRequest, match="another model"):
        ServedTables(tables.address, "engram", other, tokenizer=models["longcat"].whole)
