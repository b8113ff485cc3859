"""A model worker, and the service that its tables lie in, for attacks on its HTTP side.

Secured, it speaks HTTPS and asks for keys, and the service speaks TLS.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import psutil

from embedding_service.security.access import TLS_VARIABLE
from embedding_service.security.authority import Authority
from support.attack.window import ATTACKER
from support.cluster import READY, UpCommand, free_port, until
from support.security import HOSTS, write_policy

NEIGHBOUR = "neighbour"


class WorkerService:
    """`model-worker serve` of the small model that the worker's tests have; ended with all that came from it.

    Args:
        folder: For all that is made.
        within: A command that runs it, as `prlimit --nofile=1024` does.
        secured: The attacker has a key, and so have neighbours.

    Attributes:
        credentials: A folder of what a neighbour shows. None: it speaks plain text.
    """

    def __init__(self, folder: Path, within: Sequence[str] = (), *, secured: bool = False) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.credentials = folder / "worker-credentials" if secured else None
        self._folder = folder
        self._within = within
        self._log = folder / "worker.log"
        self._stack = ExitStack()

    def __enter__(self) -> WorkerService:
        """Begin to start it."""
        sys.path.append(str(Path(__file__).parents[2] / "worker"))
        from small_model import write_checkpoint

        from embedding_service.store.importing import import_checkpoint

        checkpoint, store = self._folder / "small", self._folder / "small-store"
        write_checkpoint(checkpoint)
        import_checkpoint(checkpoint, str(store), "small", dtype="fp32")
        secure = self._folder / "small-secure"
        options = [f"--secure={secure}"] if self.credentials else []
        tables = UpCommand(self._folder / "small.log", store, 1, "--memory=64MiB", *options)
        self._stack.callback(tables.end)
        tables.wait_for(READY)
        serve = ["-m", "model_worker", "serve", str(checkpoint), f"--embeddings={tables.address}"]
        if self.credentials:
            serve += self._secure(secure, self.credentials)
        command = [*self._within, sys.executable, *serve]
        with self._log.open("wb") as output:
            self._popen = psutil.Popen(
                [*command, "--name=small", f"--port={self.address.rpartition(':')[2]}", "--max-batch=2"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | ({TLS_VARIABLE: str(secure / "client")} if self.credentials else {}),
            )
        self._stack.callback(self._end)
        return self

    def _secure(self, secure: Path, credentials: Path) -> list[str]:
        """Make what the worker and its neighbours show. Returns the worker's options."""
        Authority.load(secure).issue(credentials, HOSTS)
        (credentials / "token").write_text(NEIGHBOUR)
        ours = self._folder / "worker-policy"
        ours.mkdir()
        keys = {name: {"tokens": [name], "read": ["*"]} for name in (NEIGHBOUR, ATTACKER)}
        policy = write_policy(ours, keys)
        return [f"--policy={policy}", f"--tls-cert={credentials / 'tls.crt'}", f"--tls-key={credentials / 'tls.key'}"]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def wait_until_ready(self) -> None:
        """Until it answers; fails, showing its output, where it ends before."""

        def printed() -> bool:
            assert self._popen.poll() is None, self._log.read_text()
            return " ready at " in self._log.read_text()

        until(printed, "the worker")

    def _end(self) -> None:
        if not self._popen.is_running():
            return
        family = [self._popen, *self._popen.children(recursive=True)]
        self._popen.terminate()
        for process in psutil.wait_procs(family, timeout=20)[1]:
            process.kill()
