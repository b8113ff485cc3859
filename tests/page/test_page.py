"""What people see of one cluster: its page in a real browser, and Prometheus with boards and alerts."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
import yaml
from page.browser import PATIENCE, chromium, picture, violations
from page.prometheus import Prometheus, board_queries, need_prometheus, prometheus, promtool, rule_groups
from playwright.sync_api import Browser, Page, expect
from support.checkpoints import longcat_checkpoint, longcat_table
from support.cluster import Members, free_port, until
from support.tokenizers import byte_level_bpe

from embedding_service import EmbeddingClient, NgramHasher, RemoteEmbedding
from embedding_service.client.channels import open_channel
from embedding_service.client.optimizers import SGD
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import embedding_pb2_grpc

pytestmark = [pytest.mark.service, pytest.mark.timeout(1200)]  # a busy machine starts a cluster and a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Served(NamedTuple):
    """A running service, its page's address, and the ports of its metrics: the controller's first."""

    members: Members
    url: str
    metrics: list[int]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a tokenizer."""
    folder = longcat_checkpoint(tmp_path_factory.mktemp("checkpoint") / "longcat")
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path, traced: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three shards and a controller with a page, each part twice. One branch of it was trained for three steps."""
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    for dtype in ("fp32", "int8"):
        import_checkpoint(checkpoint, str(folder / "store"), f"longcat-{dtype}", dtype=dtype, part_bytes=64 << 10)
    page = {"controller": [f"--http-port={port}"]}
    metrics = ports_in_a_row(4)
    members = Members(folder, folder / "store", 3, 2, 64 << 20, more=page, metrics_port=metrics[0], variables=traced)
    try:
        members.restart()
        train(members.address)
        yield Served(members, f"http://127.0.0.1:{port}", metrics)
    finally:
        members.end()


def ports_in_a_row(count: int) -> list[int]:
    while True:
        ports = [free_port() for _ in range(count)]
        if ports == list(range(ports[0], ports[0] + count)):
            return ports


def train(address: str) -> None:
    """Three steps of longcat-fp32@tuned."""
    with (
        EmbeddingClient(address, timeout=60) as client,
        client.train("longcat-fp32@tuned", optimizer=SGD(lr=0.1)) as session,
    ):
        module = RemoteEmbedding(client, "longcat-fp32@tuned/ngram")
        for _ in range(3):
            module(torch.arange(0, 19_000, 1000)).sum().backward()
            session.step()


@pytest.fixture
def said() -> list[str]:
    """What the browser complained of."""
    return []


@pytest.fixture
def page(browser: Browser, served: Served, said: list[str]) -> Iterator[Page]:
    """The page, as it shows a cluster that serves all."""
    context = browser.new_context(color_scheme="light", viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(served.url)
    expect(page.locator("#state")).to_have_text("All is served")
    expect(page.locator("#shard-rows tr")).to_have_count(3)
    yield page
    context.close()


def test_it_answers_rows_n_grams_and_what_if(page: Page, checkpoint: Path, said: list[str]) -> None:
    ids, tokens = [130, 5], [3, 14, 15, 92]
    lookup, ngrams, plan = (page.locator(f"#{form}") for form in ("lookup", "ngrams", "plan"))
    lookup.get_by_label("Table").select_option("longcat-fp32/ngram")
    lookup.get_by_label("Row ids").fill(" ".join(map(str, ids)))
    lookup.get_by_role("button").click()
    for row_id in ids:
        row = lookup.locator("tbody tr").filter(has=page.get_by_role("cell", name=str(row_id), exact=True))
        expect(row).to_contain_text("  ".join(f"{value:.5g}" for value in longcat_table()[row_id, :6].tolist()))
    lookup.get_by_label("Row ids").fill("99999999")
    lookup.get_by_role("button").click()
    expect(lookup).to_contain_text("id 99999999 at position 0 is outside table")

    ngrams.get_by_label("Model").select_option("longcat-fp32")
    ngrams.get_by_label("Text, or token ids").fill(", ".join(map(str, tokens)))
    ngrams.get_by_role("button").click()
    expect(ngrams.locator("tbody tr")).to_have_count(len(tokens))
    hasher = NgramHasher.from_config(checkpoint)
    for position, heads in enumerate(hasher.row_ids(torch.tensor([tokens]))[0, :, 0].tolist()):
        expect(ngrams.locator("tbody tr").nth(position)).to_contain_text("  ".join(map(str, heads)))

    ngrams.get_by_label("Text, or token ids").fill("The cafe, naïve")
    ngrams.get_by_role("button").click()
    expect(ngrams.locator("tbody tr").first.locator(".name")).to_have_text("The")

    plan.get_by_label("Add shards").fill("1")
    plan.get_by_label("shard-1").check()
    plan.get_by_role("button").click()
    expect(plan).to_contain_text("It fits.")
    expect(plan.locator("tbody tr")).to_have_count(3)
    expect(plan.locator("tbody")).to_contain_text("new-0")
    expect(plan.locator("tbody")).not_to_contain_text("shard-1")
    assert not violations(page)
    picture(page, "answers")
    plan.get_by_label("GiB each").fill("0.001")
    for name in ("shard-0", "shard-2"):
        plan.get_by_label(name).check()
    plan.get_by_role("button").click()
    expect(plan.locator(".bad-text")).to_contain_text("It would fit with")
    # The browser itself tells of answers that are errors.
    assert len(said) == 2 and all("the server responded with a status of 4" in each for each in said)


def test_it_shows_the_cluster_to_everybody(page: Page, served: Served, said: list[str]) -> None:
    status = served.members.status()
    for shard in status.shards:
        expect(page.locator("#shard-rows tr").filter(has_text=shard.address)).to_contain_text(shard.shard_id)
    for model in status.models:
        row = page.locator("#model-rows tr").filter(has_text=f"{model.model.name}@{model.model.version}")
        expect(row).to_contain_text(f"{model.parts} of {model.parts}")
    branch = page.locator("#branch-rows tr")
    expect(branch).to_contain_text("longcat-fp32@tuned")
    expect(branch.locator("td[data-label=Step]")).to_have_text("3")
    expect(branch).to_contain_text("none")
    parts = page.locator("[role=option]")
    expect(parts).to_have_count(sum(model.parts for model in status.models))

    # Without a mouse: a map says where each part is.
    first = page.get_by_role("listbox").first
    first.press("End")
    last = first.locator("[role=option]").last
    expect(last).to_have_attribute("aria-selected", "true")
    assert first.get_attribute("aria-activedescendant") == last.get_attribute("id")
    expect(page.locator("#cell")).to_have_text(
        re.compile(r"longcat-fp32@1/ngram, part \d+; rows [\d,]+ to 19,475; on shard-")
    )

    assert not violations(page)
    picture(page, "light")
    page.emulate_media(color_scheme="dark")
    assert not violations(page)
    picture(page, "dark")
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_function("document.documentElement.scrollWidth <= innerWidth")
    assert not violations(page)
    picture(page, "phone")
    assert not said


def test_it_follows_shards_that_die_and_come_without_a_reload(page: Page, served: Served, said: list[str]) -> None:
    page.evaluate("window.same = true")
    gone = ("shard-1", "shard-2")
    for name in gone:
        served.members.processes[name].end(signal.SIGKILL)
    expect(page.locator("#shard-rows tr")).to_have_count(1)
    told = "2 copies of every part need 2 shards; 1 can hold any, so 1 are held: add shards"
    problem = page.locator("#problem-list li").filter(has_text=told)
    expect(problem).to_have_count(1)
    expect(problem).to_contain_text("Add shards, or lower --replicas.")
    expect(page.locator("#state")).to_have_text("1 problem")
    assert not violations(page)
    picture(page, "problem")
    for name in gone:
        served.members.restart_member(name)
    expect(page.locator("#shard-rows tr")).to_have_count(3)
    expect(page.locator("#state")).to_have_text("All is served")
    expect(page.locator("#problems")).to_be_hidden()
    assert page.evaluate("window.same")
    assert not said


def process_down(groups: list[dict[str, Any]], instance: str) -> dict[str, str]:
    """What the alert says of a process."""
    [rule] = [each for group in groups for each in group["rules"] if each.get("alert") == "EmbeddingProcessDown"]
    return {name: text.replace("{{ $labels.instance }}", instance) for name, text in rule["annotations"].items()}


def test_rules_boards_and_metrics_are_as_prometheus_wants_them(served: Served, tmp_path: Path) -> None:
    need_prometheus()
    asked = [query for each in board_queries().values() for query in each]
    boards = {"name": "boards", "rules": [{"record": f"board:query_{n}", "expr": expr} for n, expr in enumerate(asked)]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [*rule_groups(), boards]}))
    promtool("check", "rules", str(tmp_path / "rules.yml"))
    # A process that is away for two minutes fires the alert, and one that is away for a moment does not.
    down = {"alertname": "EmbeddingProcessDown", "severity": "warning", "job": "embedding-shard"}
    alerts = [
        {"exp_labels": {**down, "instance": "b"}, "exp_annotations": process_down(rule_groups(), "b")},
    ]
    case = {
        "interval": "15s",
        "input_series": [
            {"series": 'up{job="embedding-shard",instance="a"}', "values": "1x4 0x1 1x20"},
            {"series": 'up{job="embedding-shard",instance="b"}', "values": "1x4 0x20"},
        ],
        "alert_rule_test": [
            {"eval_time": "90s", "alertname": "EmbeddingProcessDown"},
            {"eval_time": "4m", "alertname": "EmbeddingProcessDown", "exp_alerts": alerts},
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [case]}))
    promtool("test", "rules", str(tmp_path / "test.yml"))
    for port in served.metrics[:2]:
        promtool("check", "metrics", given=httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text)


def test_it_is_no_way_in_for_other_sites(served: Served) -> None:
    found = httpx.get(served.url, timeout=60)
    assert "default-src 'none'" in found.headers["Content-Security-Policy"]
    # A name that somebody else made lead here, and questions that a form of another site could send.
    other = httpx.get(f"{served.url}/api/overview", headers={"Host": "evil.example:80"}, timeout=60)
    assert other.status_code == 403 and "localhost" in other.json()["error"]
    question = '{"table": "longcat-fp32/ngram", "ids": [1]}'
    plain = httpx.post(f"{served.url}/api/lookup", content=question, headers={"Content-Type": "text/plain"}, timeout=60)
    assert plain.status_code == 400
    long = httpx.post(f"{served.url}/api/lookup", json={"table": "x" * 70_000}, timeout=60)
    assert long.status_code == 400 and "65,536 bytes" in long.json()["error"]
    assert httpx.get(f"{served.url}/api/nothing", timeout=60).status_code == 404


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def traces_of(address: str, running: Prometheus) -> set[str]:
    """Look a row up, as a part of this trace. Returns those that Prometheus has as exemplars of times."""
    request = wire.LookupRequest(model="longcat-int8", table="ngram", ids=[1], traceparent=f"00-{TRACE}-{'1' * 16}-01")
    with open_channel(address, None) as channel:
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Lookup(request)
    return {labels["trace_id"] for labels in running.exemplars("embedding_lookup_seconds_bucket")}


# The last one: the shard stays away.
def test_every_panel_has_data_and_a_killed_shard_fires_the_alert(
    served: Served, traced: dict[str, str], tmp_path: Path
) -> None:
    need_prometheus()
    groups = rule_groups()
    for group in groups:
        for rule in group["rules"]:
            rule.pop("for", None)  # the rules as they are take minutes
    controller, *shards = (f"127.0.0.1:{port}" for port in served.metrics)
    jobs = {"embedding-controller": [controller], "embedding-shard": shards}
    queries = board_queries()
    del queries["workers"]  # which Ray's agents tell of
    asked = [query for each in queries.values() for query in each]
    with (
        prometheus(tmp_path / "prometheus", jobs, groups) as running,
        EmbeddingClient(served.members.address, timeout=60) as client,
    ):

        def without_data() -> list[str]:
            client.lookup("longcat-int8/ngram", torch.arange(100))
            return [query for query in asked if not running.ask(query)]

        until(lambda: not without_data(), "data of every panel")
        if traced:
            until(lambda: TRACE in traces_of(served.members.address, running), "the trace of a bucket")
        served.members.processes["shard-2"].end(signal.SIGKILL)
        firing = f'ALERTS{{alertname="EmbeddingProcessDown",alertstate="firing",instance="{shards[2]}"}}'
        until(lambda: running.ask(firing), "the alert")
