"""The worker's HTTP is what its OpenAPI document says, for requests that schemathesis draws from that."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from schemathesis.specs.openapi.schemas import OpenApiSchema
from support.json_values import alike
from support.wire_bytes import ALIKE

from model_worker.http_app import build_app
from model_worker.worker import Worker, WorkerConfig

pytestmark = [pytest.mark.slow, pytest.mark.fuzz]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
LIMITS = ("max_tokens", "max_completion_tokens")
# What it answers is what the document says, whatever it was asked.
ALWAYS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
OF_BODIES = {
    GenerationMode.POSITIVE: [*ALWAYS, checks.positive_data_acceptance],
    GenerationMode.NEGATIVE: [*ALWAYS, checks.negative_data_rejection],
}
PATHS = list(itertools.product((COMPLETIONS, CHAT), OF_BODIES))
# Each body is asked with others that are made of it, at all paths together as many as `make fuzz` wants. A path alone
# has few forms, so `make fuzz` draws no more than this.
BODIES = max(int(os.environ.get("FUZZ_EXAMPLES", 0)) // (ALIKE * len(PATHS)), 3)
NAMES = min(int(os.environ.get("FUZZ_EXAMPLES", 20)), 2000)
PLACES = 8


@pytest.fixture(scope="module")
def app(model_folder: Path, embeddings: str) -> Iterator[FastAPI]:
    worker = Worker(
        WorkerConfig(model_folder, embeddings, name="small", version="1", max_batch=2, max_queue=PLACES - 2)
    )
    yield build_app(worker)
    worker.close()


@pytest.fixture(scope="module")
def schema(app: FastAPI) -> OpenApiSchema:
    """The document, of requests for this model. Another one does not exist."""
    for name in ("CreateCompletionRequest", "CreateChatCompletionRequest"):
        app.openapi()["components"]["schemas"][name]["properties"]["model"] = {"const": "small"}
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.fixture(scope="module")
def http(app: FastAPI) -> Iterator[TestClient]:
    """One event loop for all of them."""
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(("path", "mode"), PATHS)
@settings(max_examples=BODIES)
@given(data=st.data())
def test_s8_bodies_are_taken_where_the_document_says_so(
    schema: OpenApiSchema, http: TestClient, path: str, mode: GenerationMode, data: st.DataObject
) -> None:
    case = data.draw(schema[path]["POST"].as_strategy(mode))
    body: Any = case.body
    if mode is GenerationMode.POSITIVE:
        body = case.body = short(body)
    case.validate_response(case.call(), checks=OF_BODIES[mode])
    if not isinstance(body, dict):
        return
    for each in itertools.islice(alike(body), 1, None):
        text = json.dumps(short(each) if isinstance(each, dict) else each)
        case.validate_response(http.post(path, content=text.encode(), headers=JSON), checks=ALWAYS)


def short(body: dict[str, Any]) -> dict[str, Any]:
    """The same for a few tokens. They do."""
    few = {name: min(body[name], 3) for name in LIMITS if isinstance(body.get(name), int | float)}
    if isinstance(prompts := body.get("prompt"), list) and len(prompts) > 1:
        few["n"] = 1  # there are places for all prompts, each once
    if body.get("max_tokens") is None:
        few["max_tokens"] = 3
    return {**body, **few}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/v1/worker", "/healthz"])
@settings(max_examples=NAMES)
@given(data=st.data())
def test_s8_answers_are_as_the_document_says(schema: OpenApiSchema, path: str, data: st.DataObject) -> None:
    case = data.draw(schema[path]["GET"].as_strategy())
    case.validate_response(case.call(), checks=[*ALWAYS, checks.unsupported_method])
