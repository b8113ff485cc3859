"""A trainer that may die: `python -m support.trainer FOLDER COPIES SHARES ADDRESS...` trains two branches at once.

One learns by row-wise Adagrad. Its rows are compared bit by bit with training in this process. The other is a ledger:
it learns by SGD at a rate of 1, and each push writes into its rows that it was there. So a row tells how many pushes
changed it, and which. FOLDER/progress has the last step that all shards have. When FOLDER/end is there it stops. When
FOLDER/back is there, the next trainer begins some steps before: at FOLDER/wanted, until one has begun.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from embedding_service import SGD, EmbeddingClient, RowwiseAdagrad
from embedding_service.client.training import Session
from embedding_service.store.importing import import_checkpoint
from support.training import DIM, LR, MODEL, ROWS, TABLE, InProcess, changes, store_to_train

BITS, LEDGER = f"{MODEL}@bits", "ledger@pushes"
CHECKPOINT_EVERY = 20
# Steps from one checkpoint that the trainer asks for, too, to the next.
ASKED_EVERY = 3 * CHECKPOINT_EVERY
# Columns of the ledger: the row's id, the pushes, the sum of their steps, then a bit for each step in turn.
_COLUMNS, _BITS = DIM - 3, 20
# Steps from one note of the reference to the next.
_NOTE_EVERY = 500


def stores(folder: Path) -> Path:
    """A store with what both branches begin from."""
    store = store_to_train(folder)
    rows = torch.zeros(ROWS, DIM)
    rows[:, 0] = torch.arange(ROWS)
    save_file({"w": rows}, folder / "ledger.safetensors")
    part_bytes = ROWS * DIM * 4 // 8
    import_checkpoint(
        folder / "ledger.safetensors", store, "ledger", dtype="fp32", part_bytes=part_bytes, generic={"w": TABLE}
    )
    return store


def entry(step: int, rows: int) -> Tensor:
    """What a push of the ledger adds to each row: [rows, DIM], whole numbers."""
    line = torch.zeros(DIM)
    line[1], line[2] = 1, step
    line[3 + step // _BITS % _COLUMNS] = 2 ** (step % _BITS)
    return line.expand(rows, DIM)


def check_ledger(rows: Tensor, step: int) -> None:
    """Each row has exactly the pushes 1 to `step` that were for it, once. Says which are missing or came twice."""
    expected = torch.zeros(ROWS, DIM, dtype=torch.float64)
    expected[:, 0] = torch.arange(ROWS)
    for each in range(1, step + 1):
        ids, _ = changes(each, 1)
        expected[ids] += entry(each, 1).double()
    wrong = (rows.double() != expected).any(1).nonzero().flatten().tolist()
    for row in wrong[:5]:
        more = (rows[row].double() - expected[row]).tolist()
        print(f"row {row} says it is row {rows[row, 0]:g}; {more[1]:+g} pushes, steps {more[2]:+g}: {more}", flush=True)
    assert not wrong, f"{len(wrong)} rows of the ledger do not have each push up to step {step} once"


def check_bits(rows: Tensor, step: int, notes: Path) -> None:
    """The rows are those of training in this process. Notes of it are kept, for it takes long."""
    reference = InProcess("rowwise_adagrad")
    known = [int(path.stem) for path in notes.glob("*.pt") if int(path.stem) <= step]
    if known:
        reference.steps = max(known)
        reference.rows, reference.state = torch.load(notes / f"{reference.steps}.pt")
    while reference.steps < step:
        reference.until(reference.steps + 1)
        if reference.steps % _NOTE_EVERY == 0:
            notes.mkdir(exist_ok=True)
            torch.save((reference.rows, reference.state), notes / f"{os.getpid()}.new")
            (notes / f"{os.getpid()}.new").replace(notes / f"{reference.steps}.pt")
    wrong = (rows != reference.rows).any(1).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} rows have other bits at step {step}, row {wrong[0]} first"


def check(sessions: list[Session], folder: Path) -> None:
    """Both branches are as they must be after their last steps."""
    bits, ledger = sessions
    every = torch.arange(ROWS)
    check_bits(bits.lookup(TABLE, every), bits.steps, folder / "notes")
    check_ledger(ledger.lookup(TABLE, every), ledger.steps)


def step(sessions: list[Session]) -> None:
    """One of each branch."""
    bits, ledger = sessions
    bits.add_gradients(TABLE, *changes(bits.steps + 1))
    bits.step()
    ids, _ = changes(ledger.steps + 1, 1)
    ledger.add_gradients(TABLE, ids, -entry(ledger.steps + 1, len(ids)))
    ledger.step()


def note(step: int, path: Path) -> None:
    """Write a step to a file, all of it or nothing."""
    new = path.with_suffix(".new")
    new.write_text(str(step))
    new.replace(path)


def noted(path: Path, default: int) -> int:
    """What `note` wrote last."""
    return int(path.read_text()) if path.exists() else default


def main(folder: Path, copies: int, shares: int, addresses: list[str]) -> None:
    """Go on from where the shards are, or from some steps before. See the module."""
    torch.set_num_threads(1)
    progress, wanted = folder / "progress", folder / "wanted"
    done = noted(progress, 0)
    at_step = None
    if wanted.exists():  # a trainer before this one died on its way back, before or after it was there
        least = noted(wanted, done)
        at_step = random.choice((least, None))
    else:
        least = done
        if (folder / "back").exists() or random.random() < 0.25:
            # Two checkpoints are kept: of the furthest step that it ever had, and the one before.
            oldest = (noted(folder / "furthest", 0) // CHECKPOINT_EVERY - 1) * CHECKPOINT_EVERY
            at_step = least = max(done - random.randrange(1, CHECKPOINT_EVERY), oldest, 0)
            note(least, wanted)
    (folder / "back").unlink(missing_ok=True)
    about: dict[str, Any] = {"checkpoint_every": CHECKPOINT_EVERY, "copies": copies, "shares": shares, "timeout": 170}
    with (
        EmbeddingClient(addresses, timeout=60) as client,
        client.train(BITS, optimizer=RowwiseAdagrad(lr=LR), at_step=at_step, **about) as bits,
        client.train(LEDGER, optimizer=SGD(lr=1.0), at_step=at_step, **about) as ledger,
    ):
        sessions = [bits, ledger]
        begun = bits.begun_at, ledger.begun_at
        print(f"begins at {begun}, asked for {at_step} after {done}", flush=True)
        assert begun == (at_step, at_step) if at_step is not None else min(begun) >= least
        note(min(begun), progress)
        wanted.unlink(missing_ok=True)
        check(sessions, folder)
        while not (folder / "end").exists():
            furthest = max(noted(folder / "furthest", 0), *(session.steps + 1 for session in sessions))
            note(furthest, folder / "furthest")
            step(sessions)
            note(min(session.steps for session in sessions), progress)
            if bits.steps % ASKED_EVERY == 0:
                bits.checkpoint()
            time.sleep(0.01)
        check(sessions, folder)
        print(f"right at {[session.steps for session in sessions]}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
