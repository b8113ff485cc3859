"""The `model-worker` command. Heavy imports wait until a command needs them, so that --help is fast."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from embedding_service.commands.console import PlainConsole
from embedding_service.commands.text import parse_bytes
from embedding_service.commands.waiting import Say, Waiting
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, NotFound
from embedding_service.foreign import one_line, printable
from embedding_service.machine import check_free, join_address, prepare_local_ray
from model_worker.drafts import Speculate

if TYPE_CHECKING:
    from embedding_service.client.client import ModelDescription
    from model_worker.serving import Scaling
    from model_worker.worker import WorkerConfig

# Read when ray is imported. Serve's proxy then streams answers from replicas over gRPC. Ray's own way makes an object
# of each write, which takes the proxy nearly twice the processor time.
_SERVE_OVER_GRPC = {"RAY_SERVE_PROXY_USE_GRPC": "1"}

# Names the policy of API keys where no option does.
POLICY_VARIABLE = "MODEL_WORKER_POLICY"
# What computes a replica's model.
Engine = Literal["embedded", "vllm"]

app = typer.Typer(
    help="Serve a language model whose n-gram tables live elsewhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None:
    # Makes `serve` a command of its own though it is the only one.
    pass


@app.command()
def serve(
    checkpoint: Annotated[
        Path, typer.Argument(help="The model's folder: the whole checkpoint, or the dense half that `split` makes.")
    ],
    embeddings: Annotated[str, typer.Option(metavar="HOST:PORT", help="The embedding service.")],
    name: Annotated[
        str | None,
        typer.Option(help="The model in the service, NAME or NAME@VERSION; NAME becomes the served model id."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen for HTTP.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen for HTTP.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="How many replicas.")] = 1,
    min_replicas: Annotated[int, typer.Option(min=0, help="With --max-replicas: never fewer.")] = 1,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Scale with the load, up to this many.")] = None,
    num_cpus: Annotated[float, typer.Option(min=0, help="CPUs of a replica (also its threads).")] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs of a replica.")] = 0,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests a replica runs at once.")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait at a replica; more get 429.")] = 64,
    cache_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help='Rows that a replica keeps, as "64MiB"; 0 keeps none.')
    ] = "0",
    prefix_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for beginnings of prompts, so that common ones are run once.")
    ] = "256MiB",
    speculate: Annotated[
        Speculate,
        typer.Option(
            help="Draft tokens and check them in one pass: as the text went on before, or by LongCat's draft layer."
        ),
    ] = "off",
    draft_tokens: Annotated[int, typer.Option(min=1, help="With --speculate: the most that a step drafts.")] = 4,
    near: Annotated[
        bool,
        typer.Option("--near/--no-near", help="Read rows in place on a shard's machine, or never."),
    ] = True,
    topology: Annotated[
        str | None,
        typer.Option(
            help="Where replicas are: shards that say the same come first. Default: EMBEDDING_SERVICE_TOPOLOGY."
        ),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="What runs the model: this package, or vLLM (docs/vllm.md).")
    ] = "embedded",
    engine_args: Annotated[
        str, typer.Option(metavar="WORDS", help="Further options of `vllm serve`, as '--dtype float32'.")
    ] = "",
    policy: Annotated[
        Path | None,
        typer.Option(
            envvar=POLICY_VARIABLE,
            help="Whose API keys count, and for what (docs/security.md). Default: everybody may ask.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Speak HTTPS with this certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's private key, PEM.")] = None,
    upscale_delay: Annotated[float, typer.Option(min=0, help="Seconds of too much load before one more.")] = 10,
    downscale_delay: Annotated[float, typer.Option(min=0, help="Seconds of too little load before one less.")] = 300,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds that a leaving replica has to finish its requests.")
    ] = 60,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Prometheus metrics of all replicas here; default: any free.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Join this Ray cluster ('auto' for the one around) instead of starting one here.")
    ] = None,
) -> None:
    """Serve a LongCat or Qwen4-Exp checkpoint over an OpenAI-compatible HTTP API, until SIGINT or SIGTERM.

    Then it takes no more requests, and ends when those that run have ended. It ends at the latest after
    --drain-seconds, or at a second signal.
    """
    if metrics_port and ray_address:
        raise typer.BadParameter(
            "a Ray cluster has metrics ports of its own: give no --metrics-port with --ray-address"
        )
    if max_replicas is not None and (replicas != 1 or min_replicas > max_replicas):
        raise typer.BadParameter("give either --replicas, or --min-replicas and a --max-replicas not below it")
    words = engine_words(engine, engine_args)
    tls = _pair(tls_cert, tls_key)
    host = host.strip("[]")
    if ray_address is None:
        check_free(join_address(host, port), "--port")
        if metrics_port:
            check_free(f"127.0.0.1:{metrics_port}", "--metrics-port")
        prepare_local_ray()
        os.environ.update(_SERVE_OVER_GRPC)
    rows = parse_bytes(cache_bytes)
    progress = Waiting(PlainConsole(stderr=True), "model-worker")
    with progress:
        config = resolve_model(
            checkpoint,
            embeddings,
            name,
            progress.say,
            max_batch=max_batch,
            max_queue=max_queue,
            cache_bytes=rows,
            prefix_bytes=parse_bytes(prefix_bytes),
            near=near,
            topology=topology,
            policy=policy,
            speculate=speculate,
            draft_tokens=draft_tokens,
            engine=engine,
            engine_args=words,
        )
        progress.say("loading ray")
        from model_worker.serving import Scaling
    scaling = Scaling(
        replicas, min_replicas, max_replicas, num_cpus, num_gpus, upscale_delay, downscale_delay, drain_seconds
    )
    _run(config, scaling, host, port, tls, ray_address, metrics_port, progress)


def _pair(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    """The files of TLS. Raises BadParameter, and InvalidRequest naming files that do not count."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise typer.BadParameter("--tls-cert and --tls-key come together")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:
        raise InvalidRequest(f"{certificate} and {key} are no certificate and its key: {one_line(error)}") from None
    return certificate.absolute(), key.absolute()


def engine_words(engine: Engine, text: str) -> tuple[str, ...]:
    """The words of --engine-args. Raises InvalidRequest if they, or the engine itself, cannot be had."""
    if engine == "embedded":
        if text:
            raise InvalidRequest("--engine-args are options of vLLM: say --engine vllm as well, or leave them out")
        return ()
    if find_spec("vllm") is None:
        raise InvalidRequest(
            "--engine vllm needs vLLM, which is not installed here: pip install 'embedding-service[worker,vllm]' (on a "
            "CPU: pip install --no-deps -r requirements/vllm.txt), or leave out --engine"
        )
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise InvalidRequest(f"--engine-args {text!r} is not a command line: {one_line(error)}") from None


def resolve_model(
    checkpoint: Path,
    embeddings: str,
    name: str | None,
    say: Say = lambda waiting: None,
    *,
    cache_bytes: int,
    policy: Path | None,
    speculate: Speculate,
    engine: Engine,
    **settings: Any,
) -> WorkerConfig:
    """Check the policy and the checkpoint, and find the model in the service, before anything is started.

    settings: further ones of `WorkerConfig`.
    """
    if policy:
        from embedding_service.security.policy import read_policy

        read_policy(policy)
    say("loading torch and transformers")
    from embedding_service import EmbeddingClient
    from model_worker import families, vllm
    from model_worker.worker import LOOKUP_TIMEOUT, WorkerConfig

    say(f"checking {checkpoint}")
    if engine == "vllm":
        vllm.check(checkpoint)
    else:
        families.check(checkpoint, speculate)
    say(f"asking the embedding service at {embeddings} for its models")
    with EmbeddingClient(embeddings, timeout=LOOKUP_TIMEOUT, cache_bytes=cache_bytes, near=False) as client:
        model = _pick(name, client.models())
    return WorkerConfig(
        str(checkpoint.resolve()),
        embeddings,
        model.name,
        model.version,
        cache_bytes=cache_bytes,
        policy=str(policy.absolute()) if policy else None,
        imported_as=model.checkpoint,
        pinned=name == model.full_name,
        speculate=speculate,
        engine=engine,
        **settings,
    )


def _pick(wanted: str | None, served: list[ModelDescription]) -> ModelDescription:
    """What to serve."""
    known = ", ".join(model.full_name for model in served) or "none"
    # Those of domains are served beside the one that they are over.
    names = {model.name for model in served}
    names -= {name for name in names if any(name.startswith(f"{other}+") for other in names)}
    if wanted is None:
        if len(names) != 1:
            raise InvalidRequest(f"say which model with --name; the service has {known}")
        wanted = names.pop()
    found = [model for model in served if wanted in (model.name, model.full_name)]
    if not found:
        raise NotFound(f"the service has no model {wanted!r}; it has {known}")
    return found[-1]


def _run(
    config: WorkerConfig,
    scaling: Scaling,
    host: str,
    port: int,
    tls: tuple[Path, Path] | None,
    ray_address: str | None,
    metrics_port: int | None,
    progress: Waiting,
) -> None:
    from model_worker import serving

    _on_signals(_exit)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        with progress:
            if ray_address is None:
                progress.say("starting Ray")
                serving.start_local_ray(scaling, metrics_port)
            else:
                progress.say(f"joining the Ray cluster at {ray_address}")
                serving.join_ray(ray_address)
            # Ray takes SIGTERM for itself when it starts.
            _on_signals(_exit)
            serving.deploy(config, scaling, host, port, tls, progress.say)
        typer.echo(
            f"model-worker: {config.name} ready at {'https' if tls else 'http'}://{join_address(host, port)}/v1 "
            f"(up to {scaling.most} replicas, embeddings from {config.embeddings}; "
            f"metrics at {', '.join(serving.metrics_addresses())})"
        )
        with suppress(SystemExit):
            signal.pause()
        # A second signal ends the wait.
        with suppress(SystemExit):
            serving.drain(scaling)
    finally:
        _on_signals(signal.SIG_IGN)
        serving.stop(joined=ray_address is not None)


def _on_signals(handler: signal.Handlers | Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    """End by an exception, so that all that was started is taken down on the way out."""
    raise SystemExit(0)


def main() -> None:
    """Run the command line. A failure is one red line and exit code 1. Wrong usage is exit code 2."""
    try:
        app()
    except (EmbeddingServiceError, OSError) as error:
        typer.secho(f"error: {printable(str(error))}", fg="red", err=True)
        sys.exit(1)
