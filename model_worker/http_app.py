"""The HTTP side of a worker: OpenAI's paths, health and what the worker holds."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedding_service.errors import EmbeddingServiceError, ServiceError
from model_worker.engine import EngineBusy
from model_worker.protocol import (
    ChatReply,
    ChatRequest,
    Choice,
    CompletionReply,
    CompletionRequest,
    GenerationRequest,
    Reply,
    error_body,
    usage_of,
)
from model_worker.worker import Events, Generation, Worker

_log = logging.getLogger(__name__)
# Seconds after which a refused request may well succeed.
_RETRY_AFTER = {"Retry-After": "1"}


# A prompt of a million tokens is about half of this.
MAX_BODY_BYTES = 8 * 2**20


class BadRequest(Exception):
    """The request cannot be answered; the message tells what to change."""

    def __init__(self, message: str, param: str | None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def build_app(worker: Worker) -> FastAPI:
    """The ASGI application around a worker."""
    app = FastAPI(title="model-worker", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)
    for kind in (BadRequest, RequestValidationError, HTTPException, EngineBusy, EmbeddingServiceError, Exception):
        app.add_exception_handler(kind, _as_response)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        _check_model(worker, body)
        prompt = await asyncio.to_thread(_prompt_tokens, worker, body.prompt)
        return await _answer(worker, body, prompt, CompletionReply(worker.name, worker.spelling))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest) -> Response:
        _check_model(worker, body)
        prompt = await asyncio.to_thread(_chat_tokens, worker, body)
        return await _answer(worker, body, prompt, ChatReply(worker.name, worker.spelling))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(worker)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(worker, name)
        return _model_card(worker)

    @app.get("/v1/worker")
    async def info() -> dict[str, Any]:
        return worker.info()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        await asyncio.to_thread(worker.check)
        return {"status": "ok"}

    return app


class BodyLimit:
    """Refuses bodies over MAX_BODY_BYTES with 413: at once where their length is told, else as soon as it is seen."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise _too_large()
            return message

        if scope["type"] == "http" and _told_length(scope) > MAX_BODY_BYTES:
            await JSONResponse(_status_and_body(_too_large())[1], 413)(scope, receive, send)
        else:
            await self._app(scope, receive_counted, send)


def _told_length(scope: Scope) -> int:
    told = Headers(scope=scope).get("content-length", "")
    return int(told) if told.isdecimal() else 0


def _too_large() -> HTTPException:
    # FastAPI lets no other kind through while it reads a body.
    return HTTPException(413, f"the body is over {MAX_BODY_BYTES >> 20} MiB, the most this server takes: send less")


async def _answer(worker: Worker, body: GenerationRequest, prompt: list[int], reply: Reply) -> Response:
    room = worker.context_length - len(prompt)
    max_tokens = body.wanted_tokens(room)
    if not prompt:
        raise BadRequest("the prompt holds no token: give at least one", body.prompt_param)
    if max_tokens > room:
        raise BadRequest(
            f"the prompt has {len(prompt)} tokens and {max_tokens} are to follow, but the model's context is "
            f"{worker.context_length}: shorten the prompt or ask for fewer tokens",
            "max_tokens" if room > 0 else body.prompt_param,
            "context_length_exceeded",
        )
    if body.n > worker.capacity:
        raise BadRequest(f"this server takes at most {worker.capacity} choices at once, not {body.n}", "n")
    generation = worker.generate(prompt, body.sampling(max_tokens), streamed=body.stream)
    events = generation.events()
    # Until the first event there is no status to send, so a failure before it can still have its own.
    first = await anext(events)
    if body.stream:
        stream = _server_sent_events(generation, _chained(first, events), reply, body)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    choices = [Choice() for _ in range(body.n)]
    async for together in _chained(first, events):
        for choice, event in together:
            choices[choice].add(event)
    return JSONResponse(reply.whole(choices, usage_of(len(prompt), generation.completion_tokens)))


async def _chained(first: Events, rest: AsyncGenerator[Events]) -> AsyncGenerator[Events]:
    async with aclosing(rest):
        yield first
        async for together in rest:
            yield together


async def _server_sent_events(
    generation: Generation, events: AsyncGenerator[Events], reply: Reply, body: GenerationRequest
) -> AsyncGenerator[str]:
    async with aclosing(events):
        try:
            for choice in range(body.n):
                for chunk in reply.opening(choice):
                    yield _data(chunk)
            async for together in events:
                chunks = [chunk for choice, event in together for chunk in reply.chunks(choice, event)]
                yield "".join(map(_data, chunks))
        except Exception as error:
            # The status is long sent; clients find the error in the stream.
            yield _data(_status_and_body(error)[1])
            return
    if body.stream_options.include_usage:
        yield _data(reply.usage(usage_of(len(generation.prompt), generation.completion_tokens)))
    yield "data: [DONE]\n\n"


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _prompt_tokens(worker: Worker, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return worker.tokenizer.encode(prompt)
    for position, token in enumerate(prompt):
        if not 0 <= token < worker.vocab_size:
            raise BadRequest(f"prompt[{position}] is {token}, not a token in [0, {worker.vocab_size})", "prompt")
    return prompt


def _chat_tokens(worker: Worker, body: ChatRequest) -> list[int]:
    if not worker.tokenizer.chat_template:
        raise BadRequest(f"{worker.name!r} has no chat template: use /v1/completions", "messages")
    messages = [message.for_template() for message in body.messages]
    try:
        text = worker.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise BadRequest(f"the chat template of {worker.name!r} refuses these messages: {error}", "messages") from error
    return worker.tokenizer.encode(text, add_special_tokens=False)


def _check_model(worker: Worker, body: GenerationRequest) -> None:
    _check_name(worker, body.model)


def _check_name(worker: Worker, name: str) -> None:
    if name != worker.name:
        raise BadRequest(
            f"the model {name!r} does not exist: this server serves {worker.name!r}", "model", "model_not_found", 404
        )


def _model_card(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.name,
        "object": "model",
        "created": worker.started,
        "owned_by": "model-worker",
        "max_model_len": worker.context_length,
    }


async def _as_response(request: Request, error: Exception) -> Response:
    status, body = _status_and_body(error)
    return JSONResponse(body, status, headers=_RETRY_AFTER if status in (429, 503) else None)


def _status_and_body(error: Exception) -> tuple[int, dict[str, Any]]:
    match error:
        case BadRequest():
            return error.status, error_body(str(error), "invalid_request_error", error.code, error.param)
        case RequestValidationError():
            return 400, _validation_body(error)
        case HTTPException():
            return error.status_code, error_body(str(error.detail), "invalid_request_error")
        case EngineBusy():
            return 429, error_body(f"{error}; try again later", "rate_limit_error", "server_busy")
        case ServiceError():
            return 503, error_body(
                f"the embedding service does not answer: {error}; try again later", "server_error", "unavailable"
            )
    _log.error("a request failed", exc_info=error)
    return 500, error_body(f"{type(error).__name__}: {error}", "server_error", "internal_error")


def _validation_body(error: RequestValidationError) -> dict[str, Any]:
    """The first thing wrong with the body, naming the parameter."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    param = place[0] if place and first["type"] != "json_invalid" else None
    message = f"{'.'.join(place)}: {first['msg']}" if param else f"the body is not as it must be: {first['msg']}"
    if first["type"] == "extra_forbidden":
        message = f"{'.'.join(place)} is not supported by this server: leave it out"
    return error_body(message, "invalid_request_error", first["type"], param)
