"""Load: closed and open loops, and the command that puts it on a running service."""

import re
import time

import pytest
from support.cluster import Up
from typer.testing import CliRunner

from embedding_service.cli import app
from embedding_service.commands.load import run_load


def test_a_closed_loop_calls_again_after_each_answer() -> None:
    turns: list[int] = []
    load = run_load([turns.append], 0.3)
    assert turns == list(range(len(turns)))
    assert len(load.latencies) == len(turns) > 1
    assert load.seconds >= 0.3


def test_an_open_loop_counts_from_when_a_call_was_due() -> None:
    def slow_at_first(turn: int) -> None:
        time.sleep(0.3 if turn == 0 else 0)

    load = run_load([slow_at_first], 0.4, rate=50)
    # Twenty fall due, one every 20 ms; those due while the first hangs wait for it, 20 ms less each.
    assert len(load.latencies) + load.errors["unsent"] == 20
    assert all(seconds >= 0.3 - 0.02 * turn for turn, seconds in enumerate(load.latencies[:15]))


def test_what_could_not_be_sent_is_counted() -> None:
    load = run_load([lambda turn: time.sleep(0.15)], 0.2, rate=100)
    assert len(load.latencies) + load.errors["unsent"] == 20
    assert load.errors["unsent"] > 0


def test_errors_are_counted_by_kind() -> None:
    load = run_load([lambda turn: 1 // (turn - 1)], 0.3)
    assert load.errors["ZeroDivisionError"] == 1
    assert len(load.latencies) > 1


def run_bench(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *arguments])
    return done.exit_code, done.output + str(done.exception or "")


@pytest.mark.parametrize("rate", [(), ("--rate=20",)])
def test_a_running_service(service: Up, rate: tuple[str, ...]) -> None:
    code, output = run_bench(
        service.address, "--table=int8/ngram", "--batch=12", "--batch=100", "--clients=2", "--seconds=1", *rate
    )
    assert code == 0, output
    assert ("open loop, 20 lookups due a second" if rate else "closed loop") in output
    for rows in ("12", "100"):
        [line] = [line for line in output.splitlines() if re.match(rf"\W+{rows} ", line)]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        lookups, p50, p99, errors, floor = (float(cells[index].replace(",", "")) for index in (1, 2, 4, 7, 8))
        assert lookups + errors == 20 if rate else errors == 0  # of those that fall due some may not be sent
        assert lookups > 0
        assert 0 < p50 <= p99
        assert floor > 0


def test_a_table_that_is_not_served(service: Up) -> None:
    code, output = run_bench(service.address, "--table=int8/nope")
    assert code == 1
    assert "no table 'int8/nope' is served" in output
    assert "int8/ngram" in output
