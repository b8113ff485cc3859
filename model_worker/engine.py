"""The generation engine: many requests, one batch, one step for all.

Rules
- A request joins and leaves the batch between two steps. Its prompt is run before, with other prompts that wait. Then
  its cache is joined to the batch's. What is not its own is masked in both, so a request's logits do not depend on the
  other requests in its batch, but for float rounding.
- A step gives each request one token. Where tokens are drafted, the pass runs the drafts too, and the request has all
  that it would have chosen itself, and one more. Each token is chosen from the model's own logits by the request's own
  chance. So drafts change no distribution, and with a seed no token.
- Prompts are run in chunks and in turns, a bounded number of tokens between two steps. So running requests never wait
  long for prompts, and short prompts do not wait for long ones. Where few run and many wait, the bound is higher.
- What a prompt has in common with earlier ones is not run again (`prefixes`).
- The choices of one HTTP request are requests of their own, taken all or none.
- A failed prefill ends the requests of its pass. A request that cannot join the batch ends alone. A failed step ends
  the requests of its batch. The engine goes on.
- Each request has its rows from the tables that it names. Where those are served no more, it ends alone.

transformers' continuous batching (`generate_batch`, tried with 5.23) does not fit. It lays all requests end to end in
one row, over a paged cache of keys and values of one width.
- An n-gram would look back into its neighbour's tokens, and the cache has no place for a request's own.
- LongCat's keys, wider than its values, do not fit it even without n-grams: "index_copy_(): Source/destination tensor
  must have same slice shapes".
- Qwen4-Exp's linear attention is refused: "Invalid layer type: linear_attention".
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from embedding_service import tracing
from embedding_service.errors import EmbeddingServiceError, NotFound, Unavailable
from model_worker import families
from model_worker.batch_cache import BatchCache, PaddedCache, new_cache
from model_worker.drafts import PromptDrafts, Speculate, same_width
from model_worker.ends import end_tokens
from model_worker.prefill import PromptRun, next_pass
from model_worker.prefixes import Prefixes
from model_worker.rows import Tables
from model_worker.sampling import SamplingParams, TokenLogprob, choose, log_probability
from model_worker.slot_cache import SlotCache
from model_worker.text import Spelling, TextStream

FinishReason = Literal["stop", "length"]
# Tokens of prompts that are run between two steps, and the most of one prompt in a pass.
PREFILL_TOKENS = 256
# Where more requests wait for their first token than half of those that run: up to so many times as many, and in one
# pass.
_IN_A_BURST, _IN_A_PASS = 8, 4

_log = logging.getLogger(__name__)


class EngineBusy(Exception):
    """There is no room for more: ask again later."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a request: new text, its end (finish_reason set), or its failure (error set).

    logprobs: if asked for, those of every token generated since the event before.
    """

    text: str = ""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Request:
    """One sequence to generate."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        spelling: Spelling,
        emit: Callable[[Event], None],
        tables: str | None = None,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.tables = tables
        self.emit = emit
        self.completion: list[int] = []
        """The tokens generated so far, one that ends it included."""
        self.cancelled = False
        self.text = TextStream(spelling, params.stop)
        self.generator = params.generator()
        self.submitted = time.perf_counter()
        self.span = tracing.current()
        self._logprobs: list[TokenLogprob] = []
        self._drafts: PromptDrafts | None = None
        # How many tokens to draft: as many again as were right the last time, and one.
        self._hopeful = 1

    @property
    def cached(self) -> int:
        """Positions in its KV cache: all tokens but the newest, which the next step runs."""
        return len(self.prompt) + len(self.completion) - 1

    def cancel(self) -> None:
        """Nobody waits for it any more, so it leaves before the next step. Call from any thread."""
        self.cancelled = True

    @property
    def room(self) -> int:
        """Tokens that it may have beside the next one, which needs no guess."""
        return self.params.max_tokens - len(self.completion) - 1

    def draft(self, most: int) -> list[int]:
        """Guess at most so many of the tokens after the newest."""
        if self._drafts is None:
            self._drafts = PromptDrafts([*self.prompt, *self.completion])
        return self._drafts.guess(min(most, self._hopeful, self.room))

    def check(self, draft: list[int], logits: Tensor, ends: frozenset[int]) -> tuple[bool, int]:
        """Choose tokens from float [1 + drafted, V] logits, the next one as long as the draft has the same.

        A guess is all that its draft had in mind. So that is rejection sampling: the token that is chosen from the
        model's own distribution accepts the guess or takes its place. Returns False when the request is over, and how
        many guesses were right.
        """
        right = 0
        goes_on = self.advance(logits[0], ends)
        while goes_on and right < len(draft) and self.completion[-1] == draft[right]:
            right += 1
            goes_on = self.advance(logits[right], ends)
        self._hopeful = 2 * right + 1 if draft else self._hopeful
        if self._drafts:
            for token in self.completion[-right - 1 :]:
                self._drafts.push(token)
        return goes_on, right

    def advance(self, logits: Tensor, ends: frozenset[int]) -> bool:
        """Choose the next token from float [V] logits and emit what is new. False when the request is over."""
        token = choose(logits, self.params, self.generator)
        self.completion.append(token)
        if self.params.logprobs is not None:
            self._logprobs.append(log_probability(logits, token, self.params.logprobs))
        text, reason = self._text_and_end(token, ends)
        if text or reason:
            self.emit(Event(text, reason, logprobs=tuple(self._logprobs)))
            self._logprobs.clear()
        return reason is None

    def _text_and_end(self, token: int, ends: frozenset[int]) -> tuple[str, FinishReason | None]:
        if token in ends and not self.params.ignore_eos:
            return self.text.finish(), "stop"
        text = self.text.push(token)
        if self.text.stopped:
            return text, "stop"
        if len(self.completion) == self.params.max_tokens:
            text += self.text.finish()
            return text, "stop" if self.text.stopped else "length"
        return text, None


class Engine:
    """Runs a causal language model on its own thread.

    model: a transformers model that `model_worker.attach` has fed.
    tokenizer: its tokenizer. `end_tokens` says what ends a sequence.
    max_batch: requests that run at once.
    max_queue: requests that may wait beside those.
    on_first_token: called on the engine's thread with the seconds from a request's submission to its first token.
    tables: what `attach` gave the model, where requests name their tables. None: all have the model's own.
    speculate: how tokens are drafted. prompt: as the sequence went on when its last tokens came before. mtp: by the
        model's own draft layer, and then no beginnings of prompts are kept.
    draft_tokens: the most that are drafted for a request in a step.
    prefix_bytes: of beginnings of prompts that are kept. A model whose cache cannot step back keeps none.
    Raises StoreError: the end of a sequence is no token of the model.
    InvalidRequest: the model's cache cannot step back, so drafts cannot be checked. Or it has no draft layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_batch: int = 8,
        max_queue: int = 64,
        on_first_token: Callable[[float], object] = lambda seconds: None,
        tables: Tables | None = None,
        speculate: Speculate = "off",
        draft_tokens: int = 4,
        prefix_bytes: int = 0,
    ) -> None:
        self._model = model
        self._tables = tables
        self._draft_tokens = 0 if speculate == "off" else draft_tokens
        if self._draft_tokens:
            SlotCache.check_fits(model.config)
        self._drafter = families.drafter(model) if speculate == "mtp" else None
        self._has_slots = SlotCache.fits(model.config)
        # The draft layer needs the main model's states of the whole prompt.
        keeps = prefix_bytes and self._has_slots and not self._drafter
        self._prefixes = Prefixes(model.config, prefix_bytes) if keeps else None
        self.spelling = Spelling(tokenizer)
        """What its tokens are as text."""
        self._max_batch = max_batch
        self.capacity = max_batch + max_queue
        """Requests that may run and wait at once."""
        self._on_first_token = on_first_token
        self._ends = end_tokens(model.config, model.generation_config, tokenizer)
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._joining: deque[PromptRun] = deque()
        self._running: list[Request] = []
        # Row i is the sequence of self._running[i]. None while no request runs.
        self._cache: BatchCache | None = None
        self._stopping = False
        self.requests = 0
        """Requests taken since the start."""
        self.refused = 0
        """Requests refused since the start."""
        self.prompt_tokens = 0
        """Tokens prefilled since the start."""
        self.prefix_tokens = 0
        """Tokens of prompts that were kept from others."""
        self.tokens = 0
        """Tokens generated since the start."""
        self.drafted = 0
        """Tokens guessed since the start."""
        self.accepted = 0
        """Guesses that were right."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and completion together."""
        return self._model.config.get_text_config().max_position_embeddings

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the model's tensors, those of a draft layer included."""
        tensors = self._model.state_dict().values()
        return sum(tensor.nbytes for tensor in tensors) + (self._drafter.nbytes if self._drafter else 0)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread still runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    def submit(
        self, prompt: list[int], params: SamplingParams, emit: Callable[[Event], None], tables: str | None = None
    ) -> Request:
        """Queue a request. As `submit_all`."""
        return self.submit_all([(prompt, params, emit)], tables)[0]

    def submit_all(
        self, choices: Sequence[tuple[list[int], SamplingParams, Callable[[Event], None]]], tables: str | None = None
    ) -> list[Request]:
        """Queue one request for each choice, all or none.

        choices: the prompt, how to generate, and a callback. The prompt has at least one token id, and with max_tokens
            at most `context_length`. The engine's thread calls back with each event. The last one has finish_reason or
            error set.
        tables: the model in the service that they have their rows from. None: the worker's own.
        Raises EngineBusy: there is no room for all of them.
        """
        requests = [Request(prompt, params, self.spelling, emit, tables) for prompt, params, emit in choices]
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
            if self._taken + len(requests) > self.capacity:
                self.refused += len(requests)
                raise EngineBusy(
                    f"{self._taken} requests run or wait already; this worker takes {self.capacity}, "
                    f"and this asks for {len(requests)} more"
                )
            self.requests += len(requests)
            self._waiting.extend(requests)
            self._changed.notify()
        return requests

    @property
    def _taken(self) -> int:
        return len(self._waiting) + len(self._joining) + len(self._running)

    def close(self) -> None:
        """Stop after the current step. Requests that run or wait get an error. Returns when the thread has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._work_comes():
                try:
                    self._drop([request for request in self._running if request.cancelled])
                    self._admit()
                    self._prefill()
                    self._step()
                except Exception as error:
                    # A prompt that has been run is nothing without its logits.
                    lost = [run for run in self._joining if run.is_whole]
                    self._joining = deque(run for run in self._joining if run not in lost)
                    self._fail([*self._running, *(run.request for run in lost)], error)
                    self._forget()
        joining = [prompt.request for prompt in self._joining]
        self._fail([*self._running, *joining, *self._waiting], Unavailable("the worker is shutting down"))

    def _work_comes(self) -> bool:
        """Wait until there is something to do. False when the engine is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._taken)
            return not self._stopping

    def _admit(self) -> None:
        """Give places in the batch to requests that wait."""
        with self._changed:
            while self._waiting and len(self._joining) + len(self._running) < self._max_batch:
                request = self._waiting.popleft()
                self._joining.append(PromptRun(request, "", new_cache(self._model.config), 0))

    def _prefill(self) -> None:
        """Run the next tokens of prompts, a turn's, and take requests into the batch that have theirs."""
        waiting_for_two = ceil(2 * len(self._joining) / max(2, len(self._running)))
        room = PREFILL_TOKENS * max(1, min(waiting_for_two, _IN_A_BURST))
        while self._joining:
            self._joining = deque(run for run in self._joining if not run.request.cancelled)
            self._find_beginnings()
            places, most = min(room, _IN_A_PASS * PREFILL_TOKENS), self._max_batch if self._has_slots else 1
            runs = next_pass(self._joining, places, PREFILL_TOKENS, most)
            if not runs:
                return
            room -= self._run_prompts(runs)

    def _find_beginnings(self) -> None:
        """Give prompts that are not begun what is kept of them."""
        for run in [run for run in self._joining if self._prefixes and not run.done]:
            assert self._prefixes is not None
            try:
                run.tables = self._version(run.request)
            except NotFound as error:
                self._joining.remove(run)
                self._fail([run.request], error)
                continue
            run.cache, run.done = self._prefixes.find(run.tables, run.request.prompt)
            self.prefix_tokens += run.done

    def _run_prompts(self, runs: list[PromptRun]) -> int:
        """Run prompts in one pass, at most PREFILL_TOKENS of each. Returns how many places the pass had."""
        try:
            logits, places = self._run_pass(runs)
        except Exception as error:
            if isinstance(error, NotFound) and len(runs) > 1:
                # The tables of one of them went. It must not take the others along.
                return sum(self._run_prompts([run]) for run in runs)
            for run in runs:
                self._joining.remove(run)
            self._fail([run.request for run in runs], error)
            return 0
        for run, row in zip(runs, logits, strict=True):
            if run.is_whole:
                self._first_token(run, row)
            self._joining.remove(run)
            if not run.is_whole:
                self._joining.append(run)
        return places

    def _run_pass(self, runs: list[PromptRun]) -> tuple[Tensor, int]:
        """As `_run_prompts`. Returns float32 [B, 1, V], the logits of each one's last token, too."""
        tokens = [run.request.prompt[run.done :][:PREFILL_TOKENS] for run in runs]
        cache: BatchCache
        if len(runs) == 1:
            cache = PaddedCache(runs[0].cache, self._model.device)
        else:
            cache = SlotCache(self._model.config, self._model.dtype, self._model.device)
            for run in runs:
                cache.join(run.cache)
        ends, end = torch.tensor([len(each) - 1 for each in tokens]).unique(return_inverse=True)
        logits = self._forward([run.request for run in runs], tokens, [run.done for run in runs], cache, ends)
        for row, (run, ran) in enumerate(zip(runs, tokens, strict=True)):
            run.done += len(ran)
            self.prompt_tokens += len(ran)
            if isinstance(cache, SlotCache):
                run.cache = cache.of_row(row, run.done)
            if self._drafter:
                hidden = self._drafter.hidden[row, : len(ran)]
                run.drafts = self._drafter.prefill(run.drafts, run.request.prompt, hidden)
            self._keep_beginning(run)
        return logits[torch.arange(len(runs)), end][:, None], len(runs) * max(map(len, tokens))

    def _keep_beginning(self, run: PromptRun) -> None:
        """Keep a prompt that has been run for others. If its tables were replaced, it has rows of both."""
        with suppress(NotFound):
            if self._prefixes and run.is_whole and run.tables == self._version(run.request):
                self._prefixes.put(run.tables, run.request.prompt, run.cache)

    def _first_token(self, run: PromptRun, logits: Tensor) -> None:
        """Give a request its first token from float [1, V] logits, and a place in the batch if it goes on."""
        self._on_first_token(time.perf_counter() - run.request.submitted)
        if not self._check(run.request, [], logits):
            return
        try:
            self._join(run)
        except Exception as error:
            self._keep(list(range(len(self._running))))  # some layers may have its row already
            self._fail([run.request], error)
        else:
            self._running.append(run.request)

    def _version(self, request: Request) -> str:
        """NAME@VERSION of the tables that a request's rows come from now. Raises NotFound: it has none any more."""
        return self._tables.resolve(request.tables or self._tables.name) if self._tables else ""

    def _join(self, run: PromptRun) -> None:
        config, device = self._model.config, self._model.device
        if self._drafter and run.drafts:
            self._drafter.join(run.drafts)
        if self._cache is None and not self._has_slots:
            self._cache = PaddedCache(run.cache, device)
            return
        if self._cache is None:
            self._cache = SlotCache(config, self._model.dtype, device)
        self._cache.join(run.cache)

    def _step(self) -> None:
        """Generate tokens for every running request: one, and those that were guessed right."""
        self._end_those_without_tables()
        if self._cache is None:
            return
        drafts = self._drafts()
        tokens = [[request.completion[-1], *draft] for request, draft in zip(self._running, drafts, strict=True)]
        cached = [request.cached for request in self._running]
        try:
            logits = self._forward(self._running, tokens, cached, self._cache, max(map(len, tokens)))
        except NotFound:
            # Tables went within this moment. What a cache that steps back was given does not count yet.
            if self._cache.steps_back and self._end_those_without_tables():
                return
            raise
        checked = zip(self._running, drafts, logits, strict=True)
        over = [request for request, draft, rows in checked if not self._check(request, draft, rows)]
        if self._drafter:
            pairs = zip(self._running, cached, strict=True)
            self._drafter.checked([request.cached - before for request, before in pairs])
        self._drop(over)

    def _drafts(self) -> list[list[int]]:
        """Guesses of the tokens after each request's newest."""
        if self._drafter:
            completions = [request.completion for request in self._running]
            cached = [request.cached for request in self._running]
            guesses = self._drafter.guess(completions, cached, self._draft_tokens)
            return [guess[: request.room] for guess, request in zip(guesses, self._running, strict=True)]
        if self._draft_tokens:
            return same_width([request.draft(self._draft_tokens) for request in self._running])
        return [[] for _ in self._running]

    def _check(self, request: Request, draft: list[int], logits: Tensor) -> bool:
        """Give a request its tokens from float [1 + drafted, V] logits. False when it is over."""
        before = len(request.completion)
        try:
            goes_on, right = request.check(draft, logits, self._ends)
        except Exception as error:
            self._fail([request], error)
            return False
        finally:
            self.tokens += len(request.completion) - before
        self.drafted += len(draft)
        self.accepted += right
        return goes_on

    def _end_those_without_tables(self) -> bool:
        """Requests whose tables are served no more must not fail the step of the others. Whether there were any."""
        before = len(self._running)
        for name in {request.tables for request in self._running}:
            try:
                if name and self._tables:
                    self._tables.resolve(name)
            except NotFound as error:
                gone = [request for request in self._running if request.tables == name]
                self._fail(gone, error)
                self._drop(gone)
        return len(self._running) < before

    def _drop(self, leaving: list[Request]) -> None:
        """Take requests out of the batch."""
        if not leaving or self._cache is None:
            return
        rows = list(range(len(self._running)))
        for hole in reversed(rows):
            if self._running[hole] in leaving:
                rows[hole] = rows[-1]
                rows.pop()
        self._keep(rows)

    def _keep(self, rows: list[int]) -> None:
        """Let only these rows of the batch go on, in this order."""
        self._running = [self._running[row] for row in rows]
        if not rows:
            self._forget()
            return
        assert self._cache
        longest = max(request.cached for request in self._running)
        self._cache.keep(rows, longest)
        if self._drafter:
            self._drafter.keep(rows, longest)

    def _forget(self) -> None:
        """No request runs any more."""
        self._running, self._cache = [], None
        if self._drafter:
            self._drafter.forget()

    def _fail(self, requests: list[Request], error: Exception) -> None:
        if not isinstance(error, EmbeddingServiceError):
            _log.error("%d requests failed", len(requests), exc_info=error)
        for request in requests:
            request.emit(Event(error=error))

    def _forward(
        self,
        requests: Sequence[Request],
        tokens: list[list[int]],
        cached: list[int],
        cache: BatchCache,
        told: int | Tensor,
    ) -> Tensor:
        """Run new tokens of these requests after the cached positions of each.

        told: whose logits are wanted: that many last places, or int64 [told], the places themselves.
        Returns float32 [B, told, V] on the CPU. Fewer tokens than the most are padded on the right.
        """
        counts = [len(each) for each in tokens]
        ids = torch.tensor([each + [0] * (max(counts) - len(each)) for each in tokens])
        traced = tracing.working_for("forward", (request.span for request in requests))
        with traced, self._tables.of([request.tables for request in requests]) if self._tables else nullcontext():
            output = self._model(
                input_ids=ids.to(self._model.device),
                use_cache=True,
                logits_to_keep=told,
                **cache.inputs(cached, counts),
            )
        return output.logits.float().cpu()
