"""Reports of shards that are none. In plain text none claims rows that it has not, nor a high term."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from embedding_service.wire import control_pb2 as control
from embedding_service.wire.control_pb2_grpc import ControlServiceStub
from support.attack.window import ATTACKER, Window

MOST = (1 << 64) - 1
MIB = 1 << 20
# Of the table, no more than it has.
MOST_PARTS = 19
# Nobody listens there.
NOWHERE = "127.0.0.1:1"


def forged_reports(window: Window) -> None:
    """A second shard of an id that is there, the largest numbers, fields without sense, text that is no name."""
    values = window.values
    while window.open:
        for report in _forged(window):
            _register(window, report, values.uniform(0.2, 1.0))


def _forged(window: Window) -> list[control.ShardReport]:
    values = window.values
    part = control.PartRef(model="m", version="9", table="ngram", part=values.randrange(1 << 32))
    broken: dict[str, Any] = dict(address=NOWHERE, device="cpu", tier="ram")
    # The names that __main__ gives them.
    taken = values.choice([name for name in window.pids if name != "controller"])
    reports = [
        control.ShardReport(shard_id=taken, memory_limit=1, has_parts=True, **broken),
        control.ShardReport(shard_id="rich", memory_limit=MOST, has_parts=True, **broken),
        control.ShardReport(
            shard_id="asked", memory_limit=1, has_parts=True, parts=[part], part_accesses=[MOST], **broken
        ),
        control.ShardReport(shard_id="many", has_parts=True, parts=[part] * 3, part_accesses=[MOST] * 9, **broken),
        control.ShardReport(),
        control.ShardReport(shard_id="", address="", device="abacus", tier="[/red]", has_parts=True),
        control.ShardReport(shard_id="x\n2026 INFO forged \x1b[31m[/x]", memory_limit=1 << 40, **broken),
        control.ShardReport(shard_id="gpu", memory_limit=MOST, **(broken | {"device": "cuda", "tier": "cuda"})),
        control.ShardReport(
            shard_id="nan", stats=control.ShardStats(pid=MOST, uptime_seconds=float("nan"), lookups=MOST), **broken
        ),
        control.ShardReport(shard_id="drains", draining=True, has_parts=True, **broken),
        control.ShardReport(shard_id="\ud7ff" * values.randrange(1, 1000), topology="z" * 10000, **broken),
    ]
    return [*reports, *_of_a_member(reports, values.choice(window.shards))] if window.secure else reports


def _of_a_member(reports: list[control.ShardReport], taken: str) -> list[control.ShardReport]:
    """The same of a shard that has a member's certificate, and claims that a secured service alone withstands."""
    own = []
    for report in reports:
        own.append(control.ShardReport())
        own[-1].CopyFrom(report)
        own[-1].shard_id = ATTACKER
    about: dict[str, Any] = dict(shard_id=ATTACKER, device="cpu", tier="ram", memory_limit=1 << 40, has_parts=True)
    everything = [control.PartRef(model="m", version="1", table="ngram", part=part) for part in range(MOST_PARTS)]
    claims = [
        control.ShardReport(address=NOWHERE, parts=everything, **about),
        control.ShardReport(address=taken, parts=everything, incarnation=1, **about),
        *(control.ShardReport(address=NOWHERE, term=term, epoch=MOST, **about) for term in (MOST, 1 << 51)),
    ]
    return [*own, *claims]


def huge_reports(window: Window) -> None:
    """Ten megabytes of failures and of parts that nobody knows."""
    while window.open:
        parts = [control.PartRef(model="none", version="1", table="t" * 64, part=number) for number in range(100_000)]
        message = "[/x] \x1b[31m " + "f" * (window.values.randrange(1, 8) * MIB)
        failures = [control.PartFailure(part=parts[0], message=message)]
        failures += [control.PartFailure(part=part, message="broken") for part in parts[:20_000]]
        about: dict[str, Any] = dict(address=NOWHERE, device="cpu", tier="ram", memory_limit=1, has_parts=True)
        _register(window, control.ShardReport(shard_id=_name(window, "long"), parts=parts, **about), 0.5)
        _register(window, control.ShardReport(shard_id=_name(window, "failing"), failures=failures, **about), 1.0)


def come_and_go(window: Window) -> None:
    """Shards that register and disconnect every half a second."""
    number = 0
    while window.open:
        number += 1
        about: dict[str, Any] = dict(address=NOWHERE, device="cpu", tier="ram", memory_limit=1 << 20, has_parts=True)
        _register(window, control.ShardReport(shard_id=_name(window, f"guest-{number % 3}"), **about), 0.25)
        window.rest(0.25)


def _name(window: Window, name: str) -> str:
    """Of a shard that may report."""
    return ATTACKER if window.secure else name


def _register(window: Window, report: control.ShardReport, seconds: float) -> None:
    """Report it, again and again, for a while, then hang up."""
    if not window.open:
        return
    over = threading.Event()

    def reports() -> Iterator[control.ShardReport]:
        yield report
        while not over.wait(0.2):
            yield report

    with window.channel(window.control, window.member) as channel:
        with window.tried("answered"):
            answers = ControlServiceStub(channel).Register(reports(), timeout=seconds)
            for _ in answers:
                window.ended["told what to hold"] += 1
        over.set()
