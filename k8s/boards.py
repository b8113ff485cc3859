"""Writes Grafana's boards, one JSON file each: `python k8s/boards.py`. A test compares the files with what it makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models.dashboard import DataSourceRef

FOLDER = Path(__file__).parent / "components/monitoring/boards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
WIDE, HALF, THIRD, SIXTH = 24, 12, 8, 4
# A shard's name beside what its process tells.
NAMED = "* on (instance) group_left (shard_id) embedding_shard_info"

Queries = dict[str, str]


def chart(title: str, unit: str, queries: Queries, about: str = "", span: int = HALF, stacked: bool = False) -> Any:
    """Lines over time. `queries`: by the legend of each."""
    panel = timeseries.Panel().title(title).unit(unit).span(span).height(8).datasource(SOURCE).min(0)
    panel = panel.fill_opacity(20 if stacked else 8).line_width(1.5).show_points(shapes.VisibilityMode.NEVER)
    if about:
        panel = panel.description(about)
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    legends = common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.LIST)
    legends = legends.placement(shapes.LegendPlacement.BOTTOM).show_legend(True)
    tooltip = common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI)
    panel = panel.legend(legends).tooltip(tooltip)
    for letter, (legend, query) in zip("ABCDE", queries.items(), strict=False):
        panel = panel.with_target(prometheus.Dataquery().expr(query).legend_format(legend).ref_id(letter).range())
    return panel


def figure(title: str, unit: str, query: str) -> Any:
    """One number."""
    return (
        stat.Panel().title(title).unit(unit).span(SIXTH).height(4).datasource(SOURCE)
        .with_target(prometheus.Dataquery().expr(query).legend_format(title).ref_id("A").range())
    )  # fmt: skip


def percentile(share: float, metric: str, by: str = "le") -> str:
    """A query of how long that share of a histogram's events took at most."""
    return f"histogram_quantile({share}, sum by ({by}) (rate({metric}_bucket[$__rate_interval])))"


def rate(metric: str) -> str:
    """Of a counter, over all processes."""
    return f"sum(rate({metric}[$__rate_interval]))"


def rate_of_shards(metric: str) -> str:
    """Of a counter, by shard."""
    return f"rate({metric}[$__rate_interval]) {NAMED}"


def service() -> list[Any]:
    """Whether all is well, and how much is asked."""
    return [
        figure("Shards", "none", "embedding_shards"),
        figure("Versions served", "none", "embedding_served_versions"),
        figure("Lost parts", "none", "embedding_lost_parts"),
        figure("Missing copies", "none", "embedding_missing_copies"),
        figure("Problems", "none", "embedding_problems"),
        figure("Processes down", "none", 'count(up{job=~"embedding.*"} == 0) or vector(0)'),
        chart("Rows", "rowsps", {
            "wired": rate("embedding_rows_total"), "near": rate("embedding_near_rows_total"),
            "forwarded": rate("embedding_forwarded_rows_total"),
        }, "Rows that shards sent, that clients read in place, and that shards asked of others for thin clients."),
        chart("Time to answer", "s", {
            "half within": percentile(0.5, "embedding_lookup_seconds"),
            "99 % within": percentile(0.99, "embedding_lookup_seconds"),
        }, "Of lookups at the shards."),
        chart("Lookups", "reqps", {"lookups": rate("embedding_lookups_total")}),
        chart("Errors", "reqps", {"errors": rate("embedding_request_errors_total")}),
        chart("Memory of rows", "bytes", {
            "held": "sum(embedding_held_bytes)", "offered": "sum(embedding_memory_limit_bytes)",
        }),
        chart("Bytes sent", "Bps", {"rows": rate("embedding_row_bytes_total")}),
    ]  # fmt: skip


def shards() -> list[Any]:
    """Each shard beside the others."""
    name = "{{shard_id}}"
    return [
        chart("Lookups", "reqps", {name: rate_of_shards("embedding_lookups_total")}, span=THIRD),
        chart("Rows", "rowsps", {name: rate_of_shards("embedding_rows_total")}, span=THIRD),
        chart("Near rows", "rowsps", {name: rate_of_shards("embedding_near_rows_total")}, span=THIRD),
        chart("99 % of lookups within", "s", {
            name: f'{percentile(0.99, "embedding_lookup_seconds", "le, instance")} {NAMED}',
        }, span=THIRD),
        chart("Errors", "reqps", {name: rate_of_shards("embedding_request_errors_total")}, span=THIRD),
        chart("Processor", "percentunit", {name: rate_of_shards("process_cpu_seconds_total")}, span=THIRD),
        chart("Rows held", "bytes", {name: f"embedding_held_bytes {NAMED}"}, span=THIRD, stacked=True),
        chart("Held of what is offered", "percentunit", {
            name: f"embedding_held_bytes / embedding_memory_limit_bytes {NAMED}",
        }, span=THIRD),
        chart("Resident memory", "bytes", {name: f"process_resident_memory_bytes {NAMED}"}, span=THIRD),
        chart("Parts held", "none", {name: f"embedding_held_parts {NAMED}"}),
        chart("Parts that cannot be held", "none", {name: f"embedding_failing_parts {NAMED}"}),
    ]  # fmt: skip


def training() -> list[Any]:
    """Branches that learn."""
    return [
        chart("Step", "none", {"{{branch}}": "min by (branch) (embedding_branch_step)"},
              "The step that all shares of a branch have reached."),
        chart("Steps a second", "none", {
            "{{branch}}": "min by (branch) (deriv(embedding_branch_step[$__rate_interval]))",
        }),
        chart("Steps not on disk yet", "none", {
            "{{branch}}": "max by (branch) (embedding_branch_step - embedding_branch_durable_step)",
        }, "What a sudden end of a shard's machine would cost. The client keeps these pushes and sends them again."),
        chart("Losses", "none", {"{{branch}}": "sum by (branch) (embedding_branch_losses_total)"},
              "How often updates were lost that had been accepted."),
    ]  # fmt: skip


def workers() -> list[Any]:
    """Replicas of models, as Ray's agents tell of them."""
    name = "ray_model_worker"
    return [
        chart("Tokens", "none", {
            "generated": rate(f"{name}_generated_tokens_total"), "read": rate(f"{name}_prompt_tokens_total"),
        }),
        chart("Time to the first token", "s", {
            "half within": percentile(0.5, f"{name}_time_to_first_token_seconds"),
            "99 % within": percentile(0.99, f"{name}_time_to_first_token_seconds"),
        }),
        chart("Requests", "none", {
            "in batches": f"sum({name}_batch_requests)", "waiting": f"sum({name}_queue_requests)",
        }, stacked=True),
        chart("Refused", "reqps", {"refused": rate(f"{name}_refused_requests_total")}),
        chart("Waiting for rows", "s", {
            "half within": percentile(0.5, f"{name}_lookup_wait_seconds"),
            "99 % within": percentile(0.99, f"{name}_lookup_wait_seconds"),
        }, "What a forward pass waits for its rows."),
        chart("Rows", "rowsps", {
            "near": rate(f"{name}_near_rows_total"), "wired": rate(f"{name}_wired_rows_total"),
            "from the cache": rate(f"{name}_cache_hits_total"),
        }),
    ]  # fmt: skip


BOARDS = {"service": service, "shards": shards, "training": training, "workers": workers}


def board(name: str, panels: Sequence[Any]) -> str:
    """A board as Grafana reads it."""
    made = dashboard.Dashboard(f"Embedding service: {name}").uid(f"embedding-{name}").tags(["embedding-service"])
    made = made.refresh("10s").time("now-1h", "now").timezone("browser").readonly()
    made = made.link(
        dashboard.DashboardLink("Boards").type("dashboards").tags(["embedding-service"]).keep_time(True)  # type: ignore[arg-type]
    )
    made = made.with_variable(dashboard.DatasourceVariable("source").label("Data source").type("prometheus"))
    for panel in panels:
        made = made.with_panel(panel)
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write all boards."""
    FOLDER.mkdir(exist_ok=True)
    for name, panels in BOARDS.items():
        (FOLDER / f"{name}.json").write_text(board(name, panels()))


if __name__ == "__main__":
    main()
