"""The worker as a Ray Serve application."""

from __future__ import annotations

import io
import logging
import math
import os
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray._common.network_utils import is_localhost
from ray.exceptions import RayActorError
from ray.serve._private import replica
from ray.serve.schema import ApplicationStatus, ReplicaState

from embedding_service.commands.waiting import Say
from embedding_service.errors import EmbeddingServiceError
from embedding_service.foreign import one_line, printable
from embedding_service.local_ray import start_ray
from model_worker import http_limits
from model_worker.http_app import build_app
from model_worker.metrics import ReplicaMetrics
from model_worker.options import Scaling
from model_worker.worker import Worker, WorkerConfig

APP = "model-worker"
_POLL_SECONDS = 0.1
# A replica's own queue refuses with 429. So this many more requests than it takes may reach it.
_ABOVE_QUEUE = 64
_LOOPBACK = "127.0.0.1"
# Ray Serve gives its proxy 5 s to start and then kills it. On a busy machine that would go on for ever.
_PROXY_ENVIRONMENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", **http_limits.PROXY_ENVIRONMENT}
# Seconds that Ray may take to end a replica that runs nothing any more.
_DELETION_SECONDS = 10


@serve.ingress()
class WorkerReplica(Worker):
    """One replica. Ray Serve constructs it, builds its ASGI app, asks for its health and drops it at the end."""

    def __init__(self, config: WorkerConfig) -> None:
        keep_on_loopback()
        self._metrics = ReplicaMetrics()
        super().__init__(config, self._metrics.first_token, self._metrics.lookup_wait)
        self._metrics.watch(self.counts)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self)

    async def check_health(self) -> None:
        """Check the replica alone. A service that is away for a while is no reason to restart it."""
        self.check_engine()

    async def __del__(self) -> None:
        self._metrics.close()
        self.close()


def replica_class(config: WorkerConfig) -> type:
    """What a replica is with the config's engine."""
    if config.engine == "embedded":
        return WorkerReplica
    from model_worker.vllm.replica import VllmReplica

    return VllmReplica


def deployment_options(scaling: Scaling, config: WorkerConfig) -> dict[str, Any]:
    """The options of Ray Serve's deployment."""
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_batch + config.max_queue + _ABOVE_QUEUE,
        "ray_actor_options": {"num_cpus": scaling.num_cpus, "num_gpus": scaling.num_gpus},
        "graceful_shutdown_timeout_s": scaling.drain_seconds,
    }
    if scaling.max_replicas is None:
        return options | {"num_replicas": scaling.replicas}
    return options | {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": config.max_batch,
            "upscale_delay_s": scaling.upscale_delay,
            "downscale_delay_s": scaling.downscale_delay,
            # The load is a mean over this time. It must not outlast the delays.
            "look_back_period_s": min(30.0, max(2.0, scaling.upscale_delay)),
            "metrics_interval_s": 1.0,
        }
    }


def join_ray(address: str) -> None:
    """Become a driver of a running Ray cluster. Raises EmbeddingServiceError: there is none."""
    try:
        ray.init(address=address, namespace=APP, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EmbeddingServiceError(f"cannot join the Ray cluster at {address}: {one_line(error)}") from error


def start_local_ray(scaling: Scaling, metrics_port: int | None = None) -> None:
    """Start Ray on this machine alone, with room for all replicas. None exports metrics on any free port.

    Raises Unavailable.
    """
    os.environ.update(_PROXY_ENVIRONMENT | os.environ)
    start_ray(
        namespace=APP,
        num_cpus=max(os.cpu_count() or 1, math.ceil(scaling.most * scaling.num_cpus)),
        num_gpus=None if scaling.num_gpus else 0,
        _metrics_export_port=metrics_port,
        log_to_driver=False,
    )


def metrics_addresses() -> list[str]:
    """Where Ray's nodes export the replicas' metrics."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]


def deploy(
    config: WorkerConfig, scaling: Scaling, host: str, port: int, tls: tuple[Path, Path] | None, say: Say
) -> None:
    """Serve. Returns when all replicas answer. Raises EmbeddingServiceError, with their reason, if they do not.

    tls: PEM of a certificate and of its key. None: plain text.
    say: called with what it waits for, again and again.
    """
    http: dict[str, Any] = {"host": host, "port": port}
    if tls:
        http |= {"ssl_certfile": str(tls[0]), "ssl_keyfile": str(tls[1])}
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    say("starting Ray Serve and its HTTP server")
    try:
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=quiet)
    except RayActorError as error:
        raise EmbeddingServiceError(f"Ray Serve's proxy does not come up: {one_line(error)}") from error
    deployment: Any = serve.deployment(
        replica_class(config),
        name=APP,
        logging_config=quiet,
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.2,
        **deployment_options(scaling, config),
    )
    application = serve.RunTarget(deployment.bind(config), name=APP, route_prefix="/")
    serve.run_many([application], wait_for_applications_running=False)
    _wait_for_replicas(config, scaling, say)


def _wait_for_replicas(config: WorkerConfig, scaling: Scaling, say: Say) -> None:
    """Wait until Ray Serve says that the application runs."""
    wanted = scaling.replicas if scaling.max_replicas is None else scaling.min_replicas
    while True:
        application = serve.status().applications[APP]
        replicas = application.deployments.get(APP)
        if application.status == ApplicationStatus.RUNNING:
            return
        if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            message = replicas.message if replicas else application.message
            raise EmbeddingServiceError(f"the replicas do not come up: {_reason(message)}")
        ready = replicas.replica_states.get(ReplicaState.RUNNING, 0) if replicas else 0
        say(
            f"waiting for replicas, {ready} of {wanted} ready: each starts a process, loads {config.checkpoint} and "
            f"connects to {config.embeddings}"
        )
        time.sleep(_POLL_SECONDS)


def _reason(message: str) -> str:
    """The last line of a replica's traceback. For an error raised on purpose, its message alone."""
    last = printable(message.strip().splitlines()[-1])
    if last.startswith(EmbeddingServiceError.__module__):
        return last.partition(": ")[2]
    return f"{last} (the traceback is in the replica's log, by default in /tmp/ray/session_latest/logs/serve)"


def keep_on_loopback() -> None:
    """Keep a replica of a local Ray on loopback. Called before it opens its server for calls between deployments.

    Ray Serve 2.60 binds that server to every interface, with any node address. The server unpickles what it is sent.
    """
    if not is_localhost(ray.util.get_node_ip_address()):
        return
    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", _LOOPBACK))


def drain(scaling: Scaling) -> None:
    """Take the application down. It gets no new requests, and those that run have drain_seconds to end."""
    serve.delete(APP, _blocking=False)
    deadline = time.monotonic() + scaling.drain_seconds + _DELETION_SECONDS
    while APP in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.1)


def stop(joined: bool) -> None:
    """Take down what is left. In a cluster that we joined, that is the application and nothing else."""
    if not ray.is_initialized():
        return
    # Ray prints, as an error, that Serve's controller was killed at its own shutdown.
    with redirect_stdout(io.StringIO()):
        if joined:
            serve.delete(APP, _blocking=False)
        else:
            serve.shutdown()
        ray.shutdown()
