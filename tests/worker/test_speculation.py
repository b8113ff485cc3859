"""Drafts change how many passes an answer takes, and nothing else."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import CONFIG, VOCAB, add_draft_layer
from test_engine import Job, greedy, prompts
from test_qwen4_exp import TEXT
from transformers import LongcatFlashForCausalLM, PreTrainedTokenizerFast, Qwen4ExpForCausalLM, Qwen4ExpTextConfig

from embedding_service.errors import InvalidRequest, StoreError
from model_worker.checkpoint import CheckpointTensors
from model_worker.drafts import PromptDrafts, same_width
from model_worker.engine import PREFILL_TOKENS, Engine, Request
from model_worker.families import attach as attach_tables
from model_worker.families import check
from model_worker.longcat import LocalTables, load_model
from model_worker.longcat_mtp import load_draft_layer
from model_worker.rows import Lookups
from model_worker.sampling import SamplingParams
from model_worker.text import Spelling

pytestmark = pytest.mark.slow

Asked = tuple[list[int], SamplingParams]


@pytest.fixture(scope="module")
def plain(model: LongcatFlashForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Engine]:
    running = Engine(model, tokenizer, max_batch=8, max_queue=1000)
    yield running
    running.close()


@pytest.fixture(scope="module")
def drafting(model: LongcatFlashForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Engine]:
    running = Engine(model, tokenizer, max_batch=8, max_queue=1000, speculate="prompt")
    yield running
    running.close()


def test_a_sequence_is_expected_to_go_on_as_before() -> None:
    drafts = PromptDrafts([7, 1, 2, 3, 9, 4, 2, 3, 5, 6])
    assert drafts.guess(4) == []
    drafts.push(2)
    assert drafts.guess(4) == []
    drafts.push(3)
    assert drafts.guess(3) == [5, 6, 2]  # the last time counts
    drafts = PromptDrafts([1, 2, 3, 8, 9, 2, 3, 5, 1, 2, 3])
    assert drafts.guess(2) == [8, 9]  # and the longest likeness before that
    assert PromptDrafts([4, 4, 4]).guess(2) == [4]


def test_at_most_half_of_the_drafted_places_are_padding() -> None:
    assert same_width([[1, 2, 3], [1, 2], [1]]) == [[1, 2, 3], [1, 2], [1]]
    assert same_width([[1, 2, 3, 4], [], [1]]) == [[1, 2], [], [1]]
    assert same_width([[1, 2, 3], [], []]) == [[], [], []]
    assert same_width([[1, 2]]) == [[1, 2]]


@pytest.fixture
def knowing(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Asked]], list[list[int]]]:
    """Runs requests without drafts, returns their tokens, and has drafts be those from then on, some of them wrong."""
    chance = random.Random(5)
    answers: dict[Any, list[int]] = {}

    def draft(request: Request, most: int) -> list[int]:
        answer = answers[tuple(request.prompt), request.params]
        begin = len(request.completion)
        wanted = answer[begin : min(begin + most, request.params.max_tokens - 1)]
        return [token if chance.random() < 0.7 else chance.randrange(3, VOCAB) for token in wanted]

    monkeypatch.setattr(Request, "draft", draft)

    def run(requests: list[Asked]) -> list[list[int]]:
        jobs = [Job(plain, *asked) for asked in requests]
        answers.update(
            {(tuple(prompt), params): job.tokens() for (prompt, params), job in zip(requests, jobs, strict=True)}
        )
        return [answers[tuple(prompt), params] for prompt, params in requests]

    return run


@pytest.mark.parametrize("chosen", [{"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_drafts_change_no_token(drafting: Engine, knowing: Any, chosen: dict[str, Any]) -> None:
    """Twenty requests in eight places: they accept different numbers of tokens, join and leave at different steps."""
    requests = [
        (prompt, SamplingParams(max_tokens=5 + 7 * (i % 4), seed=i, logprobs=2, **chosen))
        for i, prompt in enumerate(prompts(20))
    ]
    drafted, accepted = drafting.drafted, drafting.accepted
    expected = knowing(requests)
    jobs = [Job(drafting, *asked) for asked in requests]
    assert [job.tokens() for job in jobs] == expected
    assert 0 < drafting.accepted - accepted < drafting.drafted - drafted


def test_an_end_within_a_draft_ends_the_answer(plain: Engine, drafting: Engine, knowing: Any) -> None:
    ways = [SamplingParams(24, temperature=0, stop=(stop,)) for stop in ("e", "a", "th", " ")]
    requests = [(prompt, params) for prompt in prompts(2) for params in ways]
    knowing(requests)
    found, expected = ([Job(engine, *asked) for asked in requests] for engine in (drafting, plain))
    assert [job.outcome() for job in found] == [job.outcome() for job in expected]
    assert [job.request.completion for job in found] == [job.request.completion for job in expected]


@pytest.mark.parametrize("guess", range(4))
def test_with_a_draft_tokens_have_the_models_own_distribution(tokenizer: PreTrainedTokenizerFast, guess: int) -> None:
    """Pairs of tokens where the first was guessed. Chi-square against what the model says: (p, top_p, temperature)."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]).log()
    params, spelling, draws = SamplingParams(9, temperature=0.5, top_p=0.95, seed=guess), Spelling(tokenizer), 1000
    request = Request([5], params, spelling, lambda event: None)
    firsts, pairs = Counter[int](), Counter[tuple[int, ...]]()
    for _ in range(draws):
        request.completion.clear()
        assert request.check([guess], logits, frozenset())[0]
        firsts[request.completion[0]] += 1
        pairs[tuple(request.completion)] += 1
    squares = torch.tensor([16.0, 9, 4, 1])  # temperature 1/2
    squares[3] = 0  # beyond 0.95
    expected = draws * squares / squares.sum()
    seen = [(firsts[token], float(expected[token])) for token in range(3)]
    # A guess that is right is followed by a token of its own. The likeliest there are the other way around.
    seen += [(pairs[guess, 3 - token], firsts[guess] * float(expected[token]) / draws) for token in range(3)]
    assert sum(firsts[token] for token in range(4)) == draws
    assert firsts[3] == 0
    assert all(len(pair) == 1 for pair in pairs if pair[0] != guess)
    statistic = sum((count - mean) ** 2 / mean for count, mean in seen if mean)
    assert statistic < 25  # 4 degrees of freedom: by chance in one of 20,000


def answered(engine: Engine, lookups: Lookups, asked: list[list[int]], length: int) -> tuple[list[list[int]], int]:
    """What an engine answers, `length` tokens to each prompt, and in how many lookups. It is closed then."""
    before = lookups.count
    try:
        jobs = [Job(engine, prompt, greedy(length, ignore_eos=True)) for prompt in asked]
        return [job.tokens() for job in jobs], lookups.count - before
    finally:
        engine.close()


def test_a_text_that_repeats_takes_few_passes(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = load_model(model_folder)
    lookups = attach_tables(model, LocalTables(model_folder), "local")
    # Then a token depends on the one before alone, so that a text soon repeats.
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "projection" in name:
            parameter.zero_()
    found, passes = [], []
    for speculate in ("off", "prompt"):
        engine = Engine(model, tokenizer, max_batch=4, speculate=speculate)
        answers, count = answered(engine, lookups, prompts(2), 90)
        found.append(answers)
        passes.append(count)
    assert found[0] == found[1]
    assert passes[1] < 0.8 * passes[0]


def test_a_cache_that_cannot_step_back_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**TEXT))
    with pytest.raises(InvalidRequest, match="cannot step back over wrong drafts: use --speculate off"):
        Engine(model, tokenizer, speculate="prompt")


@pytest.fixture(scope="module")
def with_draft_layer(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint, and a draft layer of random values."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("mtp") / "model"))
    add_draft_layer(folder)
    return folder


def attached(folder: Path) -> tuple[Any, Lookups]:
    model: Any = load_model(folder)
    return model, attach_tables(model, LocalTables(folder), "local")


def guesses_of(model: Any, layer: Any, sequence: list[int], most: int) -> list[int]:
    """What the draft layer says by definition: from whole sequences, without a cache."""
    states = model.model(torch.tensor([sequence]), use_cache=False).last_hidden_state[:, :-1]
    tokens = sequence[1:]
    for _ in range(most):
        length = len(tokens)
        rotary = model.model.rotary_emb(states, torch.arange(length)[None])
        found = layer(torch.tensor([tokens]), states, rotary, None, None)
        states = torch.cat([states, found[:, -1:]], 1)
        tokens = [*tokens, int(model.lm_head(found[0, -1]).argmax())]
    return tokens[-most:]


def test_the_draft_layer_guesses_what_it_says_by_definition(
    with_draft_layer: Path, tokenizer: PreTrainedTokenizerFast, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch whose requests join, leave, and accept various numbers of guesses. Answers are as without it."""
    asked = [*prompts(4), prompts(1)[0] * 20, [7]]
    params = [greedy(8 + 2 * (i % 3), ignore_eos=True) for i in range(len(asked))]
    expected = [job.tokens() for job in [Job(plain, *each) for each in zip(asked, params, strict=True)]]
    model, _ = attached(with_draft_layer)
    said: list[tuple[list[int], list[int]]] = []
    chance, drafts = random.Random(3), Engine._drafts

    def partly_right(engine: Engine) -> list[list[int]]:
        """What the layer guesses is noted. Random values would seldom be right, so other guesses are checked."""
        guesses = drafts(engine)
        instead = []
        for request, guess in zip(engine._running, guesses, strict=True):
            begin, answer = len(request.completion), expected[asked.index(request.prompt)]
            said.append(([*request.prompt, *request.completion], guess))
            wanted = answer[begin : begin + len(guess)]
            instead.append([token if chance.random() < 0.7 else 5 for token in wanted])
        return instead

    monkeypatch.setattr(Engine, "_drafts", partly_right)
    engine = Engine(model, tokenizer, max_batch=3, speculate="mtp", draft_tokens=3)
    try:
        jobs = [Job(engine, *each) for each in zip(asked, params, strict=True)]
        assert [job.tokens() for job in jobs] == expected
    finally:
        engine.close()
    assert 0 < engine.accepted < engine.drafted
    layer: Any = load_draft_layer(CheckpointTensors(with_draft_layer), model.config)
    held = [*model.state_dict().values(), *layer.state_dict().values()]
    assert engine.parameter_bytes == sum(tensor.nbytes for tensor in held)
    for sequence, guess in said:
        assert guess == guesses_of(model, layer, sequence, 3)[: len(guess)]


def test_the_draft_layer_runs_a_prompt_in_chunks(with_draft_layer: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = Engine(attached(with_draft_layer)[0], tokenizer, speculate="mtp")
    layer: Any = engine._drafter._layer  # type: ignore[union-attr]
    prompt, widths = prompts(1)[0] * 100, list[int]()
    layer.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    try:
        Job(engine, prompt, greedy(2, ignore_eos=True)).tokens()
    finally:
        engine.close()
    assert sum(widths) >= len(prompt)
    assert max(widths) == PREFILL_TOKENS


def test_a_draft_layer_that_knows_is_right(
    with_draft_layer: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Both models are made to say no more than which token came last. So each guess of the layer's is right."""
    folder = Path(shutil.copytree(with_draft_layer, tmp_path / "model"))
    hidden, tensors = CONFIG["hidden_size"], load_file(folder / "draft.safetensors")
    dense = load_file(folder / "model-00001-of-00002.safetensors")
    for name, tensor in {**tensors, **dense}.items():
        if any(part in name for part in ("o_proj", "down_proj", "post_projs")):
            tensor.zero_()
        if name.endswith("norm.weight") or name.endswith(".m.weight"):
            tensor.fill_(1)
    tensors["model.mtp.embed_tokens.weight"] = dense["model.embed_tokens.weight"].clone()
    tensors["model.mtp.layers.0.eh_proj.weight"] = torch.eye(hidden, 2 * hidden)
    save_file(tensors, folder / "draft.safetensors", {"format": "pt"})
    save_file(dense, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    found, passes = [], []
    for speculate in ("off", "mtp"):
        model, lookups = attached(folder)
        engine = Engine(model, tokenizer, max_batch=4, speculate=speculate, draft_tokens=3)
        answers, count = answered(engine, lookups, prompts(3), 33)
        found.append(answers)
        passes.append(count)
    assert found[0] == found[1]
    assert engine.accepted == engine.drafted > 0
    assert passes[1] <= 3 + 3 + 8  # prompts, joins at three different steps, and four tokens a step


def test_a_draft_layer_that_is_not_there_or_not_whole_is_refused(
    model: LongcatFlashForCausalLM, model_folder: Path, with_draft_layer: Path, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="has no draft layer that this worker knows: use --speculate prompt"):
        Engine(model, tokenizer, speculate="mtp")
    folder = Path(shutil.copytree(with_draft_layer, tmp_path / "model"))
    check(folder, "mtp")
    tensors = load_file(folder / "draft.safetensors")
    tensors["model.mtp.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "draft.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match=r"1 mismatched tensors: model\.mtp\.norm\.weight"):
        Engine(attached(folder)[0], tokenizer, speculate="mtp")
