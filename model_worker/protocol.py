"""OpenAI's HTTP bodies: what a request may say, and how replies look.

A parameter this server does not have is refused by name, never ignored, unless its value changes nothing.
Source: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from model_worker.engine import Event, FinishReason
from model_worker.sampling import SamplingParams, TokenLogprob
from model_worker.text import Spelling

# Values that ask for what this server does anyway.
_NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "suffix": "",
    "store": False,
    "response_format": {"type": "text"},
}
_COMPLETION_MAX_TOKENS = 16
# The most likeliest tokens that OpenAI tells: of completions, and of chat completions.
_COMPLETION_LOGPROBS, _CHAT_LOGPROBS = 5, 20


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream tells beside the text."""

    include_usage: bool = False


class GenerationRequest(_Body):
    """What completions and chat completions have in common."""

    model: str
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default=[], max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    ignore_eos: bool = False
    """Not OpenAI's: for measuring with answers of one length, as vLLM has it."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {
            name: value
            for name, value in body.items()
            if value is not None and (name not in _NEUTRAL or value != _NEUTRAL[name])
        }

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and "" in stops:
            raise ValueError("a stop string must not be empty")
        return stops

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options need stream=true")
        return self

    prompt_param: ClassVar[str]

    def wanted_tokens(self, room: int) -> int:
        """The most tokens to generate, where the context leaves `room` of them."""
        raise NotImplementedError

    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each generated one; None to tell no log probabilities."""
        raise NotImplementedError

    def sampling(self, max_tokens: int) -> list[SamplingParams]:
        """As the engine takes it, for each choice: choice i has the seed of the request plus i."""
        seeds = [None if self.seed is None else _wrapped(self.seed + choice) for choice in range(self.n)]
        common = SamplingParams(
            max_tokens,
            self.temperature,
            self.top_p,
            stop=tuple(self.stop),
            logprobs=self.wanted_logprobs(),
            ignore_eos=self.ignore_eos,
        )
        return [replace(common, seed=seed) for seed in seeds]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt_param = "prompt"

    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=_COMPLETION_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt):
            raise ValueError("several prompts in one request are not supported: send one request for each")
        return prompt

    def wanted_tokens(self, room: int) -> int:
        """See the base class; without max_tokens 16, as OpenAI has it, or what fits."""
        return self.max_tokens or min(_COMPLETION_MAX_TOKENS, max(room, 1))

    def wanted_logprobs(self) -> int | None:
        """See the base class."""
        return self.logprobs


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        return {"role": self.role, "content": parts if isinstance(parts, str) else "".join(p.text for p in parts)}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    prompt_param = "messages"

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=_CHAT_LOGPROBS)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    def wanted_tokens(self, room: int) -> int:
        """See the base class; without a limit all that fits."""
        return self.max_completion_tokens or self.max_tokens or max(room, 1)

    def wanted_logprobs(self) -> int | None:
        """See the base class."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Choice:
    """One choice of an answer that is not streamed, put together from its events."""

    def __init__(self) -> None:
        self.text = ""
        self.reason: FinishReason | None = None
        self.logprobs: list[TokenLogprob] = []

    def add(self, event: Event) -> None:
        """The next event."""
        self.text += event.text
        self.reason = event.finish_reason
        self.logprobs.extend(event.logprobs)

    def event(self) -> Event:
        """All of it."""
        return Event(self.text, self.reason, logprobs=tuple(self.logprobs))


class Reply(ABC):
    """The bodies that answer one request.

    model: the model's id.
    spelling: what tokens are as text.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, spelling: Spelling) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._spelling = spelling

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The answer without streaming."""
        bodies = [self._whole(number, choice.event()) for number, choice in enumerate(choices)]
        return {**self._head, "object": self.kind, "choices": bodies, "usage": usage}

    def opening(self, choice: int) -> list[dict[str, Any]]:
        """The chunks before a choice's first text."""
        return []

    def chunks(self, choice: int, event: Event) -> list[dict[str, Any]]:
        """The chunks for a choice's new text, for its end, or for both."""
        return [self._chunk(body) for body in self._pieces(choice, event)]

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage}

    def _chunk(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [body]}

    @abstractmethod
    def _whole(self, choice: int, event: Event) -> dict[str, Any]:
        """A choice's object, all of it in one event."""

    @abstractmethod
    def _pieces(self, choice: int, event: Event) -> list[dict[str, Any]]:
        """A choice's objects in chunks."""


class CompletionReply(Reply):
    """/v1/completions."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, model: str, spelling: Spelling) -> None:
        super().__init__(model, spelling)
        # Characters of each choice's tokens so far.
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def _whole(self, choice: int, event: Event) -> dict[str, Any]:
        logprobs = self._logprobs(choice, event.logprobs) if event.logprobs else None
        return {"index": choice, "text": event.text, "logprobs": logprobs, "finish_reason": event.finish_reason}

    def _pieces(self, choice: int, event: Event) -> list[dict[str, Any]]:
        return [self._whole(choice, event)]

    def _logprobs(self, choice: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokens = [self._spelling.spell(each.token) for each in logprobs]
        ends = list(accumulate(map(len, tokens), initial=self._offsets[choice]))
        self._offsets[choice] = ends[-1]
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [self._top(each) for each in logprobs],
            "text_offset": ends[:-1],
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """By the tokens' texts, as OpenAI has it; of those that spell alike (parts of a character), the less likely
        ones are called token_id:N.
        """
        top: dict[str, float] = {}
        for token, value in logprob.top:
            text = self._spelling.spell(token)
            top[f"token_id:{token}" if text in top else text] = value
        return top


class ChatReply(Reply):
    """/v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, choice: int) -> list[dict[str, Any]]:
        """See the base class."""
        return [self._chunk(_delta(choice, {"role": "assistant", "content": ""}))]

    def _whole(self, choice: int, event: Event) -> dict[str, Any]:
        message = {"role": "assistant", "content": event.text, "refusal": None}
        logprobs = self._logprobs(event.logprobs)
        return {"index": choice, "message": message, "logprobs": logprobs, "finish_reason": event.finish_reason}

    def _pieces(self, choice: int, event: Event) -> list[dict[str, Any]]:
        """The end comes in a chunk of its own."""
        logprobs = self._logprobs(event.logprobs)
        pieces = [_delta(choice, {"content": event.text}, logprobs)] if event.text or logprobs else []
        return pieces + ([_delta(choice, {}, reason=event.finish_reason)] if event.finish_reason else [])

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        content = [
            {**self._entry(each.token, each.logprob), "top_logprobs": [self._entry(*pair) for pair in each.top]}
            for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        """`bytes` may be a part of a character; None for special tokens, which are no text."""
        utf8 = self._spelling.utf8(token)
        return {
            "token": self._spelling.spell(token),
            "logprob": logprob,
            "bytes": None if utf8 is None else list(utf8),
        }


def _delta(
    choice: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, reason: FinishReason | None = None
) -> dict[str, Any]:
    return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _wrapped(seed: int) -> int:
    """As a signed number of 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
