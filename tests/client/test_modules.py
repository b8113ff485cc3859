"""Remote modules among others: compiled, copied, pickled, converted, saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from support.checkpoints import DIM, longcat_table
from support.cluster import Up
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor

from embedding_service import EmbeddingClient, RemoteEmbedding
from embedding_service.torchrec import RemoteEmbeddingBagCollection, RemoteEmbeddingCollection

ROWS = len(longcat_table())
IDS = torch.tensor([[5, 7], [19_000, 5]])
FEATURES = KeyedJaggedTensor.from_lengths_sync(["ngram"], torch.tensor([5, 7, 19_000, 5]), torch.tensor([2, 0, 2]))
BACKENDS = ["eager", "aot_eager", "inductor"]


class Model(nn.Module):
    """A model around an embedding, remote or not."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.head = nn.Linear(DIM, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).relu())


def remote(client: EmbeddingClient) -> Model:
    torch.manual_seed(0)
    return Model(RemoteEmbedding(client, "fp32/ngram"))


def local() -> Model:
    embedding = nn.Embedding.from_pretrained(longcat_table().clone())
    torch.manual_seed(0)
    return Model(embedding)


def config(kind: type) -> object:
    return kind(name="ngram", embedding_dim=DIM, num_embeddings=ROWS, feature_names=["ngram"])


def collection(client: EmbeddingClient) -> Callable[[KeyedJaggedTensor], Tensor]:
    module = RemoteEmbeddingCollection(client, "fp32", [config(EmbeddingConfig)])
    return lambda features: module(features)["ngram"].values() * 2


def bags(client: EmbeddingClient) -> Callable[[KeyedJaggedTensor], Tensor]:
    module = RemoteEmbeddingBagCollection(client, "fp32", [config(EmbeddingBagConfig)])
    return lambda features: module(features).values() * 2


@pytest.fixture
def compiled() -> Callable[[Callable, str], tuple[Callable, CompileCounterWithBackend]]:
    torch._dynamo.reset()

    def compile(called: Callable, backend: str) -> tuple[Callable, CompileCounterWithBackend]:
        counter = CompileCounterWithBackend(backend)
        return torch.compile(called, backend=counter), counter

    return compile


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_gives_what_the_eager_one_does(client: EmbeddingClient, compiled, backend: str) -> None:
    model = remote(client).requires_grad_(False)
    model.embedding.requires_grad_(False)
    fast, graphs = compiled(model, backend)
    for count in (4, 9, 17, 33, 2):
        ids = torch.randint(0, ROWS, (2, count))
        assert torch.allclose(fast(ids), model(ids), atol=1e-6)
    # What follows the lookup: once for the first shape and once for any.
    assert graphs.frame_count <= 3


@pytest.mark.parametrize("make", [collection, bags])
def test_compiled_torchrec_modules(client: EmbeddingClient, compiled, make: Callable) -> None:
    module = make(client)
    with torch.no_grad():
        fast, graphs = compiled(module, "aot_eager")
        for count in (4, 9, 17, 33):
            ids, lengths = torch.randint(0, ROWS, (count,)), torch.tensor([count - 1, 0, 1])
            features = KeyedJaggedTensor.from_lengths_sync(["ngram"], ids, lengths)
            assert torch.equal(fast(features), module(features))
    assert graphs.frame_count <= 4


def test_copies_share_the_client(client: EmbeddingClient) -> None:
    model = remote(client)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    for twin in (copy.deepcopy(model), copy.copy(model), averaged.module):
        assert twin.embedding._client is client
        assert torch.equal(twin(IDS), model(IDS))
    assert copy.deepcopy(client) is client


def test_what_was_pickled_connects_when_it_is_used(service: Up, client: EmbeddingClient) -> None:
    with EmbeddingClient("127.0.0.1:9", timeout=3, cache_bytes=1 << 20) as nowhere:
        again = pickle.loads(pickle.dumps(nowhere))
        assert again.cache is not None
        again.close()
    model, saved = remote(client), io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert loaded.embedding._client is not client
    with loaded.embedding._client:
        assert torch.equal(loaded(IDS), model(IDS))
    modules = [
        RemoteEmbeddingCollection(client, "fp32", [config(EmbeddingConfig)]),
        RemoteEmbeddingBagCollection(client, "fp32", [config(EmbeddingBagConfig)]),
    ]
    collected, bagged = pickle.loads(pickle.dumps(modules))
    with collected._client:
        assert collected._client is bagged._client
        assert torch.equal(collected(FEATURES)["ngram"].values(), modules[0](FEATURES)["ngram"].values())
        assert torch.equal(bagged(FEATURES).values(), modules[1](FEATURES).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_model_is_converted_whole(client: EmbeddingClient, dtype: torch.dtype) -> None:
    for convert in (lambda model: model.to(dtype), lambda model: model.to("cpu", dtype)):
        ours, theirs = convert(remote(client)), convert(local())
        assert ours.embedding(IDS).dtype == dtype
        assert torch.equal(ours.embedding(IDS), theirs.embedding(IDS))
        assert torch.equal(ours(IDS), theirs(IDS))
        assert ours.to("cpu").embedding(IDS).dtype == dtype
        assert ours.float().embedding(IDS).dtype == torch.float32
    collected = RemoteEmbeddingCollection(client, "fp32", [config(EmbeddingConfig)]).to(dtype)
    assert torch.equal(collected(FEATURES)["ngram"].values(), longcat_table()[[5, 7, 19_000, 5]].to(dtype))
    assert RemoteEmbeddingBagCollection(client, "fp32", [config(EmbeddingBagConfig)]).to(dtype)(
        FEATURES
    ).values().dtype == (dtype)


def test_a_state_holds_no_tables(client: EmbeddingClient) -> None:
    model = remote(client).bfloat16()
    assert sorted(model.state_dict()) == ["head.bias", "head.weight"]
    assert model.load_state_dict(remote(client).state_dict(), strict=True)
