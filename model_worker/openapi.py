"""The OpenAPI document of a worker: what requests may say, and how answers look, by OpenAI's names."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from model_worker.protocol import CreateChatCompletionRequest, CreateCompletionRequest, GenerationRequest
from model_worker.worker import Worker

FinishReason = Literal["stop", "length"]
_PLACE = "#/components/schemas/{model}"


class _Answer(BaseModel):
    """An object of an answer. All its fields are always there."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Error(_Answer):
    """What is wrong with a request."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorResponse(_Answer):
    """The body of every status that is no success."""

    error: Error


class CompletionUsage(_Answer):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Answer):
    """Of each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CreateCompletionResponse(_Answer):
    """The answer of /v1/completions. Streamed, each event has such a body, without `usage` but for the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class ChatCompletionTopLogprob(_Answer):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionTokenLogprob(ChatCompletionTopLogprob):
    """A token, with the likeliest ones in its place."""

    top_logprobs: list[ChatCompletionTopLogprob]


class ChatCompletionLogprobs(_Answer):
    """Of each token."""

    content: list[ChatCompletionTokenLogprob]
    refusal: None


class ChatCompletionResponseMessage(_Answer):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatCompletionChoice(_Answer):
    """One turn."""

    index: int
    message: ChatCompletionResponseMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: FinishReason


class CreateChatCompletionResponse(_Answer):
    """The answer of /v1/chat/completions. Streamed, events have chunks as OpenAI has them."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionChoice]
    usage: CompletionUsage


class Model(_Answer):
    """A model that requests may name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ListModelsResponse(_Answer):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Health(_Answer):
    """The replica can generate."""

    status: Literal["ok"]


def _refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


# Any request may be refused so.
ALWAYS = _refused(400, 408, 413, 429, 431, 500, 503)
# And with a policy so.
_KEYED = _refused(401, 403)


def answers(kind: type[BaseModel] | None, *statuses: int, keyed: bool = True) -> dict[int | str, dict[str, Any]]:
    """What a route's decorator says of its answers: the kind of a success, and further statuses."""
    found = {**ALWAYS, **(_KEYED if keyed else {}), **_refused(*statuses)}
    return {200: {"model": kind}, **found} if kind else found


# Before version 3.2 of OpenAPI the schema of a stream is that of each event.
_EVENT = {
    "type": "object",
    "description": "`data` is a chunk as OpenAI has them, in JSON. The last one is [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}


def generates(request: type[GenerationRequest], kind: type[BaseModel]) -> dict[str, Any]:
    """What the decorator of a route says that answers such requests, whole or as a stream of events."""
    reference = {"$ref": _PLACE.format(model=request.__name__)}
    success: dict[str, Any] = {"model": kind, "content": {"text/event-stream": {"schema": _EVENT}}}
    body = {"required": True, "content": {"application/json": {"schema": reference}}}
    return {
        "responses": {**answers(None, 404, 415), 200: success},
        "openapi_extra": {"requestBody": body},
    }


def describe(app: FastAPI, worker: Worker) -> None:
    """Have the application answer /openapi.json with what this worker takes."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            kinds = [(each, "validation") for each in (CreateCompletionRequest, CreateChatCompletionRequest)]
            _, found = models_json_schema(kinds, ref_template=_PLACE)  # type: ignore[arg-type]
            schemas = made["components"]["schemas"]
            schemas.update(_of_this(found["$defs"], worker))
            # FastAPI's own answer to what its models refuse. Bodies are read here.
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for path in made["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            if worker.keys:
                made["components"]["securitySchemes"] = {"ApiKeyAuth": {"type": "http", "scheme": "bearer"}}
                for path, operations in made["paths"].items():
                    for operation in operations.values():
                        operation["security"] = [{}] if path == "/healthz" else [{"ApiKeyAuth": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _of_this(schemas: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """The same with what this worker alone knows: the number of its tokens and of its places."""
    for schema in schemas.values():
        fields = schema["properties"]
        for each in fields.get("n", {}).get("anyOf", ()):
            if each["type"] == "integer":
                each["maximum"] = worker.capacity
        if "prompt" in fields:
            _bound(fields["prompt"], worker)
    return schemas


def _bound(schema: dict[str, Any], worker: Worker) -> None:
    """Of tokens, and of lists of them."""
    for each in schema.get("anyOf", ()):
        _bound(each, worker)
    items = schema.get("items")
    if items is None:
        return
    if items["type"] == "integer":
        items["maximum"], schema["maxItems"] = worker.vocab_size - 1, worker.context_length - 1
    else:
        schema["maxItems"] = worker.capacity
        _bound(items, worker)
