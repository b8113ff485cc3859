"""A shard's share of a branch: what it accepts, what its rows are, and how they come back."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from support.cluster import START_SECONDS, until
from support.training import (
    DIM,
    MODEL,
    ROWS,
    TABLE,
    InProcess,
    changes,
    new_branch,
    pieces_of,
    spread,
    start_rows,
    store_to_train,
)
from torch import Tensor
from xxhash import xxh3_64_intdigest

from embedding_service.errors import (
    CorruptPart,
    InvalidRequest,
    OutOfRange,
    OutOfTurn,
    Overloaded,
    Redirect,
    SessionEnded,
    StoreError,
    Unavailable,
)
from embedding_service.store.store import Store
from embedding_service.training import checkpoints
from embedding_service.training.branch import Branch, create_branch
from embedding_service.training.checkpoints import Snapshot
from embedding_service.training.log import NEVER, PUSH, Draft, Log, Record
from embedding_service.training.push import PushReader
from embedding_service.training.seats import change_seat, read_seat
from embedding_service.training.share import Change, Share
from embedding_service.training.tables import TrainedTable
from embedding_service.wire import embedding_pb2 as base_wire
from embedding_service.wire import training_pb2 as wire

KINDS = ("sgd", "rowwise_adagrad", "adagrad", "rowwise_adam")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which each test makes a branch of another name."""
    return store_to_train(tmp_path_factory.mktemp("base"))


class Shares:
    """All shares of a branch, in this process."""

    def __init__(self, store: Path, branch: Branch, logs: Path) -> None:
        self.branch, self._store, self._logs = branch, Store(store), logs
        self.open: dict[str, Share] = {}
        for shard in branch.shares:
            self.start(shard)

    def start(self, shard: str, sync: float = NEVER) -> Share:
        self.open[shard] = Share(self._store, self.branch, shard, self._logs / shard, sync)
        return self.open[shard]

    def crash(self, shard: str) -> Share:
        """It goes without a word, and comes back. A thread cannot be killed, so its checkpoint is waited for."""
        gone = self.open.pop(shard)
        gone._wait_for_writer()
        gone._log._lock.close()
        return self.start(shard)

    def begin(self, session: int, workers: int = 1) -> None:
        for share in self.open.values():
            share.begin(session, workers)

    def push(self, session: int, step: int, worker: int = 0, most: int = 200) -> None:
        for shard, ids, gradients in spread(self.branch, *changes(step, worker, most)):
            share = self.open[shard]
            share.accept(share.read(pieces_of(self.branch, session, step, ids, gradients, worker)))

    def rows(self) -> Tensor:
        rows = torch.empty(ROWS, DIM)
        every = torch.arange(ROWS)
        for shard, ids, _ in spread(self.branch, every, every):
            rows[ids] = self.open[shard].rows(TABLE, ids.numpy())[0]
        return rows

    def close(self) -> None:
        for share in self.open.values():
            share.close()


class Make(Protocol):
    """Makes the shares of a new branch."""

    def __call__(self, kind: str = ..., shards: int = ..., every: int = ...) -> Shares: ...


@pytest.fixture
def make(base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Shares] = []

    def shares(kind: str = "rowwise_adagrad", shards: int = 2, every: int = 1000) -> Shares:
        name = f"{request.node.name.partition('[')[0][-80:]}-{kind}-{len(made)}-{shards}"
        branch = new_branch(base, kind, [f"s{number}" for number in range(shards)], every, name)
        made.append(Shares(base, branch, tmp_path / str(len(made))))
        return made[-1]

    yield shares
    for each in made:
        each.close()


@pytest.mark.parametrize("kind", KINDS)
def test_t4_rows_are_those_of_training_in_process_on_any_number_of_shards(make: Make, kind: str) -> None:
    """One of the shards dies after a checkpoint, and once more before the next."""
    reference = InProcess(kind).until(12)
    for shards in (1, 3):
        shares = make(kind, shards, every=5)
        shares.begin(1)
        assert torch.equal(shares.rows(), start_rows())
        for step in range(1, 13):
            shares.push(1, step)
            if step in (5, 8):
                shares.crash("s0")
        assert torch.equal(shares.rows(), reference)


@pytest.mark.parametrize("kind", KINDS)
def test_t4_one_row_alone_has_the_bits_that_it_has_in_company(kind: str) -> None:
    together, alone = InProcess(kind), InProcess(kind)
    ids, gradients = changes(1)
    together.step((ids, gradients))
    for row in range(len(ids)):
        alone.steps = 0
        alone.step((ids[row : row + 1], gradients[row : row + 1]))
    assert torch.equal(together.rows, alone.rows)


def test_t1_a_push_counts_once_and_one_out_of_turn_not_at_all(make: Make) -> None:
    shares = make(shards=1)
    shares.begin(7)
    [share] = shares.open.values()
    first, second, third = (share.read(pieces_of(shares.branch, 7, step, *changes(step))) for step in (1, 2, 3))
    with pytest.raises(OutOfTurn, match=r"step 2 .* step 1 is expected"):
        share.accept(second)
    for push in (first, first, second, second, first, third):
        share.accept(push)
    assert share.applied == 3
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(3))
    assert [change.step for change in share.source()[1] if change.kind == "push"] == [1, 2, 3]
    share.begin(8, 1)
    with pytest.raises(SessionEnded, match=r"session 7 .* session 8 began"):
        share.accept(share.read(pieces_of(shares.branch, 7, 4, *changes(4))))
    with pytest.raises(SessionEnded):
        share.begin(7, 1)
    assert share.applied == 3


def test_t1_a_step_waits_for_all_workers_and_adds_in_their_order(make: Make) -> None:
    """Many rows are in the pushes of all three: a sum of two is the same in any order."""
    shares, reference = make(shards=2), InProcess("rowwise_adagrad")
    shares.begin(1, workers=3)
    for step in range(1, 5):
        for worker in (2, 0, 1) if step % 2 else (1, 2, 0):
            assert all(share.applied == step - 1 for share in shares.open.values())
            shares.push(1, step, worker, ROWS)
        reference.step(*(changes(step, worker, ROWS) for worker in range(3)))
    assert torch.equal(shares.rows(), reference.rows)


def test_t1_t4_a_step_that_fails_half_way_is_not_done_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done again from the checkpoint and the log. Nobody sees the rows of before."""
    shares = make(shards=1, every=3)
    shares.begin(1)
    [share] = shares.open.values()
    for step in range(1, 5):
        shares.push(1, step)
    share._wait_for_writer()
    really = TrainedTable.step

    def fails(*arguments: Any) -> None:
        really(*arguments)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(TrainedTable, "step", fails)
        with pytest.raises(MemoryError):
            shares.push(1, 5)
    uses: list[Callable[[], object]] = [
        shares.rows,
        share.advance,
        lambda: shares.push(1, 6),
        lambda: shares.begin(2),
        lambda: share.rewind(4),
        lambda: share.want_checkpoint(4),
    ]
    for use in uses:
        with pytest.raises(Unavailable, match=r"share s0 of .* failed while its rows changed, and is opened again"):
            use()
    assert share.is_broken and not shares.crash("s0").is_broken
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(5))


def test_t5_rows_are_of_the_step_that_is_said_though_pushes_go_on(make: Make) -> None:
    shares, reference = make("sgd", 1), InProcess("sgd")
    shares.begin(1)
    [share] = shares.open.values()
    every, expected, over = torch.arange(ROWS).numpy(), [start_rows()], threading.Event()
    for step in range(1, 81):
        reference.step(changes(step, 0, ROWS))
        expected.append(reference.rows.clone())

    def read() -> set[int]:
        seen: set[int] = set()
        while not over.is_set():
            rows, step = share.rows(TABLE, every)
            assert torch.equal(rows, expected[step]), f"rows of another step than {step}"
            seen.add(step)
        return seen

    with ThreadPoolExecutor(2) as threads:
        reading = [threads.submit(read) for _ in range(2)]
        try:
            for step in range(1, 81):
                shares.push(1, step, 0, ROWS)
        finally:
            over.set()
    assert all(len(each.result()) > 1 for each in reading)


def bad_pushes(branch: Branch) -> dict[str, tuple[list[bytes], type[Exception], str]]:
    ids, gradients = torch.tensor([1, 5, 9]), torch.ones(3, DIM)
    other = gradients.clone()
    other[1, 3] = torch.nan
    good = pieces_of(branch, 1, 1, ids, gradients)

    def of(ids: list[int], gradients: Tensor = gradients, step: int = 1) -> list[bytes]:
        return pieces_of(branch, 1, step, torch.tensor(ids), gradients)

    changed = bytearray(good[0])
    changed[-60] ^= 1

    def said(**fields: object) -> list[bytes]:
        """The good push with other fields."""
        piece = wire.PushPiece.FromString(good[0])
        for name, value in fields.items():
            setattr(piece, name, value)
        return [piece.SerializeToString()]

    in_two = [wire.PushPiece.FromString(each) for each in good * 2]
    in_two[0].last, in_two[1].encoding = False, base_wire.ROW_ENCODING_FLOAT16
    in_two[1].gradients = in_two[1].gradients[: 3 * DIM * 2]
    in_two[1].checksum = xxh3_64_intdigest(b"".join(each.ids + each.gradients for each in in_two))
    around_nothing = [wire.PushPiece.FromString(good[0]) for _ in range(3)]
    around_nothing[0].last = around_nothing[1].last = False
    around_nothing[1].ids = around_nothing[1].gradients = b""
    around_nothing[2].checksum = xxh3_64_intdigest(b"".join(each.ids + each.gradients for each in around_nothing))
    return {
        "an id past the end": (of([1, 5, ROWS]), OutOfRange, f"id {ROWS} at position 2"),
        "a negative id": (of([-1, 5, 9]), OutOfRange, "id -1 at position 0"),
        "an id twice": (of([1, 5, 5]), InvalidRequest, "ids of table t must ascend"),
        "ids that descend": (of([9, 5, 1]), InvalidRequest, "5 comes after 9"),
        "an id again, after nothing": (
            [each.SerializeToString() for each in around_nothing],
            InvalidRequest,
            "1 comes after 9",
        ),
        "an id of another shard": (of([1, 5, ROWS // 8]), Redirect, f"id {ROWS // 8} of table t is of part 1"),
        "a gradient that is no number": (of([1, 5, 9], other), InvalidRequest, "table t, id 5 is not finite"),
        "an infinite one": (of([1, 5, 9], gradients / 0), InvalidRequest, "id 1 is not finite"),
        "too few gradients": (of([1, 5, 9], gradients[:2]), InvalidRequest, "3 ids take"),
        "rows too wide": (of([1, 5, 9], torch.ones(3, DIM + 1)), InvalidRequest, "3 ids take"),
        "a bit that changed": ([bytes(changed)], InvalidRequest, "checksum of the push"),
        "no last piece": ([], InvalidRequest, "no last piece"),
        "a table that is not there": (said(table="u"), InvalidRequest, "no table 'u' in .*; its tables: t"),
        "another branch": (said(branch="m@other"), InvalidRequest, "a push for branch 'm@other' came to"),
        "a rate that is no number": (said(learning_rate=float("nan")), InvalidRequest, "learning_rate .* got nan"),
        "a negative rate": (said(learning_rate=-1.0), InvalidRequest, "learning_rate must be a number from 0 on"),
        "no encoding": (said(encoding=0), InvalidRequest, "table t have encoding 0: send FLOAT32"),
        "rows as they are stored": (said(encoding=base_wire.ROW_ENCODING_STORED), InvalidRequest, "send FLOAT32"),
        "two encodings": ([each.SerializeToString() for each in in_two], InvalidRequest, "table t come in several"),
        "a worker that is not there": (said(worker=1), InvalidRequest, "worker 1 of session 1 .* with 1 workers"),
        "a session that has not begun": (said(session=2), InvalidRequest, "session 2 .* begin first"),
        "a step too far": (said(step=3), OutOfTurn, "pushed step 3 of .*, step 1 is expected"),
        "step 0": (of([1, 5, 9], step=0), InvalidRequest, "step must be 1 or more"),
        "garbage": ([b"\xff\xff"], InvalidRequest, "malformed"),
    }


def test_t2_everything_about_a_push_is_checked_before_anything_is_done(make: Make) -> None:
    shares = make(shards=2)
    shares.begin(1)
    share = shares.open["s0"]
    for name, (pieces, error, said) in bad_pushes(shares.branch).items():
        with pytest.raises(error, match=said):
            share.accept(share.read(pieces))
            pytest.fail(name)
    assert share.applied == 0 and torch.equal(shares.rows(), start_rows())
    shares.push(1, 1)
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(1))
    for shard in shares.branch.shares:  # nor is any of it in the log
        shares.crash(shard)
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(1))


def test_what_no_branch_can_have_is_refused_with_its_name(make: Make, base: Path) -> None:
    def of(optimizer: wire.Optimizer) -> None:
        create_branch(Store(base), f"{MODEL}@refused", wire.OpenRequest(optimizer=optimizer), {}, ["s0"])

    with pytest.raises(InvalidRequest, match=r"unknown optimizer 'lamb'; known: sgd, rowwise_adagrad"):
        of(wire.Optimizer(kind="lamb"))
    with pytest.raises(InvalidRequest, match=r"rowwise_adam: eps, beta1 and beta2 must be .* 1, got 1e-08, 0.9, 1"):
        of(wire.Optimizer(kind="rowwise_adam", eps=1e-8, beta1=0.9, beta2=1.0))
    [share] = make(shards=1).open.values()
    with pytest.raises(InvalidRequest, match="workers must be from 1 to 10,000, got 0"):
        share.begin(1, 0)
    share.begin(1, 2)
    with pytest.raises(InvalidRequest, match="session 1 has 2 workers, not 3"):
        share.begin(1, 3)


@pytest.mark.parametrize("kind", ["rowwise_adagrad"])
def test_t7_a_share_that_dies_at_any_step_comes_back_with_the_same_bits(make: Make, kind: str) -> None:
    shares, reference = make(kind, 2, every=4), InProcess(kind)
    shares.begin(1, workers=2)
    for step in range(1, 7):
        shares.push(1, step, 1)
        share = shares.crash("s0")
        assert (share.applied, share.accepted) == (step - 1, [step - 1, step])
        shares.push(1, step, 0)
        assert shares.crash("s1").applied == step
        assert torch.equal(shares.rows(), reference.until(step, workers=2))


def test_t7_recovery_stops_at_the_first_record_that_is_not_whole(make: Make, tmp_path: Path) -> None:
    shares = make(shards=1)
    shares.begin(1)
    for step in (1, 2, 3):
        shares.push(1, step)
    [path] = tmp_path.glob("0/s0/log-*.records")
    shares.open.pop("s0").close()
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) - 40):
        path.write_bytes(data[:size])
        share = shares.start("s0")
        assert share.applied == 2 and torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(2))
        shares.push(1, 3)  # the client still has it
        assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(3))
        shares.open.pop("s0").close()
    broken = bytearray(data)
    broken[len(data) // 2] ^= 4  # in the second push
    path.write_bytes(broken)
    assert shares.start("s0").applied == 1


def flip(path: Path) -> None:
    """A bit in the middle of a file is another one."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_t7_a_corrupt_file_that_a_checkpoint_covers_takes_nothing_away(make: Make, tmp_path: Path) -> None:
    shares = make(shards=1, every=5)
    shares.begin(1)
    for step in range(1, 18):
        shares.push(1, step)
        shares.open["s0"]._wait_for_writer()
    shares.open.pop("s0").close()
    first, second = sorted(tmp_path.glob("0/s0/log-*.records"))
    flip(first)
    share = shares.start("s0")
    assert share.applied == 17 and torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(17))
    assert first.with_suffix(".corrupt").exists() and not first.exists() and second.exists()
    assert share._oldest_step() == 15  # for what was between is not there
    assert [change.step for change in share.source()[1] if change.kind == "push"] == [16, 17]
    shares.begin(2)
    with pytest.raises(InvalidRequest, match="can go back to step 15 and no further"):
        share.rewind(14)
    share.rewind(16)
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(16))
    assert shares.crash("s0").applied == 16


def test_t7_a_corrupt_file_that_is_needed_is_named_and_nothing_is_removed(make: Make, tmp_path: Path) -> None:
    shares = make(shards=1)
    shares.begin(1)
    for step in range(1, 6):
        shares.push(1, step)
    shares.open["s0"]._begin_log_file(5)  # its checkpoint was not written
    shares.push(1, 6)
    first, second = sorted(tmp_path.glob("0/s0/log-*.records"))
    whole = first.read_bytes()
    flip(first)
    files = {path: path.read_bytes() for path in (first, second)}
    shares.begin(2)
    files[second] = second.read_bytes()
    said = rf"{first} is corrupt at byte [\d,]+, .* put a whole copy of the file there, or remove .*/s0 to go back"
    with pytest.raises(CorruptPart, match=said):  # a share that is open
        shares.open["s0"].rewind(5)
    shares.open.pop("s0").close()
    with pytest.raises(CorruptPart, match=said):
        shares.start("s0")
    assert {path: path.read_bytes() for path in sorted(tmp_path.glob("0/s0/log-*"))} == files
    first.write_bytes(whole)
    assert shares.start("s0").applied == 6
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(6))


def test_t7_a_torn_record_before_a_file_without_pushes_is_cut_off(make: Make, tmp_path: Path) -> None:
    """Releases before began the next file while a push was on its way into this one."""
    shares = make(shards=1)
    shares.begin(1)
    for step in (1, 2):
        shares.push(1, step)
    shares.open["s0"]._begin_log_file(2)
    shares.open.pop("s0").close()
    first, _ = sorted(tmp_path.glob("0/s0/log-*.records"))
    with first.open("ab") as file:
        file.write(bytes(1000))
    assert shares.start("s0").applied == 2
    shares.push(1, 3)
    assert shares.crash("s0").applied == 3
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(3))


def test_t7_a_log_of_another_release_is_refused_and_stays(make: Make, tmp_path: Path) -> None:
    shares = make(shards=1)
    shares.begin(1)
    shares.push(1, 1)
    shares.open.pop("s0").close()
    [path] = tmp_path.glob("0/s0/log-*.records")
    other = path.read_bytes().replace(b"ESL2", b"ESL9")
    path.write_bytes(other)
    with pytest.raises(StoreError, match=r"log of version b'9', and this release reads b'2': start .*/s0 to go back"):
        shares.start("s0")
    assert path.read_bytes() == other


def test_t7_a_log_that_is_gone_makes_another_timeline(make: Make, tmp_path: Path) -> None:
    shares = make(shards=1, every=2)
    shares.begin(1)
    for step in (1, 2, 3):
        shares.push(1, step)
    [share] = shares.open.values()
    share.close()
    assert share.timeline == 0
    for path in tmp_path.glob("0/s0/*"):
        path.unlink()
    share = shares.start("s0")
    assert (share.timeline, share.applied) == (1, 2)
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(2))
    assert shares.crash("s0").timeline == 1


@pytest.mark.parametrize("kind", ["rowwise_adam"])
def test_t8_a_branch_goes_back_to_any_step(make: Make, kind: str) -> None:
    shares, references = make(kind, 2, every=3), [start_rows()]
    one = InProcess(kind)
    for step in range(1, 12):
        references.append(one.until(step).clone())
    shares.begin(1)
    for step in range(1, 12):
        shares.push(1, step)
    for session, step in enumerate((11, 10, 7, 6), 2):
        shares.begin(session)
        for share in shares.open.values():
            share.rewind(step)
        assert torch.equal(shares.rows(), references[step])
        assert torch.equal(shares.rows(), references[step]) and shares.crash("s0").applied == step
    for step in range(7, 12):  # the same steps again, from there
        shares.push(5, step)
    assert torch.equal(shares.rows(), references[11])
    with pytest.raises(InvalidRequest, match="is at step 11 and cannot begin at step 12"):
        shares.open["s0"].rewind(12)


def test_t8_a_branch_goes_back_over_its_first_checkpoint_and_not_over_two(make: Make) -> None:
    """What it began from counts as one of the two that are kept."""
    shares = make("rowwise_adagrad", 1, every=5)
    shares.begin(1)
    [share] = shares.open.values()
    for step in range(1, 7):
        shares.push(1, step)
    share._wait_for_writer()
    assert checkpoints.saved_steps(share.folder, "s0") == [5]
    shares.begin(2)
    share.rewind(2)
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(2))
    for step in range(3, 11):
        shares.push(2, step)
    share._wait_for_writer()
    shares.begin(3)
    with pytest.raises(InvalidRequest, match="can go back to step 5 and no further"):
        share.rewind(4)


def test_t9_a_checkpoint_is_of_one_step_though_pushes_go_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for full in (True, False):
        monkeypatch.setattr(checkpoints, "_CHUNK_BYTES", (700 if full else 70) * 4 * DIM)
        shares = make("adagrad", 1)
        shares.begin(1)
        for step in range(1, 4):
            shares.push(1, step)
        [share] = shares.open.values()
        changed = share.tables[TABLE].changed_since(1)
        some = torch.arange(ROWS) if full else changed
        expected = {name: tensor[some] for name, tensor in share.tables[TABLE].tensors.items()}
        snapshot = share._snapshot = Snapshot(share.tables, None if full else {TABLE: changed})
        step, got = 4, {}
        for (_, name), item in snapshot.items.items():
            chunks = []
            while item.rows_left:
                chunks.append(item.copy_next())
                shares.push(1, step)  # between any two chunks
                step += 1
            got[name] = torch.cat(chunks)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert torch.equal(shares.rows(), InProcess("adagrad").until(step - 1))
        share._snapshot = None
        share.want_checkpoint(step - 1)
        share._wait_for_writer()
        assert checkpoints.whole_steps(share.folder, shares.branch) == [step - 1]


def test_a_chunk_of_a_checkpoint_costs_no_more_for_steps_that_changed_none_of_its_rows(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_CHUNK_BYTES", 1024 * 4 * DIM)
    [share] = make("sgd", 1).open.values()
    snapshot = Snapshot(share.tables)
    [item] = snapshot.items.values()
    for first in (0, 1020, 2040, 2040):
        snapshot.put_aside(TABLE, torch.arange(first, first + 8))
    for _ in range(3):
        snapshot.put_aside(TABLE, torch.empty(0, dtype=torch.int64))
    assert {chunk: len(parts) for chunk, parts in item._aside.items()} == {0: 2, 1: 2}
    item.copy_next()
    snapshot.put_aside(TABLE, torch.arange(0, 8))
    assert {chunk: len(parts) for chunk, parts in item._aside.items()} == {1: 2}


def test_t8_t9_checkpoints_of_what_changed_give_all_steps_and_those_they_lie_over_are_kept(make: Make) -> None:
    """The primary dies now and then, so it goes on with chains that others began."""
    shares, one = make("rowwise_adam", 1, every=1), InProcess("rowwise_adam")
    references, overs, kept = [start_rows()], [], []
    for step in range(1, 41):
        references.append(one.until(step).clone())
    shares.begin(1)
    [share] = shares.open.values()
    for step in range(1, 41):
        shares.push(1, step)
        share._wait_for_writer()
        if step % 9 == 0:
            share = shares.crash("s0")
            assert torch.equal(shares.rows(), references[step])
        chain = checkpoints.chain(share.folder, "s0", step)
        overs.append(len(chain) - 1)
        kept = sorted(int(path.name.partition("-")[2]) for path in share.folder.glob("checkpoint-*"))
        assert {each.step for each in chain} <= set(kept)
        rows = checkpoints.SavedRows(share.folder, "s0", chain, TABLE).read(100, 3000)
        assert torch.equal(torch.from_numpy(rows), references[step][100:3000])
    assert max(overs) == checkpoints.MOST_OVER and overs.count(0) == 3  # a full one at first, and at steps 17 and 33
    assert kept == list(range(33, 41)) and share._oldest_step() == 39
    folder = checkpoints.checkpoint_folder(share.folder, 40)
    assert (folder / "s0" / TABLE / "rows.safetensors").stat().st_size < ROWS * DIM * 4 / 8
    shares.begin(2)
    share.rewind(39)
    assert torch.equal(shares.rows(), references[39])
    shares.push(2, 40)
    share._wait_for_writer()
    assert torch.equal(shares.rows(), references[40])
    with pytest.raises(InvalidRequest, match="can go back to step 39 and no further"):
        share.rewind(37)
    path = checkpoints.checkpoint_folder(share.folder, 36) / "s0" / TABLE / "rows.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptPart, match=r"checkpoint-0*36/s0/t/rows.safetensors is corrupt"):
        checkpoints.load_checkpoint(share.folder, "s0", 40, share.tables)


def test_t2_a_push_that_the_disk_does_not_take_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = make(shards=1)
    shares.begin(1)
    shares.push(1, 1)
    write = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        if len(data) > 100:
            write(file, data[:50], at)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data, at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(Overloaded, match=r"takes no more \(No space left on device\): free space"):
            shares.push(1, 2)
    assert shares.open["s0"].applied == 1
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(1))  # lookups go on
    for step in (2, 3):
        shares.push(1, step)
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(3))
    assert shares.crash("s0").applied == 3
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(3))


def test_t2_a_push_that_was_given_up_leaves_nothing_that_looks_like_one(tmp_path: Path) -> None:
    """Its pieces were in the log, and what comes next is as long as that part of them which is no record."""
    (forged := Log(tmp_path / "forged", NEVER)).ready(0)
    forged.append(Record(PUSH, 9, [b"forged"]))
    [path] = (tmp_path / "forged").glob("*.records")
    (log := Log(tmp_path / "log", NEVER)).ready(0)
    log.append(Record(PUSH, 1, [b"first"]))
    draft = Draft(log)
    for piece in (bytes(8), path.read_bytes()):
        draft.add(piece)
    log.append(Record(PUSH, 2, [bytes(8 + 8)]))
    log._lock.close()  # the process dies
    assert [record.step for record in Log(log.folder, NEVER).read()] == [1, 2]


def test_t3_pieces_count_once_their_push_is_whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedding_service.client.gradients.PIECE_BYTES", 16 * DIM)
    shares = make(shards=1)
    shares.begin(1)

    def begun(step: int) -> PushReader:
        reader = shares.open["s0"].reader()
        for piece in pieces_of(shares.branch, 1, step, *changes(step)):
            reader.add(piece)
        return reader

    begun(1)
    assert shares.crash("s0").applied == 0
    for step in range(1, 5):
        begun(step)  # a trainer that gave up
        early = begun(step)
        if step == 3:
            shares.open["s0"]._begin_log_file(2)  # a checkpoint, between the last piece and the push
        shares.open["s0"].accept(early.end())
    assert shares.crash("s0").applied == 4
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(4))


def test_t9_a_checkpoint_that_is_asked_for_while_it_is_written_is_written_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written twice, it lay over itself, and nobody could load it."""
    shares, goes_on = make(shards=1, every=4), threading.Event()
    [share] = shares.open.values()
    write, wait = checkpoints.write_checkpoint, share._wait_for_writer

    def write_later(*arguments: Any) -> None:
        goes_on.wait()
        write(*arguments)

    def wait_for_it() -> None:
        goes_on.set()
        wait()

    shares.begin(1)
    for step in range(1, 8):
        shares.push(1, step)
    wait()
    monkeypatch.setattr(checkpoints, "write_checkpoint", write_later)
    shares.push(1, 8)
    monkeypatch.setattr(share, "_wait_for_writer", wait_for_it)
    share.want_checkpoint(8)
    wait()
    assert [saved.step for saved in checkpoints.chain(share.folder, share.name, 8)] == [4, 8]
    assert shares.crash("s0").applied == 8
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(8))


def test_t9_a_checkpoint_that_finds_the_disk_full_loses_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = make(shards=1, every=4)
    shares.begin(1, workers=2)
    for step in range(1, 4):
        shares.push(1, step, 0)
        shares.push(1, step, 1)
    shares.push(1, 4, 1)
    [share] = shares.open.values()

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:  # once the new file is written
        patched.setattr("embedding_service.training.log.sync_folder", full)
        shares.push(1, 4, 0)
    assert share.applied == 4
    with pytest.raises(Overloaded, match=r"checkpoint of .* at step 4 cannot be written .*free space"):
        share.has_checkpoint(4)
    shares.push(1, 5, 1)
    share = shares.crash("s0")
    assert (share.applied, share.accepted) == (4, [4, 5])
    shares.push(1, 5, 0)
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(5, workers=2))


def test_t7_a_new_file_of_the_log_that_was_not_finished_takes_nothing_away(make: Make, tmp_path: Path) -> None:
    """The process died when it had written only the session to it."""
    shares = make(shards=1, every=1000)
    shares.begin(1, workers=2)
    for step in (1, 2):
        shares.push(1, step, 0)
        shares.push(1, step, 1)
    shares.push(1, 3, 1)
    shares.open["s0"]._log.begin_file(2, [Share._session_record(1, 2)])
    share = shares.crash("s0")
    assert len(list(tmp_path.glob("0/s0/log-*.records"))) == 2
    assert (share.applied, share.accepted) == (2, [2, 3])


def test_t8_a_log_that_is_rewritten_is_on_disk_before_it_counts_and_counts_before_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power then has the records before, or those after."""
    log = Log(tmp_path / "log", sync=NEVER)
    log.ready(0)
    log.append(Record(PUSH, 1, [b"before"]))
    log.begin_file(1, [])
    done: list[str] = []
    fsync, rename, unlink = os.fsync, Path.replace, Path.unlink

    def note_sync(file: int) -> None:
        fsync(file)
        [name] = [
            each.name for each in (log.folder, *log.folder.iterdir()) if os.path.samestat(each.stat(), os.fstat(file))
        ]
        done.append(f"sync {name}")

    def note_name(path: Path, target: Path) -> Path:
        done.append(f"name {target.name}")
        return rename(path, target)

    def note_gone(path: Path) -> None:
        done.append(f"remove {path.name}")
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", note_sync)
        patched.setattr(Path, "replace", note_name)
        patched.setattr(Path, "unlink", note_gone)
        log.rewrite([Record(PUSH, 1, [b"after"])])
    first, second = "log-000000000000000", "log-000000000000001"
    assert done == [
        *(f"sync {first}.new", "sync log"),
        *(f"name {first}.whole", "sync log"),
        *(f"remove {second}.records", "sync log"),
        *(f"name {first}.records", "sync log"),
    ]
    assert [[bytes(piece) for piece in record.pieces] for record in log.read()] == [[b"after"]]
    log.close()


def test_t8_going_back_that_finds_the_disk_full_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = make(shards=1, every=3)
    shares.begin(1)
    [share] = shares.open.values()
    for step in range(1, 12):
        shares.push(1, step)
        share._wait_for_writer()
    shares.begin(2)
    files = sorted(path.name for path in share._log.folder.iterdir())

    def full(file: int, data: bytes, at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(Overloaded, match=r"takes no more \(No space left on device\): free space"):
            share.rewind(8)
    assert sorted(path.name for path in share._log.folder.iterdir()) == files
    assert share.applied == 11 and checkpoints.saved_steps(share.folder, "s0") == [3, 6, 9]
    shares.push(2, 12)
    share = shares.crash("s0")
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(12))
    share.rewind(10)
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(10))


def test_t8_going_back_that_somebody_else_forbids_changes_nothing(make: Make) -> None:
    """This primary was deposed and does not know it. The newer checkpoints are the new primary's."""
    shares = make(shards=1, every=3)
    shares.begin(1)
    [share] = shares.open.values()
    for step in range(1, 8):
        shares.push(1, step)
        share._wait_for_writer()
    files = sorted(path.name for path in share._log.folder.iterdir())
    seat = read_seat(share.folder, shares.branch, "s0")
    change_seat(share.folder, shares.branch, "s0", seat, primary="s1")
    with pytest.raises(Unavailable, match=r"share s0 of .* is at shard s1 by now"):
        share.rewind(4)
    assert checkpoints.saved_steps(share.folder, "s0") == [3, 6] and share.applied == 7
    assert sorted(path.name for path in share._log.folder.iterdir()) == files


@pytest.mark.parametrize("seen", ["at once", "late"])
def test_t4_t10_the_checkpoint_of_a_step_that_was_lost_with_its_primary_does_not_stand(
    base: Path, tmp_path: Path, seen: str
) -> None:
    """The copy did not get that step, so the trainer does another one in its place."""
    branch = new_branch(base, "rowwise_adagrad", ["s0"], 5, f"lost-{seen.replace(' ', '-')}", copies=2)
    sent: list[Change] = []
    primary = Share(Store(base), branch, "s0", tmp_path / "s0", NEVER, on_change=sent.append)
    copy = Share(Store(base), branch, "s0", tmp_path / "s1", NEVER, shard="s1", copy=True)
    copy.restart(0)
    primary.begin(1, 1)
    for step in range(1, 6):
        primary.accept(primary.read(pieces_of(branch, 1, step, *changes(step))))
    for change in sent:
        if change.step < 5:
            copy.do(change)
    primary._wait_for_writer()
    primary._log._lock.close()  # it dies
    assert checkpoints.saved_steps(copy.folder, "s0") == [5]
    seat = read_seat(copy.folder, branch, "s0")
    change_seat(copy.folder, branch, "s0", seat, primary="s1", in_sync={"s1": copy.log_identity})
    there = checkpoints.checkpoint_folder(copy.folder, 5)
    if seen == "late":
        there.rename(tmp_path / "not-seen-yet")
    copy.lead(0)
    if seen == "late":
        (tmp_path / "not-seen-yet").rename(there)
    copy.begin(2, 1)
    copy.rewind(copy.applied)
    assert copy.applied == 4
    reference = InProcess("rowwise_adagrad")
    reference.until(4)
    for step in range(5, 8):
        other = changes(100 + step)
        reference.step(other)
        copy.accept(copy.read(pieces_of(branch, 2, step, *other)))
    copy.close()
    again = Share(Store(base), branch, "s0", tmp_path / "s1", NEVER, shard="s1")
    rows, step = again.rows(TABLE, torch.arange(ROWS).numpy())
    assert step == 7 and torch.equal(rows, reference.rows)
    again.close()


def test_t3_a_step_that_was_gone_back_over_is_not_durable_again_before_it_is_on_disk(make: Make) -> None:
    shares = make(shards=1)
    shares.open.pop("s0").close()
    share = shares.start("s0", sync=0.001)
    shares.begin(1)
    for step in range(1, 11):
        shares.push(1, step)
    until(lambda: (share._log._synced, share.durable) == (share._log._written, 10), "all steps on disk")
    share._log._sync = 3600  # from here on nothing comes to disk by itself
    shares.begin(2)
    share.rewind(4)
    shares.push(2, 5)
    assert share.applied == 5 and share.durable <= 4


def test_t3_a_step_is_durable_though_its_record_was_on_disk_before_the_step_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()

    def sync(file: int, really: Callable[[int], None] = os.fdatasync) -> None:
        really(file)
        synced.set()

    log = Log(tmp_path / "log", sync=0.001)
    log.ready(0)
    until(lambda: (log._synced, log.durable) == (log._written, 0), "what was there")
    monkeypatch.setattr(os, "fdatasync", sync)
    log.append(Record(PUSH, 1, [b"rows"]))
    assert synced.wait(START_SECONDS)
    log.applied(1)
    until(lambda: log.durable == 1, "the step on disk")
    log.close()


def test_t3_a_disk_that_fails_in_the_background_stops_training_and_not_reading(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = make(shards=1)
    shares.open.pop("s0").close()
    share = shares.start("s0", sync=0.001)
    shares.begin(1)
    shares.push(1, 1)
    until(lambda: share.durable == 1, "the first push on disk")

    def fails(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fails)
        shares.push(1, 2)
        until(lambda: share.has_failed, "the disk to fail")
    with pytest.raises(Overloaded, match=r"has failed \(Input/output error\).*pushes after step 1: start the shard"):
        shares.push(1, 3)
    assert share.applied == 2 and share.durable == 1
    assert torch.equal(shares.rows(), InProcess("rowwise_adagrad").until(2))
