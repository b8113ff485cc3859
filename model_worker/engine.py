"""The generation engine: many requests, one batch, one token for each in a step.

Rules
- A request joins and leaves the batch between two steps. It is prefilled alone, without padding. Then its cache is
  joined to the batch's, left-padded to the longest. Padding is masked, so a request's logits do not depend on the other
  requests in its batch, but for float rounding.
- At most one request joins in a step. So running requests never wait for more than one prompt.
- The choices of one HTTP request are requests of their own, taken all or none.
- A failed prefill ends its request. A failed step ends the requests of its batch. The engine goes on.
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
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from embedding_service.errors import EmbeddingServiceError, NotFound, Unavailable
from model_worker.batch_cache import join, keep, new_cache
from model_worker.ends import end_tokens
from model_worker.rows import Tables
from model_worker.sampling import SamplingParams, TokenLogprob, choose, log_probability
from model_worker.text import Spelling, TextStream

FinishReason = Literal["stop", "length"]

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
        self._logprobs: list[TokenLogprob] = []

    @property
    def cached(self) -> int:
        """Positions in its KV cache: all tokens but the newest, which the next step runs."""
        return len(self.prompt) + len(self.completion) - 1

    def cancel(self) -> None:
        """Nobody waits for it any more, so it leaves before the next step. Call from any thread."""
        self.cancelled = True

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
    Raises StoreError: the end of a sequence is no token of the model.
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
    ) -> None:
        self._model = model
        self._tables = tables
        self.spelling = Spelling(tokenizer)
        """What its tokens are as text."""
        self._max_batch = max_batch
        self.capacity = max_batch + max_queue
        """Requests that may run and wait at once."""
        self._on_first_token = on_first_token
        self._ends = end_tokens(model.config, model.generation_config, tokenizer)
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._joining = 0
        self._running: list[Request] = []
        # Row i is the sequence of self._running[i]. None while no request runs.
        self._cache: DynamicCache | None = None
        self._stopping = False
        self.requests = 0
        """Requests taken since the start."""
        self.refused = 0
        """Requests refused since the start."""
        self.prompt_tokens = 0
        """Tokens prefilled since the start."""
        self.tokens = 0
        """Tokens generated since the start."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and completion together."""
        return self._model.config.get_text_config().max_position_embeddings

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
        return len(self._waiting) + self._joining + len(self._running)

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
                    self._step()
                except Exception as error:
                    self._fail(self._running, error)
                    self._running, self._cache = [], None
        self._fail([*self._running, *self._waiting], Unavailable("the worker is shutting down"))

    def _work_comes(self) -> bool:
        """Wait until there is something to do. False when the engine is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._running)
            return not self._stopping

    def _admit(self) -> None:
        """Prefill the next waiting request and take it into the batch, if there is one and a place for it."""
        with self._changed:
            if not self._waiting or len(self._running) >= self._max_batch:
                return
            request = self._waiting.popleft()
            self._joining = 1
        try:
            if not request.cancelled:
                self._prefill(request)
        finally:
            self._joining = 0

    def _prefill(self, request: Request) -> None:
        cache = new_cache(self._model.config)
        try:
            logits = self._forward([request], [request.prompt], [0], cache)
        except Exception as error:
            self._fail([request], error)
            return
        self.prompt_tokens += len(request.prompt)
        self._on_first_token(time.perf_counter() - request.submitted)
        if self._advance(request, logits[0]):
            self._running.append(request)
            self._cache = join(self._cache, cache)

    def _step(self) -> None:
        """Generate one token for every running request."""
        self._end_those_without_tables()
        if self._cache is None:
            return
        newest = [request.completion[-1:] for request in self._running]
        logits = self._forward(self._running, newest, [request.cached for request in self._running], self._cache)
        pairs = zip(self._running, logits, strict=True)
        self._drop([request for request, row in pairs if not self._advance(request, row)])

    def _end_those_without_tables(self) -> None:
        """Requests whose tables are served no more must not fail the step of the others."""
        for name in {request.tables for request in self._running}:
            try:
                if name and self._tables:
                    self._tables.resolve(name)
            except NotFound as error:
                gone = [request for request in self._running if request.tables == name]
                self._fail(gone, error)
                self._drop(gone)

    def _advance(self, request: Request, logits: Tensor) -> bool:
        self.tokens += 1
        try:
            return request.advance(logits, self._ends)
        except Exception as error:
            self._fail([request], error)
            return False

    def _drop(self, leaving: list[Request]) -> None:
        """Take requests out of the batch."""
        if not leaving or self._cache is None:
            return
        staying = [row for row, request in enumerate(self._running) if request not in leaving]
        self._running = [self._running[row] for row in staying]
        if staying:
            keep(self._cache, staying, max(request.cached for request in self._running))
        else:
            self._cache = None

    def _fail(self, requests: list[Request], error: Exception) -> None:
        if not isinstance(error, EmbeddingServiceError):
            _log.error("%d requests failed", len(requests), exc_info=error)
        for request in requests:
            request.emit(Event(error=error))

    def _forward(
        self, requests: Sequence[Request], tokens: list[list[int]], cached: list[int], cache: DynamicCache
    ) -> Tensor:
        """Run [B, S] tokens of these requests after the cached positions of each.

        Returns float32 [B, V], the logits of the last token, on the CPU.
        cached: positions of each sequence in the cache. Its rows are left-padded to the longest.
        """
        new, device = len(tokens[0]), self._model.device
        before = torch.tensor(cached)[:, None]
        width = int(before.max())
        mask = torch.arange(width + new) >= width - before
        with self._tables.of([request.tables for request in requests]) if self._tables else nullcontext():
            output = self._model(
                input_ids=torch.tensor(tokens).to(device),
                attention_mask=mask.long().to(device),
                position_ids=(before + torch.arange(new)).to(device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float().cpu()
