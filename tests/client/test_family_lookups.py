"""Models of several tables through a running service: ids hashed by client and service, and the rows they name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import engram_checkpoint, engram_tables, qwen4_exp_checkpoint, qwen4_exp_tables
from support.cluster import Up, serving
from support.nearness import come_near

from embedding_service import EmbeddingClient, NgramHasher
from embedding_service.errors import InvalidRequest
from embedding_service.formats import get_format
from embedding_service.ngram import NO_TOKEN
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import embedding_pb2_grpc

pytestmark = pytest.mark.service

TABLES = {"qwen": qwen4_exp_tables, "engram": engram_tables}
WORDS = torch.randn(700, 24, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints `qwen` and `engram`, and a `store` with both and with a table of no family."""
    folder = tmp_path_factory.mktemp("families")
    save_file({"words": WORDS}, folder / "words.safetensors")
    for name, make in (("qwen", qwen4_exp_checkpoint), ("engram", engram_checkpoint)):
        import_checkpoint(make(folder / name), folder / "store", name, dtype="keep", part_bytes=40 << 12)
    import_checkpoint(folder / "words.safetensors", folder / "store", "any", dtype="fp32", generic={"words": "words"})
    return folder


@pytest.fixture(scope="module")
def families(folder: Path) -> Iterator[Up]:
    """Three shards that serve them."""
    with serving(folder, folder / "store", 3) as running:
        yield running


@pytest.fixture(scope="module", params=["near", "wired"])
def families_client(request: pytest.FixtureRequest, families: Up) -> Iterator[EmbeddingClient]:
    """A client of theirs whose rows are all near, and one without any."""
    near = request.param == "near"
    with EmbeddingClient(families.address, timeout=60, near=near) as client:
        yield come_near(client) if near else client


def sequences(name: str, hasher: NgramHasher) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [5, 30] and context [5, 2], padding and EOS among them."""
    generator = torch.Generator().manual_seed(len(name))
    tokens = torch.randint(hasher.vocab_size, (5, 32), generator=generator)
    tokens[0, 2:9], tokens[1, 5], tokens[2] = NO_TOKEN, 2, hasher.vocab_size - 1
    return tokens[:, 2:], tokens[:, :2]


@pytest.mark.parametrize("name", TABLES)
def test_the_client_gets_the_rows_that_the_hasher_names(
    name: str, folder: Path, families_client: EmbeddingClient
) -> None:
    hasher = NgramHasher.from_config(folder / name)
    tokens, context = sequences(name, hasher)
    ids = hasher.row_ids(tokens, context)
    assert torch.equal(families_client.hasher(name).row_ids(tokens, context), ids)
    rows = families_client.lookup_ngrams(name, tokens, context)
    tables = list(TABLES[name]().values())
    assert rows.shape == (*tokens.shape, len(tables), hasher.num_heads, tables[0].shape[1])
    for layer, table in enumerate(tables):
        assert torch.equal(rows[:, :, layer], table[ids[:, :, layer]])
        assert torch.equal(
            families_client.lookup(f"{name}/{hasher.tables[layer].name}", ids[0, :, layer]), rows[0, :, layer]
        )


@pytest.mark.parametrize("encoding", ["FLOAT32", "BFLOAT16", "STORED"])
@pytest.mark.parametrize("name", TABLES)
def test_the_service_hashes_as_the_client_does(
    name: str, encoding: str, families: Up, families_client: EmbeddingClient
) -> None:
    tokens, context = sequences(name, families_client.hasher(name))
    request = wire.LookupNgramsRequest(
        model=name,
        token_ids=tokens.flatten().tolist(),
        batch=len(tokens),
        context=context.flatten().tolist(),
        encoding=f"ROW_ENCODING_{encoding}",
    )
    with grpc.insecure_channel(families.address) as channel:
        answer = embedding_pb2_grpc.EmbeddingServiceStub(channel).LookupNgrams(request, timeout=120)
    expected = families_client.lookup_ngrams(name, tokens, context)
    assert (answer.batch, answer.length, answer.tables, answer.heads, answer.dim) == tuple(expected.shape)
    stored = {"FLOAT32": "fp32", "BFLOAT16": "bf16", "STORED": {"qwen": "fp32", "engram": "fp8"}[name]}[encoding]
    raw = torch.from_numpy(np.frombuffer(answer.rows, np.uint8).copy()).view(-1, answer.row_bytes)
    rows = get_format(stored).decode(raw, answer.dim).view(expected.shape)
    assert torch.equal(rows, expected if encoding != "BFLOAT16" else expected.bfloat16().float())


def test_token_by_token_rows_are_those_of_the_whole(families_client: EmbeddingClient) -> None:
    for name in TABLES:
        hasher = families_client.hasher(name)
        tokens, context = sequences(name, hasher)
        whole, steps = families_client.lookup_ngrams(name, tokens, context), []
        for step in tokens.split(1, 1):
            steps.append(families_client.lookup_ngrams(name, step, context))
            context = hasher.next_context(step, context)
        assert torch.equal(torch.cat(steps, 1), whole)


def test_fp8_rows_come_as_the_dtype_asked_for(families_client: EmbeddingClient) -> None:
    table, ids = engram_tables()["layer_14"], torch.tensor([3, 3699, 0, 3])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(families_client.lookup("engram/layer_14", ids, dtype=dtype), table[ids].to(dtype))


def test_a_table_of_no_family_is_looked_up_by_id_alone(families_client: EmbeddingClient) -> None:
    ids = torch.tensor([[0, 699], [5, 5]])
    assert torch.equal(families_client.lookup("any/words", ids), WORDS[ids])
    with pytest.raises(InvalidRequest, match="no n-gram family: look its rows up by id"):
        families_client.lookup_ngrams("any", ids)
