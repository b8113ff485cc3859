"""The HTTP side of a worker: OpenAI's paths, health and what the worker holds."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from embedding_service import tracing
from embedding_service.errors import EmbeddingServiceError, NotFound, ServiceError
from embedding_service.security.identity import Caller
from embedding_service.security.quotas import Quota
from model_worker.engine import EngineBusy
from model_worker.http_errors import RETRY_AFTER, error_body
from model_worker.http_limits import WholeBodies
from model_worker.keys import CALLER, Admission, NotAllowed, give_back, refusal, require, spend
from model_worker.openapi import (
    CreateChatCompletionResponse,
    CreateCompletionResponse,
    Health,
    ListModelsResponse,
    Model,
    answers,
    describe,
    generates,
)
from model_worker.prompts import Prompts
from model_worker.protocol import (
    BadRequest,
    ChatReply,
    Choice,
    CompletionReply,
    CreateChatCompletionRequest,
    CreateCompletionRequest,
    GenerationRequest,
    Reply,
    clipped,
    parse,
    usage_of,
)
from model_worker.sampling import SamplingParams
from model_worker.traces import Traced
from model_worker.worker import Events, Generation, Worker

_log = logging.getLogger(__name__)

# Longer bodies are read one at a time, so that short ones never wait for more than one of them.
_LONG_BODY_BYTES = 64 * 2**10
_READERS = 2

_Read = TypeVar("_Read")
# A prompt's tokens, and how to generate each of its choices.
_Sequence = tuple[list[int], list[SamplingParams]]


def build_app(worker: Worker) -> FastAPI:
    """The ASGI application around a worker."""
    app = FastAPI(title="model-worker", docs_url=None, redoc_url=None)
    app.add_middleware(WholeBodies)
    if worker.keys:
        app.add_middleware(Admission, keys=worker.keys)  # the last one that is added comes first
    if tracing.tracer is not None:
        app.add_middleware(Traced)
    for kind in (BadRequest, HTTPException, EngineBusy, NotAllowed, EmbeddingServiceError, Exception):
        app.add_exception_handler(kind, _as_response)

    read = _Readers()
    prompts = Prompts(worker.name, worker.tokenizer, worker.vocab_size, worker.context_length)

    def read_completion(raw: bytes, caller: Caller | None) -> tuple[CreateCompletionRequest, list[_Sequence]]:
        body = parse(CreateCompletionRequest, raw)
        _check_places(worker, body, len(body.prompt), caller)
        several = len(body.prompt) > 1
        told = [f"prompt[{number}]" if several else "prompt" for number in range(len(body.prompt))]
        tokens = [prompts.tokens(prompt, where) for prompt, where in zip(body.prompt, told, strict=True)]
        return body, [_sequence(worker, body, *pair) for pair in zip(tokens, told, strict=True)]

    def read_chat(raw: bytes, caller: Caller | None) -> tuple[CreateChatCompletionRequest, list[_Sequence]]:
        body = parse(CreateChatCompletionRequest, raw)
        _check_places(worker, body, 1, caller)
        return body, [_sequence(worker, body, prompts.conversation(body.messages), "the prompt")]

    @app.post("/v1/completions", **generates(CreateCompletionRequest, CreateCompletionResponse))
    async def completions(request: Request) -> Response:
        body, sequences = await read(request, read_completion)
        return await _answer(worker, body, sequences, CompletionReply(body.model, worker.spelling), _caller(request))

    @app.post("/v1/chat/completions", **generates(CreateChatCompletionRequest, CreateChatCompletionResponse))
    async def chat_completions(request: Request) -> Response:
        body, sequences = await read(request, read_chat)
        return await _answer(worker, body, sequences, ChatReply(body.model, worker.spelling), _caller(request))

    @app.get("/v1/models", responses=answers(ListModelsResponse))
    async def models(request: Request) -> dict[str, Any]:
        require(_caller(request), ("read",), "use models")
        names = await asyncio.to_thread(_names, worker, _caller(request))
        return {"object": "list", "data": [_model_card(worker, name) for name in names]}

    @app.get("/v1/models/{name:path}", responses=answers(Model, 404))
    async def model(name: str, request: Request) -> dict[str, Any]:
        await asyncio.to_thread(_check_name, worker, name, _caller(request))
        return _model_card(worker, name)

    @app.get("/v1/worker", responses=answers(None))
    async def info(request: Request) -> dict[str, Any]:
        require(_caller(request), ("admin", "metrics"), "see what this replica does")
        return await asyncio.to_thread(worker.info)

    @app.get("/healthz", responses=answers(Health, keyed=False))
    async def healthz() -> dict[str, str]:
        await asyncio.to_thread(worker.check)
        return {"status": "ok"}

    describe(app, worker)
    return app


class _Readers:
    """Reads bodies on threads of its own, because parsing and tokenizing take long."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(_READERS, "short-bodies")
        self._long = ThreadPoolExecutor(1, "long-bodies")

    async def __call__(self, request: Request, read: Callable[[bytes, Caller | None], _Read]) -> _Read:
        """The result of `read` for the body. Raises BadRequest if the body is not JSON, and what `read` raises."""
        _check_content_type(request)
        raw = await request.body()
        threads = self._long if len(raw) > _LONG_BODY_BYTES else self._short
        return await asyncio.get_running_loop().run_in_executor(threads, read, raw, _caller(request))


def _caller(request: Request) -> Caller | None:
    """Whose a request is. None where there is no policy."""
    found: Caller | None = request.scope.get(CALLER)
    return found


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        # A browser sends other types to any site that a page names, and does not ask that site first.
        raise BadRequest(
            f"the body's type is {clipped(given) if given else 'not told'}, and must be JSON: send the header "
            "Content-Type: application/json (curl: -H 'Content-Type: application/json')",
            None,
            "unsupported_media_type",
            415,
        )
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        told = f"the body is compressed ({clipped(coding)}), which this server does not read: send it as it is"
        raise BadRequest(told, None, "unsupported_media_type", 415)


def _check_places(worker: Worker, body: GenerationRequest, prompts: int, caller: Caller | None) -> None:
    """Refuse, before any work, a request with more choices than there are places."""
    _check_name(worker, body.model, caller)
    if body.n * prompts > worker.capacity:
        told = f"{body.n}" if prompts == 1 else f"{prompts} prompts of {body.n} each"
        raise BadRequest(
            f"this server takes at most {worker.capacity} choices at once, not {told}",
            "n" if body.n > worker.capacity or prompts == 1 else body.prompt_param,
        )


def _sequence(worker: Worker, body: GenerationRequest, prompt: list[int], where: str) -> _Sequence:
    room = worker.context_length - len(prompt)
    max_tokens = body.wanted_tokens(room)
    if not prompt:
        raise BadRequest(f"{where} holds no token: give at least one", body.prompt_param)
    if max_tokens > room:
        raise BadRequest(
            f"{where} has {len(prompt)} tokens and {max_tokens} are to follow, but the model's context is "
            f"{worker.context_length}: shorten it or ask for fewer tokens",
            "max_tokens" if room > 0 else body.prompt_param,
            "context_length_exceeded",
        )
    return prompt, body.sampling(max_tokens)


async def _answer(
    worker: Worker, body: GenerationRequest, sequences: list[_Sequence], reply: Reply, caller: Caller | None
) -> Response:
    prompt_tokens = sum(len(prompt) for prompt, _ in sequences)
    spend(caller, prompt_tokens)
    # Choices are numbered across the prompts, those of the first prompt first.
    wanted = [(prompt, params) for prompt, choices in sequences for params in choices]
    try:
        generation = worker.generate(wanted, streamed=body.stream, tables=body.model)
    except EngineBusy:
        give_back(caller, prompt_tokens)
        raise
    events = _owed(generation, caller.quota) if caller and caller.quota else generation.events()
    # Until the first event no status is sent. So a failure before it can still have its own status.
    first = await anext(events)

    def usage() -> dict[str, int]:
        return usage_of(prompt_tokens, generation.completion_tokens)

    if body.stream:
        told = usage if body.stream_options.include_usage else None
        stream = _server_sent_events(_chained(first, events), reply, len(wanted), told)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    choices = [Choice() for _ in wanted]
    async for together in _chained(first, events):
        for choice, event in together:
            choices[choice].add(event)
    return JSONResponse(reply.whole(choices, usage()))


async def _owed(generation: Generation, quota: Quota) -> AsyncGenerator[Events]:
    """A generation's events. What was generated by the end is taken from the quota."""
    try:
        async with aclosing(generation.events()) as events:
            async for together in events:
                yield together
    finally:
        quota.owe(generation.completion_tokens)


async def _chained(first: Events, rest: AsyncGenerator[Events]) -> AsyncGenerator[Events]:
    async with aclosing(rest):
        yield first
        async for together in rest:
            yield together


async def _server_sent_events(
    events: AsyncGenerator[Events], reply: Reply, choices: int, usage: Callable[[], dict[str, int]] | None
) -> AsyncGenerator[str]:
    async with aclosing(events):
        try:
            for choice in range(choices):
                for chunk in reply.opening(choice):
                    yield _data(chunk)
            async for together in events:
                chunks = [chunk for choice, event in together for chunk in reply.chunks(choice, event)]
                yield "".join(map(_data, chunks))
        except Exception as error:
            # The status is long sent. Clients find the error in the stream.
            yield _data(_status_and_body(error)[1])
            return
    if usage:
        yield _data(reply.usage(usage()))
    yield "data: [DONE]\n\n"


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _names(worker: Worker, caller: Caller | None) -> list[str]:
    """The models that requests of this caller may name."""
    return [name for name in worker.domains.names() if _may_use(worker, name, caller)]


def _may_use(worker: Worker, name: str, caller: Caller | None) -> bool:
    if caller is None:
        return True
    try:
        model, _, version = worker.domains.resolve(name).partition("@")
    except NotFound:  # it went a moment ago
        return False
    return caller.may_read(model, version)


def _check_name(worker: Worker, name: str, caller: Caller | None) -> None:
    """Refuse a model that is not served. One that the caller may not use looks like that, too.

    Asks the embedding service where only that knows.
    """
    require(caller, ("read",), "use models")
    if not (worker.domains.has(name) and _may_use(worker, name, caller)):
        may = _may_use(worker, worker.name, caller)
        serves = f"this server serves {worker.name!r}, and GET /v1/models lists those for domains"
        if caller is None and name.startswith(f"{worker.name}+") and (why := worker.domains.of_another(name)):
            serves = why
        raise BadRequest(
            f"the model {clipped(name)} does not exist: "
            f"{serves if may else 'this server has none that your key may use'}",
            "model",
            "model_not_found",
            404,
        )


def _model_card(worker: Worker, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": worker.started,
        "owned_by": "model-worker",
        "max_model_len": worker.context_length,
    }


async def _as_response(request: Request, error: Exception) -> Response:
    if isinstance(error, NotAllowed):
        return refusal(error.why)
    status, body = _status_and_body(error)
    headers = getattr(error, "headers", None)  # as Allow of a method that a path does not have
    return JSONResponse(body, status, headers=RETRY_AFTER if status in (429, 503) else headers)


def _status_and_body(error: Exception) -> tuple[int, dict[str, Any]]:
    match error:
        case BadRequest():
            return error.status, error_body(str(error), "invalid_request_error", error.code, error.param)
        case HTTPException():
            return error.status_code, error_body(str(error.detail), "invalid_request_error")
        case NotFound():
            told = f"the model's tables are served no more: {error}"
            return 404, error_body(told, "invalid_request_error", "model_not_found", "model")
        case EngineBusy():
            return 429, error_body(f"{error}; try again later", "rate_limit_error", "server_busy")
        case ServiceError():
            return 503, error_body(
                f"the embedding service does not answer: {error}; try again later", "server_error", "unavailable"
            )
    _log.error("a request failed", exc_info=error)
    return 500, error_body(f"{type(error).__name__}: {error}", "server_error", "internal_error")
