"""Debian's Prometheus: scrapes processes of a test, and answers queries."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.cluster import free_port, until

MONITORING = Path(__file__).parent.parent.parent / "k8s/components/monitoring"


def need_prometheus() -> None:
    """Skip the test where there is none."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        pytest.skip("needs prometheus and promtool: `make test-packages` installs Debian's as root")


def promtool(*arguments: str, given: str = "") -> None:
    """Run a check. Fails the test with what it says."""
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rule_groups() -> list[dict[str, Any]]:
    """Of the rules that Kubernetes brings."""
    groups: list[dict[str, Any]] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]
    return groups


def board_queries() -> dict[str, list[str]]:
    """The queries of each board, by its name."""
    boards = {path.stem: json.loads(path.read_text()) for path in sorted((MONITORING / "boards").iterdir())}
    return {
        name: [
            target["expr"].replace("$__rate_interval", "1m")
            for panel in board["panels"]
            for target in panel.get("targets", ())
        ]
        for name, board in boards.items()
    }


class Prometheus:
    """One that runs."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, query: str) -> list[dict[str, Any]]:
        """What a query gives now."""
        answer = httpx.get(f"http://{self._address}/api/v1/query", params={"query": query}, timeout=60).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def exemplars(self, query: str) -> list[dict[str, str]]:
        """The labels of exemplars that it has kept for a query."""
        ever = {"query": query, "start": "0", "end": str(time.time() + 60)}
        answer = httpx.get(f"http://{self._address}/api/v1/query_exemplars", params=ever, timeout=60).json()
        assert answer["status"] == "success", answer
        return [each["labels"] for series in answer["data"] for each in series["exemplars"]]

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            return httpx.get(f"http://{self._address}/-/ready", timeout=60).status_code == 200
        except httpx.HTTPError:
            return False


@contextmanager
def prometheus(
    folder: Path, jobs: Mapping[str, Sequence[str]], groups: Sequence[Mapping[str, Any]]
) -> Iterator[Prometheus]:
    """Scrape the addresses of each job every two seconds, and go by these rules."""
    folder.mkdir()
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": list(groups)}))
    scraped = [{"job_name": name, "static_configs": [{"targets": list(each)}]} for name, each in jobs.items()]
    every = {"scrape_interval": "2s", "evaluation_interval": "1s"}
    config = {"global": every, "rule_files": [str(folder / "rules.yml")], "scrape_configs": scraped}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    command.append("--enable-feature=exemplar-storage")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    running = Prometheus(address)
    try:
        until(lambda: running.is_ready() or process.poll() is not None, "Prometheus")
        assert process.poll() is None, (folder / "log").read_text()
        yield running
    finally:
        process.kill()
        process.wait()
