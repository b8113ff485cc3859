"""What an attack brought, for people and for the exit code."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from rich.markup import escape
from rich.table import Table

from support.attack.neighbours import Figures

MIB = 1 << 20
# What is promised. A member's memory may stay above what it was by so much, which malloc keeps for the next answers.
KEPT_BYTES = 256 * MIB
# Attackers, members and neighbours share the same few cores here: a neighbour waits longer because of that alone.
TIMES_SLOWER, FLOOR_SECONDS = 10.0, 0.5
BEFORE, DURING = "before", "during"


@dataclass
class Result:
    """One class of attack: `resident` and others in bytes by member, `lost` in words by member."""

    name: str
    members: int
    ended: Counter[str] = field(default_factory=Counter)
    resident: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    not_mended: str = ""
    before: Figures = field(default_factory=Figures)
    during: Figures = field(default_factory=Figures)

    def faults(self, *, timed: bool = True) -> list[str]:
        """All that should not be, in lines of some length; `timed`: how long the neighbours waited, too."""
        found = [f"{member} {how}" for member, how in self.lost.items()]
        found += [self.not_mended] if self.not_mended else []
        if not self.ended.total():
            found.append("made no call")
        if self.during.wrong:
            found.append(f"{self.during.wrong} lookups of neighbours were answered wrongly")
        if self.during.failed:
            found.append(f"{self.during.failed} lookups of neighbours failed")
        if not self.during.seconds:
            found.append("no lookup of a neighbour was answered")
        before, during = (_percentile(each, 99) for each in (self.before, self.during))
        if timed and during > max(FLOOR_SECONDS, TIMES_SLOWER * before):
            found.append(f"neighbours' p99 went from {before * 1000:.0f} to {during * 1000:.0f} ms")
        for member, nbytes in self.after.items():
            if nbytes - self.resident[member] > KEPT_BYTES:
                found.append(f"{member} keeps {(nbytes - self.resident[member]) // MIB:,} MiB more than before")
        return [fault[:300] for fault in found]


@dataclass
class Outcome:
    """A whole run."""

    seed: int
    results: list[Result]
    troubles: list[str]
    seconds: float = 0.0

    def check(self) -> None:
        """Raise AssertionError that names all that should not be, but for times, which tell of the machine."""
        faults = [f"{result.name}: {fault}" for result in self.results for fault in result.faults(timed=False)]
        assert not faults, "\n".join([*faults, *self.troubles])

    def table(self) -> Table:
        """The figures."""
        calls = sum(result.ended.total() for result in self.results)
        table = Table(
            title=f"attack, seed {self.seed}: {calls:,} calls in {self.seconds:.0f} s",
            caption="lookups are the neighbours', times in ms; anonymous memory of controller and shards in MiB",
        )
        table.add_column("class")
        headings = ("calls", "lookups", "failed", "wrong", "p50 before", "during", "p99 before", "during")
        for heading in (*headings, "alive", "memory before", "peak", "after"):
            table.add_column(heading, justify="right")
        for result in self.results:
            table.add_row(*_row(result), style="red" if result.faults() else "")
        return table

    def verdict(self) -> str:
        """One line, then each fault, with how the calls ended."""
        faults = [f"{result.name}: {fault}" for result in self.results for fault in result.faults()]
        lines = [f"{len(faults)} faults" if faults else "held: 0 wrong, 0 failed, 0 members lost, memory back"]
        return escape("\n".join([*lines, *faults, *self.troubles]))

    def endings(self) -> str:
        """How each class's calls ended."""
        return escape(
            "\n".join(
                f"{result.name}: {', '.join(f'{count:,} {how}' for how, count in result.ended.most_common(8))}"
                for result in self.results
            )
        )


def _row(result: Result) -> list[str]:
    times = [f"{_percentile(figures, q) * 1000:.1f}" for q in (50, 99) for figures in (result.before, result.during)]
    memory = [
        " ".join(f"{each[name] // MIB:,}" for name in each) for each in (result.resident, result.peak, result.after)
    ]
    figures = (result.ended.total(), len(result.during.seconds), result.during.failed, result.during.wrong)
    alive = f"{result.members - len(result.lost)}/{result.members}"
    return [result.name, *(f"{each:,}" for each in figures), *times, alive, *memory]


def _percentile(figures: Figures, q: int) -> float:
    return float(np.percentile(figures.seconds, q)) if figures.seconds else 0.0
