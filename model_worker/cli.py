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
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from embedding_service.commands.console import PlainConsole
from embedding_service.commands.text import parse_bytes
from embedding_service.commands.waiting import Say, Waiting
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, NotFound
from embedding_service.foreign import one_line, printable
from embedding_service.machine import check_free, join_address, prepare_local_ray
from model_worker.options import Options, Scaling, spread

if TYPE_CHECKING:
    from embedding_service.client.client import ModelDescription
    from model_worker.worker import WorkerConfig

# Read when ray is imported. Serve's proxy then streams answers from replicas over gRPC. Ray's own way makes an object
# of each write, which takes the proxy nearly twice the processor time.
_SERVE_OVER_GRPC = {"RAY_SERVE_PROXY_USE_GRPC": "1"}

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
@spread
def serve(
    options: Options,
    scaling: Scaling,
    host: Annotated[str, typer.Option(help="Where to listen for HTTP.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen for HTTP.")] = 8000,
    tls_cert: Annotated[Path | None, typer.Option(help="Speak HTTPS with this certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's private key, PEM.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Prometheus metrics of all replicas here; default: any free.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Join this Ray cluster ('auto' for the one around) instead of starting one here.")
    ] = None,
) -> None:
    """Serve a LongCat, Qwen4-Exp or Gemma checkpoint over an OpenAI-compatible HTTP API, until SIGINT or SIGTERM.

    Then it takes no more requests, and ends when those that run have ended. It ends at the latest after
    --drain-seconds, or at a second signal.
    """
    if metrics_port and ray_address:
        raise typer.BadParameter(
            "a Ray cluster has metrics ports of its own: give no --metrics-port with --ray-address"
        )
    most = scaling.max_replicas
    if most is not None and (scaling.replicas != 1 or scaling.min_replicas > most):
        raise typer.BadParameter("give either --replicas, or --min-replicas and a --max-replicas not below it")
    tls = _pair(tls_cert, tls_key)
    host = host.strip("[]")
    if ray_address is None:
        check_free(join_address(host, port), "--port")
        if metrics_port:
            check_free(f"127.0.0.1:{metrics_port}", "--metrics-port")
        prepare_local_ray()
        os.environ.update(_SERVE_OVER_GRPC)
    progress = Waiting(PlainConsole(stderr=True), "model-worker")
    with progress:
        config = resolve_model(options, progress.say)
        progress.say("loading ray")
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


def resolve_model(options: Options, say: Say = lambda waiting: None) -> WorkerConfig:
    """Check the options and the checkpoint, and find the model in the service, before anything is started."""
    engine_words(options)
    cache_bytes, _ = parse_bytes(options.cache_bytes), parse_bytes(options.prefix_bytes)
    if options.policy:
        from embedding_service.security.policy import read_policy

        read_policy(options.policy)
    say("loading torch and transformers")
    from embedding_service import EmbeddingClient
    from model_worker import families, vllm
    from model_worker.worker import LOOKUP_TIMEOUT, WorkerConfig

    say(f"checking {options.checkpoint}")
    if options.engine == "vllm":
        vllm.check(options.checkpoint)
    else:
        families.check(options.checkpoint, options.speculate)
    say(f"asking the embedding service at {options.embeddings} for its models")
    with EmbeddingClient(options.embeddings, timeout=LOOKUP_TIMEOUT, cache_bytes=cache_bytes, near=False) as client:
        model = _pick(options.name, client.models())
    found = {
        "checkpoint": options.checkpoint.resolve(),
        "name": model.name,
        "policy": options.policy and options.policy.absolute(),
        "version": model.version,
        "imported_as": model.checkpoint,
        "pinned": options.name == model.full_name,
    }
    return WorkerConfig(**vars(options) | found)


def engine_words(options: Options) -> list[str]:
    """The words of --engine-args. Raises InvalidRequest if they, or the engine itself, cannot be had."""
    if options.engine == "embedded":
        if options.engine_args:
            raise InvalidRequest("--engine-args are options of vLLM: say --engine vllm as well, or leave them out")
        return []
    if find_spec("vllm") is None:
        raise InvalidRequest(
            "--engine vllm needs vLLM, which is not installed here: pip install 'embedding-service[worker,vllm]' (on a "
            "CPU: pip install --no-deps -r requirements/vllm.txt), or leave out --engine"
        )
    try:
        return shlex.split(options.engine_args)
    except ValueError as error:
        raise InvalidRequest(
            f"--engine-args {options.engine_args!r} is not a command line: {one_line(error)}"
        ) from None


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
