"""podman with everything of its own in one folder, so that ending leaves nothing behind and touches nobody's images."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

# crun needs more of its host than a restricted one gives; so do the default limits.
CONFIG = """
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
"""
RUN_ROOT = Path("/run/embedding-e2e")  # sockets, whose paths must be short


class Podman:
    """Runs podman commands on images and containers kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "containers.conf"
        config.write_text(CONFIG.format(folder=folder))
        self._environment = os.environ | {"CONTAINERS_CONF": str(config)}
        self._command = ["podman", f"--root={folder}/storage", f"--runroot={RUN_ROOT}", f"--tmpdir={RUN_ROOT}/libpod"]

    def __call__(self, *arguments: str, check: bool = True, timeout: float = 60, log: Path | None = None) -> str:
        """Run one command; returns its output, or appends it to `log`. Raises RuntimeError if it fails."""
        command = [*self._command, *arguments]
        output = log.open("a") if log else subprocess.PIPE
        done = subprocess.run(
            command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            text=True,
            check=False,
            timeout=timeout,
        )
        if check and done.returncode:
            raise RuntimeError(f"podman {' '.join(arguments)}: {done.stderr or f'see {log}'}")
        return (done.stdout or "").strip()

    def has_image(self, name: str) -> bool:
        """Whether an image of that name is there."""
        return bool(self("image", "ls", "--quiet", name))

    def remove_containers(self) -> None:
        """All containers and networks, at once."""
        self("rm", "--all", "--force", "--time=0", check=False)
        self("network", "prune", "--force", check=False)

    def remove(self) -> None:
        """Everything there is, images too."""
        self.remove_containers()
        self("rmi", "--all", "--force", check=False, timeout=300)
        self("umount", "--all", check=False)
        for folder in (self.folder, RUN_ROOT):
            shutil.rmtree(folder, ignore_errors=True)
