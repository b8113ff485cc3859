"""Remote modules among others: compiled, copied, pickled, converted, saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.checkpoints import DIM, longcat_table
from support.cluster import Up
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, Dataset
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)

from embedding_service import EmbeddingClient, RemoteEmbedding
from embedding_service.errors import InvalidRequest, NoGradients, NotFound
from embedding_service.torchrec import RemoteEmbeddingBagCollection, RemoteEmbeddingCollection

pytestmark = pytest.mark.service

ROWS = len(longcat_table())
IDS = torch.tensor([[5, 7], [19_000, 5]])
CONFIG: dict[str, Any] = {"name": "ngram", "embedding_dim": DIM, "num_embeddings": ROWS, "feature_names": ["ngram"]}


def features(count: int = 4) -> KeyedJaggedTensor:
    """Three bags, the middle one empty."""
    ids = torch.randint(0, ROWS, (count,), generator=torch.Generator().manual_seed(count))
    return KeyedJaggedTensor.from_lengths_sync(["ngram"], ids, torch.tensor([count - 1, 0, 1]))


class Model(nn.Module):
    """A model around two embeddings, remote or not."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        torch.manual_seed(0)
        self.head = nn.Linear(DIM, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.first(ids) * 0.5 + self.second(ids)).tanh())


def remote(client: EmbeddingClient) -> Model:
    return Model(RemoteEmbedding(client, "fp32/ngram"), RemoteEmbedding(client, "bf16@1/ngram"))


def local(dtype: torch.dtype) -> Model:
    """The same model as it was before its tables went, converted."""
    tables = longcat_table(), longcat_table().bfloat16().float()
    return Model(*map(nn.Embedding.from_pretrained, tables)).to(dtype)


class Bags(nn.Module):
    """A model around a collection of TorchRec's kind."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables
        torch.manual_seed(0)
        self.head = nn.Linear(DIM, 3)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.tables(features)
        rows = found["ngram"].values() if isinstance(found, dict) else found.values()
        return self.head(rows.tanh())


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_model_is_one_graph_with_the_values_of_the_eager_one(client: EmbeddingClient, backend: str) -> None:
    model, graphs = remote(client), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    counted = CompileCounterWithBackend("eager")
    plain = torch.compile(local(torch.float32).requires_grad_(True), backend=counted, fullgraph=True)
    for shape in ((2, 4), (2, 9), (3, 17), (5, 3)):
        ids = torch.randint(0, ROWS, shape)
        torch.testing.assert_close(compiled(ids), model(ids))
        torch.testing.assert_close(compiled(ids), plain(ids))
    assert graphs.frame_count == counted.frame_count
    with pytest.raises(NoGradients, match=r"RemoteEmbedding\('.*ngram'.*requires_grad_\(False\)"):
        compiled(IDS).sum().backward()


def test_what_is_frozen_lets_the_rest_of_a_compiled_model_be_trained(client: EmbeddingClient) -> None:
    model, expected = remote(client), local(torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(IDS).requires_grad
    model.first.requires_grad_(False)
    model.second.requires_grad_(False)
    compiled(IDS).sum().backward()
    expected(IDS).sum().backward()
    torch.testing.assert_close(model.head.weight.grad, expected.head.weight.grad)


def test_one_graph_serves_all_modules_and_their_copies(service: Up, client: EmbeddingClient) -> None:
    """As of nn.Embeddings, whose weights are data to a graph: of layers that are compiled one by one."""
    with EmbeddingClient(service.address, timeout=60) as other:
        modules = [RemoteEmbedding(client, f"{table}/ngram") for table in ["fp32", "fp16", "int8", "nope"] * 3]
        modules = [module for module in modules if "nope" not in module.table]
        graphs = CompileCounterWithBackend("eager")
        for module in (*modules, copy.deepcopy(modules[0]), copy.deepcopy(modules[1])):
            rows = torch.compile(module, backend=graphs, fullgraph=True)(IDS)
            assert torch.equal(rows, client.lookup(module.table, IDS))
        assert graphs.frame_count == 1
        elsewhere = RemoteEmbedding(other, "bf16/ngram")
        elsewhere(IDS)
        assert torch.equal(torch.compile(elsewhere, backend=graphs)(IDS), client.lookup("bf16/ngram", IDS))
        assert graphs.frame_count <= 2


def test_errors_of_compiled_modules_are_those_of_eager_ones(client: EmbeddingClient) -> None:
    unknown = torch.compile(Model(*(RemoteEmbedding(client, "nope/ngram") for _ in range(2))), backend="eager")
    for _ in range(2):
        with pytest.raises(NotFound, match="nope"):
            unknown(IDS)
    module = RemoteEmbedding(client, "fp32/ngram")
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with pytest.raises(IndexError, match=f"id {ROWS} "):
        compiled(torch.tensor([ROWS]))


def test_graphs_never_give_rows_that_they_were_not_made_for(client: EmbeddingClient) -> None:
    from embedding_service.client import graphs

    with pytest.raises(InvalidRequest, match="another process"):
        graphs.look_up(IDS, None, torch.tensor([0.5], dtype=torch.float64), DIM, torch.float32)
    module = RemoteEmbedding(client, "fp32/ngram")
    module._dim = DIM + 1  # as if an import had changed it since
    with pytest.raises(InvalidRequest, match=rf"rows of {DIM} values now, {DIM + 1} when .*reset\(\)"):
        torch.compile(module, backend="eager", fullgraph=True)(IDS)


def test_the_operator_is_what_torch_expects(client: EmbeddingClient) -> None:
    from embedding_service.client import graphs

    module = RemoteEmbedding(client, "fp32/ngram")
    module.requires_grad_(False)
    arguments = (IDS, None, module._handle, DIM, torch.bfloat16)
    torch.library.opcheck(graphs.look_up, arguments)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(RemoteEmbeddingCollection, EmbeddingConfig), (RemoteEmbeddingBagCollection, EmbeddingBagConfig)],
)
def test_compiled_torchrec_modules_break_a_graph_once(client: EmbeddingClient, kind: Any, config: Any) -> None:
    model, graphs = Bags(kind(client, "fp32", [config(**CONFIG)])), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs)
    with torch.no_grad():
        for count in (4, 9, 17, 33):
            assert torch.equal(compiled(features(count)), model(features(count)))
    assert graphs.frame_count <= 3


def test_copies_share_the_client(client: EmbeddingClient) -> None:
    model = remote(client)
    model.first.requires_grad_(False)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    for twin in (copy.deepcopy(model), copy.copy(model), averaged.module):
        assert twin.first._client is client  # type: ignore[union-attr]
        assert torch.equal(twin(IDS), model(IDS))
    twin = copy.deepcopy(model)
    assert not twin.first(IDS).requires_grad
    assert twin.second(IDS).requires_grad


def test_a_loaded_model_connects_when_it_is_used(service: Up, client: EmbeddingClient) -> None:
    model, saved = remote(client).bfloat16(), io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert loaded.first._client is loaded.second._client is not client
    with loaded.first._client:
        assert torch.equal(loaded(IDS), model(IDS))
        assert torch.equal(torch.compile(loaded, backend="eager", fullgraph=True)(IDS), model(IDS))
    with EmbeddingClient("127.0.0.1:9") as nobody:
        pickle.loads(pickle.dumps(RemoteEmbedding(nobody, "fp32/ngram")))._client.close()


def test_torchrec_modules_are_copied_and_loaded(client: EmbeddingClient) -> None:
    modules = (
        RemoteEmbeddingCollection(client, "fp32", [EmbeddingConfig(**CONFIG)]),
        RemoteEmbeddingBagCollection(client, "fp32", [EmbeddingBagConfig(**CONFIG)]),
    )
    loaded = pickle.loads(pickle.dumps(modules))
    with loaded[0]._client as other:
        assert other is loaded[1]._client is not client
        for rows, bags in (loaded, copy.deepcopy(modules)):
            assert torch.equal(rows(features())["ngram"].values(), modules[0](features())["ngram"].values())
            assert torch.equal(bags(features()).values(), modules[1](features()).values())


class Looked(Dataset[Tensor]):
    """Rows that a DataLoader's processes look up."""

    def __init__(self, embedding: RemoteEmbedding) -> None:
        self.embedding = embedding

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.embedding(torch.tensor([index, index * 1000]))


def test_a_spawned_data_loader_looks_up(client: EmbeddingClient) -> None:
    data = Looked(RemoteEmbedding(client, "fp32/ngram"))
    loader = DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context="spawn", timeout=120)
    rows = torch.cat(list(loader))
    assert torch.equal(rows, longcat_table()[torch.tensor([[index, index * 1000] for index in range(6)])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("convert", [nn.Module.to, nn.Module.type])
def test_a_converted_model_is_converted_whole(client: EmbeddingClient, dtype: torch.dtype, convert: Callable) -> None:
    ours, theirs = convert(remote(client), dtype), local(dtype)
    assert ours.first.dtype == ours.first(IDS).dtype == dtype
    assert torch.equal(ours.first(IDS), theirs.first(IDS))
    assert torch.equal(ours(IDS), theirs(IDS))
    assert ours.to("cpu").first(IDS).dtype == dtype
    assert torch.equal(ours.float().first(IDS), longcat_table()[IDS])


def test_a_given_dtype_is_converted_too_and_none_is_torchs_default(client: EmbeddingClient) -> None:
    given = RemoteEmbedding(client, "fp32/ngram", torch.bfloat16)
    assert given(IDS).dtype == torch.bfloat16
    assert torch.equal(given.float()(IDS), longcat_table()[IDS])
    torch.set_default_dtype(torch.float64)
    try:
        assert RemoteEmbedding(client, "fp32/ngram")(IDS).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(InvalidRequest, match="int8"):
        RemoteEmbedding(client, "fp32/ngram", torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_converted_torchrec_modules_give_what_torchrecs_do(client: EmbeddingClient, dtype: torch.dtype) -> None:
    rows, bags = (
        EmbeddingCollection([EmbeddingConfig(**CONFIG)]),
        EmbeddingBagCollection([EmbeddingBagConfig(**CONFIG)]),
    )
    for module in (rows.embeddings["ngram"], bags.embedding_bags["ngram"]):
        module.weight.data.copy_(longcat_table())
    our_rows = RemoteEmbeddingCollection(client, "fp32", [EmbeddingConfig(**CONFIG)])
    our_bags = RemoteEmbeddingBagCollection(client, "fp32", [EmbeddingBagConfig(**CONFIG)])
    for module in (rows, bags, our_rows, our_bags):
        module.to(dtype)
    expected, found = rows(features())["ngram"].values(), our_rows(features())["ngram"].values()
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)
    assert our_bags(features()).values().dtype == torch.float32
    assert torch.equal(our_bags(features()).values(), bags(features()).values())
    assert our_rows.to("meta")(features())["ngram"].values().device.type == our_rows.device.type == "meta"


def test_a_state_holds_no_tables(client: EmbeddingClient) -> None:
    model = remote(client).bfloat16()
    assert sorted(model.state_dict()) == ["head.bias", "head.weight"]
    assert list(model.buffers()) == []
    model.load_state_dict(remote(client).state_dict(), strict=True)
