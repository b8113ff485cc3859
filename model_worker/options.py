"""What a worker is told, said once: for the command line, for a Serve config file, and for its replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from model_worker.drafts import Speculate

# Names the policy of API keys where no option does.
POLICY_VARIABLE = "MODEL_WORKER_POLICY"
# What computes a replica's model.
Engine = Literal["embedded", "vllm"]


@dataclass(frozen=True)
class Options:
    """Each field is an option of `model-worker serve`, and an argument of a Serve config file. Sizes are text."""

    checkpoint: Annotated[
        Path, typer.Argument(help="The model's folder: the whole checkpoint, or the dense half that `split` makes.")
    ]
    embeddings: Annotated[str, typer.Option(metavar="HOST:PORT", help="The embedding service.")]
    name: Annotated[
        str | None,
        typer.Option(help="The model in the service, NAME or NAME@VERSION; NAME becomes the served model id."),
    ] = None
    max_batch: Annotated[int, typer.Option(min=1, help="Requests a replica runs at once.")] = 32
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait at a replica; more get 429.")] = 64
    cache_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help='Rows that a replica keeps, as "64MiB"; 0 keeps none.')
    ] = "0"
    prefix_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for beginnings of prompts, so that common ones are run once.")
    ] = "256MiB"
    speculate: Annotated[
        Speculate,
        typer.Option(
            help="Draft tokens and check them in one pass: as the text went on before, or by LongCat's draft layer."
        ),
    ] = "off"
    draft_tokens: Annotated[int, typer.Option(min=1, help="With --speculate: the most that a step drafts.")] = 4
    near: Annotated[
        bool, typer.Option("--near/--no-near", help="Read rows in place on a shard's machine, or never.")
    ] = True
    topology: Annotated[
        str | None,
        typer.Option(
            help="Where replicas are: shards that say the same come first. Default: EMBEDDING_SERVICE_TOPOLOGY."
        ),
    ] = None
    engine: Annotated[Engine, typer.Option(help="What runs the model: this package, or vLLM (docs/vllm.md).")] = (
        "embedded"
    )
    engine_args: Annotated[
        str, typer.Option(metavar="WORDS", help="Further options of `vllm serve`, as '--dtype float32'.")
    ] = ""
    policy: Annotated[
        Path | None,
        typer.Option(
            envvar=POLICY_VARIABLE,
            help="Whose API keys count, and for what (docs/security.md). Default: everybody may ask.",
        ),
    ] = None


@dataclass(frozen=True)
class Scaling:
    """How many replicas, and what each gets. Each field is an option of `model-worker serve`.

    replicas is fixed, unless max_replicas is set. Then Ray Serve keeps between min_replicas and max_replicas of them,
    so that each has about as many requests as its batch holds. It adds one after upscale_delay seconds with too many
    requests. It takes one away after downscale_delay seconds with too few. A replica that goes gets no new requests,
    and has drain_seconds to finish those it has.
    """

    replicas: Annotated[int, typer.Option(min=1, help="How many replicas.")] = 1
    min_replicas: Annotated[int, typer.Option(min=0, help="With --max-replicas: never fewer.")] = 1
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Scale with the load, up to this many.")] = None
    num_cpus: Annotated[float, typer.Option(min=0, help="CPUs of a replica (also its threads).")] = 1
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs of a replica.")] = 0
    upscale_delay: Annotated[float, typer.Option(min=0, help="Seconds of too much load before one more.")] = 10
    downscale_delay: Annotated[float, typer.Option(min=0, help="Seconds of too little load before one less.")] = 300
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds that a leaving replica has to finish its requests.")
    ] = 60

    @property
    def most(self) -> int:
        """Replicas there may be at once."""
        return self.max_replicas or self.replicas


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Make options of all fields of a command's dataclasses. Typer reads options from a function's parameters."""
    own = signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {each.name: each.annotation for each in own if is_dataclass(each.annotation)}

    @wraps(command)
    def spread_out(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **given)

    parameters = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY)
        for each in own
        for parameter in (
            signature(groups[each.name], eval_str=True).parameters.values() if each.name in groups else [each]
        )
    ]
    spread_out.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return spread_out
