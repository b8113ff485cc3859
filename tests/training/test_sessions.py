"""Trainers against real shards: modules give gradients, shards learn, versions come of it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import grpc
import pytest
import torch
from support.checkpoints import DIM as NGRAM_DIM
from support.checkpoints import HEADS, VOCAB, longcat_table
from support.cluster import cluster, until
from support.mortal import HALF_WRITTEN, passed
from support.trainer import stores
from support.training import DIM, LR, MODEL, ROWS, TABLE, InThread, start_rows, store_to_train
from support.training_chaos import CONTROLLER, LOST_AFTER, TRAINER, Run
from torch import Tensor, nn

from embedding_service import (
    SGD,
    EmbeddingClient,
    InvalidRequest,
    LostUpdates,
    NotFound,
    OutOfRange,
    RemoteEmbedding,
    RowwiseAdagrad,
    RowwiseAdam,
    SessionEnded,
)
from embedding_service.client import gradients
from embedding_service.client.gradients import summed
from embedding_service.formats import get_format
from embedding_service.shard import training
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.store import Store
from embedding_service.training.branch import branch_folder, read_branch
from embedding_service.training.optimizers import optimizer_of
from embedding_service.training.seats import read_seats
from embedding_service.training.share import Share
from embedding_service.wire import embedding_pb2 as base_wire
from embedding_service.wire import training_pb2 as wire
from embedding_service.wire.training_pb2_grpc import TrainingServiceStub
from model_worker.longcat import NgramRows

NGRAMS = "ngram"


@pytest.fixture(scope="module")
def shards(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    """Two shards that train branches of a store."""
    folder = tmp_path_factory.mktemp("training")
    for dtype in ("fp32", "int4"):
        import_checkpoint(checkpoint, folder / "store", dtype, dtype=dtype, part_bytes=128 << 10)
    running = InThread(folder / "store", folder / "logs", ["s0", "s1"], sync=3600)
    yield running
    running.close()


@pytest.fixture
def own(shards: InThread) -> Iterator[EmbeddingClient]:
    """A client with sessions of its own."""
    with EmbeddingClient(list(shards.addresses.values()), timeout=30) as client:
        yield client


def batch(step: int, rows: int) -> Tensor:
    """Row ids int64 [4, 30], some of them more than once."""
    return torch.randint(0, rows, (4, 30), generator=torch.Generator().manual_seed(step)) // (1 + step % 3)


def loss_of(rows: Tensor, step: int) -> Tensor:
    """Something that every row's gradient depends on."""
    wanted = torch.randn(rows.shape, generator=torch.Generator().manual_seed(100 + step))
    return (rows - wanted).square().mean() * 50


class Reference:
    """The table in this process: the same loss, the same sums, the same optimizer."""

    def __init__(self, optimizer: RowwiseAdagrad | SGD | RowwiseAdam, rows: Tensor) -> None:
        self._optimizer, self._lr = optimizer_of(optimizer.message()), optimizer.lr
        self.rows = rows.clone()
        shapes = self._optimizer.state_shapes(*rows.shape)
        self._state = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self.losses: list[float] = []

    def step(self, number: int) -> None:
        ids = batch(number, len(self.rows))
        rows = self.rows[ids].requires_grad_()
        loss = loss_of(rows, number)
        loss.backward()
        self.losses.append(loss.item())
        assert rows.grad is not None
        together, sums = summed([ids.reshape(-1)], [rows.grad.reshape(-1, rows.shape[-1])])
        self._optimizer.step(self.rows, self._state, together, sums, self._lr, number)


def train(client: EmbeddingClient, module: nn.Module, rows: int, numbers: range) -> list[float]:
    session = client.session_of(module.table)  # type: ignore[arg-type]
    assert session
    losses = []
    for number in numbers:
        loss = loss_of(module(batch(number, rows)), number)
        loss.backward()
        assert session.step() == number
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Three shards in processes of their own."""
    folder = tmp_path_factory.mktemp("processes")
    options = ("--expect-shards=3", f"--lost-after={LOST_AFTER}")
    with cluster(folder, stores(folder), *options, mortal=folder) as running:
        yield Run(folder, running, 2, random.Random(1))


@pytest.mark.service
def test_t1_t7_t10_what_dies_or_hangs_while_two_branches_are_trained_changes_no_bit_and_no_count(run: Run) -> None:
    """`python -m support.training_chaos FOLDER` does it for long, at many points."""
    run.arm("shard", "after training.share:Share.admit", 3)
    run.arm(TRAINER, "after client.branch_calls:BranchCalls.begin_push", 20)
    run.kill(CONTROLLER)
    run.start(CONTROLLER)
    run.start(TRAINER)
    run.goes_on(2)
    run.cluster.wait_until(lambda status: len(status.shards) == 3, "the controller to know who hangs then")
    run.hang_primary(2)
    run.end()
    assert run.died["shard after training.share:Share.admit"] == 1
    assert run.died["trainer after client.branch_calls:BranchCalls.begin_push"] == 1
    assert passed(run.folder / "shard")[HALF_WRITTEN]  # somebody could have died there, too


@pytest.mark.service
def test_t4_t7_t8_t11_a_shard_killed_on_the_way_changes_no_bit_and_a_version_comes_of_it(run: Run) -> None:
    store = Store(run.cluster.store)
    optimizer = RowwiseAdagrad(lr=LR)
    reference = Reference(optimizer, start_rows())
    for number in range(1, 31):
        reference.step(number)
    with EmbeddingClient(list(run.cluster.addresses.values()), timeout=60) as client:
        name = f"{MODEL}@tuning"
        with client.train(name, optimizer=optimizer, checkpoint_every=8, timeout=170) as session:
            module = RemoteEmbedding(client, f"{name}/{TABLE}")
            losses = train(client, module, ROWS, range(1, 13))
            run.kill("s1")
            run.start("s1")
            losses += train(client, module, ROWS, range(13, 31))
            assert losses == reference.losses
            assert torch.equal(session.lookup(TABLE, torch.arange(ROWS)), reference.rows)
            published = client.publish(name, version="2", dtype="int8", timeout=170)
        assert published == f"{MODEL}@2"
        got = client.lookup(f"{MODEL}/{TABLE}", torch.arange(ROWS), timeout=170)
        stored = get_format("int8").encode(reference.rows)
        assert torch.equal(got, get_format("int8").decode(stored, DIM))
        # The branch goes on from where it was, in another session; and back to any step.
        with client.train(name, at_step=27, timeout=170) as session:
            assert (session.begun_at, session.number) == (27, 2)
            back = Reference(optimizer, start_rows())
            for number in range(1, 28):
                back.step(number)
            assert torch.equal(session.lookup(TABLE, torch.arange(ROWS)), back.rows)
        # Nobody trains it now: a version of the rows that differ from another version's.
        published = client.publish(name, base="1", version="3", timeout=170)
        got = client.lookup(f"{published}/{TABLE}", torch.arange(ROWS), timeout=170)
        assert torch.equal(got, back.rows)
        base = store.manifest(MODEL, "3").base
        assert base and base.version == "1"
        differ = (back.rows != start_rows()).any(1)
        assert 0 < store.manifest(MODEL, "3").replaced_rows == int(differ.sum()) < ROWS


def test_t1_a_later_trainer_ends_the_one_before(own: EmbeddingClient, shards: InThread) -> None:
    table = longcat_table()
    with own.train("fp32@fenced", optimizer=SGD(lr=0.1)) as first:
        module = RemoteEmbedding(own, f"fp32@fenced/{NGRAMS}")
        train(own, module, len(table), range(1, 3))
        with (
            EmbeddingClient(shards.addresses["s1"], timeout=30) as other,
            other.train("fp32@fenced") as second,
        ):
            assert second.number > first.number and second.begun_at == 2
            loss_of(module(batch(3, len(table))), 3).backward()
            with pytest.raises(SessionEnded, match="began"):
                first.step()
            second.lr = 0.1
            module = RemoteEmbedding(other, f"fp32@fenced/{NGRAMS}")
            train(other, module, len(table), range(3, 5))
            reference = Reference(SGD(lr=0.1), table)
            for number in range(1, 5):
                reference.step(number)
            every = torch.arange(len(table))
            assert torch.equal(second.lookup(NGRAMS, every), reference.rows)


def test_a_session_begins_at_all_shards_at_the_same_time(
    own: EmbeddingClient, shards: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back may take each of them minutes."""
    both, begin = threading.Barrier(len(shards.shares)), Share.begin

    def begin_together(share: Share, session: int, workers: int) -> None:
        both.wait(20)
        begin(share, session, workers)

    with own.train("fp32@together", optimizer=SGD(lr=0.1)) as session:
        session.step()
    monkeypatch.setattr(Share, "begin", begin_together)
    with own.train("fp32@together", at_step=0) as session:
        assert session.begun_at == 0


def test_t5_workers_wait_for_each_other_and_rows_are_of_their_step(own: EmbeddingClient, shards: InThread) -> None:
    table, name = longcat_table(), "fp32@workers"
    first = own.train(name, optimizer=RowwiseAdagrad(lr=LR), workers=2)
    read: dict[int, list[Tensor]] = {0: [], 1: []}
    failures: list[BaseException] = []
    every = torch.arange(0, len(table), 7)

    def work(worker: int, client: EmbeddingClient) -> None:
        try:
            session = first if worker == 0 else client.train(name, workers=2, worker=1, join=first.number)
            session.lr = LR
            for step in range(1, 6):
                read[worker].append(session.lookup(NGRAMS, every))
                ids = batch(10 * step + worker, len(table))
                session.add_gradients(NGRAMS, ids, torch.full((*ids.shape, NGRAM_DIM), 1.0 + worker))
                time.sleep(0.02 * worker)
                session.step()
            read[worker].append(session.lookup(NGRAMS, every))
        except BaseException as error:
            failures.append(error)

    with EmbeddingClient(shards.addresses["s1"], timeout=30) as other:
        threads = [threading.Thread(target=work, args=each) for each in ((0, own), (1, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    first.close()
    assert not failures, failures
    rows, state = table.clone(), {"sum": torch.zeros(len(table))}
    optimizer = optimizer_of(RowwiseAdagrad(lr=LR).message())
    for step in range(6):
        assert torch.equal(read[0][step], rows[every]) and torch.equal(read[1][step], rows[every])
        parts = [batch(10 * (step + 1) + worker, len(table)).reshape(-1) for worker in range(2)]
        values = [torch.full((len(ids), NGRAM_DIM), 1.0 + worker) for worker, ids in enumerate(parts)]
        sums = [summed([ids], [value]) for ids, value in zip(parts, values, strict=True)]
        ids, total = summed([each for each, _ in sums], [each for _, each in sums])
        optimizer.step(rows, state, ids, total, LR, step + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_travel_in_half_the_bytes(own: EmbeddingClient, dtype: torch.dtype) -> None:
    table, name = longcat_table(), f"fp32@{str(dtype).rpartition('.')[2]}"
    with own.train(name, optimizer=SGD(lr=0.5), dtype=dtype) as session:
        ids = torch.tensor([3, 9, 3, 800])
        values = torch.randn(4, NGRAM_DIM, generator=torch.Generator().manual_seed(4))
        session.add_gradients(NGRAMS, ids, values)
        session.step()
        together, sums = summed([ids], [values])
        expected = table[together] - 0.5 * sums.to(dtype).float()
        torch.testing.assert_close(session.lookup(NGRAMS, together), expected, rtol=1e-6, atol=1e-6)


def test_gradients_are_clipped_unscaled_and_accumulated(own: EmbeddingClient) -> None:
    table = longcat_table()
    with own.train("fp32@clipped", optimizer=SGD(lr=1.0)) as session:
        ids = torch.tensor([[5, 6]])
        for _ in range(2):
            session.add_gradients(NGRAMS, ids, torch.full((1, 2, NGRAM_DIM), 8.0))
        assert session.unscale_(16.0)
        norm = session.clip_grad_norm_(0.5)
        assert norm == pytest.approx((2 * NGRAM_DIM) ** 0.5)
        session.step()
        moved = table[[5, 6]] - session.lookup(NGRAMS, torch.tensor([5, 6]))
        assert moved.norm().item() == pytest.approx(0.5, rel=1e-3)
        session.add_gradients(NGRAMS, ids, torch.full((1, 2, NGRAM_DIM), torch.inf))
        assert not session.unscale_(16.0)
        session.zero_grad()
        assert session.step() == 2
        assert torch.equal(table[[5, 6]] - session.lookup(NGRAMS, torch.tensor([5, 6])), moved)
        theirs = torch.full((1, NGRAM_DIM), 3.0)
        session.add_gradients(NGRAMS, ids, theirs.expand(1, 2, NGRAM_DIM))  # as the backward of a sum gives them
        session.clip_grad_norm_(0.5)
        assert torch.equal(theirs, torch.full((1, NGRAM_DIM), 3.0))  # a gradient of the caller's stays what it was
        session.step()
        again = table[[5, 6]] - moved - session.lookup(NGRAMS, torch.tensor([5, 6]))
        assert again.norm().item() == pytest.approx(0.5, rel=1e-3)


def test_gradients_stay_though_autograd_adds_to_a_parameter_that_shares_their_memory(own: EmbeddingClient) -> None:
    table = longcat_table()
    with own.train("fp32@shared", optimizer=SGD(lr=1.0)) as session:
        rows = RemoteEmbedding(own, f"fp32@shared/{NGRAMS}", dtype=torch.float64)
        positions = nn.Parameter(torch.zeros(4, NGRAM_DIM, dtype=torch.float64))
        ids = torch.tensor([[5, 6, 7, 8]])
        for scale in (1.0, 10.0):
            ((rows(ids) + positions.unsqueeze(0)) * scale).sum().backward()
        session.step()
        assert torch.equal(session.lookup(NGRAMS, ids[0]), table[ids[0]] - 11)
        reused, gradients = ids[0].clone(), torch.ones(4, NGRAM_DIM)
        session.add_gradients(NGRAMS, reused, gradients)
        reused.fill_(9)
        gradients.fill_(100.0)
        session.step()
        assert torch.equal(session.lookup(NGRAMS, ids[0]), table[ids[0]] - 12)


def test_t5_rows_a_step_behind_are_prefetched_while_pushes_go_on(own: EmbeddingClient) -> None:
    table, name, ids = longcat_table(), "fp32@behind", torch.tensor([[7, 9000], [7, 3]])
    with (
        own.train(name, optimizer=SGD(lr=1.0)) as session,
        pytest.raises(InvalidRequest, match=r"prefetch of table ngram needs .* staleness=1"),
    ):
        session.prefetch(NGRAMS, ids)

    def steps_in(rows: Tensor) -> int:
        """Steps that rows are of. Each one takes 1 from all values."""
        [steps] = set((table[ids] - rows).round().int().flatten().tolist())
        return int(steps)

    with own.train(name, staleness=1) as session:
        session.lr = 1.0
        for number in range(1, 8):
            assert steps_in(session.lookup(NGRAMS, ids)) >= number - 2
            assert not session._prefetched
            session.prefetch(NGRAMS, ids)
            if number % 3 == 0:
                session.lookup(NGRAMS, torch.tensor([5]))  # others than those that are on their way
            session.add_gradients(NGRAMS, torch.tensor([3, 7, 9000]), torch.ones(3, NGRAM_DIM))
            assert session.step() == number
    with own.train(name) as session:
        assert session.begun_at == 7 and steps_in(session.lookup(NGRAMS, ids)) == 7


def test_rows_of_ngrams_learn_as_tables_in_this_process(own: EmbeddingClient) -> None:
    optimizer = RowwiseAdagrad(lr=LR)
    tokens = torch.randint(0, VOCAB, (5, 2, 12), generator=torch.Generator().manual_seed(6))
    reference = Reference(optimizer, longcat_table())
    with own.train("fp32@ngrams", optimizer=optimizer) as session:
        module = NgramRows(own, "fp32@ngrams", NGRAM_DIM)
        for step, some in enumerate(tokens, 1):
            rows = module(some, None, torch.empty(0))
            ids = module.hasher.row_ids(some)
            ours = reference.rows[ids].flatten(-3).requires_grad_()
            assert torch.equal(rows, ours)
            for each in (rows, ours):
                loss_of(each, step).backward()
            session.step()
            assert ours.grad is not None and ids.shape == (2, 12, 1, HEADS)
            together, sums = summed([ids.reshape(-1)], [ours.grad.reshape(-1, NGRAM_DIM)])
            reference._optimizer.step(reference.rows, reference._state, together, sums, LR, step)
        every = torch.arange(len(reference.rows))
        assert torch.equal(own.lookup(f"fp32@ngrams/{NGRAMS}", every), reference.rows)


@pytest.mark.slow
def test_compiled_modules_learn_as_eager_ones(own: EmbeddingClient) -> None:
    """Two calls alike give their gradients twice, though a compiler may make one of them."""
    found = []
    for name in ("eager", "inductor"):
        torch.compiler.reset()
        with own.train(f"fp32@{name}", optimizer=SGD(lr=1.0)) as session:
            module = RemoteEmbedding(own, f"fp32@{name}/{NGRAMS}")

            def loss(ids: Tensor, module: RemoteEmbedding = module) -> Tensor:
                return (module(ids) + module(ids)).tanh().sum() + module(ids // 2).square().sum()

            made = torch.compile(loss, backend=name, fullgraph=True) if name != "eager" else loss
            for number in range(1, 4):
                made(batch(number, 5000)).backward()
                session.step()
            found.append(session.lookup(NGRAMS, torch.arange(5000)))
    torch.compiler.reset()
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0], longcat_table()[:5000])


def test_what_cannot_be_trained_is_refused_with_the_remedy(own: EmbeddingClient) -> None:
    adagrad = RowwiseAdagrad(lr=LR)
    with pytest.raises(InvalidRequest, match=r"fp32@none is no branch yet, .* needs an optimizer"):
        own.train("fp32@none")
    with pytest.raises(InvalidRequest, match=r"int4@1 stores table ngram as int4.*dequantize=True"):
        own.train("int4@b", optimizer=adagrad)
    with pytest.raises(InvalidRequest, match="fp32@1 is a version"):
        own.train("fp32@1", optimizer=adagrad)
    with pytest.raises(NotFound, match="no model 'absent'"):
        own.train("absent@b", optimizer=adagrad)
    with pytest.raises(InvalidRequest, match="MODEL@BRANCH"):
        own.train("fp32", optimizer=adagrad)
    with pytest.raises(NotFound, match="no branch 'fp32@absent'"):
        own.publish("fp32@absent")
    with pytest.raises(InvalidRequest, match=r"float32, float16 or bfloat16, not torch.float64"):
        own.train("fp32@b", optimizer=adagrad, dtype=torch.float64)
    with pytest.raises(InvalidRequest, match=r"worker must be from 0 to workers - 1 = 1, got 2"):
        own.train("fp32@b", optimizer=adagrad, workers=2, worker=2, join=1)
    with pytest.raises(InvalidRequest, match=r"the first worker says at_step"):
        own.train("fp32@b", optimizer=adagrad, at_step=1, join=1)
    with own.train("fp32@refusals", optimizer=adagrad) as session:
        with pytest.raises(InvalidRequest, match=r"gradients of table ngram are \[2, 3\], for ids \[4\]"):
            session.add_gradients(NGRAMS, torch.arange(4), torch.ones(2, 3))
        with pytest.raises(InvalidRequest, match=r"learns by rowwise_adagrad .* not by sgd"):
            own.train("fp32@refusals", optimizer=SGD(lr=1.0))
        with pytest.raises(OutOfRange, match="id 90000 at position 0"):
            own.lookup(f"fp32@refusals/{NGRAMS}", torch.tensor([90000]))
        with pytest.raises(NotFound, match="no table 'nothing'"):
            session.lookup("nothing", torch.tensor([1]))
        session.add_gradients(NGRAMS, torch.tensor([4]), torch.full((1, NGRAM_DIM), torch.nan))
        with pytest.raises(InvalidRequest, match=r"table ngram, id 4 is not finite"):
            session.step()
        session.zero_grad()
        assert session.step() == 1


def test_what_trainers_ask_counts_among_requests_and_answers(own: EmbeddingClient, shards: InThread) -> None:
    """An answer that nobody reads, and pieces without end that hold nothing."""
    with (
        own.train("fp32@budget", optimizer=SGD(lr=LR)) as session,
        grpc.insecure_channel(shards.addresses["s0"]) as port,
    ):
        number, trainer, budget = session.number, TrainingServiceStub(port), shards.budgets["s0"]
        until(lambda: budget.left == budget.most, "what came before to be over")
        budget.count(budget.most)
        try:
            ids = torch.zeros(4096, dtype=torch.int64).numpy().tobytes()
            read = wire.ReadRequest(
                branch="fp32@budget",
                share="s0",
                session=number,
                table=NGRAMS,
                ids=ids,
                encoding=base_wire.ROW_ENCODING_FLOAT32,
            )
            with pytest.raises(grpc.RpcError, match="ask again in a moment") as of_read:
                trainer.Read(read, timeout=30)
            assert "RESOURCE_EXHAUSTED" in str(of_read.value)
            begun, goes_on = threading.Event(), threading.Event()

            def pieces() -> Iterator[wire.PushPiece]:
                yield wire.PushPiece(branch="fp32@budget", share="s0", session=number, step=1)
                begun.set()
                goes_on.wait()
                yield from [wire.PushPiece()] * 1000

            push = trainer.Push.future(pieces(), timeout=30)
            until(lambda: begun.is_set() and budget.left < 0, "the push to be counted")
            goes_on.set()
            with pytest.raises(grpc.RpcError, match="the push has no last piece"):
                push.result()
            until(lambda: budget.left == 0, "its bytes to be given back")
            with ThreadPoolExecutor(1) as other:
                every = torch.arange(len(longcat_table()))
                rows = other.submit(session.lookup, NGRAMS, every)
                wait([rows], 0.5)
                assert not rows.done()
                budget.give_back(budget.most)
                assert torch.equal(rows.result(), longcat_table())
        finally:
            if budget.left <= 0:
                budget.give_back(budget.most)
        assert len(trainer.Read(read, timeout=30).rows) == 4096 * NGRAM_DIM * 4
        until(lambda: budget.left == budget.most, "all bytes to be given back")


def test_t2_pushes_larger_than_the_budget_wait_for_each_other_and_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has many pieces, and holds more than all together may."""
    monkeypatch.setattr(gradients, "PIECE_BYTES", 16 << 10)
    shards, workers, failures = InThread(store_to_train(tmp_path), tmp_path / "logs", ["s0"], budget=512 << 10), 4, []
    clients = [EmbeddingClient(shards.addresses["s0"], timeout=60) for _ in range(workers)]
    first = clients[0].train(f"{MODEL}@large", optimizer=SGD(lr=1.0), workers=workers)

    def work(worker: int) -> None:
        try:
            session = first
            if worker:
                session = clients[worker].train(f"{MODEL}@large", workers=workers, worker=worker, join=first.number)
            session.lr = 1.0
            for step in range(3):
                session.add_gradients(TABLE, torch.arange(ROWS), torch.ones(ROWS, DIM))
                session.step()
                torch.testing.assert_close(
                    session.lookup(TABLE, torch.arange(ROWS)), start_rows() - workers * (step + 1)
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    shards.close()
    assert not failures, failures


def test_a_push_that_goes_on_no_more_is_given_up(
    own: EmbeddingClient, shards: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SILENCE", 0.5)
    name, over, budget = "fp32@silent", threading.Event(), shards.budgets["s0"]
    with own.train(name, optimizer=SGD(lr=LR)) as session, grpc.insecure_channel(shards.addresses["s0"]) as port:

        def pieces() -> Iterator[wire.PushPiece]:
            yield wire.PushPiece(branch=name, share="s0", session=session.number, step=1)
            over.wait()

        try:
            with pytest.raises(grpc.RpcError, match="the next piece of the push did not come") as raised:
                TrainingServiceStub(port).Push(pieces(), timeout=60)
            assert "UNAVAILABLE" in str(raised.value)  # a client sends it again
        finally:
            over.set()
        until(lambda: budget.left == budget.most, "its bytes to be given back")


def test_t3_what_was_not_on_disk_is_sent_again(own: EmbeddingClient, shards: InThread) -> None:
    """The machine of a shard dies, and what its kernel had not written is gone."""
    table, name = longcat_table(), "fp32@unsynced"
    with own.train(name, optimizer=RowwiseAdagrad(lr=LR), timeout=60) as session:
        module = RemoteEmbedding(own, f"{name}/{NGRAMS}")
        losses = train(own, module, len(table), range(1, 4))
        losses += train(own, module, len(table), range(4, 7))
        shards.stop("s1")
        [path] = shards.logs_of(name, "s1").glob("log-*.records")
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 6 // 10])
        shards.start("s1")
        losses += train(own, module, len(table), range(7, 10))
        reference = Reference(RowwiseAdagrad(lr=LR), table)
        for number in range(1, 10):
            reference.step(number)
        assert losses == reference.losses
        assert torch.equal(session.lookup(NGRAMS, torch.arange(len(table))), reference.rows)


def test_t6_rows_of_a_branch_are_not_kept_and_not_had_from_a_copy(shards: InThread) -> None:
    table, name = longcat_table(), "fp32@current"
    ids = torch.arange(0, len(table), len(table) // 30)
    with (
        EmbeddingClient(list(shards.addresses.values()), timeout=30, cache_bytes=1 << 20) as client,
        client.train(name, optimizer=SGD(lr=1.0), copies=2) as session,
    ):
        about = read_branch(shards.store, name)
        folder = branch_folder(shards.store, about.model, about.name)
        until(lambda: all(len(seat.in_sync) == 2 for seat in read_seats(folder, about).values()), "both in sync")
        for step in range(4):
            for _ in range(2):
                torch.testing.assert_close(client.lookup(f"{name}/{NGRAMS}", ids), table[ids] - step)
            session.add_gradients(NGRAMS, ids, torch.ones(len(ids), NGRAM_DIM))
            session.step()
        assert client.cache and client.cache.stats.rows == client.cache.stats.hits == 0
        for share, seat in read_seats(folder, about).items():
            [copy] = set(seat.in_sync) - {seat.primary}
            read = wire.ReadRequest(branch=name, share=share, session=session.number, table=NGRAMS)
            read.encoding = base_wire.ROW_ENCODING_FLOAT32
            with (
                grpc.insecure_channel(shards.addresses[copy]) as port,
                pytest.raises(grpc.RpcError, match=f"share {share} of {name} is at shard {seat.primary}"),
            ):
                TrainingServiceStub(port).Read(read, timeout=30)


def test_t7_a_log_that_is_gone_is_told_with_parts_and_steps(own: EmbeddingClient, shards: InThread) -> None:
    table, name = longcat_table(), "fp32@lost"
    optimizer = RowwiseAdagrad(lr=LR)
    reference = Reference(optimizer, table)
    with own.train(name, optimizer=optimizer, checkpoint_every=3, timeout=60) as session:
        module = RemoteEmbedding(own, f"{name}/{NGRAMS}")
        train(own, module, len(table), range(1, 6))
        for shard in session._calls.shares:  # the client has no push of before any more
            shard.kept.clear()
        shards.stop("s1")
        for path in shards.logs_of(name, "s1").iterdir():
            path.unlink()
        shards.start("s1")
        with pytest.raises(LostUpdates, match=r"shard s1 of fp32@lost lost steps 4 to 5") as raised:
            train(own, module, len(table), range(6, 7))
        assert raised.value.steps == (4, 5)
        assert raised.value.parts and all(part.startswith(f"{NGRAMS}/") for part in raised.value.parts)
    with pytest.raises(LostUpdates, match="lost steps 4 to"), own.train(name, at_step=5):
        pass
    with own.train(name, timeout=60) as session:
        assert session.begun_at == 3  # the other shard went back with it
        session.lr = LR
        train(own, module, len(table), range(4, 7))
        for number in range(1, 7):
            reference.step(number)
        assert torch.equal(session.lookup(NGRAMS, torch.arange(len(table))), reference.rows)
