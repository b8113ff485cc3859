"""OpenAI's HTTP bodies: what a request may say, and how replies look.

A parameter that this server does not have is refused by name. It is ignored only if its value changes nothing.
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
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, from_json

from model_worker.engine import Event, FinishReason
from model_worker.sampling import SamplingParams, TokenLogprob
from model_worker.text import Spelling

# Of a request, each with its choices.
Prompt = str | list[Any]

_COMPLETION_MAX_TOKENS = 16
# The most likeliest tokens that OpenAI tells, for completions and for chat completions.
_COMPLETION_LOGPROBS, _CHAT_LOGPROBS = 5, 20
# No honest request has more, and each costs time.
_MOST_FIELDS, _MOST_MESSAGES, _MOST_PARTS, _MOST_STOP_CHARACTERS = 100, 4096, 1024, 1024
_CLIPPED = 200
# A parser makes an object of each and holds Python's lock. 8 MiB of them take a second.
_MOST_BRACKETS, _MOST_COMMAS = 2**18, 2**21
# JSON's name for each Python type.
_JSON: dict[type, str] = {
    int: "a number",
    float: "a number",
    bool: "a truth value",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}

# What clients send by default, or for a server's own books. It changes nothing in the answer.
_ANYTHING = object()
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's.
    "best_of": (1,),
    "echo": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "suffix": ("",),
    "store": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "user": (_ANYTHING,),
    "safety_identifier": (_ANYTHING,),
    "metadata": (_ANYTHING,),
    "prompt_cache_key": (_ANYTHING,),
    "prompt_cache_options": (_ANYTHING,),
    "prompt_cache_retention": (_ANYTHING,),
    # vLLM's.
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "include_stop_str_in_output": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
    "chat_template_kwargs": ({},),
    "priority": (0,),
    "request_id": (_ANYTHING,),
    "cache_salt": (_ANYTHING,),
}


class BadRequest(Exception):
    """The request cannot be answered. The message tells what to change."""

    def __init__(self, message: str, param: str | None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class _Body(BaseModel):
    """An object of a request. A null, or another value that changes nothing, counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if len(body) > _MOST_FIELDS:
            raise ValueError(f"{len(body)} fields are more than there are: leave out what is not OpenAI's")
        return {
            name: value
            for name, value in body.items()
            if value is not None and not any(_same(value, neutral) for neutral in cls.neutral.get(name, ()))
        }

    # What no field's own schema says.
    rules: ClassVar[dict[str, Any]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """For the OpenAPI document: with nulls, and with the values that change nothing."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        fields, required = schema["properties"], schema.get("required", ())
        for name in fields:
            if name not in required:
                fields[name] = _either(fields[name], {"type": "null"})
        for name, values in cls.neutral.items():
            taken = {} if _ANYTHING in values else {"enum": [*values, None]}
            fields[name] = _either(fields[name], taken) if name in fields else taken
        schema |= {"maxProperties": _MOST_FIELDS, "additionalProperties": {"type": "null"}, **cls.rules}
        return reference


def _either(*schemas: dict[str, Any]) -> dict[str, Any]:
    """Any of these. What is the default stays beside them."""
    first, *others = schemas
    about: dict[str, Any] = {name: first[name] for name in ("default", "title") if name in first}
    alone = {name: value for name, value in first.items() if name not in about}
    known = alone.get("anyOf", [alone]) if alone.keys() <= {"anyOf"} else [alone]
    return {**about, "anyOf": [*known, *(each for each in others if each not in known)]}


def _same(value: Any, neutral: Any) -> bool:
    return neutral is _ANYTHING or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool))


def shortened(text: str) -> str:
    """Not too long for a message."""
    return text if len(text) <= _CLIPPED else f"{text[:_CLIPPED]}..."


def clipped(value: object) -> str:
    """The value as Python writes it, not too long for a message."""
    if isinstance(value, str):
        return repr(shortened(value))
    return shortened(repr(value)) if isinstance(value, int | float) else _JSON[type(value)]


def whole(number: Any) -> Any:
    """1.0 is 1, as JSON Schema has it. Anything else stays what it is."""
    return int(number) if type(number) is float and number.is_integer() else number


_WHOLE = BeforeValidator(whole)


class ChatCompletionStreamOptions(_Body):
    """What a stream tells beside the text."""

    neutral = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


_STOP = {"type": "string", "minLength": 1, "maxLength": _MOST_STOP_CHARACTERS}
_MOST_STOPS = 4
_STOPS = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": _MOST_STOPS}]}


def _if_then(field: str, value: dict[str, Any], other: str) -> dict[str, Any]:
    """A rule of JSON Schema: where a field is such, another one is true."""
    condition = {"properties": {field: value}, "required": [field]}
    return {"if": condition, "then": {"properties": {other: {"const": True}}, "required": [other]}}


_USAGE_OF_STREAMS = _if_then(
    "stream_options",
    {"type": "object", "properties": {"include_usage": {"const": True}}, "required": ["include_usage"]},
    "stream",
)


class GenerationRequest(_Body):
    """What completions and chat completions have in common."""

    neutral = _NEUTRAL
    rules: ClassVar[dict[str, Any]] = {"allOf": [_USAGE_OF_STREAMS]}

    model: str
    n: Annotated[int, Field(ge=1), _WHOLE] = 1
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), _WHOLE] | None = None
    stop: Annotated[list[str], FailFast(), WithJsonSchema(_STOPS)] = Field(default=[], max_length=_MOST_STOPS)
    stream: bool = False
    stream_options: ChatCompletionStreamOptions = ChatCompletionStreamOptions()
    max_tokens: Annotated[int, Field(ge=1), _WHOLE] | None = None
    ignore_eos: bool = False
    """vLLM's, not OpenAI's. It makes answers of one length, for measuring."""

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and "" in stops:
            raise ValueError("a stop string must not be empty")
        if isinstance(stops, list) and any(
            len(each) > _MOST_STOP_CHARACTERS for each in stops if isinstance(each, str)
        ):
            raise ValueError(f"a stop string may have {_MOST_STOP_CHARACTERS} characters: give the beginning of it")
        return stops

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options need stream=true")
        return self

    prompt_param: ClassVar[str]

    def wanted_tokens(self, room: int) -> int:
        """The most tokens to generate, if the context leaves `room` of them."""
        raise NotImplementedError

    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each generated one. None tells no log probabilities."""
        raise NotImplementedError

    def sampling(self, max_tokens: int) -> list[SamplingParams]:
        """Parameters for the engine, for each choice. Choice i has the request's seed plus i."""
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


def _prompts(given: Any) -> list[Prompt]:
    """One prompt or several, as a list. Ids in lists of ids are not checked here, because there may be millions."""
    kinds = set(map(type, given)) if isinstance(given, list) else {type(given)}
    if kinds == {str} or kinds == {list}:
        return [given] if isinstance(given, str) else given
    if isinstance(given, list) and kinds <= {int, float}:
        numbers = given if kinds <= {int} else [whole(each) for each in given]
        if set(map(type, numbers)) <= {int}:
            return [numbers]
    told = " and ".join(sorted({_JSON[kind] for kind in kinds}))
    raise ValueError(
        "give a text, a list of token ids, a list of texts, or a list of lists of token ids, "
        f"not {'a list with ' if isinstance(given, list) else ''}{told}"
    )


# Without the model's number of tokens, which a worker knows.
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_PROMPTS = {"anyOf": [_TEXT, _TOKENS, *({"type": "array", "items": each, "minItems": 1} for each in (_TEXT, _TOKENS))]}


class CreateCompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt_param = "prompt"

    neutral = {**_NEUTRAL, "logprobs": (False,)}

    prompt: Annotated[list[Prompt], PlainValidator(_prompts), WithJsonSchema(_PROMPTS)]
    logprobs: Annotated[int, Field(ge=0, le=_COMPLETION_LOGPROBS), _WHOLE] | None = None

    def wanted_tokens(self, room: int) -> int:
        """See the base class. Without max_tokens it is 16, as OpenAI has it, or what fits."""
        return self.max_tokens or min(_COMPLETION_MAX_TOKENS, max(room, 1))

    def wanted_logprobs(self) -> int | None:
        """See the base class."""
        return self.logprobs


class ChatCompletionRequestMessageContentPartText(_Body):
    """A piece of a message."""

    neutral = {"annotations": ([],)}

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _text_alone(cls, kind: Any) -> Any:
        if kind != "text":
            raise ValueError(f"parts of type {clipped(kind)} are not supported: this server reads text alone")
        return kind


class _OrText:
    """For the OpenAPI document: a text may stand in a list's place."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _either(handler(core), {"type": "string"})


class ChatCompletionRequestMessage(_Body):
    """One turn of a conversation."""

    neutral = {"annotations": ([],), "tool_calls": ([],), "refusal": ("",), "reasoning": ("",)}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ChatCompletionRequestMessageContentPartText], FailFast(), Field(max_length=_MOST_PARTS), _OrText()
    ]
    name: str | None = None
    reasoning_content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _content_as_parts(cls, content: Any) -> Any:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise ValueError("give a text, or a list of parts of type 'text'")
        return content

    def for_template(self) -> dict[str, str]:
        """The message for chat templates. Each template decides what it makes of a name or a reasoning."""
        told = {"role": self.role, "content": "".join(part.text for part in self.content)}
        return told | self.model_dump(include={"name", "reasoning_content"}, exclude_none=True)


class CreateChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    prompt_param = "messages"
    rules: ClassVar[dict[str, Any]] = {
        "allOf": [_USAGE_OF_STREAMS, _if_then("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs")]
    }

    messages: Annotated[list[ChatCompletionRequestMessage], FailFast(), Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1), _WHOLE] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_CHAT_LOGPROBS), _WHOLE] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> CreateChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    def wanted_tokens(self, room: int) -> int:
        """See the base class. Without a limit it is all that fits."""
        return self.max_completion_tokens or self.max_tokens or max(room, 1)

    def wanted_logprobs(self) -> int | None:
        """See the base class."""
        return (self.top_logprobs or 0) if self.logprobs else None


_Request = TypeVar("_Request", bound=GenerationRequest)


def parse(kind: type[_Request], body: bytes) -> _Request:
    """A request from its HTTP body. Raises BadRequest, which names the first fault."""
    if body.count(b"[") + body.count(b"{") > _MOST_BRACKETS or body.count(b",") > _MOST_COMMAS:
        told = f"{_MOST_BRACKETS} brackets or {_MOST_COMMAS} commas, the most this server takes: send less at once"
        raise BadRequest(f"the body holds more than {told}", None, "json_too_large")
    try:
        read = from_json(body)
    except ValueError as error:
        raise BadRequest(f"the body is no valid JSON: {_json_error(body, str(error))}", None, "json_invalid") from error
    if not isinstance(read, dict):
        raise BadRequest(
            f'the body must be one JSON object, as {{"model": ...}}, and is {_JSON[type(read)]}', None, "json_type"
        )
    try:
        return kind.model_validate(read)
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False, include_context=False, include_input=False)
        raise _bad_parameter(first["type"], first["loc"], first["msg"]) from error


def _json_error(body: bytes, told: str) -> str:
    if not body.strip():
        return "it is empty"
    if "hex escape" in told:
        return f"{told}; half of a surrogate pair, as \\ud83d alone, is no character"
    if "unicode code point" in told:
        return f"{told}; it must be UTF-8"
    return told


def _bad_parameter(kind: str, location: tuple[int | str, ...], told: str) -> BadRequest:
    place = shortened(".".join(map(str, location)))
    message = told.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        message = f"{place} is not supported by this server: leave it out"
    elif kind == "missing":
        message = f"{place} is missing, or null: give it"
    elif place:
        message = f"{place}: {message}"
    return BadRequest(message, shortened(str(location[0])) if location else None, kind)


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
        """The last chunk, if it was asked for."""
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
        """Log probabilities by the tokens' texts, as OpenAI has it.

        If tokens have one text (parts of a character), the less likely ones are called token_id:N.
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
        """`bytes` may be a part of a character. It is None for special tokens, which are no text."""
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
    """The seed as a signed number of 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
