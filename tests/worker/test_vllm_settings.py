"""The vLLM plugin: how it is told to work, and what it says where tables are not to be had. It needs no vLLM here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from support.checkpoints import DIM, head_rows
from support.cluster import Up, free_port

from embedding_service.errors import InvalidRequest, NotFound, ServiceError
from model_worker.vllm import tables
from model_worker.vllm.tables import ServedTables, TablesElsewhere


def vllm_config(settings: Any, checkpoint: Path, **changed: Any) -> SimpleNamespace:
    """What of vLLM's config counts."""
    config = {**json.loads((checkpoint / "config.json").read_text()), **changed}
    return SimpleNamespace(additional_config=settings, model_config=SimpleNamespace(hf_config=config))


def settings(address: str, model: str = "fp32") -> dict[str, Any]:
    return {"embedding_service": {"address": address, "model": model}}


@pytest.mark.parametrize("other", [{}, {"gdn_prefill_backend": "triton"}, object()])
def test_a_model_keeps_its_tables_where_nothing_is_said(other: Any, checkpoint: Path) -> None:
    assert ServedTables.of(vllm_config(other, checkpoint)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        "localhost:7070",
        {"address": "localhost:7070"},
        {"address": "a:1", "name": "b"},
        {"address": "a:1", "model": "b", "near": "no"},
    ],
)
def test_settings_that_are_not_understood(wrong: Any, checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"additional_config\['embedding_service'\] is .*--additional-config"):
        ServedTables.of(vllm_config({"embedding_service": wrong}, checkpoint))


def test_no_service(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_START_SECONDS", 0.5)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ServiceError, match=f"--additional-config .*{address}.*embedding-service up"):
        ServedTables.of(vllm_config(settings(address), checkpoint))


def test_where_the_engine_is_and_that_it_is_to_use_the_wire(checkpoint: Path, service: Up) -> None:
    more = {**settings(service.address)["embedding_service"], "near": False, "topology": "zone-a"}
    served = ServedTables.of(vllm_config({"embedding_service": more}, checkpoint))
    assert served is not None
    _, options = served.client.__reduce__()[1]
    assert (options["near"], options["topology"]) == (False, "zone-a")
    served.client.close()


def test_another_model_s_name(checkpoint: Path, service: Up) -> None:
    with pytest.raises(NotFound, match=r"tables 'other' from .*fp32.*correct address and model"):
        ServedTables.of(vllm_config(settings(service.address, "other"), checkpoint))


def test_another_hash(checkpoint: Path, service: Up) -> None:
    with pytest.raises(InvalidRequest, match=r"'fp32' are hashed with .*'eos_token_ids': \[2\].*\[3\].*another model"):
        ServedTables.of(vllm_config(settings(service.address), checkpoint, eos_token_id=3))


def test_another_checkpoints_rows_are_refused(checkpoint: Path, service: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start where the settings say which checkpoint it is, and later where another one is served."""
    more = {**settings(service.address)["embedding_service"], "checkpoint": "fp32@7"}
    with pytest.raises(
        NotFound, match=r"fp32@1 belong to the checkpoint that was imported as fp32@1.*has that of fp32@7"
    ):
        ServedTables.of(vllm_config({"embedding_service": more}, checkpoint))
    served = ServedTables.of(vllm_config(settings(service.address), checkpoint))
    assert served is not None
    rows = served.embedding("ngram", sum(head_rows()), DIM, torch.float32)
    assert served.now() == "fp32@1"
    assert rows(torch.arange(3)).shape == (3, DIM)
    before = served.client.model("fp32")
    # Published over this checkpoint's tables, then imported from another one.
    monkeypatch.setattr(served.client, "model", lambda name: replace(before, base="fp32@1", version="2"))
    assert served.now() == "fp32@2"
    monkeypatch.setattr(served.client, "model", lambda name: replace(before, version="3", checkpoint="fp32@3"))
    with pytest.raises(NotFound, match=r"fp32@3.*start one with the other checkpoint"):
        rows(torch.arange(3))
    served.client.close()


@pytest.mark.parametrize(("rows", "dim"), [(0, 1), (1, 0)])
def test_other_dimensions(rows: int, dim: int, checkpoint: Path, service: Up) -> None:
    served = ServedTables.of(vllm_config(settings(service.address), checkpoint))
    assert served is not None
    told = rf"fp32@1/ngram in the service is {sum(head_rows())} rows of {DIM} values"
    with pytest.raises(InvalidRequest, match=told):
        served.embedding("ngram", sum(head_rows()) + rows, DIM + dim, torch.float32)


class Model:
    """What a model class of vLLM is to `TablesElsewhere`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self.made_with = Elsewhere.stood_in

    def load_weights(self, weights: Any) -> set[str]:
        return {name for name, _ in weights}


class Elsewhere(TablesElsewhere, Model):
    table_tensors = re.compile("table")
    stood_in: ClassVar[ServedTables | None] = None

    @staticmethod
    @contextmanager
    def tables_of(served: ServedTables) -> Iterator[None]:
        Elsewhere.stood_in = served
        yield
        Elsewhere.stood_in = None


WEIGHTS = [("table", torch.ones(1)), ("dense", torch.ones(1))]


def test_tables_of_a_service_are_neither_made_nor_loaded(checkpoint: Path, service: Up) -> None:
    model = Elsewhere(vllm_config=vllm_config(settings(service.address), checkpoint))
    assert model.served is not None and model.made_with is model.served
    assert Elsewhere.stood_in is None
    assert model.load_weights(WEIGHTS) == {"dense"}
    assert [model.is_unused_checkpoint_weight(name) for name, _ in WEIGHTS] == [True, False]


def test_tables_are_made_and_loaded_where_nothing_is_said(checkpoint: Path) -> None:
    model = Elsewhere(vllm_config=vllm_config({}, checkpoint))
    assert model.served is None and model.made_with is None
    assert model.load_weights(WEIGHTS) == {"table", "dense"}
    assert [model.is_unused_checkpoint_weight(name) for name, _ in WEIGHTS] == [False, False]
