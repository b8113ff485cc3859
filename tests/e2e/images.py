"""The project's images, built from its Dockerfile on a base made from Debian's packages, for no registry is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

from podman import Podman

ROOT = Path(__file__).parents[2]
BASE = "localhost/debian-minimal"
IMAGES = {"embedding-service": "service", "model-worker": "worker"}
TAG = "e2e"
CERTIFICATES = "/run/build/certificates.pem"


def build_all(podman: Podman) -> None:
    """Base and both images; what is there already is used again, layer by layer."""
    if not podman.has_image(BASE):
        _make_base(podman)
    for name, target in IMAGES.items():
        _build(podman, name, target)


def _make_base(podman: Podman) -> None:
    tree, archive, log = podman.folder / "base", podman.folder / "base.tar", podman.folder / "build.log"
    with log.open("a") as output:
        subprocess.run(
            ["debootstrap", "--variant=minbase", "bookworm", str(tree)], stdout=output, stderr=output, check=True
        )
        subprocess.run(
            ["tar", "--one-file-system", "--exclude=./var/cache/apt/*", "-C", str(tree), "-cf", str(archive), "."],
            check=True,
        )
    subprocess.run(["rm", "--recursive", "--one-file-system", str(tree)], check=True)
    podman("import", "--change=ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin", str(archive), BASE, timeout=120)
    archive.unlink()


def _build(podman: Podman, name: str, target: str) -> None:
    config, mounts = _pip_as_here(podman.folder)
    podman(
        "build",
        f"--target={target}",
        f"--tag=localhost/{name}:{TAG}",
        f"--build-arg=BASE_IMAGE={BASE}",
        f"--secret=id=pip,src={config}",
        "--network=host",
        *(f"--volume={mount}:ro" for mount in mounts),
        str(ROOT),
        timeout=900,
        log=podman.folder / "build.log",
    )


def _pip_as_here(folder: Path) -> tuple[Path, list[str]]:
    """This machine's pip configuration as a file, and what to mount so that it holds inside a build.

    Local indexes and wheels are found at the paths they have here; certificates elsewhere, for Debian's own would be in
    their way.
    """
    settings = _pip_settings()
    # The pages of an index name files beside it.
    paths = {
        path.parent if name.endswith("index-url") else path
        for name, value in settings.items()
        for path in _local_paths(value)
    }
    mounts = {f"{path}:{path}" for path in paths}
    certificates = settings.pop("cert", os.environ.get("SSL_CERT_FILE", ""))
    if certificates:
        mounts.discard(f"{certificates}:{certificates}")
        mounts.add(f"{certificates}:{CERTIFICATES}")
        settings["cert"] = CERTIFICATES
    config = folder / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return config, sorted(mounts)


def _pip_settings() -> dict[str, str]:
    """Global settings of pip; what the environment says goes before what files say."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    found: dict[str, dict[str, str]] = {"global": {}, ":env:": {}}
    for line in listing.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        found.setdefault(section, {})[name] = value.strip("'").replace("\\n", " ")
    return found["global"] | found[":env:"]


def _local_paths(value: str) -> list[Path]:
    """The files and folders that a setting names by path or file URL."""
    paths = [Path(urlparse(word).path) for word in value.split() if word.startswith(("/", "file:"))]
    return [path for path in paths if path.exists()]
