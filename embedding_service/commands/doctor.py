"""`doctor`: looks at this machine, a store and a service for what will go wrong, and says what to do about it."""

from __future__ import annotations

import ctypes
import datetime
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from embedding_service.commands.secured import TlsOption, TokenOption
from embedding_service.commands.text import JsonOption, check_address, format_bytes, say, say_json
from embedding_service.errors import EmbeddingServiceError
from embedding_service.foreign import one_line
from embedding_service.machine import check_free

GOOD, NOTE, BAD = "good", "note", "bad"
MARKS = {GOOD: "ok", NOTE: "note", BAD: "BAD"}
# The least of files that a shard with some hundred clients opens.
FILES = 4096
# Days before its end at which a certificate is told of.
SOON_DAYS = 14
# Seconds that a controller's start may lie in the future of this clock.
CLOCK_SECONDS = 60
# Of a container's memory. Kernels write more than that for none.
MOST_LIMIT = 1 << 50
_TIME_ERROR = 5  # what adjtimex answers for a clock that nobody sets


@dataclass(frozen=True)
class Finding:
    """What a check found. `remedy` is empty where nothing is to be done."""

    check: str
    state: str
    found: str
    remedy: str = ""


def doctor(
    store: Annotated[str | None, typer.Option(help="Look at this store, too: a folder or an fsspec URL.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Look at the service at this HOST:PORT, too.", callback=check_address)
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that `up` is to listen on.")] = 7070,
    tls: TlsOption = None,
    token_file: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a set-up: versions, memory, limits, clock, ports, a store, TLS, a service. Exit code 1 if one is bad."""
    checks: list[Callable[[], Iterator[Finding]]] = [_versions, _memory, _huge_pages, _limits, _clock]
    checks.append(lambda: _service(address) if address else _port(port))
    checks.append(_credentials)
    if store:
        checks.append(lambda: _store(store))
    findings = [finding for check in checks for finding in check()]
    if as_json:
        say_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            say(f"{MARKS[finding.state]:>4}  {finding.check}: {finding.found}")
            if finding.remedy:
                say(f"      {finding.remedy}")
    if any(finding.state == BAD for finding in findings):
        raise typer.Exit(1)


def _versions() -> Iterator[Finding]:
    yield Finding("python", GOOD, ".".join(map(str, sys.version_info[:3])))
    torch, fbgemm = _version("torch"), _version("fbgemm-gpu-cpu") or _version("fbgemm-gpu")
    if not torch or not fbgemm:
        yield Finding("packages", BAD, "torch or FBGEMM is not installed", "`make setup`, or the extra cpu or gpu")
        return
    # FBGEMM 1.n is built for torch 2.(n + 5).
    fits = int(torch.split(".")[1]) == int(fbgemm.split(".")[1]) + 5
    found = f"torch {torch}, FBGEMM {fbgemm}, torchrec {_version('torchrec') or 'none'}"
    remedy = "" if fits else "FBGEMM 1.n is built for torch 2.(n + 5): install the pair of requirements/all.txt"
    yield Finding("packages", GOOD if fits else BAD, found, remedy)
    from embedding_service.grpc_core import why_public

    found = f"grpcio {_version('grpcio')}"
    if why := why_public():
        remedy = "Lookups are right, and slower. A grpcio within this package's bounds brings its core back."
        yield Finding("grpc", NOTE, f"{found}, {why}", remedy)
    else:
        yield Finding("grpc", GOOD, found)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _memory() -> Iterator[Finding]:
    from embedding_service.memory import available_memory, containers

    limits = [limit for limit, _ in containers() if limit < MOST_LIMIT]
    within = f", of a container's {format_bytes(min(limits))}" if limits else ""
    found = f"{format_bytes(available_memory())} are available{within}"
    little = available_memory() < 1 << 30
    remedy = "A shard takes 0.3 GiB besides its rows: end other processes, or raise the limit." if little else ""
    yield Finding("memory", NOTE if little else GOOD, found, remedy)


def _huge_pages() -> Iterator[Finding]:
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    try:
        chosen = (folder / "enabled").read_text().partition("[")[2].partition("]")[0]
    except OSError:
        yield Finding("huge pages", NOTE, "this kernel has none", "Gathers of random rows take longer. Nothing else.")
        return
    off = chosen == "never"
    remedy = f"As root: echo madvise > {folder / 'enabled'}. Gathers of random rows get faster." if off else ""
    yield Finding("huge pages", NOTE if off else GOOD, chosen, remedy)


def _limits() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = hard != resource.RLIM_INFINITY and hard < FILES
    remedy = f"Each connection takes a file: ulimit -n {FILES}, or LimitNOFILE of the unit." if few else ""
    yield Finding("open files", BAD if few else GOOD, f"at most {hard:,}" if hard >= 0 else "no limit", remedy)
    from embedding_service.address_space import can_seal, most_maps
    from embedding_service.near.reader import SHARE_OF_MAPS

    maps = most_maps()
    few = maps < 65_530
    remedy = "Each part is mapped by itself: sysctl vm.max_map_count=262144" if few else ""
    found = f"at most {maps:,}: a client reads up to {maps // SHARE_OF_MAPS:,} parts in place"
    yield Finding("memory maps", NOTE if few else GOOD, found, remedy)
    near = can_seal()
    remedy = "" if near else "Clients of this machine read no rows in place: it needs Linux 5.1."
    yield Finding("near rows", GOOD if near else NOTE, "can be shared" if near else "cannot be sealed", remedy)


def _clock() -> Iterator[Finding]:
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # asks, and sets nothing
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    free = state == _TIME_ERROR
    remedy = "Terms of routings and certificates go by it: start chrony or systemd-timesyncd." if free else ""
    yield Finding("clock", NOTE if free else GOOD, now + (", and nobody sets it" if free else ""), remedy)


def _port(port: int) -> Iterator[Finding]:
    try:
        check_free(f"127.0.0.1:{port}")
    except EmbeddingServiceError as error:
        remedy = f"Give `up` another --port, or look who has it: doctor --address localhost:{port}"
        yield Finding("port", NOTE, str(error), remedy)
    else:
        yield Finding("port", GOOD, f"{port} is free")


def _credentials() -> Iterator[Finding]:
    from embedding_service.security.access import access_of

    try:
        access = access_of(None, None)
    except EmbeddingServiceError as error:
        yield Finding("tls", BAD, str(error), "Give --tls the folder that `up --secure` made for clients.")
        return
    if access is None:
        yield Finding("tls", GOOD, "plain text: no --tls and no EMBEDDING_SERVICE_TLS")
        return
    for path in (access.ca, access.certificate):
        if path:
            yield _certificate(path)
    key = access.key or access.token_file
    if key and key.stat().st_mode & 0o077:
        yield Finding("secrets", BAD, f"others may read {key}", f"chmod 600 {key}")


def _certificate(path: Path) -> Finding:
    from cryptography import x509

    try:
        ends = min(each.not_valid_after_utc for each in x509.load_pem_x509_certificates(path.read_bytes()))
    except (OSError, ValueError) as error:
        return Finding("tls", BAD, f"{path}: {one_line(error)}", "It must be a PEM file of certificates.")
    days = (ends - datetime.datetime.now(datetime.UTC)).days
    found = f"{path} ends on {ends:%Y-%m-%d}"
    if days < 0:
        return Finding("tls", BAD, f"{found}, which is over", "Issue it again (docs/security.md, Rotation).")
    if days < SOON_DAYS:
        return Finding("tls", NOTE, found, "Issue it again (docs/security.md, Rotation).")
    return Finding("tls", GOOD, found)


def _service(address: str) -> Iterator[Finding]:
    from embedding_service.client.status import get_status

    began = time.monotonic()
    try:
        status = get_status(address)
    except EmbeddingServiceError as error:
        remedy = "See that it runs and can be reached from here, and that --tls is right."
        yield Finding("service", BAD, str(error), remedy)
        return
    took = 1000 * (time.monotonic() - began)
    models = sum(model.serving for model in status.models)
    yield Finding("service", GOOD, f"{len(status.shards)} shards serve {models} models, told in {took:.0f} ms")
    for problem in status.problems:
        yield Finding("service", BAD, problem.message, "`embedding-service status` and the page say more.")
    ahead = status.term / 1000 - time.time()
    if ahead > CLOCK_SECONDS:
        remedy = "Set the clocks of both machines. Certificates of one may not count yet at the other."
        yield Finding("clock", NOTE, f"the service began {ahead:,.0f} s in the future of this clock", remedy)
    for shard in status.shards:
        yield from _reach(shard.shard_id, shard.address)


def _reach(name: str, address: str) -> Iterator[Finding]:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        remedy = "Clients ask it directly: open the port, or give the shard an --advertise that is reached from here."
        yield Finding("network", BAD, f"{name} at {address} cannot be reached: {one_line(error)}", remedy)


def _store(url: str) -> Iterator[Finding]:
    from embedding_service.memory import available_memory
    from embedding_service.store.store import Store

    began = time.monotonic()
    try:
        store = Store(url)
        catalogue, newest = store.catalogue(), store.newest()
    except (EmbeddingServiceError, OSError) as error:
        yield Finding("store", BAD, one_line(error), "See that it is mounted, or that its credentials are set.")
        return
    took = 1000 * (time.monotonic() - began)
    size = sum(manifest.bytes for manifest in newest)
    yield Finding("store", GOOD, f"{len(newest)} models of {format_bytes(size)}, read in {took:.0f} ms")
    for problem in catalogue.problems.values():
        yield Finding("store", NOTE, problem, "Import it again under another name, or remove it.")
    if not newest:
        yield Finding("store", NOTE, f"no model in {url}", "`embedding-service import` puts one there.")
    if size > available_memory():
        remedy = "Use --tier mmap, or more machines: `embedding-service plan` says how many."
        yield Finding("store", NOTE, f"{format_bytes(size)} of rows are more than the memory here", remedy)
    if store.is_local and not os.access(url, os.W_OK):
        yield Finding("store", NOTE, f"{url} cannot be written to", "Serving needs no more. Imports and branches do.")
