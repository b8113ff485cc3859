"""Somebody else's lookups while the service is attacked, in a process of their own: every row is checked.

    python -m support.attack.neighbours KIND ADDRESS...

A line on standard input names the phase that begins. At its end, what happened in each goes out as JSON.
"""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedding_service.security.access import TLS_VARIABLE, Access, Shown, access_of
from support.attack.child import start

PYTHON, THIN, WORKER = "python client", "thin client", "worker"
# The worker's neighbours ask for the same completion again and again.
PROMPT = {"model": "small", "prompt": [5, 6, 7, 8], "max_tokens": 4, "temperature": 0}


@dataclass
class Figures:
    """What happened to one neighbour's lookups that began in one phase. Seconds."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0

    def __add__(self, other: Figures) -> Figures:
        return Figures(self.seconds + other.seconds, self.failed + other.failed, self.wrong + other.wrong)


class Neighbour:
    """One of those processes, as seen from outside."""

    def __init__(self, kind: str, addresses: Sequence[str], credentials: Path | None = None) -> None:
        """`credentials`: a folder of what it shows. None: it speaks plain text."""
        self.kind = kind
        shown = {TLS_VARIABLE: str(credentials)} if credentials else {}
        self._popen = start("neighbours", kind, *addresses, environment=shown)

    def wait_until_ready(self) -> None:
        """Until its first lookups were answered."""
        assert self._popen.stdout
        assert self._popen.stdout.readline() == "ready\n", f"{self.kind}: no lookup was answered"

    def phase(self, name: str) -> None:
        """What its lookups count for from now on."""
        assert self._popen.stdin
        self._popen.stdin.write(f"{name}\n")
        self._popen.stdin.flush()

    def end(self) -> tuple[dict[str, Figures], list[str]]:
        """Figures by phase, and the first troubles in words."""
        out, _ = self._popen.communicate(timeout=60)
        said: dict[str, Any] = json.loads(out)
        return {phase: Figures(**figures) for phase, figures in said["phases"].items()}, said["troubles"]

    def kill(self) -> None:
        """Should it still be there."""
        self._popen.kill()
        self._popen.wait()


def main(kind: str, addresses: list[str]) -> None:
    """Look up until standard input ends."""
    import torch

    from support.chaos import TABLE
    from support.checkpoints import longcat_table
    from support.cluster import until
    from support.load import CheckedLoad, Load, ThinLoad

    torch.set_num_threads(1)

    class Completions(CheckedLoad):
        """The same completion again and again; a token is a row of one value."""

        def __init__(self, address: str, access: Access | None) -> None:
            import httpx

            scheme, tls, headers = "http", ssl.create_default_context(), {}
            if access:
                scheme, tls = "https", ssl.create_default_context(cafile=access.ca)
                headers = {"Authorization": Shown(access).header("localhost")}
            self._client = httpx.Client(timeout=30, verify=tls, headers=headers)
            self._url = f"{scheme}://{address}/v1/completions"
            super().__init__(self._ask(), threads=1, pause=0.05)

        def _ask(self) -> torch.Tensor:
            import httpx

            from embedding_service.errors import ServiceError

            try:
                answer = self._client.post(self._url, json=PROMPT)
            except httpx.HTTPError as error:
                raise ServiceError(f"{type(error).__name__} {error}") from error
            if answer.status_code != 200:
                raise ServiceError(f"{answer.status_code}: {answer.text[:300]}")
            return torch.tensor([ord(letter) for letter in answer.json()["choices"][0]["text"]])[:, None]

        def _lookup(self, ids: torch.Tensor) -> torch.Tensor:
            text = self._ask()
            return text[ids] if torch.equal(text, self._tables[0]) else text - 1

        def _close(self) -> None:
            self._client.close()

    load: CheckedLoad
    if kind == PYTHON:
        load = Load(addresses, TABLE, longcat_table(), threads=2, pause=0.01, tls=access_of(None, None))
    elif kind == THIN:
        load = ThinLoad(lambda: addresses, TABLE, longcat_table(), pause=0.02, tls=access_of(None, None))
    else:
        load = Completions(addresses[0], access_of(None, None))
    with load:
        until(lambda: load.lookups > 5, "lookups")
        print("ready", flush=True)
        for line in sys.stdin:
            load.phase = line.strip()
    phases = load.seconds.keys() | load.failed_in.keys() | load.wrong_in.keys()
    figures = {
        phase: {"seconds": load.seconds[phase], "failed": load.failed_in[phase], "wrong": load.wrong_in[phase]}
        for phase in phases
    }
    troubles = [str(error) for error in load.failed[:3]] + load.wrong[:3]
    print(json.dumps({"phases": figures, "troubles": troubles}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
