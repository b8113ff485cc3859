"""Trainers on a Ray cluster, with the tables outside of them: a branch of the service learns by the pushes of all.

    python examples/train/ray_train.py SERVICE MODEL@BRANCH/TABLE [--ray ADDRESS] [--steps 60] [--fall-at STEP]

SERVICE is HOST:PORT of a service that has the model in float32, which every node of the cluster reaches. Without --ray
a Ray of its own runs here, on loopback addresses only. Each worker computes on its own data. Ray Train's DDP averages
the gradients of the dense half, and the service adds up those of the rows. Every 20 steps the first worker reports a
checkpoint of the dense half with its step. After a failure Ray starts the workers again. They load that checkpoint, and
the branch goes back to its step. --fall-at has the last worker fail once, to show it.

It needs `ray[train]` on all nodes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_model
from torch import Tensor, distributed, nn

from embedding_service import EmbeddingClient, RemoteEmbedding, RowwiseAdagrad
from embedding_service.client.training import Session
from embedding_service.local_ray import LOCAL_RAY

BATCH, CLASSES = 64, 8
REPORT_EVERY = 20
OPTIMIZER = RowwiseAdagrad(lr=0.1)


class Classifier(nn.Module):
    """Says of which class a bag of rows is. All that it knows of an id is in its row."""

    def __init__(self, rows: RemoteEmbedding, dim: int) -> None:
        super().__init__()
        self.rows, self.head = rows, nn.Linear(dim, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, n] -> float32 [B, CLASSES]."""
        return self.head(self.rows(ids).mean(1))


def begin(client: EmbeddingClient, branch: str, at_step: int | None) -> Session:
    """One session for all workers: the first one begins it, and tells the others its number."""
    context = train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    number = [0]
    if rank == 0:
        session = client.train(branch, optimizer=OPTIMIZER, workers=workers, at_step=at_step)
        number = [session.number]
    distributed.broadcast_object_list(number)
    if rank:
        session = client.train(branch, optimizer=OPTIMIZER, workers=workers, worker=rank, join=number[0])
    return session


def learn(config: dict[str, Any]) -> None:
    """What each worker does."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, _, table = config["table"].partition("/")
    rank, workers = train.get_context().get_world_rank(), train.get_context().get_world_size()
    kept = load(train.get_checkpoint())
    with EmbeddingClient(config["service"], timeout=60) as client, begin(client, name, kept.get("step")) as session:
        count, dim, _ = session.tables[table]
        model = prepare_model(Classifier(RemoteEmbedding(client, config["table"]), dim))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        if kept:
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
        for step in range(session.steps + 1, config["steps"] + 1):
            if step == config["fall_at"] and rank == workers - 1 and not kept:
                raise RuntimeError(f"worker {rank} falls at step {step}, as it was told")
            ids, classes = batch(step * workers + rank, count)
            loss = nn.functional.cross_entropy(model(ids), classes)
            loss.backward()
            session.unscale_(workers)  # the service adds up what DDP averages
            optimizer.step()
            optimizer.zero_grad()
            session.step()
            if step % REPORT_EVERY == 0:
                report(session, model, optimizer, float(loss.detach()), rank)


def batch(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Ids int64 [BATCH, 4] and the class that they are of, int64 [BATCH]."""
    chance = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (BATCH,), generator=chance)
    ids = torch.randint(rows // CLASSES, (BATCH, 4), generator=chance) * CLASSES + classes[:, None]
    return ids, classes


def report(session: Session, model: nn.Module, optimizer: torch.optim.Optimizer, loss: float, rank: int) -> None:
    """Tell Ray Train how it goes, which takes a second. The first worker adds a checkpoint of the dense half."""
    said = {"step": session.steps, "session": session.number, "loss": loss}
    if rank:
        train.report(said)
        return
    with tempfile.TemporaryDirectory() as folder:
        kept = {"step": session.steps, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(kept, Path(folder) / "dense.pt")
        train.report(said, checkpoint=train.Checkpoint.from_directory(folder))


def load(checkpoint: train.Checkpoint | None) -> dict[str, Any]:
    """What `report` saved; empty at first."""
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder:
        kept: dict[str, Any] = torch.load(Path(folder) / "dense.pt")
        return kept


def main(given: argparse.Namespace) -> None:
    """Run the trainers, and say how the loss was at last."""
    here = {"num_cpus": given.workers, **LOCAL_RAY}
    ray.init(log_to_driver=False, **({"address": given.ray} if given.ray else here))
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            learn,
            train_loop_config={
                "service": given.service,
                "table": given.table,
                "steps": given.steps,
                "fall_at": given.fall_at,
            },
            scaling_config=train.ScalingConfig(num_workers=given.workers),
            # Of several machines it has to be a folder that all see, or a URL.
            run_config=train.RunConfig(storage_path=folder, failure_config=train.FailureConfig(max_failures=1)),
        )
        metrics = trainer.fit().metrics
    ray.shutdown()
    if not metrics:
        sys.exit("nothing was left to do: the branch is past these steps")
    print(f"step {metrics['step']} in session {metrics['session']}: loss {metrics['loss']:.4f}, ln {CLASSES} at first")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("service")
    parser.add_argument("table")
    parser.add_argument("--ray")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--fall-at", type=int)
    main(parser.parse_args())
