"""Many users of one worker: their number against tokens a second and the wait for a first token.

    python -m benchmarks.worker_load --checkpoint FOLDER --out FOLDER
    python -m benchmarks.worker_load --url http://HOST:PORT --out FOLDER

The first imports the checkpoint's tables as int8, runs two shards and a worker of one replica, measures and ends them.
(`python examples/demo/make_checkpoint.py FOLDER` makes a checkpoint.) The second asks a worker that runs already. Each
user streams answers, one after the other, each to another prompt. Prompts and answers have fixed lengths, or with
`--lengths sharegpt` those of people's chats: log-normal, with a few long ones. Clients, worker and shards share this
machine. Numbers of users take turns, --rounds times, and figures are medians of the rounds. Leaves worker_load.json and
worker_load.png in --out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics
from subprocess import run
from time import perf_counter
from typing import Any

import httpx
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.peers.base import command, says, service
from embedding_service.machine import free_port

USERS = (1, 2, 4, 8, 16, 32)
PROMPT_WORDS = 30
# Chats of ShareGPT: half of the prompts have fewer than 40 words, and half of the answers fewer than 110 tokens.
CHAT_PROMPT, CHAT_ANSWER = (40, 1.3, 600), (110, 0.8, 400)
SHARDS = 2
WORDS = " ".join(topics.topics.values()).split()


@dataclass(frozen=True)
class Level:
    """What all users saw together. Seconds to the first token count from sending the request."""

    users: int
    answers: int
    tokens_per_second: float
    first_token_p50: float
    first_token_p95: float
    refused: int


class Users:
    """Asks a worker, and keeps what it saw."""

    def __init__(self, url: str, model: str, tokens: int, chats: bool) -> None:
        self._url, self._model, self._tokens, self._chats = url, model, tokens, chats
        self._chance = random.Random(1)
        self._told = 0
        self.first_tokens: list[float] = []
        self.refused = 0

    async def level(self, users: int, seconds: float) -> Level:
        """Run `users` users. Each asks again and again until the time is over."""
        self.first_tokens, self.refused, self._told = [], 0, 0
        self._chance.seed(users)
        begun = perf_counter()
        limits = httpx.Limits(max_connections=users)
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as client:
            await asyncio.gather(*(self._user(client, begun + seconds) for _ in range(users)))
        took = perf_counter() - begun
        p50, p95 = np.percentile(self.first_tokens, (50, 95))
        answers = len(self.first_tokens)
        return Level(users, answers, self._told / took, float(p50), float(p95), self.refused)

    async def _user(self, client: httpx.AsyncClient, until: float) -> None:
        while perf_counter() < until:
            await self._ask(client)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        words, tokens = PROMPT_WORDS, self._tokens
        if self._chats:
            words, tokens = self._length(*CHAT_PROMPT), self._length(*CHAT_ANSWER)
        start = self._chance.randrange(len(WORDS) - words)
        body = {
            "model": self._model,
            "prompt": " ".join(WORDS[start : start + words]),
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent, first, told = perf_counter(), None, 0
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                self.refused += 1
                await asyncio.sleep(float(answer.headers["Retry-After"]))
                return
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                first = first or perf_counter() - sent
                chunk = json.loads(line.removeprefix("data: "))
                told = (chunk.get("usage") or {}).get("completion_tokens", told)
        if first is None or told != tokens:
            raise RuntimeError(f"the answer has {told} tokens, not {tokens}; its last line: {chunk}")
        self.first_tokens.append(first)
        self._told += told

    def _length(self, median: int, spread: float, most: int) -> int:
        return min(most, max(4, round(self._chance.lognormvariate(math.log(median), spread))))


@contextmanager
def served(checkpoint: Path, max_batch: int) -> Iterator[str]:
    """The URL of a worker over that checkpoint, with shards of its own."""
    with tempfile.TemporaryDirectory() as folder:
        store, log, web = Path(folder, "store"), Path(folder, "worker.log"), free_port()
        importing = [sys.executable, "-m", "embedding_service", "import", str(checkpoint), f"--store={store}"]
        run([*importing, "--name=load"], check=True)
        worker = [sys.executable, "-m", "model_worker", "serve", str(checkpoint)]
        options = [f"--port={web}", f"--max-batch={max_batch}"]
        with (
            service(store, Path(folder, "up.log"), f"--shards={SHARDS}") as (address, _),
            command([*worker, f"--embeddings={address}", *options], log, says(log, " ready at ")),
        ):
            yield f"http://127.0.0.1:{web}"


def measure(url: str, tokens: int, chats: bool, seconds: float, users_of: list[int]) -> list[Level]:
    """Measure numbers of users, one after the other, after a few answers to warm up."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    users = Users(url, model, tokens, chats)
    asyncio.run(users.level(2, 2))
    return [asyncio.run(users.level(number, seconds)) for number in users_of]


def medians(turns: list[Level]) -> Level:
    """Of each figure, over turns of one number of users."""
    names = vars(turns[0])
    return Level(**{name: type(names[name])(np.median([vars(turn)[name] for turn in turns])) for name in names})


def show(levels: list[Level]) -> None:
    table = Table("users", "answers", "tokens/s", "first token p50 ms", "p95 ms", "refused", title="worker under load")
    for each in levels:
        first = (f"{each.first_token_p50 * 1e3:.0f}", f"{each.first_token_p95 * 1e3:.0f}")
        table.add_row(str(each.users), str(each.answers), f"{each.tokens_per_second:.0f}", *first, str(each.refused))
    Console().print(table)


def plot(levels: list[Level], about: str, file: Path) -> None:
    figure, (speed, wait) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    users = [each.users for each in levels]
    speed.plot(users, [each.tokens_per_second for each in levels], "o-")
    speed.set(ylabel="tokens/s, all users", ylim=(0, None))
    for name in ("p50", "p95"):
        wait.plot(users, [1e3 * getattr(each, f"first_token_{name}") for each in levels], "o-", label=name)
    wait.set(ylabel="first token, ms", ylim=(0, None))
    wait.legend()
    for axes in (speed, wait):
        axes.set(xlabel="users", xscale="log", xticks=users, xticklabels=users)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.suptitle(about)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--checkpoint", type=Path, help="serve this one here")
    where.add_argument("--url", help="a worker that runs already")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures and the plot")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--lengths", choices=("fixed", "sharegpt"), default="fixed", help="of prompts and answers")
    parser.add_argument("--users", type=int, nargs="+", default=USERS, help="numbers of them, one after the other")
    parser.add_argument("--seconds", type=float, default=15, help="for each number of users")
    parser.add_argument("--rounds", type=int, default=1, help="of all numbers of users")
    parser.add_argument("--max-batch", type=int, default=32, help="of the worker, with --checkpoint")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    chats, users = given.lengths == "sharegpt", list(given.users) * given.rounds
    if given.url:
        turns = measure(given.url.rstrip("/"), given.tokens, chats, given.seconds, users)
        batch = ""
    else:
        with served(given.checkpoint, given.max_batch) as url:
            turns = measure(url, given.tokens, chats, given.seconds, users)
        batch = f", one replica, batch of {given.max_batch}"
    levels = [medians([turn for turn in turns if turn.users == number]) for number in given.users]
    show(levels)
    about = f"{'chats' if chats else f'answers of {given.tokens} tokens'}{batch}"
    found: dict[str, Any] = {
        "about": about,
        "levels": [asdict(each) for each in levels],
        "turns": [asdict(each) for each in turns],
    }
    (given.out / "worker_load.json").write_text(json.dumps(found, indent=2) + "\n")
    plot(levels, about, given.out / "worker_load.png")


if __name__ == "__main__":
    main()
