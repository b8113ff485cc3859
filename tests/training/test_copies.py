"""Shares that move and have copies while a trainer goes on: T10."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.cluster import until
from support.training import (
    DIM,
    LR,
    MODEL,
    ROWS,
    TABLE,
    InProcess,
    InThread,
    changes,
    new_branch,
    pieces_of,
    store_to_train,
)
from typer.testing import CliRunner

from embedding_service import EmbeddingClient, InvalidRequest, RowwiseAdagrad
from embedding_service.cli import app
from embedding_service.client.training import Session
from embedding_service.errors import EmbeddingServiceError, Unavailable
from embedding_service.security.access import Access, access_of
from embedding_service.security.authority import prepare_folder
from embedding_service.serving import cancel
from embedding_service.shard import copies as copies_module
from embedding_service.shard import shares as shares_module
from embedding_service.shard.following import follow_once
from embedding_service.shard.opened import Opened
from embedding_service.shard.training import SERVICE
from embedding_service.store.store import Store
from embedding_service.training.branch import branch_folder, read_address, read_branch, write_address
from embedding_service.training.log import NEVER, Log
from embedding_service.training.seats import Seat, read_seats
from embedding_service.training.share import Share
from embedding_service.training.tables import TrainedTable
from embedding_service.wire import training_pb2 as wire

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One without branches."""
    return store_to_train(tmp_path / "base")


@pytest.fixture
def shards(store: Path, tmp_path: Path) -> Iterator[InThread]:
    """Two shards that train."""
    running = InThread(store, tmp_path / "logs", ["s0", "s1"])
    yield running
    running.close()


class Trainer:
    """Steps of `changes`, one after the other, on a thread of its own."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.failure: BaseException | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                push(self.session)
        except BaseException as error:
            self.failure = error

    def goes_on(self) -> None:
        """It does ten more steps."""
        target = self.session.steps + 10
        until(lambda: self.failure or self.session.steps >= target, "ten more steps")

    def end(self) -> None:
        """No more steps. What came of all of them is what training in this process gives."""
        self._end.set()
        self._thread.join()
        if self.failure:
            raise self.failure
        check(self.session)


def push(session: Session) -> None:
    session.add_gradients(TABLE, *changes(session.steps + 1))
    session.step()


def check(session: Session) -> None:
    rows = session.lookup(TABLE, torch.arange(ROWS))
    assert torch.equal(rows, InProcess("rowwise_adagrad").until(session.steps))


@contextmanager
def training(
    shards: InThread, name: str, copies: int = 1, at_step: int | None = None, access: Access | None = None
) -> Iterator[Session]:
    with (
        EmbeddingClient(list(shards.addresses.values()), timeout=60, tls=access or False) as client,
        client.train(
            f"{MODEL}@{name}",
            optimizer=RowwiseAdagrad(lr=LR),
            timeout=170,
            checkpoint_every=20,
            copies=copies,
            at_step=at_step,
        ) as session,
    ):
        yield session


def seats_of(store: Path, name: str) -> dict[str, Seat]:
    branch = read_branch(Store(store), f"{MODEL}@{name}")
    return read_seats(branch_folder(Store(store), MODEL, name), branch)


def wait_for(store: Path, name: str, condition: Callable[[dict[str, Seat]], bool]) -> dict[str, Seat]:
    def found() -> dict[str, Seat] | None:
        seats = seats_of(store, name)
        return seats if condition(seats) else None

    return until(found, f"the seats of {name}")


def led_by(*shards: str) -> Callable[[dict[str, Seat]], bool]:
    return lambda seats: sorted(seat.primary for seat in seats.values()) == sorted(shards)


def all_in_sync(seats: dict[str, Seat]) -> bool:
    return all(len(seat.in_sync) == 2 for seat in seats.values())


def test_t10_shares_move_to_shards_that_join_and_from_those_that_leave(store: Path, shards: InThread) -> None:
    with training(shards, "moves") as session:
        trainer = Trainer(session)
        trainer.goes_on()
        shards.drain("s1")
        assert led_by("s0", "s0")(seats_of(store, "moves"))
        shards.stop("s1")
        shards.route(["s0"])
        trainer.goes_on()
        shards.start("s2")
        wait_for(store, "moves", led_by("s0", "s2"))
        trainer.goes_on()
        trainer.end()
        assert not shards.logs_of(f"{MODEL}@moves", "s1").exists()


def test_t10_a_copy_in_sync_leads_when_the_primary_dies_and_one_that_fell_out_is_caught_up(
    store: Path, shards: InThread
) -> None:
    with training(shards, "copied", 2) as session:
        trainer = Trainer(session)
        for dead, alive in (("s1", "s0"), ("s0", "s1")):
            wait_for(store, "copied", all_in_sync)
            trainer.goes_on()
            shards.stop(dead)
            shards.route([alive])
            wait_for(store, "copied", led_by(alive, alive))
            trainer.goes_on()
            shards.start(dead)
        wait_for(store, "copied", all_in_sync)
        wait_for(store, "copied", led_by("s0", "s1"))
        trainer.end()
    # T8: shards that lead since they came back can go back as far as those before.
    with training(shards, "copied", 2, at_step=session.steps - 19) as again:
        assert again.begun_at == session.steps - 19 > 20
        check(again)


def test_t10_a_copy_in_sync_stays_though_large_pushes_have_not_reached_it_yet(
    store: Path, shards: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training(shards, "large", 2) as session:
        seats = wait_for(store, "large", all_in_sync)
        monkeypatch.setattr(copies_module, "_MOST_BYTES", 1)
        for _ in range(10):
            push(session)
        check(session)
        assert seats_of(store, "large") == seats


def test_s6_s9_copies_follow_by_their_own_certificates_and_who_trains_is_noted(store: Path, tmp_path: Path) -> None:
    secure = tmp_path / "secure"
    prepare_folder(secure, ["127.0.0.1"], ["s0", "s1"])
    shards = InThread(store, tmp_path / "logs", ["s0", "s1"], secure=secure)
    access = access_of(secure / "client", None)
    try:
        with training(shards, "noted", copies=2, access=access) as session:
            push(session)
            wait_for(store, "noted", all_in_sync)
            check(session)
            published_as = session.publish(version=None, dtype=None, base=None)
            number = str(session.number)
        lines = [json.loads(line) for line in (secure / "audit.jsonl").read_text().splitlines()]
        begun, published = (
            [(each["who"], each["model"], each.get("session")) for each in lines if each["action"] == action]
            for action in ("train", "publish")
        )
        assert begun and set(begun) == {("admin", f"{MODEL}@noted", number)}
        assert published == [("admin", published_as, None)]
        assert not any(each["action"] == "denied" for each in lines)
    finally:
        shards.close()


def test_shares_that_open_at_once_say_where_their_shard_is(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: write_address(tmp_path, "s1", f"10.0.0.1:{number}"), range(10, 60)))
    assert read_address(tmp_path, "s1").startswith("10.0.0.1:")
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["s1"]


def test_a_share_whose_opening_is_given_up_lets_go_of_its_log(store: Path, tmp_path: Path) -> None:
    """Its trainer dies. The process could not open that log again for as long as it lived."""
    branch = new_branch(store, "sgd", ["s0"])
    begun, goes_on, made = threading.Event(), threading.Event(), threading.Event()

    def make() -> Share:
        begun.set()
        goes_on.wait()
        share = Share(Store(store), branch, "s0", tmp_path / "log", NEVER)
        made.set()
        return share

    async def use() -> None:
        opened = Opened(branch, "s0", asyncio.get_running_loop())
        opened.seat = Seat(primary="s0", in_sync={"s0": ""})
        making = asyncio.create_task(opened.make(make))
        await asyncio.to_thread(begun.wait)
        await cancel([making])
        closing = asyncio.create_task(opened.close())
        await asyncio.sleep(0)
        await cancel([closing])
        goes_on.set()
        await asyncio.to_thread(made.wait)
        while not await asyncio.to_thread(can_be_opened):
            await asyncio.sleep(0.01)

    def can_be_opened() -> bool:
        try:
            Log(tmp_path / "log", NEVER).close()
        except Unavailable:
            return False
        return True

    asyncio.run(asyncio.wait_for(use(), 60))


def test_t10_a_copy_that_stopped_following_follows_again(
    store: Path, shards: InThread, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def count(*about: Any) -> None:
        nonlocal tries
        tries += 1
        await follow_once(*about)

    monkeypatch.setattr(shares_module, "follow_once", count)
    with training(shards, "stopped", 2) as session:
        wait_for(store, "stopped", all_in_sync)
        push(session)
        shards.end_following("s1", f"{MODEL}@stopped", "s0")
        for _ in range(3):  # they wait for the copy
            push(session)
        wait_for(store, "stopped", all_in_sync)
        assert "are dropped" not in caplog.text  # nobody waited until it was given up
        shards.stop("s0")
        until(lambda: tries > 40, "that many tries")
        said = Counter(line for line in caplog.messages if "Failed to connect" in line)
        assert len(said) <= 2 and set(said.values()) == {1}  # once of each share
        shards.route(["s1"])
        wait_for(store, "stopped", led_by("s1", "s1"))
        push(session)
        check(session)


@pytest.mark.parametrize("copies", [1, 2])
def test_t1_t10_a_share_that_fails_while_its_rows_change_is_opened_again_and_the_trainer_goes_on(
    store: Path, shards: InThread, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    name, really, failed = f"fails-{copies}", TrainedTable.step, threading.Event()

    def fails_once(*arguments: Any) -> None:
        really(*arguments)
        if not failed.is_set():
            failed.set()
            raise MemoryError

    with training(shards, name, copies) as session:
        wait_for(store, name, lambda seats: all(len(seat.in_sync) == copies for seat in seats.values()))
        for _ in range(3):
            push(session)
        monkeypatch.setattr(TrainedTable, "step", fails_once)
        for _ in range(3):
            push(session)
        check(session)
        assert failed.is_set() and session.steps == 6


def test_t10_a_deposed_primary_accepts_nothing(store: Path, tmp_path: Path) -> None:
    """It is cut off from all but the trainer, and does not know that its copy leads."""
    shards = InThread(store, tmp_path / "logs", ["s0", "s1"], patience=0.5)
    with contextlib.closing(shards), training(shards, "fenced", 2) as session:
        wait_for(store, "fenced", all_in_sync)
        for _ in range(3):
            push(session)
        shards.look_away("s0")
        shards.route(["s1"], told=["s1"])
        wait_for(store, "fenced", led_by("s1", "s1"))
        opened = shards.shares["s0"]._open[f"{MODEL}@fenced", "s0"]
        ids, gradients = torch.tensor([0, 1]), torch.ones(2, DIM)  # of a part of s0
        pieces = pieces_of(opened.branch, session.number, 4, ids, gradients)
        with grpc.insecure_channel(shards.addresses["s0"]) as channel:
            push_to = channel.stream_unary(f"/{SERVICE}/Push", None, wire.PushResponse.FromString)
            with pytest.raises(grpc.RpcError, match="share s0 of m@fenced is at shard s1"):
                push_to(iter(pieces), timeout=170)
        for _ in range(3):
            push(session)
        check(session)
        assert session.steps == 6


def test_a_branch_is_removed_when_nobody_trains_it_and_its_memory_comes_back(store: Path, tmp_path: Path) -> None:
    takes = ROWS * (DIM + 2) * 4  # rows, when they changed, and row-wise Adagrad's state
    shards = InThread(store, tmp_path / "logs", ["s0"], memory=takes * 3 // 2)
    name, folder = f"{MODEL}@gone", branch_folder(Store(store), MODEL, "gone")
    command = ["remove-branch", name, "--store", str(store)]
    with contextlib.closing(shards):
        with training(shards, "gone") as session:
            push(session)
            until(lambda: (folder / "trained").exists(), "the mark of a branch that is trained")
            log = shards.logs_of(name, "s0")
            refused = CliRunner().invoke(app, command)
            assert isinstance(refused.exception, InvalidRequest)
            assert re.search(r"m@gone was trained \d+ s ago: end its trainer, and ask again", str(refused.exception))
            said = f"share s0 of m@large takes {takes:,} bytes here, and {takes // 2:,} of this shard's .*--memory"
            with pytest.raises(EmbeddingServiceError, match=said), training(shards, "large"):
                pass
            done = CliRunner().invoke(app, ["remove-branch", f"{MODEL}@large", "--store", str(store)])
            assert done.exit_code == 0, done.output
            push(session)
            check(session)

        def removed() -> bool:
            os.utime(folder / "trained", (0, 0))  # the shard may say once more that somebody trained it
            return CliRunner().invoke(app, command).exit_code == 0

        until(removed, "the branch to be removed")
        until(lambda: not log.exists(), "the log to go")
        with training(shards, "gone") as session:  # another one, from the start
            assert session.begun_at == 0
            push(session)
            check(session)
