"""`top`: the cluster in the terminal, followed from second to second."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Annotated

import typer

from embedding_service.commands.query import DEFAULT_ADDRESS, AddressArgument
from embedding_service.commands.secured import TlsOption, TokenOption
from embedding_service.commands.text import format_bytes
from embedding_service.errors import EmbeddingServiceError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from embedding_service.wire import control_pb2 as control

# Views whose rates a curve shows.
BEATS = 30
_CURVE = " ▁▂▃▄▅▆▇█"
_BAR = 12


def top(
    address: AddressArgument = DEFAULT_ADDRESS,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    tls: TlsOption = None,
    token_file: TokenOption = None,
) -> None:
    """Follow shards, memory, rates, times to answer and problems. Ctrl-C ends it."""
    from rich.live import Live

    from embedding_service.client.status import get_status
    from embedding_service.commands.console import wide_console

    view, console = View(address), wide_console()
    status = get_status(address)  # a wrong address is told before the screen is taken
    with Live(view.show(status), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                try:
                    shown = view.show(get_status(address))
                except EmbeddingServiceError as error:
                    shown = view.failed(str(error))
                live.update(shown, refresh=True)
        except KeyboardInterrupt:
            return


class View:
    """What `top` shows of one status after another."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._rates: deque[float] = deque([0.0] * BEATS, maxlen=BEATS)
        self._last: RenderableType = ""

    def show(self, status: control.Status) -> RenderableType:
        """The view of a status."""
        from rich.console import Group
        from rich.text import Text

        wired = sum(shard.stats.rows_per_second for shard in status.shards)
        near = sum(shard.stats.near_rows_per_second for shard in status.shards)
        self._rates.append(wired + near)
        serving = sum(model.serving for model in status.models)
        state = ("all is served", "green") if not status.problems else (f"{len(status.problems)} problems", "bold red")
        head = Text.assemble(
            ("embedding-service ", "bold"),
            f"{self._address}  ",
            state,
            f"  {serving} of {len(status.models)} models  {wired:,.0f} rows/s wired, {near:,.0f} near  ",
            (curve(self._rates), "cyan"),
        )
        problems = [Text(f"problem: {problem.message}", style="red") for problem in status.problems]
        self._last = Group(head, *problems, self._shards(status), self._models(status))
        return self._last

    def failed(self, why: str) -> RenderableType:
        """The last view, and why there is no newer one."""
        from rich.console import Group
        from rich.text import Text

        return Group(Text(f"{why}: trying again", style="bold red"), self._last)

    def _shards(self, status: control.Status) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table("shard", "tier", "memory", box=None, header_style="dim", pad_edge=False)
        for heading in ("parts", "rows/s", "near/s", "lookups/s", "p50 ms", "p99 ms", "errors"):
            table.add_column(heading, justify="right")
        for shard in status.shards:
            stats = shard.stats
            missing = f" +{shard.parts_missing}" if shard.parts_missing else ""
            table.add_row(
                Text(shard.shard_id, style="yellow" if shard.draining else "bold"),
                f"{shard.device} {shard.tier}",
                _memory(stats.held_bytes, shard.memory_limit),
                f"{shard.parts}{missing}",
                f"{stats.rows_per_second:,.0f}",
                f"{stats.near_rows_per_second:,.0f}",
                f"{stats.lookups_per_second:,.0f}",
                f"{1000 * stats.p50_seconds:.3g}" if stats.p50_seconds else "-",
                f"{1000 * stats.p99_seconds:.3g}" if stats.p99_seconds else "-",
                f"{stats.errors:,}",
            )
        return table

    def _models(self, status: control.Status) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table("model", "family", box=None, header_style="dim", pad_edge=False)
        for heading in ("rows", "size", "parts", "state"):
            table.add_column(heading, justify="right")
        for model in status.models:
            whole = model.parts_ready == model.parts
            style = "green" if model.serving and whole else "red" if model.serving else "yellow"
            table.add_row(
                f"{model.model.name}@{model.model.version}",
                model.model.family,
                f"{sum(each.rows for each in model.model.tables):,}",
                format_bytes(model.bytes),
                f"{model.parts_ready} of {model.parts}",
                Text("loading" if not model.serving else "served" if whole else "parts lost", style=style),
            )
        return table


def curve(rates: deque[float]) -> str:
    """A character for each rate, as high as it is beside the largest."""
    most = max(rates) or 1.0
    return "".join(_CURVE[round((len(_CURVE) - 1) * rate / most)] for rate in rates)


def _memory(held: int, limit: int) -> Text:
    from rich.text import Text

    share = min(held / limit, 1.0) if limit else 0.0
    full = round(_BAR * share)
    style = "red" if share > 0.95 else "cyan"
    return Text.assemble(("━" * full, style), ("─" * (_BAR - full), "dim"), f" {format_bytes(held)} {share:.0%}")
