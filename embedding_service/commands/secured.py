"""Options of TLS and rights: those of servers, and those of commands that ask a service."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedding_service.commands.text import check_address
from embedding_service.errors import InvalidRequest
from embedding_service.machine import split_address

if TYPE_CHECKING:
    from embedding_service.security.server import Files

CertificateOption = Annotated[
    Path | None, typer.Option(help="PEM of this process's certificate. With it, every port has TLS 1.3.")
]
KeyOption = Annotated[Path | None, typer.Option(help="PEM of the certificate's key.")]
AuthorityOption = Annotated[Path | None, typer.Option(help="PEM of the authorities that vouch for others.")]
PolicyOption = Annotated[Path | None, typer.Option(help="Who may do what (docs/security.md). It comes with TLS.")]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Listen beyond loopback in plain text, for everybody who reaches the port.")
]
HealthOption = Annotated[
    str | None,
    typer.Option(
        help="A further HOST:PORT that answers health checks alone, in plain text, for probes.", callback=check_address
    ),
]


AuditOption = Annotated[
    Path | None,
    typer.Option(help="File of JSON lines: who published, trained, drained, was denied (docs/security.md)."),
]


def _export(variable: str) -> typer.models.OptionInfo:
    """An option that means what a variable of the environment does, for this process and those it starts."""

    def callback(value: str | None) -> str | None:
        if value is not None:
            os.environ[variable] = value
        return value

    helps = {
        "EMBEDDING_SERVICE_TLS": "The service has TLS: a folder with ca.crt and perhaps a token, or ca.crt alone.",
        "EMBEDDING_SERVICE_TOKEN_FILE": "A file with a token. Default: the folder's, or EMBEDDING_SERVICE_TOKEN.",
    }
    option: typer.models.OptionInfo = typer.Option(help=helps[variable], envvar=variable, callback=callback)
    return option


# Of commands that ask a service. What asks reads the variables, as every client does.
TlsOption = Annotated[str | None, _export("EMBEDDING_SERVICE_TLS")]
TokenOption = Annotated[str | None, _export("EMBEDDING_SERVICE_TOKEN_FILE")]


def files_of(
    certificate: Path | None,
    key: Path | None,
    ca: Path | None,
    policy: Path | None,
    audit: Path | None,
    insecure: bool,
    *listens: str | None,
) -> Files | None:
    """What secures a server. None: nothing does, and it speaks plain text.

    Raises:
        typer.BadParameter: some of the options are given without the rest.
        InvalidRequest: it would speak plain text beyond loopback, and nobody said that it may.
    """
    if certificate is None and key is None and ca is None and policy is None and audit is None:
        check_plain(insecure, *listens)
        return None
    if certificate is None or key is None or ca is None or policy is None:
        raise typer.BadParameter("--tls-cert, --tls-key, --tls-ca and --policy come together, and with --audit")
    from embedding_service.security.server import Files

    return Files(certificate, key, ca, policy, audit)


def check_plain(
    insecure: bool, *listens: str | None, remedy: str = "--tls-cert, --tls-key, --tls-ca and --policy"
) -> None:
    """Raise InvalidRequest if plain text would be spoken beyond loopback, and nobody said that it may.

    remedy: the options that secure this command.
    """
    for listen in listens:
        if listen and not insecure and not is_loopback(listen):
            raise InvalidRequest(
                f"{listen} is reached from other machines, and everybody there could read and change everything: give "
                f"{remedy}, or --insecure inside a network that you trust"
            )


def is_loopback(listen: str) -> bool:
    """Whether HOST or HOST:PORT is reached from this machine alone."""
    host = split_address(listen)[0] if listen.rpartition("]")[2].count(":") == 1 else listen
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
