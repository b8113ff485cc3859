"""A replica of the worker whose engine is vLLM, with the tables in the service.

vLLM's own OpenAI server answers HTTP. Its engine runs in a process of its own, which the replica starts. What vLLM does
not have is added in front: places, keys, health and the worker's metrics.
"""

from __future__ import annotations

import asyncio
import io
import os
import shlex
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from typing import Any

import ray
import torch
from ray import serve
from starlette.types import ASGIApp

from embedding_service.commands.text import parse_bytes
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, Unavailable
from embedding_service.foreign import one_line, printable
from model_worker.http_errors import error_body
from model_worker.http_limits import WholeBodies
from model_worker.keys import Admission, Keys
from model_worker.metrics import ReplicaMetrics
from model_worker.vllm.admission import OneModel, Placed, Places
from model_worker.vllm.tables import CONFIG_KEY, ServedTables
from model_worker.worker import WorkerConfig

_HEALTH_TIMEOUT = 2.0
# Between two times that the engine's process is asked what it looked up. It answers between two steps.
_ROWS_SECONDS = 5.0
# vLLM's options that the worker's own command line has another word for.
_OURS = {
    "--model": "CHECKPOINT",
    "--served-model-name": "--name",
    "--max-num-seqs": "--max-batch",
    "--host": "--host",
    "--port": "--port",
    "--api-key": "--policy",
    "--ssl-certfile": "--tls-cert",
    "--ssl-keyfile": "--tls-key",
}
# Tokens at a sequence's end that are looked for earlier in it.
_LOOK_UP = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}


class EngineCounts:
    """What vLLM's engine says that it does, in the worker's words. vLLM calls `record` after each step."""

    def __init__(self, metrics: ReplicaMetrics) -> None:
        self._metrics = metrics
        self.counts: dict[str, int] = dict.fromkeys(
            ("requests", "running", "waiting", "prompt_tokens", "generated_tokens"), 0
        )

    def record(self, scheduler: Any, iteration: Any) -> None:
        """`SchedulerStats` and `IterationStats` of vLLM. Either may be None."""
        if scheduler is not None:
            self.counts["running"] = scheduler.num_running_reqs
            self.counts["waiting"] = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
        if iteration is not None:
            self.counts["prompt_tokens"] += iteration.num_prompt_tokens
            self.counts["generated_tokens"] += iteration.num_generation_tokens
            self.counts["requests"] += len(iteration.time_to_first_tokens_iter)
            for seconds in iteration.time_to_first_tokens_iter:
                self._metrics.first_token(seconds)

    def logger(self) -> Any:
        """A factory for vLLM's `stat_loggers`."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        counts = self

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
            ) -> None:
                counts.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Logger


@serve.ingress()
class VllmReplica:
    """One replica. Ray Serve constructs it, builds its ASGI app, asks for its health and drops it at the end.

    Raises InvalidRequest: vLLM refuses an option, or the tables are of another model.
    NotFound, Unavailable: the service has no such tables, or does not answer.
    """

    def __init__(self, config: WorkerConfig) -> None:
        from model_worker.serving import keep_on_loopback

        keep_on_loopback()
        self._config = config
        self._metrics = ReplicaMetrics()
        self._keys = Keys(config.policy) if config.policy else None
        self._counted = EngineCounts(self._metrics)
        self._places = Places(config.max_batch + config.max_queue)
        self._rows: dict[str, int] = {}
        self._started = time.time()
        self._engine, self._served, self._arguments = self._start()
        self._metrics.watch(self.counts)

    def _start(self) -> tuple[Any, ServedTables, Any]:
        # vLLM would tell its makers what runs here.
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self._config, len(ray.get_gpu_ids()))
        usage = UsageContext.OPENAI_API_SERVER
        try:
            vllm_config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(usage_context=usage)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InvalidRequest(f"vLLM refuses {self._config.checkpoint}: {one_line(error)}") from error
        # The engine's process checks the same, but its errors only reach a log.
        served = ServedTables.of(vllm_config, self._config.checkpoint)
        assert served is not None
        engine = AsyncLLM.from_vllm_config(
            vllm_config,
            usage_context=usage,
            stat_loggers=[self._counted.logger()],
            disable_log_stats=False,
        )
        return engine, served, arguments

    async def __serve_build_asgi_app__(self) -> Any:
        from vllm.entrypoints.openai.api_server import build_app, init_app_state

        tasks = await self._engine.get_supported_tasks()
        app = build_app(self._arguments, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, self._arguments, tasks)
        app.add_api_route("/healthz", self._healthz)
        app.add_api_route("/v1/worker", self.info)
        self._asking = asyncio.get_running_loop().create_task(self._ask_for_rows())
        # vLLM's application takes no further middleware, so these are around it.
        guarded: ASGIApp = WholeBodies(Placed(app, self._places))
        if self._keys:
            guarded = Admission(OneModel(guarded, self._config.name, self._config.version), self._keys)
        return guarded

    async def _healthz(self) -> Any:
        """Prove that the replica can generate, as the worker's own engine does."""
        from starlette.responses import JSONResponse

        try:
            await self.check_health()
            token = torch.zeros(1, 1, dtype=torch.int64)
            look_up = self._served.client.lookup_ngrams
            await asyncio.to_thread(look_up, self._served.now(), token, timeout=_HEALTH_TIMEOUT)
        except EmbeddingServiceError as error:
            told = f"the embedding service does not answer: {error}; try again later"
            return JSONResponse(error_body(told, "server_error", "unavailable"), 503)
        return {"status": "ok"}

    async def check_health(self) -> None:
        """Check the engine. A service that is away for a while is no reason to restart it."""
        try:
            await self._engine.check_health()
        except Exception as error:
            raise Unavailable(f"vLLM's engine has stopped: {one_line(error)}; Ray starts the replica again") from error

    async def info(self) -> dict[str, Any]:
        """What this replica has done, since its start."""
        return {"pid": os.getpid(), "model": self._served.now(), "engine": "vllm", **self.counts()}

    def counts(self) -> Mapping[str, int]:
        """What it does now and has done since its start, in numbers."""
        return {**self._counted.counts, "refused": self._places.refused, **self._rows}

    async def _ask_for_rows(self) -> None:
        """Ask the engine's process, which has the client, for its counts of rows, again and again."""
        while True:
            await asyncio.sleep(_ROWS_SECONDS)
            # An engine that died is for `check_health` to tell.
            with suppress(Exception):
                [counts, *_] = await self._engine.collective_rpc("row_counts")
                self._rows = counts

    async def __del__(self) -> None:
        self._metrics.close()
        if hasattr(self, "_engine"):
            self._engine.shutdown()
            self._served.client.close()
        if self._keys:
            self._keys.close()


def engine_arguments(config: WorkerConfig, gpus: int = 0) -> Any:
    """The parsed command line of vLLM: what the user gave, and what the worker says itself.

    gpus: what the replica has. With several of them, each holds a share of the model.
    Raises InvalidRequest: the user gave what vLLM does not know, or what the worker has an option of its own for.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    given = shlex.split(config.engine_args)
    for word in given:
        option = word.partition("=")[0].replace("_", "-")
        if option in _OURS:
            raise InvalidRequest(f"--engine-args has {option}: say it as {_OURS[option]} of model-worker serve")
    words = [str(config.checkpoint), *given]
    if gpus > 1:
        # Ray gave the replica these GPUs already.
        words[1:1] = [f"--tensor-parallel-size={gpus}", "--distributed-executor-backend=mp"]
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            arguments = make_arg_parser(FlexibleArgumentParser(prog="--engine-args")).parse_args(words)
    except SystemExit:
        last = told.getvalue().strip().splitlines()[-1:]
        raise InvalidRequest(f"vLLM does not take --engine-args: {printable(' '.join(last))}") from None
    arguments.model = str(config.checkpoint)
    arguments.served_model_name = [config.name]
    arguments.max_num_seqs = config.max_batch
    arguments.additional_config = {**(arguments.additional_config or {}), CONFIG_KEY: table_settings(config)}
    arguments.worker_extension_cls = "model_worker.vllm.counts.RowCounts"
    if config.speculate == "prompt":
        arguments.speculative_config = {"method": "ngram", "num_speculative_tokens": config.draft_tokens, **_LOOK_UP}
    return arguments


def table_settings(config: WorkerConfig) -> dict[str, Any]:
    """What the plugin is told, see `ServedTables.of`."""
    name = f"{config.name}@{config.version}" if config.pinned else config.name
    settings: dict[str, Any] = {"address": config.embeddings, "model": name, "near": config.near}
    if config.imported_as:
        settings["checkpoint"] = config.imported_as
    if kept := parse_bytes(config.cache_bytes):
        settings["cache_bytes"] = kept
    if config.topology:
        settings["topology"] = config.topology
    return settings
