"""What a shard may report. Anything else is refused where it comes in. No later code checks again."""

from __future__ import annotations

from embedding_service.errors import InvalidRequest
from embedding_service.machine import split_address
from embedding_service.placement.demand import CUDA, MOST_MEMORY
from embedding_service.wire import control_pb2 as control

MOST_ACCESSES = 1 << 60
MOST_PARTS = 1 << 18
MOST_VERSIONS = 10_000
# Characters of an address, an id, a topology. Host names have at most 253.
MOST_CHARACTERS = 300
# Terms are microseconds of the clock. A higher one would leave no controller any to follow with.
MOST_TERM = 1 << 52
# Failures to load that a shard reports.
MOST_FAILURES, FAILURE_CHARACTERS = 1_000, 500


def check_report(report: control.ShardReport, term: int, first: control.ShardReport | None = None) -> None:
    """Refuse a report that is not one of a shard's.

    Args:
        report: As it came.
        term: The controller's own, which may be above the bound for others.
        first: The first report of the same stream. This one must not contradict it.

    Raises InvalidRequest, naming the field and its bound.
    """
    for name in ("shard_id", "address", "device", "tier", "topology"):
        _check_text(name, getattr(report, name))
    for name in ("path", "boot_id"):
        _check_text(f"near.{name}", getattr(report.near, name))
    if not report.shard_id:
        raise InvalidRequest("shard_id must not be empty")
    if report.device not in ("cpu", CUDA):
        raise InvalidRequest(f'device must be "cpu" or "{CUDA}", got {report.device!r}')
    _check_address(report.address)
    if first:
        for name in ("shard_id", "address", "device", "incarnation"):
            if getattr(report, name) != getattr(first, name):
                raise InvalidRequest(f"{name} must stay {getattr(first, name)!r}, got {getattr(report, name)!r}")
    bounds = {"memory_limit": MOST_MEMORY, "term": max(MOST_TERM, term), "epoch": MOST_TERM}
    for name, most in bounds.items():
        _check_most(name, getattr(report, name), most)
    for name, most in {"parts": MOST_PARTS, "failures": MOST_PARTS, "served": MOST_VERSIONS}.items():
        _check_most(f"the number of {name}", len(getattr(report, name)), most)
    if len(report.part_accesses) not in (0, len(report.parts)):
        raise InvalidRequest(
            f"part_accesses must be one for each of {len(report.parts)}, got {len(report.part_accesses)}"
        )
    _check_most("part_accesses", max(report.part_accesses, default=0), MOST_ACCESSES)


def _check_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise InvalidRequest(f"{name} must be at most {most:,}, got {value:,}")


def _check_text(name: str, value: str) -> None:
    if len(value) > MOST_CHARACTERS or not value.isprintable():
        raise InvalidRequest(f"{name} must be at most {MOST_CHARACTERS} printable characters, got {value[:100]!r}")


def _check_address(address: str) -> None:
    try:
        host, port = split_address(address)
    except InvalidRequest as error:
        raise InvalidRequest(f"address: {error}") from error
    if not port or any(each in host for each in " /@") or not host.isascii():
        raise InvalidRequest(f"address must be the HOST:PORT that others reach this shard by, got {address!r}")
