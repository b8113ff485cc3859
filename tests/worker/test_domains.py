"""Tables of domains: requests name them, share a batch and a model, and each has the rows of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import save_file
from small_model import VOCAB, write_tokenizer
from starlette.testclient import TestClient
from support.cluster import Up, serving, until
from support.security import write_policy
from test_engine import Job, greedy
from test_qwen4_exp import TEXT
from transformers import PreTrainedTokenizerFast, Qwen4ExpForCausalLM, Qwen4ExpTextConfig

from embedding_service import EmbeddingClient
from embedding_service.errors import NotFound
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.publishing import publish_rows
from embedding_service.store.store import Store
from model_worker import families as worker_families
from model_worker import load_model
from model_worker.engine import Engine
from model_worker.http_app import build_app
from model_worker.longcat import LocalTables
from model_worker.qwen4_exp import RemoteTable
from model_worker.sampling import SamplingParams
from model_worker.vllm.tables import ServedTables
from model_worker.worker import Worker, WorkerConfig

pytestmark = pytest.mark.slow

FAMILIES = ("longcat", "qwen4_exp")


@pytest.fixture(scope="module")
def checkpoints(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each family, in float32."""
    torch.manual_seed(5)
    model: Any = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**TEXT))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.15)
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return {"longcat": model_folder, "qwen4_exp": folder}


def publish(store: Path, folder: Path, base: str, seed: int, name: str | None = None) -> None:
    """Put other rows in the place of every second one of all tables."""
    generator, changed = torch.Generator().manual_seed(seed), {}
    for table in Store(store).manifest(*base.split("@")).tables:
        ids = torch.arange(seed % 2, table.rows, 2)
        changed[f"{table.name}.ids"] = ids
        changed[f"{table.name}.rows"] = torch.randn(len(ids), table.dim, generator=generator)
    save_file(changed, folder / "rows.safetensors")
    publish_rows(store, base, folder / "rows.safetensors", name=name)


@pytest.fixture(scope="module")
def store(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, and two domains of each."""
    home = tmp_path_factory.mktemp("domains")
    for family, folder in checkpoints.items():
        import_checkpoint(folder, home / "store", family, dtype="fp32", part_bytes=16 << 10)
        publish(home / "store", home, f"{family}@1", 1, f"{family}+legal")
        publish(home / "store", home, f"{family}@1", 2, f"{family}+code")
    return home / "store"


@pytest.fixture(scope="module")
def families(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A service of them."""
    with serving(tmp_path_factory.mktemp("service"), store, 2, memory=64 << 20) as running:
        yield running


@pytest.mark.parametrize("near", [True, False], ids=["near", "wired"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_one_batch_have_the_rows_of_their_own_domains(
    checkpoints: dict[str, Path], families: Up, family: str, near: bool
) -> None:
    rows: list[torch.Tensor] = []
    with EmbeddingClient(families.address, timeout=30, near=near) as client:
        model: Any = load_model(checkpoints[family]).eval()
        tables = worker_families.attach(model, client, family).tables
        kinds = (RemoteTable,) if family == "qwen4_exp" else (type(model.model.ngram_embeddings.rows),)
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(lambda *call: rows.append(call[-1].clone()))
        names = [f"{family}+legal", None, f"{family}+code", f"{family}+legal"]
        tokens = torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(3)).repeat(len(names), 1)

        def run(these: list[str | None], batch: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            rows.clear()
            with tables.of(these):
                return model(batch).logits, list(rows)

        together, layers = run(names, tokens)
        for place, name in enumerate(names):
            logits, alone = run([name], tokens[place : place + 1])
            torch.testing.assert_close(together[place], logits[0])
            assert len(layers) == len(alone) > 0
            for ours, theirs in zip(layers, alone, strict=True):
                assert torch.equal(ours[place], theirs[0])
        # The same tokens, so only the tables make these differ.
        for first, second in ((0, 1), (1, 2), (0, 2)):
            assert not torch.allclose(together[first], together[second], atol=0.1)
        torch.testing.assert_close(together[0], together[3])


def test_vllm_takes_the_tables_of_a_domain_that_its_setting_names(checkpoints: dict[str, Path], families: Up) -> None:
    """One engine has one domain's tables, for all of its requests."""
    seen = []
    for name in ("longcat", "longcat+legal"):
        served = ServedTables(families.address, name, json.loads((checkpoints["longcat"] / "config.json").read_text()))
        [table] = served.hasher.tables
        ids = torch.arange(64)
        dim = served.client.lookup(f"{name}/ngram", ids).shape[1]
        rows = served.embedding("ngram", table.rows, dim, torch.float32)(ids)
        assert torch.equal(rows, served.client.lookup(f"{served.now()}/ngram", ids))
        seen.append(rows)
        served.client.close()
    assert not torch.equal(*seen)


def complete(http: TestClient, model: str, key: str = "") -> Any:
    body = {"model": model, "prompt": "The import statement", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"} if key else {})


# Whose keys may use which tables. A version counts as the one that lookups get now.
READ = {
    "all": (["longcat*"], {"longcat", "longcat+code", "longcat+legal"}),
    "own": (["longcat"], {"longcat"}),
    "lawyer": (["longcat+legal"], {"longcat+legal"}),
    "domains": (["longcat+*"], {"longcat+code", "longcat+legal"}),
    "pinned": (["longcat+code@1"], {"longcat+code"}),
    "bygone": (["longcat+code@0", "longcat@2"], set[str]()),
    "elsewhere": (["qwen4_exp+legal"], set[str]()),
}
# Names that are nearly a domain's, and are none.
OTHER_WAYS = (
    *("", " ", "+code", "longcat+", "longcat+code ", " longcat+code", "longcat+CODE", "Longcat+code", "longcat%2Bcode"),
    *("longcat+code@1", "longcat+code\0", "longcat++code", "longcat\uff0bcode", "longcat+code/..", "longcat+*"),
    *("longcat+legal,longcat+code", "longcat+cod[e]", "longcat+code\nlongcat+legal"),
)


def test_s8_a_key_uses_the_tables_of_the_domains_that_it_may_read(
    checkpoints: dict[str, Path], families: Up, tmp_path: Path
) -> None:
    """The other ones look as if they were not there, in lists and errors too, and quotas are of the identity."""
    identities: dict[str, Any] = {who: {"tokens": [who], "read": patterns} for who, (patterns, _) in READ.items()}
    identities["thrifty"] = {"tokens": ["thrifty"], "read": ["longcat*"], "tokens_per_second": 1}
    policy = write_policy(tmp_path, identities)
    config = WorkerConfig(checkpoints["longcat"], families.address, name="longcat", version="1", policy=policy)
    worker = Worker(config)
    names = READ["all"][1]
    try:
        with TestClient(build_app(worker), raise_server_exceptions=False) as http:
            texts = {name: complete(http, name, "all").json()["choices"][0]["text"] for name in names}
            assert len(set(texts.values())) == len(names)
            for who, (_, may) in READ.items():
                shown = {"Authorization": f"Bearer {who}"}
                listed = http.get("/v1/models", headers=shown)
                assert {card["id"] for card in listed.json()["data"]} == may
                for name in (*names, "longcat+none"):
                    answer, card = complete(http, name, who), http.get(f"/v1/models/{name}", headers=shown)
                    if name in may:
                        assert answer.json()["choices"][0]["text"] == texts[name] and card.json()["id"] == name
                        continue
                    absent = complete(http, "longcat+none", who).json()["error"]["message"]
                    assert (answer.status_code, card.status_code) == (404, 404)
                    assert answer.json()["error"]["message"] == absent.replace("longcat+none", name)
                    told = absent.replace("longcat+none", "")
                    assert not any(other in told for other in names - may), told
            for name in OTHER_WAYS:
                assert complete(http, name, "all").status_code in (400, 404), name
                if "%" not in name:  # the test's client decodes a path twice
                    card = http.get(f"/v1/models/{quote(name, safe='')}", headers={"Authorization": "Bearer all"})
                    assert card.status_code == 404, name
            for way in ("longcat%2Bcode", "%6congcat%2bcode", "../models/longcat+code", "./longcat%2Bcode"):
                card = http.get(f"/v1/models/{way}", headers={"Authorization": "Bearer lawyer"})
                assert card.status_code == 404, way
            assert complete(http, "longcat+legal", "thrifty").status_code == 200
            assert complete(http, "longcat+code", "thrifty").status_code == 429
    finally:
        worker.close()


def test_a_request_picks_a_domain_by_the_models_name(checkpoints: dict[str, Path], families: Up, store: Path) -> None:
    """And a worker goes on with what is published over its tables, and lists what is published later."""
    config = WorkerConfig(checkpoints["longcat"], families.address, name="longcat", version="1")
    worker = Worker(config)
    try:
        with TestClient(build_app(worker), raise_server_exceptions=False) as http:

            def listed() -> list[str]:
                return [card["id"] for card in http.get("/v1/models").json()["data"]]

            def text(model: str) -> str:
                answer = complete(http, model).json()
                assert answer["model"] == model
                return str(answer["choices"][0]["text"])

            names = ["longcat", "longcat+code", "longcat+legal"]
            assert listed() == names
            texts = {name: text(name) for name in names}
            assert len(set(texts.values())) == len(names)
            assert http.get("/v1/models/longcat+legal").json()["id"] == "longcat+legal"

            async def together() -> list[list[int]]:
                prompt = worker.tokenizer.encode("The import statement")
                params = SamplingParams(12, temperature=0, ignore_eos=True)
                begun = [worker.generate([(prompt, params)], streamed=False, tables=name) for name in names]
                for each in begun:
                    async for _ in each.events():
                        pass
                return [each._requests[0].completion for each in begun]

            decoded = [worker.tokenizer.decode(each, skip_special_tokens=True) for each in asyncio.run(together())]
            assert decoded == list(texts.values())

            for unknown in ("longcat+none", "longcat+", "qwen4_exp", "qwen4_exp+legal"):
                answer = complete(http, unknown)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
                assert http.get(f"/v1/models/{unknown}").status_code == 404

            publish(store, store.parent, "longcat@1", 4)
            until(lambda: text("longcat") != texts["longcat"], "the worker to have what was published")
            assert http.get("/v1/worker").json()["model"] == "longcat@2"
            assert text("longcat+legal") == texts["longcat+legal"]  # its base is still version 1
            import_checkpoint(checkpoints["longcat"], store, "longcat+code", version="2", dtype="fp32")
            until(lambda: listed() == ["longcat", "longcat+legal"], "a version of another import to be refused")
            answer = complete(http, "longcat+code")
            assert answer.status_code == 404
            assert (
                "imported as longcat+code@2, and this worker has that of longcat@1" in answer.json()["error"]["message"]
            )
    finally:
        worker.close()


def test_vllm_goes_on_with_what_is_published(checkpoints: dict[str, Path], families: Up, store: Path) -> None:
    """The old version leaves in the moment in which the new one comes. No step may fail, for that ends the engine."""
    served = ServedTables(families.address, "qwen4_exp", load_model(checkpoints["qwen4_exp"]).config)
    table, ids = served.hasher.tables[0], torch.arange(4)
    rows = served.embedding(
        table.name, table.rows, served.client.lookup(f"qwen4_exp/{table.name}", ids).shape[1], torch.float32
    )
    before = rows(ids)
    publish(store, store.parent, "qwen4_exp@1", 4)
    until(lambda: not torch.equal(rows(ids), before), "the rows that were published")
    assert served.now() == "qwen4_exp@2"
    assert torch.equal(rows(ids)[1::2], before[1::2])
    served.client.close()


class Several(LocalTables):
    """Tables of that name, and of others with other rows. `goes`: called at a lookup, so that a name goes then.

    Those of own+nan are not finite.
    """

    goes: Callable[[str], object] | None = None

    def lookup_ngrams(
        self, model: str, token_ids: torch.Tensor, context: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        if self.goes and model == "own+bc":
            self.goes(model)
            raise NotFound(f"no {model}")
        rows = super().lookup_ngrams(model, token_ids, context, **options).roll(len(model), -1)
        # Only those of new tokens, so that the request is in the batch by then.
        return rows * torch.nan if model == "own+nan" and token_ids.shape[1] == 1 else rows


@pytest.mark.parametrize("when", ["between two steps", "within a step"])
def test_a_request_whose_tables_go_ends_alone(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast, when: str
) -> None:
    model: Any = load_model(model_folder)
    source = Several(model_folder)
    tables = worker_families.attach(model, source, "own").tables
    gone: set[str] = set()

    def resolve(name: str) -> str:
        if name in gone:
            raise NotFound(f"no {name}")
        return name

    tables.resolve = resolve
    engine = Engine(model, tokenizer, max_batch=3, tables=tables)
    try:
        alone = {name: job(engine, name).tokens() for name in ("own", "own+a", "own+bc")}
        jobs = {name: job(engine, name) for name in alone}
        assert {name: each.tokens() for name, each in jobs.items()} == alone
        assert len(set(map(tuple, alone.values()))) == 3
        stays, goes = job(engine, "own+a"), job(engine, "own+bc", tokens=1500)
        until(lambda: len(goes.request.completion) > 2, "it to run")
        if when == "within a step":
            source.goes = gone.add
        else:
            gone.add("own+bc")
        with pytest.raises(NotFound, match=r"no own\+bc"):
            goes.outcome()
        assert stays.tokens() == alone["own+a"]
        with pytest.raises(NotFound, match=r"no own\+bc"):
            job(engine, "own+bc").outcome()
    finally:
        engine.close()


def test_rows_that_are_not_finite_fail_their_request_alone(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Nor do those that come after it, to its place in the batch, meet what it left there."""
    model: Any = load_model(model_folder)
    tables = worker_families.attach(model, Several(model_folder), "own").tables
    engine = Engine(model, tokenizer, max_batch=2, tables=tables)
    try:
        alone = job(engine, "own").tokens()
        stays = Job(engine, [5, 6] * 20, greedy(1500, ignore_eos=True), "own+a")
        until(lambda: engine.running == 1, "it to run")
        with pytest.raises(FloatingPointError, match="not finite"):
            Job(engine, [7, 8, 9, 10] * 3, greedy(24), "own+nan").outcome()
        assert job(engine, "own").tokens() == alone
        assert not any(event.error or event.finish_reason for event in list(stays.events.queue))
    finally:
        engine.close()


def job(engine: Engine, name: str, tokens: int = 24) -> Job:
    return Job(engine, [7, 8, 9, 10], greedy(tokens, ignore_eos=True), name)
