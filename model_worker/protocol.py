"""OpenAI's HTTP bodies: what a request may say, and how replies look.

A parameter this server does not have is refused by name, never ignored, unless its value changes nothing.
Source: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from model_worker.engine import FinishReason
from model_worker.sampling import SamplingParams

# Values that ask for what this server does anyway.
_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "suffix": "",
    "store": False,
    "response_format": {"type": "text"},
}
_COMPLETION_MAX_TOKENS = 16


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream tells beside the text."""

    include_usage: bool = False


class GenerationRequest(_Body):
    """What completions and chat completions have in common."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default=[], max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    max_tokens: int | None = Field(None, ge=1)

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

    def sampling(self, max_tokens: int) -> SamplingParams:
        """As the engine takes it."""
        return SamplingParams(max_tokens, self.temperature, self.top_p, self.seed, tuple(self.stop))


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt_param = "prompt"

    prompt: str | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt):
            raise ValueError("several prompts in one request are not supported: send one request for each")
        return prompt

    def wanted_tokens(self, room: int) -> int:
        """See the base class; without max_tokens 16, as OpenAI has it, or what fits."""
        return self.max_tokens or min(_COMPLETION_MAX_TOKENS, max(room, 1))


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

    def wanted_tokens(self, room: int) -> int:
        """See the base class; without a limit all that fits."""
        return self.max_completion_tokens or self.max_tokens or max(room, 1)


class Reply(ABC):
    """The bodies that answer one request."""

    prefix: ClassVar[str]

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    @abstractmethod
    def whole(self, text: str, reason: FinishReason | None, usage: dict[str, int]) -> dict[str, Any]:
        """The answer without streaming."""

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first text."""

    @abstractmethod
    def chunks(self, text: str, reason: FinishReason | None) -> list[dict[str, Any]]:
        """The chunks for new text, for the end, or for both."""

    @abstractmethod
    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, where it was asked for."""


class CompletionReply(Reply):
    """/v1/completions."""

    prefix = "cmpl"

    def whole(self, text: str, reason: FinishReason | None, usage: dict[str, int]) -> dict[str, Any]:
        """See the base class."""
        return {**self._chunk(text, reason), "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """See the base class."""
        return []

    def chunks(self, text: str, reason: FinishReason | None) -> list[dict[str, Any]]:
        """See the base class."""
        return [self._chunk(text, reason)]

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """See the base class."""
        return {**self._head, "object": "text_completion", "choices": [], "usage": usage}

    def _chunk(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": "text_completion", "choices": [choice]}


class ChatReply(Reply):
    """/v1/chat/completions."""

    prefix = "chatcmpl"

    def whole(self, text: str, reason: FinishReason | None, usage: dict[str, int]) -> dict[str, Any]:
        """See the base class."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """See the base class."""
        return [self._chunk({"role": "assistant", "content": ""}, None)]

    def chunks(self, text: str, reason: FinishReason | None) -> list[dict[str, Any]]:
        """See the base class; the end comes in a chunk of its own."""
        pieces = [self._chunk({"content": text}, None)] if text else []
        return pieces + ([self._chunk({}, reason)] if reason else [])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """See the base class."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(self, delta: dict[str, str], reason: FinishReason | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


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
