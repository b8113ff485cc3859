"""A model worker, and the service that its tables lie in, for attacks on its HTTP side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import psutil

from support.cluster import READY, UpCommand, free_port, until


class WorkerService:
    """`model-worker serve` of the small model that the worker's tests have; ended with all that came from it.

    `within`: a command that runs it, as `prlimit --nofile=1024` does.
    """

    def __init__(self, folder: Path, within: Sequence[str] = ()) -> None:
        self.address = f"127.0.0.1:{free_port()}"
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
        tables = UpCommand(self._folder / "small.log", store, 1, "--memory=64MiB")
        self._stack.callback(tables.end)
        tables.wait_for(READY)
        serve = ("-m", "model_worker", "serve", str(checkpoint), f"--embeddings={tables.address}")
        command = [*self._within, sys.executable, *serve]
        with self._log.open("wb") as output:
            self._popen = psutil.Popen(
                [*command, "--name=small", f"--port={self.address.rpartition(':')[2]}", "--max-batch=2"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._stack.callback(self._end)
        return self

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
