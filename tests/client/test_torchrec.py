"""TorchRec's modules with their tables in the service, against TorchRec's own on the same weights."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.cluster import Up, serving, until
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.models.dlrm import DLRM

from embedding_service import SGD, EmbeddingClient, RemoteEmbedding
from embedding_service.errors import InvalidRequest, NoGradients, NotFound, OutOfRange
from embedding_service.store.importing import import_checkpoint
from embedding_service.torchrec import RemoteEmbeddingBagCollection, RemoteEmbeddingCollection

pytestmark = pytest.mark.service

DIM, BATCH = 16, 6
ROWS = {"users": 5003, "goods": 2000, "words": 700, "tiny": 1}
FEATURES = {"users": ["user"], "goods": ["bought", "seen"], "words": ["title", "seen"], "tiny": ["always"]}
KEYS = ["seen", "user", "title", "always", "bought"]
WEIGHTS = {name: torch.randn(rows, DIM, generator=torch.Generator().manual_seed(rows)) for name, rows in ROWS.items()}


def publish(folder: Path, version: str, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / f"{version}.safetensors")
    names = {name: name for name in weights}
    import_checkpoint(
        folder / f"{version}.safetensors",
        folder / "store",
        "rec",
        version=version,
        dtype="fp32",
        part_bytes=64 << 10,
        generic=names,
    )


@pytest.fixture(scope="module")
def rec_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Three shards that serve model `rec` with the tables of WEIGHTS."""
    folder = tmp_path_factory.mktemp("rec")
    publish(folder, "1", WEIGHTS)
    with serving(folder, folder / "store", 3) as running:
        yield running


@pytest.fixture(scope="module")
def rec(rec_service: Up) -> Iterator[EmbeddingClient]:
    with EmbeddingClient(rec_service.address, timeout=60) as client:
        yield client


def features(
    lengths: Callable[[torch.Generator], torch.Tensor] | None = None, weighted: bool = False
) -> KeyedJaggedTensor:
    """[5 keys, 6 bags] with empty bags, repetitions, and ids that suit every table of the key."""
    generator = torch.Generator().manual_seed(7)
    counts = torch.randint(0, 4, (len(KEYS) * BATCH,), generator=generator) if lengths is None else lengths(generator)
    bounds = [min(rows for table, rows in ROWS.items() if key in FEATURES[table]) for key in KEYS]
    per_key = counts.view(len(KEYS), BATCH).sum(1).tolist()
    values = torch.cat(
        [torch.randint(0, bound, (n,), generator=generator) for bound, n in zip(bounds, per_key, strict=True)]
    )
    weights = torch.randn(len(values), generator=generator) if weighted else None
    return KeyedJaggedTensor.from_lengths_sync(KEYS, values, counts, weights)


def empty(_: torch.Generator) -> torch.Tensor:
    return torch.zeros(len(KEYS) * BATCH, dtype=torch.int64)


def bag_configs(pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=list(FEATURES[name]), pooling=pooling
        )
        for name, rows in ROWS.items()
    ]


def configs() -> list[EmbeddingConfig]:
    return [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=list(FEATURES[name]))
        for name, rows in ROWS.items()
    ]


def with_weights(module: torch.nn.Module, tables: torch.nn.ModuleDict) -> torch.nn.Module:
    for name, table in tables.items():
        table.weight.data.copy_(WEIGHTS[name])  # type: ignore[operator]
    return module


@pytest.mark.parametrize("lengths", [None, empty], ids=["jagged", "all empty"])
@pytest.mark.parametrize("need_indices", [False, True])
def test_unpooled_rows_equal_torchrecs(rec: EmbeddingClient, lengths: Any, need_indices: bool) -> None:
    local = EmbeddingCollection(configs(), need_indices=need_indices)
    expected = with_weights(local, local.embeddings)(features(lengths))
    remote = RemoteEmbeddingCollection(rec, "rec", configs(), need_indices=need_indices)
    found = remote(features(lengths))
    assert list(found) == list(expected)
    assert {"seen@goods", "seen@words", "bought"} < set(found)
    for name, jagged in expected.items():
        assert torch.equal(found[name].values(), jagged.values())
        assert torch.equal(found[name].lengths(), jagged.lengths())
        assert (found[name].weights_or_none() is None) == (jagged.weights_or_none() is None)
        if need_indices:
            assert torch.equal(found[name].weights(), jagged.weights())
    assert remote.embedding_names_by_table() == local.embedding_names_by_table()
    assert (remote.embedding_dim(), remote.need_indices()) == (local.embedding_dim(), local.need_indices())


@pytest.mark.parametrize("lengths", [None, empty], ids=["jagged", "all empty"])
@pytest.mark.parametrize(
    ("pooling", "weighted"), [(PoolingType.SUM, False), (PoolingType.MEAN, False), (PoolingType.SUM, True)]
)
def test_pooled_bags_equal_torchrecs(rec: EmbeddingClient, lengths: Any, pooling: PoolingType, weighted: bool) -> None:
    local = EmbeddingBagCollection(bag_configs(pooling), is_weighted=weighted)
    expected = with_weights(local, local.embedding_bags)(features(lengths, weighted))
    remote = RemoteEmbeddingBagCollection(rec, "rec", bag_configs(pooling), is_weighted=weighted)
    found = remote(features(lengths, weighted))
    assert found.keys() == expected.keys()
    assert found.length_per_key() == expected.length_per_key()
    assert torch.equal(found.values(), expected.values())
    assert lengths is empty or found.values().any()
    assert remote.is_weighted() == weighted


def test_int32_ids_and_a_config_without_features(rec: EmbeddingClient) -> None:
    config = EmbeddingBagConfig(name="words", num_embeddings=700, embedding_dim=DIM)
    bags = KeyedJaggedTensor.from_lengths_sync(
        ["words"], torch.tensor([3, 699, 3], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32)
    )
    found = RemoteEmbeddingBagCollection(rec, "rec@1", [config])(bags).to_dict()["words"]
    table = WEIGHTS["words"]
    assert torch.equal(found, torch.stack([table[3] + table[699], torch.zeros(DIM), table[3]]))


def test_bags_told_apart_only_by_inverse_indices(rec: EmbeddingClient) -> None:
    counts = torch.tensor([1, 2, 1, 1])  # 2 different bags a key, spread over a batch of 3
    inverse = (["bought", "seen"], torch.tensor([[0, 1, 0], [1, 1, 0]]))
    bags = KeyedJaggedTensor(["bought", "seen"], torch.tensor([5, 6, 7, 8, 9]), lengths=counts, inverse_indices=inverse)
    config = EmbeddingBagConfig(name="goods", num_embeddings=2000, embedding_dim=DIM, feature_names=["bought", "seen"])
    local = EmbeddingBagCollection([copy.copy(config)])
    local.embedding_bags["goods"].weight.data.copy_(WEIGHTS["goods"])
    found = RemoteEmbeddingBagCollection(rec, "rec", [config])(bags).values()
    assert found.shape == (3, 2 * DIM)
    assert torch.equal(found, local(bags).values())


def test_a_batch_asks_for_each_table_once_and_for_all_at_the_same_time(
    rec: EmbeddingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, together = RemoteEmbeddingCollection(rec, "rec", configs()), threading.Barrier(4, timeout=180)
    asked: dict[str, torch.Tensor] = {}
    lookup = rec.lookup

    def spy(table: str, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        together.wait()  # breaks unless all four are under way
        assert asked.setdefault(table, ids) is ids
        return lookup(table, ids, **options)

    monkeypatch.setattr(rec, "lookup", spy)
    bags = features()
    remote(bags)
    assert set(asked) == {f"rec@1/{table}" for table in ROWS}
    assert asked["rec@1/goods"].tolist() == [*bags["bought"].values().tolist(), *bags["seen"].values().tolist()]


def dlrm_configs() -> list[EmbeddingBagConfig]:
    """Without the feature that two tables have: TorchRec's DLRM knows no such."""
    tables = bag_configs()
    tables[2].feature_names = ["title"]
    return tables


def test_a_dlrm_whose_bags_are_swapped_gives_the_same_logits(rec: EmbeddingClient) -> None:
    torch.manual_seed(3)
    local = EmbeddingBagCollection(dlrm_configs())
    model = DLRM(with_weights(local, local.embedding_bags), 13, [32, DIM], [24, 1]).eval()
    swapped = copy.deepcopy(model)
    swapped.sparse_arch.embedding_bag_collection = RemoteEmbeddingBagCollection(rec, "rec", dlrm_configs())
    dense = torch.randn(BATCH, 13)
    with torch.no_grad():
        assert torch.equal(swapped(dense, features()), model(dense, features()))
    assert not any("embedding" in name for name, _ in swapped.named_parameters())


def test_training_through_remote_tables_fails_and_training_beside_frozen_ones_does_not(rec: EmbeddingClient) -> None:
    remote = RemoteEmbeddingBagCollection(rec, "rec", dlrm_configs())
    model = DLRM(remote, 13, [32, DIM], [24, 1])
    with pytest.raises(NoGradients, match=r"users \[5003, 16\](.|\n)*requires_grad_\(False\)"):
        model(torch.randn(BATCH, 13), features()).sum().backward()
    with pytest.raises(NoGradients, match="cannot be trained"):
        remote.requires_grad_(True)
    remote.requires_grad_(False)
    model.zero_grad()
    model(torch.randn(BATCH, 13), features()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("make", ["embedding", "collection"])
def test_unpooled_modules_have_no_gradients_either(rec: EmbeddingClient, make: str) -> None:
    if make == "embedding":
        rows = RemoteEmbedding(rec, "rec/words")(torch.tensor([1, 2]))
    else:
        rows = RemoteEmbeddingCollection(rec, "rec", configs())(features())["title"].values()
    rows *= 2  # as one may with what an nn.Embedding returns
    with pytest.raises(NoGradients, match="words"):
        rows.sum().backward()


def test_where_nothing_is_recorded_outputs_need_no_gradients(rec: EmbeddingClient) -> None:
    remote = RemoteEmbedding(rec, "rec/words")
    with torch.no_grad():
        assert not remote(torch.tensor([1])).requires_grad
    with torch.inference_mode():
        assert torch.equal(remote(torch.tensor([1])), WEIGHTS["words"][[1]])


def words(**changes: Any) -> list[EmbeddingBagConfig]:
    return [EmbeddingBagConfig(**({"name": "words", "num_embeddings": 700, "embedding_dim": DIM} | changes))]


@pytest.mark.parametrize(
    ("tables", "weighted", "message"),
    [
        (words(num_embeddings=701), False, "rec@1 has: words has 700 rows of 16, its config says num_embeddings=701"),
        (words(embedding_dim=8), False, "embedding_dim=8.*name the model@version"),
        (words(name="wrods"), False, "no table 'wrods', only users, goods, words, tiny"),
        (words() + words(), False, "'words', 'words'"),
        (words(pooling=PoolingType.NONE), False, "pooling of table words must be SUM or MEAN, got NONE"),
        (words(pooling=PoolingType.MEAN), True, "must be SUM where features are weighted, got MEAN"),
        ([], False, "got none"),
    ],
)
def test_configs_that_do_not_fit_are_refused(rec: EmbeddingClient, tables: Any, weighted: bool, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        RemoteEmbeddingBagCollection(rec, "rec", tables, is_weighted=weighted)


def test_tables_of_different_dims_make_no_unpooled_collection(
    rec: EmbeddingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = rec.models()
    served[0].tables["words"] = (700, 8, "fp32")
    monkeypatch.setattr(rec, "models", lambda: served)
    tables = [
        EmbeddingConfig(name="words", num_embeddings=700, embedding_dim=8),
        EmbeddingConfig(name="goods", num_embeddings=2000, embedding_dim=DIM),
    ]
    with pytest.raises(InvalidRequest, match="words 8, goods 16"):
        RemoteEmbeddingCollection(rec, "rec", tables)


def test_unknown_models_are_named(rec: EmbeddingClient) -> None:
    with pytest.raises(NotFound, match=r"'rce'.*rec@1"):
        RemoteEmbeddingCollection(rec, "rce", configs())


def test_bad_features_are_named(rec: EmbeddingClient) -> None:
    remote = RemoteEmbeddingCollection(rec, "rec", configs()[1:2])
    one = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(InvalidRequest, match="goods needs the feature 'bought'; given are: seen"):
        remote(one)
    outside = KeyedJaggedTensor.from_lengths_sync(["bought", "seen"], torch.tensor([1, 2000]), torch.tensor([1, 1]))
    with pytest.raises(OutOfRange, match=r"id 2000 at position 1 .*bought, seen, one after the other"):
        remote(outside)


def test_a_newer_version_is_taken_whole_or_refused(tmp_path: Path) -> None:
    tables = {name: WEIGHTS[name][:700] for name in ("goods", "words")}
    made = [EmbeddingConfig(name=name, num_embeddings=700, embedding_dim=DIM) for name in tables]
    ids = KeyedJaggedTensor.from_lengths_sync(list(tables), torch.tensor([5, 5]), torch.tensor([1, 1]))
    old = torch.stack([tables["goods"][5], tables["words"][5]])
    publish(tmp_path, "1", tables)
    with (
        serving(tmp_path, tmp_path / "store", 2) as running,
        EmbeddingClient(running.address, timeout=60) as client,
    ):
        remote, pinned = (RemoteEmbeddingCollection(client, name, made) for name in ("rec", "rec@1"))

        def is_new() -> bool:
            rows = torch.cat([jagged.values() for jagged in remote(ids).values()])
            assert torch.equal(rows, old) or torch.equal(rows, -old)  # never some of both
            return torch.equal(rows, -old)

        assert not is_new()
        publish(tmp_path, "2", {name: -table for name, table in tables.items()})
        until(is_new, "rows of version 2")
        with pytest.raises(NotFound, match="rec@1"):
            pinned(ids)
        publish(tmp_path, "3", {name: table[:600] for name, table in tables.items()})
        with pytest.raises(InvalidRequest, match=r"rec@3 has: goods has 600 rows"):
            until(lambda: not is_new(), "a refusal of version 3")


def test_the_page_on_other_models_does_what_it_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "other-models.md").read_text()
    save_file({"users": torch.randn(5000, DIM), "items": torch.randn(2000, DIM)}, tmp_path / "model.safetensors")
    for name in re.findall(r'EmbeddingBagConfig\(name="(\w+)"', page):  # a name that TorchRec itself takes
        config = EmbeddingBagConfig(name=name, num_embeddings=4, embedding_dim=4, feature_names=["a"])
        EmbeddingBagCollection(tables=[config])
    [command] = re.findall(r"^    embedding-service (import .*)$", page, re.MULTILINE)
    arguments = command.replace("STORE", "store").split()
    subprocess.run([sys.executable, "-m", "embedding_service", *arguments], cwd=tmp_path, check=True, timeout=120)
    with serving(tmp_path, tmp_path / "store", 2) as running:
        names: dict[str, Any] = {}
        for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            exec(block.replace("localhost:7070", running.address), names)
        names["client"].close()
    assert names["scores"].shape == (2, 2, 1)
    assert names["logits"].shape == (2, 1)
    assert all(parameter.grad is not None for parameter in names["dlrm"].parameters())


def test_tables_of_a_branch_learn_as_torchrecs_own(rec: EmbeddingClient) -> None:
    """Pooled and unpooled, by plain gradient descent."""
    bags = EmbeddingBagCollection(tables=bag_configs(PoolingType.MEAN))
    with_weights(bags, bags.embedding_bags)
    with rec.train("rec@learning", optimizer=SGD(lr=0.5), timeout=60) as session:
        remote_bags = RemoteEmbeddingBagCollection(rec, "rec@learning", bag_configs(PoolingType.MEAN))
        (remote_bags(features()).values().square().sum() * 0.1).backward()
        (bags(features()).values().square().sum() * 0.1).backward()
        session.step()
        for name, bag in bags.embedding_bags.items():
            assert bag.weight.grad is not None
            wanted = (bag.weight - 0.5 * bag.weight.grad).detach()
            found = session.lookup(name, torch.arange(ROWS[name]))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        local = EmbeddingCollection(configs())
        for name, table in local.embeddings.items():
            table.weight.data.copy_(session.lookup(name, torch.arange(ROWS[name])))  # type: ignore[operator]
        remote = RemoteEmbeddingCollection(rec, "rec@learning", configs())
        for module in (remote, local):
            sum(each.values().square().sum() * 0.1 for each in module(features()).values()).backward()  # type: ignore[union-attr]
        session.step()
        for name, table in local.embeddings.items():
            assert isinstance(table.weight.grad, torch.Tensor)
            wanted = (table.weight - 0.5 * table.weight.grad).detach()  # type: ignore[operator]
            found = session.lookup(name, torch.arange(ROWS[name]))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
