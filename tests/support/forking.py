"""What forks, as a process of its own: `python -m support.forking HOW ADDRESS`. Prints "right" where all rows were."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch
from torch.utils.data import DataLoader, Dataset

from embedding_service import EmbeddingClient, Unavailable
from support.checkpoints import longcat_table

FORKS, WAIT_SECONDS = 12, 30


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
    table = longcat_table()
    check(client)
    workers = 1 if how == "spawn" else 2  # each imports torch
    loader = DataLoader(Rows(client), batch_size=4, num_workers=workers, multiprocessing_context=how)
    index = torch.arange(16)
    assert torch.equal(torch.cat(list(loader)), table[torch.stack([index, 3 * index], 1)])
    check(client)


def check(client: EmbeddingClient) -> None:
    """A lookup on this thread, and one ahead."""
    ids = torch.tensor([5, 7, 19_000])
    ahead = client.prefetch("fp32/ngram", ids)
    assert torch.equal(client.lookup("fp32/ngram", ids), longcat_table()[ids])
    assert torch.equal(ahead.result(20), longcat_table()[ids])


def fork(client: EmbeddingClient, address: str) -> None:
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
    codes = [code_of_child(client if turn % 2 else None, address) for turn in range(FORKS)]
    ended.set()
    for thread in threads:
        thread.join()
    assert codes == FORKS * [0], codes
    assert not wrong, wrong


def code_of_child(client: EmbeddingClient | None, address: str) -> int:
    """Fork. 0: rows were right. 3: an error named forks and the remedy. A child that hangs is killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check(client or EmbeddingClient(address, timeout=20))
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


def main(how: str, address: str) -> None:
    """HOW is a start method of a DataLoader's workers, `os.fork`, or `unprepared`: gRPC does not prepare then."""
    with EmbeddingClient(address, timeout=20, cache_bytes=1 << 20) as client:
        if how == "os.fork":
            fork(client, address)
        elif how == "unprepared":
            check(client)
            assert code_of_child(client, address) in (0, 3)
            check(client)
        else:
            load(client, how)
    print("right")


if __name__ == "__main__":
    main(*sys.argv[1:])
