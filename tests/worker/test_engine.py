"""The engine: who shares a batch does not matter, requests join, leave and fail one by one."""

from __future__ import annotations

import asyncio
import json
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_model import VOCAB
from support.cluster import until
from transformers import (
    DynamicCache,
    GenerationConfig,
    LongcatFlashForCausalLM,
    PreTrainedTokenizerFast,
    Qwen4ExpConfig,
    Qwen4ExpTextConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMLA

from embedding_service.errors import StoreError, Unavailable
from model_worker import attach, families
from model_worker.ends import end_tokens
from model_worker.engine import PREFILL_TOKENS, Engine, EngineBusy, Event, Request
from model_worker.longcat import LocalTables, load_model
from model_worker.longcat_attention import LatentAttention
from model_worker.prefill import PromptRun, next_pass
from model_worker.prefixes import BLOCK
from model_worker.sampling import SamplingParams
from model_worker.slot_cache import SlotCache, SlotLayer
from model_worker.worker import Generation

pytestmark = pytest.mark.slow

SECONDS = 60


class Job:
    """A request to an engine, and what came of it."""

    def __init__(self, engine: Engine, prompt: list[int], params: SamplingParams, tables: str | None = None) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.request: Request = engine.submit(prompt, params, self.events.put, tables)

    def outcome(self) -> tuple[str, str | None]:
        """Wait for the end: (text, finish_reason). Raises what the request failed with."""
        text = ""
        while True:
            event = self.events.get(timeout=SECONDS)
            if event.error:
                raise event.error
            text += event.text
            if event.finish_reason:
                assert self.events.empty()
                return text, event.finish_reason

    def tokens(self) -> list[int]:
        self.outcome()
        return self.request.completion


@pytest.fixture(scope="module")
def engine(model: LongcatFlashForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Engine]:
    running = Engine(model, tokenizer, max_batch=4, max_queue=100)
    yield running
    running.close()


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def greedy(tokens: int = 24, **others: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, **others)


def without_a_cache(model: LongcatFlashForCausalLM, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens up to and with an EOS, each from the whole sequence."""
    sequence = torch.tensor([prompt])
    for _ in range(new_tokens):
        token = model(sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        sequence = torch.cat([sequence, token], dim=1)
        if token.item() == model.config.eos_token_id:
            break
    return sequence[0, len(prompt) :].tolist()


def attached(folder: Path) -> LongcatFlashForCausalLM:
    """A checkpoint's model, with its tables in this process."""
    loaded = load_model(folder)
    attach(loaded, LocalTables(folder), "local")
    return loaded


def test_the_batch_changes_nothing(engine: Engine, model: LongcatFlashForCausalLM) -> None:
    """Twelve requests of mixed lengths through four places: they join and leave at different steps."""
    requests = [(prompt, 5 + 7 * (i % 4)) for i, prompt in enumerate(prompts(12))]
    jobs = [Job(engine, prompt, greedy(tokens)) for prompt, tokens in requests]
    together = [job.tokens() for job in jobs]
    alone = [Job(engine, prompt, greedy(tokens)).tokens() for prompt, tokens in requests]
    assert together == alone
    assert together == [without_a_cache(model, prompt, tokens) for prompt, tokens in requests]


def test_sampling_with_a_seed_is_the_same_in_company(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=3)
    prompt = prompts(1)[0]
    alone = Job(engine, prompt, params).tokens()
    company = [Job(engine, other, greedy(30)) for other in prompts(3)]
    assert Job(engine, prompt, params).tokens() == alone
    assert Job(engine, prompt, SamplingParams(max_tokens=20, seed=4)).tokens() != alone
    for job in company:
        job.tokens()


def test_ends(engine: Engine, model: LongcatFlashForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = prompts(1)[0]
    job = Job(engine, prompt, greedy(16))
    text, reason = job.outcome()
    assert reason == "length"
    assert len(job.request.completion) == 16
    assert text == tokenizer.decode(job.request.completion, skip_special_tokens=True)

    stop = text[5:8]
    job = Job(engine, prompt, greedy(16, stop=(stop,)))
    assert job.outcome() == (text[: text.index(stop)], "stop")
    assert len(job.request.completion) < 16


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """The small checkpoint, to be changed."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change(file: Path, **keys: Any) -> None:
    """Change keys of a JSON file, which is made where there is none."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | keys))


def test_it_ends_where_generate_ends(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = prompts(1)[0]
    model = attached(folder)
    usual = without_a_cache(model, prompt, 16)
    # The config keeps the EOS that ends the n-grams' segments.
    change(folder / "generation_config.json", eos_token_id=[usual[9], usual[6]])
    model = attached(folder)
    end = usual.index(usual[6]) + 1
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]  # type: ignore[misc]
    assert generated.tolist() == usual[:end]
    ending = Engine(model, tokenizer)
    try:
        job = Job(ending, prompt, greedy(16))
        assert job.outcome() == (tokenizer.decode(usual[: end - 1], skip_special_tokens=True), "stop")
        assert job.request.completion == usual[:end]
        ignoring = Job(ending, prompt, greedy(16, ignore_eos=True))
        assert ignoring.outcome()[1] == "length"
        assert ignoring.request.completion == usual
    finally:
        ending.close()


def ends(config: dict[str, Any], generation: dict[str, Any], tokenizer: object) -> frozenset[int]:
    text = Qwen4ExpTextConfig(vocab_size=VOCAB, ple_layer_ids=[1], eos_token_id=2)
    return end_tokens(Qwen4ExpConfig(text_config=text.to_dict(), **config), GenerationConfig(**generation), tokenizer)


def test_every_source_of_ends_counts(model_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    assert ends({}, {}, tokenizer) == {2}
    assert ends({"eos_token_id": 5}, {"eos_token_id": 6}, tokenizer) == {2, 5, 6}
    assert ends({"eos_token_id": [5, 7]}, {"eos_token_id": [278, 6]}, tokenizer) == {2, 5, 6, 7, 278}
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(40)
    assert ends({}, {}, tokenizer) == {2, 40}
    spelled = tokenizer.convert_ids_to_tokens(41)
    with_eot = PreTrainedTokenizerFast.from_pretrained(model_folder, extra_special_tokens={"eot_token": spelled})
    assert ends({}, {}, with_eot) == {2, 41}


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", True),
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }} <|im_end|>{{ eos_token }}{% endfor %}", True),
        ("{% for m in messages %}<|im_end|>{{ m.content }}\n{% endfor %}", False),
        ("{{ raise_exception('no answers, please') }}", False),
        ("{{ messages[0].content }}", False),
    ],
)
def test_the_chat_template_tells_how_a_turn_ends(model_folder: Path, template: str, found: bool) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    tokenizer.add_tokens(["<|im"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # The tokenizer's tokens that its model does not have end nothing.
    assert end >= VOCAB
    assert ends({}, {}, tokenizer) == {2}
    text = Qwen4ExpTextConfig(vocab_size=VOCAB + 2, ple_layer_ids=[1], eos_token_id=2)
    assert end_tokens(text, GenerationConfig(), tokenizer) == ({2, end} if found else {2})


@pytest.mark.parametrize("bad", [VOCAB, -1, 2**70, True, 1.0, "</s>", [2, [3]], [None], {"id": 2}], ids=str)
def test_ends_that_are_no_tokens_are_refused(tokenizer: PreTrainedTokenizerFast, bad: object) -> None:
    with pytest.raises(StoreError, match=r"eos_token_id of generation_config\.json holds .*correct it"):
        ends({}, {"eos_token_id": bad}, tokenizer)


def test_a_cancelled_request_leaves(engine: Engine) -> None:
    expected = Job(engine, prompts(1)[0], greedy(60)).tokens()
    stays = Job(engine, prompts(1)[0], greedy(60))
    goes = Job(engine, [5, 6], greedy(1500))
    goes.events.get(timeout=SECONDS)
    goes.request.cancel()
    assert stays.tokens() == expected
    until(lambda: not engine.running, "the cancelled request to leave")
    events = list(goes.events.queue)
    assert [event for event in events if event.finish_reason or event.error] == []


def test_a_cancelled_request_never_joins(engine: Engine) -> None:
    jobs = [Job(engine, prompt, greedy(40)) for prompt in prompts(5)]
    jobs[-1].request.cancel()
    for job in jobs[:-1]:
        job.tokens()
    until(lambda: not engine.waiting, "the queue to empty")
    assert not jobs[-1].request.completion


class Gate(LocalTables):
    """Tables that answer when told to, or fail."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.open = threading.Event()
        self.open.set()
        self.fails_at: int | None = None
        """A batch of this many sequences fails."""

    def lookup_ngrams(self, model: str, token_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.open.wait(SECONDS)
        if self.fails_at == len(token_ids):
            raise Unavailable("no shard answers")
        return super().lookup_ngrams(model, token_ids, *args, **kwargs)


@pytest.fixture
def gated(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Engine, Gate]]:
    loaded, tables = load_model(model_folder), Gate(model_folder)
    attach(loaded, tables, "local")
    running = Engine(loaded, tokenizer, max_batch=2, max_queue=3)
    yield running, tables
    tables.open.set()
    running.close()


def test_a_full_queue_refuses(gated: tuple[Engine, Gate]) -> None:
    engine, tables = gated
    tables.open.clear()
    first = Job(engine, [5, 6], greedy(3))
    until(lambda: not engine.waiting, "the first to be taken up")
    others = [Job(engine, [7, 8], greedy(3)) for _ in range(4)]
    with pytest.raises(EngineBusy, match="5 requests run or wait"):
        Job(engine, [9], greedy(3))
    tables.open.set()
    assert [len(job.tokens()) for job in [first, *others]] == [3] * 5
    assert len(Job(engine, [9], greedy(3)).tokens()) == 3


def test_cancelled_requests_leave_the_queue_to_others(gated: tuple[Engine, Gate]) -> None:
    engine, tables = gated
    tables.open.clear()
    first = Job(engine, [5, 6], greedy(3))
    until(lambda: not engine.waiting, "the first to be taken up")
    for job in [Job(engine, [7, 8], greedy(3)) for _ in range(4)]:
        job.request.cancel()
    others = [Job(engine, [7, 8], greedy(3)) for _ in range(4)]
    tables.open.set()
    assert [len(job.tokens()) for job in [first, *others]] == [3] * 5


def test_a_failed_prefill_ends_one_request(gated: tuple[Engine, Gate]) -> None:
    engine, tables = gated
    expected = Job(engine, [5, 6], greedy(8)).tokens()
    tables.fails_at = 1
    with pytest.raises(Unavailable, match="no shard answers"):
        Job(engine, [5, 6], greedy(8)).outcome()
    tables.fails_at = None
    assert Job(engine, [5, 6], greedy(8)).tokens() == expected


def test_a_failed_step_ends_its_batch_and_no_more(gated: tuple[Engine, Gate]) -> None:
    engine, tables = gated
    expected = Job(engine, [5, 6], greedy(8)).tokens()
    tables.fails_at = 2
    tables.open.clear()
    jobs = [Job(engine, [5, 6], greedy(500)) for _ in range(2)]
    tables.open.set()
    for job in jobs:
        with pytest.raises(Unavailable, match="no shard answers"):
            job.outcome()
    assert engine.alive
    assert Job(engine, [5, 6], greedy(8)).tokens() == expected


def test_a_failed_join_ends_one_request(gated: tuple[Engine, Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    """One runs, and two others are run in one pass. The first of them gets no memory for its second layer."""
    engine, tables = gated
    engine._max_batch = 3
    asked, take = [([5] * length, greedy(40, ignore_eos=True)) for length in (9, 20, 21)], SlotLayer.take
    expected = [Job(engine, *each).tokens() for each in asked]

    def take_or_fail(layer: SlotLayer, row: int, other: Any) -> None:
        take(layer, row, other)
        cache: Any = engine._cache
        if other.get_seq_length() == 20 and layer is cache.layers[1]:
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(SlotLayer, "take", take_or_fail)
    runs = Job(engine, *asked[0])
    until(lambda: runs.request.completion, "the first to run")
    tables.open.clear()
    fails, joins = (Job(engine, *each) for each in asked[1:])
    tables.open.set()
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        fails.outcome()
    assert [runs.tokens(), joins.tokens()] == [expected[0], expected[2]]


def test_closing_fails_what_runs_and_waits(gated: tuple[Engine, Gate]) -> None:
    engine, tables = gated
    tables.open.clear()
    jobs = [Job(engine, [5, 6], greedy(1000)) for _ in range(3)]
    threading.Timer(0.2, tables.open.set).start()
    engine.close()
    for job in jobs:
        with pytest.raises(Unavailable, match="shutting down"):
            job.outcome()
    assert not engine.alive


class Crowded:
    """Stands for an engine that runs as many requests as make a stream pause for good. `emit`: of its one request."""

    running = 10**9

    def submit_all(
        self, choices: list[tuple[list[int], SamplingParams, Callable[[Event], None]]], tables: str | None
    ) -> list[Any]:
        [(_, _, self.emit)] = choices
        return [SimpleNamespace(completion=[], cancel=lambda: None)]


def test_what_comes_while_a_stream_pauses_goes_out_together_and_an_end_does_not_wait() -> None:
    async def use() -> None:
        engine: Any = Crowded()
        events = Generation(engine, [([5, 6], greedy(8))], streamed=True).events()
        engine.emit(Event("a"))
        assert await anext(events) == [(0, Event("a"))]
        following = asyncio.ensure_future(anext(events))
        for text in "bc":
            engine.emit(Event(text))
            for _ in range(10):
                await asyncio.sleep(0)
            assert not following.done()
        engine.emit(Event("d", "stop"))
        async with asyncio.timeout(180):
            assert await following == [(0, Event("b")), (0, Event("c")), (0, Event("d", "stop"))]
        assert [each async for each in events] == []

    asyncio.run(use())


def test_a_long_prompt_holds_nobody_up(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Requests that came after it have their answers while it is still being run, chunk by chunk."""
    loaded, tables = load_model(model_folder), Gate(model_folder)
    attach(loaded, tables, "local")
    engine = Engine(loaded, tokenizer, max_batch=4)
    try:
        [short, long] = prompts(2)
        expected = Job(engine, short, greedy(3, ignore_eos=True)).tokens()
        ended: list[str] = []

        def ask(name: str, prompt: list[int], tokens: int) -> Request:
            # The engine's thread tells, so the order is that of the answers.
            return engine.submit(prompt, greedy(tokens, ignore_eos=True), lambda event: told(name, event))

        def told(name: str, event: Event) -> None:
            if event.finish_reason:
                ended.append(name)

        tables.open.clear()
        held = ask("long", (long * 1000)[: 4 * PREFILL_TOKENS], 2)
        until(lambda: not engine.waiting, "the long prompt to be taken up")
        begun = engine.prompt_tokens
        others = [ask("short", short, 3) for _ in range(2)]
        tables.open.set()
        until(lambda: len(ended) == 3, "all answers")
        assert ended == ["short", "short", "long"]
        assert engine.prompt_tokens - begun == 4 * PREFILL_TOKENS + 2 * len(short)
        assert [each.completion for each in others] == [expected] * 2
        assert held.completion == without_a_cache(loaded, held.prompt, 2)
    finally:
        tables.open.set()
        engine.close()


def test_prompts_that_wait_are_run_in_one_pass(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of various lengths, after kept beginnings and without. Rows of all of them come with one lookup."""
    loaded, tables = load_model(model_folder), Gate(model_folder)
    lookups = families.attach(loaded, tables, "local")
    engine = Engine(loaded, tokenizer, max_batch=8, prefix_bytes=2**20)
    try:
        beginning = prompts(1)[0] * 20
        asked = [[5, 6, 7], beginning[: BLOCK + 9], [9] * 12, [*beginning[:BLOCK], 8, 9], [4] * 9]
        Job(engine, beginning[: BLOCK + 2], greedy(1)).tokens()
        tables.open.clear()
        held = Job(engine, [7], greedy(1, ignore_eos=True))
        until(lambda: not engine.waiting, "the first to be taken up")
        jobs = [Job(engine, prompt, greedy(9)) for prompt in asked]
        before = lookups.count
        tables.open.set()
        held.tokens()
        found = [job.tokens() for job in jobs]
        assert lookups.count - before == 1 + 1 + 8  # the first one's, all prompts, and the other tokens of all
        assert found == [without_a_cache(loaded, prompt, 9) for prompt in asked]
        assert engine.prefix_tokens == 2 * BLOCK
    finally:
        tables.open.set()
        engine.close()


def a_run(length: int, done: int = 0, first: int = 3) -> Any:
    request: Any = SimpleNamespace(prompt=[first] * length)
    return PromptRun(request, "", DynamicCache(), done)


def test_a_pass_has_bounded_places_and_at_most_half_are_padding() -> None:
    def lengths(*runs: PromptRun, most: int = 9) -> list[int]:
        return [run.left for run in next_pass(runs, 100, 80, most)]

    assert lengths(a_run(30), a_run(20), a_run(40), a_run(25)) == [30, 20, 25]  # 4 * 40 are too many
    assert lengths(a_run(50), a_run(60), a_run(3), a_run(50)) == [50, 3]
    assert lengths(a_run(5), a_run(40), a_run(5), a_run(30)) == [5, 40]  # 3 * 40 are too many, and 30 comes later
    assert lengths(a_run(30), a_run(1), a_run(1)) == [30, 1]  # the third one would be the most padding
    assert lengths(a_run(10), a_run(10), a_run(10), most=2) == [10, 10]
    assert lengths(a_run(500), a_run(2)) == [500]  # it is cut, and two times 80 are too many
    assert next_pass([a_run(500), a_run(2)], 79, 80, 9) == []
    alike = [a_run(BLOCK + 1, first=7) for _ in range(2)]
    assert next_pass(alike, 500, 80, 9) == alike[:1]  # the second one may find what is kept of the first
    later = [a_run(BLOCK + 9, 8, 7), a_run(BLOCK + 9, 0, 7)]
    assert next_pass(later, 500, 80, 9) == later
    assert next_pass([], 500, 80, 9) == []


def test_a_row_holds_nothing_of_the_sequence_before(model: LongcatFlashForCausalLM) -> None:
    """What the mask hides must be finite: 0 times NaN is NaN."""
    cache = SlotCache(model.config, torch.float32, torch.device("cpu"))

    def join(length: int, value: float) -> None:
        alone = DynamicCache()
        alone.layers = [DynamicLayer()]
        alone.update(torch.full((1, 1, length, 4), value), torch.full((1, 1, length, 4), value), 0)
        cache.join(alone)

    def read(cached: list[int]) -> torch.Tensor:
        cache.inputs(cached, [1] * len(cached))
        new = torch.full((len(cached), 1, 1, 4), 1.0)
        return torch.cat(cache.update(new, new, 0))

    for length, value in ((9, torch.nan), (3, 2.0), (9, torch.nan)):
        join(length, value)
    cache.keep([1], 3)
    join(4, 2.0)
    join(2, 2.0)
    assert read([3, 4, 2]).isfinite().all()
    assert read([3, 4, 9]).isfinite().all()


def test_attention_over_latents_is_that_of_transformers(model: LongcatFlashForCausalLM) -> None:
    """For rows of different lengths. Few new tokens go that way, many do not."""
    latent: Any = model.model.layers[0].self_attn[0]
    plain: Any = LongcatFlashMLA(model.config, 0)
    plain.load_state_dict(latent.state_dict())
    cached, new = [3, 11, 0], 2
    states = torch.randn(3, new, model.config.hidden_size)
    rotary = model.model.rotary_emb(states, torch.tensor(cached)[:, None] + torch.arange(new))
    config = model.config
    pasts = [torch.randn(1, 1, length, config.kv_lora_rank + config.qk_rope_head_dim) for length in cached]
    found = []
    for attention in (latent, plain):
        cache = SlotCache(config, states.dtype, states.device)
        for past in pasts:
            alone = DynamicCache()
            alone.layers = [DynamicLayer()]
            alone.update(*past.split([config.kv_lora_rank, config.qk_rope_head_dim], -1), 0)
            cache.join(alone)
        mask = cache.inputs(cached, [new] * 3)["attention_mask"]
        found.append(attention(states, rotary, mask, cache)[0])
    assert type(latent) is LatentAttention
    torch.testing.assert_close(found[0], found[1])
    assert latent._is_less_work(new)
    assert not latent._is_less_work(200)


def test_a_common_beginning_is_run_once(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = load_model(model_folder)
    tables = families.attach(model, LocalTables(model_folder), "local").tables
    # Room for four blocks or so: of each token two layers' latents, 24 values each, and its id.
    engine = Engine(model, tokenizer, max_batch=4, tables=tables, prefix_bytes=4 * BLOCK * (4 * 24 * 4 + 8) + 100)
    try:
        system = torch.randint(3, VOCAB, (2 * BLOCK + 7,), generator=torch.Generator().manual_seed(2)).tolist()
        asked = [[*system, *prompt] for prompt in prompts(4)]
        found = [Job(engine, prompt, greedy(6, ignore_eos=True)).tokens() for prompt in asked]
        # n-grams after a beginning look back into it.
        assert found == [without_a_cache(model, prompt, 6) for prompt in asked]
        assert engine.prefix_tokens == 3 * 2 * BLOCK
        assert engine.prompt_tokens == sum(map(len, asked)) - engine.prefix_tokens
        # A prompt that is all kept still has a last token to run.
        Job(engine, system[: 2 * BLOCK], greedy(2)).tokens()
        assert engine.prefix_tokens == 3 * 2 * BLOCK + BLOCK
        # Rows of other tables make other keys and values.
        Job(engine, asked[0], greedy(2), "other").tokens()
        assert engine.prefix_tokens == 3 * 2 * BLOCK + BLOCK
        # What was used least lately is forgotten: here the first tables' later block.
        Job(engine, asked[1], greedy(2), "third").tokens()
        Job(engine, asked[1], greedy(2), "third").tokens()
        assert engine.prefix_tokens == 4 * 2 * BLOCK + BLOCK
        Job(engine, asked[1], greedy(2)).tokens()
        assert engine.prefix_tokens == 4 * 2 * BLOCK + BLOCK
    finally:
        engine.close()
