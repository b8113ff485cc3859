"""Qwen4-Exp: transformers' model with its PLE tables in the service is the one with its own, bit for bit."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import VOCAB, write_tokenizer
from support.cluster import Up, serving
from test_engine import Job, greedy, prompts
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen4ExpConfig,
    Qwen4ExpForCausalLM,
    Qwen4ExpForConditionalGeneration,
    Qwen4ExpTextConfig,
)

from embedding_service import EmbeddingClient
from embedding_service.errors import InvalidRequest, NoGradients, NotFound, StoreError, Unavailable
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.split import split_checkpoint
from model_worker import attach, load_model
from model_worker.engine import Engine
from model_worker.qwen4_exp import RemoteTable
from model_worker.sampling import SamplingParams
from model_worker.worker import Worker, WorkerConfig

pytestmark = pytest.mark.slow

EOS = 2
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [2, 3],
    "ple_embed_dim": 32,
    "heads_per_ngram": 4,
    "ngram_vocab_size_base": 300,
    "split_ngram_parts": 4,
    "eos_token_id": EOS,
    "max_position_embeddings": 512,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}


def write(folder: Path, model: Any, dtype: torch.dtype) -> Path:
    """A checkpoint as transformers writes it: tables in pieces, weights in which a wrong row shows."""
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.15)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**TEXT))
    return write(tmp_path_factory.mktemp("qwen"), model, request.param)


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Two shards with the tables in the checkpoint's own dtype, in many parts."""
    home = tmp_path_factory.mktemp("qwen-store")
    import_checkpoint(folder, str(home / "store"), "qwen", dtype="keep", part_bytes=8 << 10)
    with serving(home, home / "store", 2, memory=64 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Up) -> Iterator[EmbeddingClient]:
    with EmbeddingClient(service.address, timeout=60) as connected:
        yield connected


@pytest.fixture(scope="module")
def here(folder: Path) -> Any:
    """Transformers' own model with its own tables."""
    return Qwen4ExpForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def there(folder: Path, client: EmbeddingClient) -> Any:
    loaded = load_model(folder).eval()
    attach(loaded, client, "qwen")
    return loaded


def some_ids() -> torch.Tensor:
    """Three sequences; segments end in two of them."""
    ids = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(6))
    ids[0, 5] = ids[0, 6] = ids[2, 20] = EOS
    return ids


def left_padding() -> torch.Tensor:
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[1, :9] = mask[2, :1] = 0
    return mask


# Equality


@pytest.mark.parametrize("mask", [None, left_padding()], ids=["whole", "left-padded"])
def test_prefill(here: Any, there: Any, mask: torch.Tensor | None) -> None:
    ids = some_ids()
    expected = here(ids, attention_mask=mask).logits
    assert torch.equal(there(ids, attention_mask=mask).logits, expected)
    assert not torch.equal(here(ids.flip(1), attention_mask=mask).logits, expected)


def test_chunked_prefill_and_decode_with_a_cache(here: Any, there: Any) -> None:
    ids, mask = some_ids(), left_padding()

    def in_pieces(model: Any) -> list[torch.Tensor]:
        cache, seen, logits = DynamicCache(config=model.config), 0, []
        for piece in ids.split([1, 7, 1, 1, 12, 2], 1):
            seen += piece.shape[1]
            out = model(piece, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
        return logits

    assert all(map(torch.equal, in_pieces(here), in_pieces(there)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": left_padding()},
        {"num_beams": 3},
        {"num_beams": 2, "attention_mask": left_padding()},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
        {"do_sample": True},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_generate(here: Any, there: Any, options: dict[str, Any]) -> None:
    def generate(model: Any) -> Any:
        torch.manual_seed(1)
        return model.generate(
            some_ids(),
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    expected, given = generate(here), generate(there)
    assert torch.equal(given.sequences, expected.sequences)
    assert all(map(torch.equal, given.logits, expected.logits))


def test_assisted_generation_is_refused_by_transformers_alike(here: Any, there: Any) -> None:
    """Its linear attention cannot take steps back, with tables here or there."""
    for model in (here, there):
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            model.generate(some_ids()[:1], max_new_tokens=4, pad_token_id=0, prompt_lookup_num_tokens=3)


def test_embeddings_in_place_of_ids(here: Any, there: Any) -> None:
    """The model finds the ids itself, so nothing can be asked for ahead: rows of other ids are not used."""
    there(some_ids().flip(1))
    embeds = here.model.embed_tokens(some_ids())
    assert torch.equal(there(inputs_embeds=embeds).logits, here(inputs_embeds=embeds).logits)


def test_a_loaded_model_gives_up_its_tables(folder: Path, client: EmbeddingClient, here: Any) -> None:
    """What is attached may be what from_pretrained loads, too."""
    loaded = Qwen4ExpForCausalLM.from_pretrained(folder).eval()
    attach(loaded, client, "qwen")
    assert not [name for name in loaded.state_dict() if name.endswith("ngram_embedding.weight")]
    assert torch.equal(loaded(some_ids()).logits, here(some_ids()).logits)


@pytest.mark.service
def test_the_model_with_vision(folder: Path, client: EmbeddingClient, tmp_path: Path) -> None:
    torch.manual_seed(8)
    config = Qwen4ExpConfig(text_config=TEXT, vision_config=VISION)
    whole = Qwen4ExpForConditionalGeneration(config)
    folder = write(tmp_path / "vision", whole, torch.float32)
    import_checkpoint(folder, str(tmp_path / "store"), "seeing", dtype="keep")
    with (
        serving(tmp_path, tmp_path / "store", 2, memory=64 << 20) as tables,
        EmbeddingClient(tables.address, timeout=60) as connected,
    ):
        here = Qwen4ExpForConditionalGeneration.from_pretrained(folder).eval()
        there = load_model(folder).eval()
        attach(there, connected, "seeing")
        assert isinstance(there, Qwen4ExpForConditionalGeneration)
        options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
        assert torch.equal(there(some_ids()).logits, here(some_ids()).logits)
        assert torch.equal(there.generate(some_ids(), **options), here.generate(some_ids(), **options))  # type: ignore[arg-type, misc]


# Loading


def test_tables_are_never_allocated(folder: Path, tmp_path: Path) -> None:
    """Tables of the published size (2 x 320 M rows) beside a small transformer: loading takes what the latter does."""
    shutil.copytree(folder, tmp_path / "huge")
    config = json.loads((folder / "config.json").read_text())
    config |= {"ngram_vocab_size_base": 20_000_000, "split_ngram_parts": 512}
    (tmp_path / "huge" / "config.json").write_text(json.dumps(config))
    before = psutil.Process().memory_info().rss
    loaded = load_model(tmp_path / "huge")
    assert psutil.Process().memory_info().rss - before < 200 << 20
    table = "model.layers.1.ple.ple_embedding.ngram_embedding.weight"
    assert table in dict(Qwen4ExpForCausalLM.from_pretrained(folder).named_parameters())
    assert table not in loaded.state_dict()
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    with pytest.raises(InvalidRequest, match=r"model_worker\.attach"):
        loaded(some_ids())


def test_the_dense_half_of_a_split_is_enough(folder: Path, client: EmbeddingClient, here: Any, tmp_path: Path) -> None:
    split_checkpoint(folder, tmp_path / "out")
    half = load_model(tmp_path / "out" / "dense").eval()
    attach(half, client, "qwen")
    assert torch.equal(half(some_ids()).logits, here(some_ids()).logits)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.ple.key_proj.weight"), r"1 missing tensors: .*key_proj"),
        (lambda t: t.update({"model.layers.0.extra": torch.zeros(2)}), r"1 unexpected tensors: .*layers\.0\.extra"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}), r"1 mismatched tensors: .*lm_head"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match=message):
        load_model(tmp_path / "m")


# Asking ahead


class Watched:
    """A client that counts what it is asked, and answers when told to."""

    def __init__(self, client: EmbeddingClient) -> None:
        self._client = client
        self.open = threading.Event()
        self.open.set()
        self._threads = ThreadPoolExecutor(1)
        self.ahead = self.at_once = 0
        self.broken = self.replaced = False

    def hasher(self, model: str) -> Any:
        return self._client.hasher(model)

    def lookup_ngrams(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._client.lookup_ngrams(*args, **kwargs)

    def prefetch_ngrams(self, model: str, *tokens: torch.Tensor | None, **options: Any) -> Future[torch.Tensor]:
        # Copied when asked, as the client does: what is looked up late must not be what the model made of it since.
        self.ahead += 1
        copies = [None if each is None else each.clone() for each in tokens]
        return self._threads.submit(self._late, model, *copies, **options)

    def _late(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.open.wait(180)
        if self.broken:
            raise Unavailable("no shard answers")
        if self.replaced:
            raise NotFound("another version is served by now")
        return self._client.prefetch_ngrams(*args, **kwargs).result()

    def lookup(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.at_once += 1
        return self._client.lookup(*args, **kwargs)


@pytest.fixture
def watched(folder: Path, client: EmbeddingClient) -> tuple[Any, Watched]:
    loaded, source = load_model(folder).eval(), Watched(client)
    attach(loaded, source, "qwen")
    return loaded, source


def test_rows_are_fetched_while_earlier_layers_run(watched: tuple[Any, Watched], here: Any) -> None:
    """The rows come only once the first layer has run, which therefore did not wait for them."""
    model, source = watched
    source.open.clear()
    asked_before: list[int] = []

    def first_layer_ran(*_: Any) -> None:
        asked_before.append(source.ahead)
        source.open.set()

    model.model.layers[0].register_forward_hook(first_layer_ran)
    assert torch.equal(model(some_ids()).logits, here(some_ids()).logits)
    assert asked_before == [1]
    assert (source.ahead, source.at_once) == (1, 0)


@pytest.mark.parametrize("replaced", [False, True], ids=["once", "again, as the version was replaced"])
def test_a_slow_lookup_has_the_look_back_of_its_own_step(
    watched: tuple[Any, Watched], here: Any, replaced: bool
) -> None:
    """The model updates its look-back in place: here before the lookup, which must not see that, has begun."""
    model, source = watched
    ids = some_ids()

    def in_two(model: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(ids[:, :-2], past_key_values=cache, use_cache=True)
        source.open.clear()
        return model(ids[:, -2:], past_key_values=cache, use_cache=True).logits

    table = model.model.layers[1].ple.ple_embedding.ngram_embedding
    table.register_forward_pre_hook(lambda *_: source.open.set())
    source.replaced = replaced
    assert torch.equal(in_two(model), in_two(here))
    assert source.at_once == 0


def test_one_lookup_a_step_for_all_layers(watched: tuple[Any, Watched]) -> None:
    model, source = watched
    options: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "attention_mask": left_padding()}
    model.generate(some_ids(), max_new_tokens=15, prefill_chunk_size=10, **options)
    # 24 tokens in three chunks, then one token a step, the last of which is not run.
    assert (source.ahead, source.at_once) == (3 + 14, 0)


def test_a_failed_lookup_is_told_and_leaves_the_model_usable(watched: tuple[Any, Watched], here: Any) -> None:
    model, source = watched
    source.broken = True
    with pytest.raises(Unavailable, match="no shard answers"):
        model(some_ids())
    source.broken = False
    assert torch.equal(model(some_ids()).logits, here(some_ids()).logits)


# Refusals


def test_copies_and_conversions_of_an_attached_model(there: Any, client: EmbeddingClient) -> None:
    ids = some_ids()
    expected = there(ids).logits
    twin, saved = copy.deepcopy(there), io.BytesIO()
    torch.save(there, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for copied, shares in ((twin, True), (loaded, False)):
        tables = [module for module in copied.modules() if isinstance(module, RemoteTable)]
        prefetch = tables[0].prefetch
        assert all(table.prefetch is prefetch for table in tables)
        assert (prefetch.tables.source is client) == shares
        asked = prefetch.lookups.count
        assert torch.equal(copied(ids).logits, expected)
        assert prefetch.lookups.count == asked + 1  # its own hook asked for what its own tables need
    prefetch.tables.source.close()  # type: ignore[attr-defined]
    for dtype in (torch.bfloat16, torch.float16):
        logits = twin.to(dtype)(ids).logits
        assert (logits.dtype, bool(torch.isfinite(logits).all())) == (dtype, True)


def test_compiled_rows_are_in_one_graph(there: Any, here: Any) -> None:
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    ours, theirs = (model.model.layers[1].ple.ple_embedding for model in (there, here))
    compiled = torch.compile(ours, backend=counted, fullgraph=True)
    for length in (24, 9, 13):
        ids = some_ids()[:, :length]
        assert torch.equal(compiled(ids, None), theirs(ids, None))
    assert counted.frame_count == 2  # of the first length, of any length
    torch.compiler.reset()


def test_training_fails_until_the_tables_are_frozen(folder: Path, client: EmbeddingClient) -> None:
    loaded = load_model(folder)
    attach(loaded, client, "qwen")
    with torch.enable_grad(), pytest.raises(NoGradients, match=r"RemoteTable\('qwen/.*requires_grad_\(False\)"):
        loaded(some_ids(), labels=some_ids()).loss.backward()
    tables = [module for module in loaded.modules() if isinstance(module, RemoteTable)]
    assert len(tables) == 2
    for table in tables:
        table.requires_grad_(False)
    loaded.zero_grad()
    with torch.enable_grad():
        loaded(some_ids(), labels=some_ids()).loss.backward()
    assert loaded.model.layers[1].ple.key_proj.weight.grad.count_nonzero()


def test_attach_refuses_the_wrong_model(folder: Path, client: EmbeddingClient, there: Any) -> None:
    with pytest.raises(InvalidRequest, match="attached already"):
        attach(there, client, "qwen")
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(InvalidRequest, match=r"LlamaForCausalLM.*LongcatFlashForCausalLM, Qwen4Exp"):
        attach(llama, client, "qwen")
    without = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**TEXT | {"ple_layer_ids": []}))
    with pytest.raises(InvalidRequest, match="no PLE layer"):
        attach(without, client, "qwen")
    for change in ({"seed": 7}, {"ple_layer_ids": [1, 3]}):
        with pytest.raises(InvalidRequest, match=r"'qwen'.*another model"):
            attach(Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**TEXT | change)), client, "qwen")
    with pytest.raises(InvalidRequest, match="4 values wide; this model takes 8"):
        attach(Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**TEXT | {"ple_embed_dim": 64})), client, "qwen")


# The worker


def test_the_engine_batches_it(folder: Path, here: Any, there: Any) -> None:
    """Requests of mixed lengths join and leave at different steps: their tokens are those they get alone."""
    if here.dtype != torch.float32:
        pytest.skip("in half precision who shares a batch shows in the rounding, with tables here as well")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    running = Engine(there, tokenizer, max_batch=4, max_queue=100)
    try:
        asked = [(prompt, 5 + 7 * (i % 4)) for i, prompt in enumerate(prompts(12))]
        jobs = [Job(running, prompt, greedy(tokens, ignore_eos=True)) for prompt, tokens in asked]
        together = [job.tokens() for job in jobs]
    finally:
        running.close()
    for (prompt, tokens), given in zip(asked, together, strict=True):
        options: dict[str, Any] = {
            "max_new_tokens": tokens,
            "eos_token_id": None,
            "pad_token_id": 0,
            "do_sample": False,
        }
        assert given == here.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def test_a_worker_serves_it(folder: Path, service: Up, here: Any) -> None:
    worker = Worker(WorkerConfig(folder, service.address, name="qwen", version="1"))
    try:
        worker.check()
        prompt = worker.tokenizer.encode("The import statement")

        async def generate() -> str:
            params = [SamplingParams(8, temperature=0, ignore_eos=True)]
            events = worker.generate([(prompt, each) for each in params], streamed=True).events()
            return "".join([event.text async for together in events for _, event in together])

        options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
        expected = here.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert asyncio.run(generate()) == worker.tokenizer.decode(expected, skip_special_tokens=True)
        info = worker.info()
        assert info["table_bytes"] == 0
        assert info["remote_table_values"] == sum(
            parameter.numel() for name, parameter in here.named_parameters() if "ngram_embedding" in name
        )
        assert info["lookup_wait_seconds"] > 0
    finally:
        worker.close()
