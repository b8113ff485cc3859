"""Processes of the service that are forked from one that has imported torch, FBGEMM and TorchRec.

Those imports take 3 s in each shard and 5 s in the process that plans. A child runs what `python -m embedding_service`
runs, from its first line to the interpreter's end, in a process of its own. grpc is not among what is imported before:
it must not be forked. None of the service's own modules is either.

A controller gets a zygote of its own, for the process that plans.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
# Read when Python, the C library or torch starts, so a fork would not see another value.
EARLY = ("PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "MKL_", "KMP_", "CUDA_", "TORCH")
REQUEST_BYTES, MOST_FILES = 1 << 17, 8
PACKAGE = "embedding_service"
PLANNING = "embedding_service.controller.planning"
Popen = subprocess.Popen


class Forked:
    """A child of the zygote, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, args: Sequence[str], reports: socket.socket) -> None:
        """`reports` says its process id, then how it ended."""
        self.args = list(args)
        self.returncode: int | None = None
        self._reports = reports
        self.pid = self._hear()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            self._reports.settimeout(timeout)
            try:
                self.returncode = self._hear()
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._reports.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # ended since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _hear(self) -> int:
        if report := self._reports.recv(64):
            return int(report)
        raise AssertionError("the process that forks others has ended")


class Zygote:
    """What asks the process that forks, at the other end of `requests`."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._early = early(os.environ)

    @classmethod
    def start(cls) -> Zygote:
        """One that ends when this process does."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "support.zygote", str(theirs.fileno())]
            subprocess.Popen(command, cwd=TESTS, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        return cls(ours)

    def suits(self) -> bool:
        """Whether a fork would be as a process that is started now: of the variables that count before `main`."""
        return early(os.environ) == self._early

    def fork(
        self, arguments: Sequence[str], module: str = PACKAGE, log: Path | None = None, pass_fds: Sequence[int] = ()
    ) -> Forked:
        """Run `python -m MODULE ARGUMENTS` in this folder and environment; its output goes to a file."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "module": module,
            "arguments": list(arguments),
            "log": str(log) if log else None,
            "files": list(pass_fds),
            "folder": str(Path.cwd()),
            "environment": {**os.environ},
        }
        with theirs:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [theirs.fileno(), *pass_fds])
        return Forked([module, *arguments], ours)

    def popen(self, command: Sequence[str], pass_fds: Sequence[int] = (), **options: Any) -> Any:
        """subprocess.Popen, but for the process that plans."""
        if command[1:3] == ["-m", PLANNING]:
            return self.fork(command[3:], PLANNING, pass_fds=pass_fds)
        return Popen(command, pass_fds=pass_fds, **options)


def early(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that count before `main` runs."""
    return {name: value for name, value in environment.items() if name.startswith(EARLY)}


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns it in the child; None when nobody can ask any more, after its children's end."""
    children: dict[int, socket.socket] = {}

    def reap(*_: object) -> None:
        while children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:  # a signal during this handler had the last one reaped
                return
            if not pid:
                return
            with children.pop(pid) as reports:
                try:
                    reports.send(str(os.waitstatus_to_exitcode(status)).encode())
                except OSError:
                    continue  # nobody listens

    signal.signal(signal.SIGCHLD, reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end what they started
    while True:
        data, handed, _, _ = socket.recv_fds(requests, REQUEST_BYTES, MOST_FILES)
        if not data:  # the tests have ended; had they been killed, their services would stay
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            return None
        reports, files = socket.socket(fileno=handed[0]), handed[1:]
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until the child is entered
        if pid := os.fork():
            children[pid] = reports
            reports.send(str(pid).encode())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            for file in files:
                os.close(file)
            continue
        for each in (*children.values(), reports, requests):
            each.close()
        return {**json.loads(data), "handed": files}


def become(request: Mapping[str, Any]) -> None:
    """Be as a process that was started for the request: signals, files, folder, environment, arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    if request["log"]:
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for output in (1, 2):
            os.dup2(log, output)
        os.close(log)
    for handed, wanted in zip(request["handed"], request["files"], strict=True):
        os.dup2(handed, wanted)
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    sys.argv = [request["module"], *request["arguments"]]


def main(requests: socket.socket) -> None:
    """Fork for each request; be one of the children."""
    if not (asked := serve(requests)):
        return
    become(asked)
    if "controller" in asked["arguments"][:2]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not os.fork():
            ours.close()
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the controller
            main(theirs)
            return
        theirs.close()
        subprocess.Popen = Zygote(ours).popen  # type: ignore[misc, assignment]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import torchrec.distributed.planner  # noqa: F401

    assert "grpc" not in sys.modules
    gc.freeze()
    main(socket.socket(fileno=int(sys.argv[1])))
