"""What forks, as a process of its own: `python -m support.forking HOW ADDRESS WAY`. Prints "right" where all rows were.

WAY is "near" or "wired": how the parent's client, and the children's, have their rows.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from embedding_service import EmbeddingClient, Unavailable
from support.checkpoints import longcat_table
from support.nearness import come_near

FORKS, WAIT_SECONDS = 8, 60
TABLE = longcat_table()
FEW, FEW_ROWS = torch.tensor([5, 7, 19_000]), TABLE[[5, 7, 19_000]]
# torch works on so many on several threads. In a child nothing but lookups may do that.
MANY, TOKENS = torch.arange(len(TABLE)), torch.ones(80, 80).long()
MANY_ROWS, HALVES = TABLE.numpy(), TABLE.half().numpy()


class Rows(Dataset):
    """Rows of one table. The loading process looks them up."""

    def __init__(self, client: EmbeddingClient) -> None:
        self.client = client

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.client.lookup("fp32/ngram", torch.tensor([index, 3 * index]))


def load(client: EmbeddingClient, how: str) -> None:
    """Rows that came through a DataLoader's workers are right, and so are those of this process afterwards."""
    check(client)
    workers = 1 if how == "spawn" else 2  # each imports torch
    loader = DataLoader(Rows(client), batch_size=4, num_workers=workers, multiprocessing_context=how)
    index = torch.arange(16)
    assert torch.equal(torch.cat(list(loader)), TABLE[torch.stack([index, 3 * index], 1)])
    check(client)


def check(client: EmbeddingClient) -> None:
    """A lookup on this thread, and one ahead."""
    ahead = client.prefetch("fp32/ngram", FEW)
    assert torch.equal(client.lookup("fp32/ngram", FEW), FEW_ROWS)
    assert torch.equal(ahead.result(60), FEW_ROWS)


def check_many(client: EmbeddingClient) -> None:
    """Lookups of which each is work for several of torch's threads."""
    assert np.array_equal(client.lookup("fp32/ngram", MANY).numpy(), MANY_ROWS)
    halves = asyncio.run(client.lookup_async("fp32/ngram", MANY, dtype=torch.float16))
    assert np.array_equal(halves.numpy(), HALVES)
    assert (client.lookup_ngrams("fp32", TOKENS).numpy()[..., 0] == 1).all()


def fork(client: EmbeddingClient, address: str, near: bool) -> None:
    """Children that use the client of before, or one of their own, while threads of the parent use theirs."""
    ended, wrong = threading.Event(), []

    def use() -> None:
        while not ended.is_set():
            try:
                check(client)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    codes = [code_of_child(client if turn % 2 else None, address, near) for turn in range(FORKS)]
    ended.set()
    for thread in threads:
        thread.join()
    assert codes == FORKS * [0], codes
    assert not wrong, wrong


def code_of_child(client: EmbeddingClient | None, address: str, near: bool) -> int:
    """Fork. 0: rows were right. 3: an error named forks and the remedy. A child that hangs is killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            client = client or EmbeddingClient(address, timeout=60, near=near)
            check(client)
            check_many(client)
            if near:
                check_many(come_near(client))
            code = 0
        except Unavailable as error:
            code = 3 if "fork" in str(error) and "forkserver" in str(error) else 4
        finally:
            if code:
                os._exit(code)
            sys.exit(0)
    give_up = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < give_up:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def main(how: str, address: str, way: str) -> None:
    """HOW is a start method of a DataLoader's workers, `os.fork`, or `unprepared`: gRPC does not prepare then."""
    near = way == "near"
    torch.set_num_threads(2)
    with EmbeddingClient(address, timeout=60, cache_bytes=1 << 20, near=near) as client:
        check_many(come_near(client) if near else client)
        if how == "os.fork":
            fork(client, address, near)
        elif how == "unprepared":
            check(client)
            assert code_of_child(client, address, near) in (0, 3)
            check(client)
        else:
            load(client, how)
    print("right")


if __name__ == "__main__":
    main(*sys.argv[1:])
