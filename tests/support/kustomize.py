"""Overlays of k8s/, rendered by kubectl, as people render them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parents[2] / "k8s"
Manifest = dict[str, Any]


def can_render() -> bool:
    """Whether there is a kubectl. `kubectl kustomize` asks no cluster."""
    return shutil.which("kubectl") is not None


def render(folder: Path) -> list[Manifest]:
    """All objects of a kustomization."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return list(yaml.safe_load_all(done.stdout))


def find(objects: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one object of that kind (and name; generated names may go on with a hash)."""
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].startswith(name or "")]
    assert len(found) == 1, f"{len(found)} objects {kind} {name or ''}"
    return found[0]


def pod_templates(objects: list[Manifest]) -> list[Manifest]:
    """The pod templates of workloads and of Ray clusters."""
    templates = [each["spec"]["template"] for each in objects if each["kind"] in ("StatefulSet", "DaemonSet", "Job")]
    for service in (each for each in objects if each["kind"] == "RayService"):
        cluster = service["spec"]["rayClusterConfig"]
        templates += [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return templates


def environment(container: Manifest, objects: list[Manifest]) -> dict[str, Manifest | str]:
    """The variables of a container: values, or for the downward API what they refer to."""
    variables: dict[str, Manifest | str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            variables |= find(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        variables[variable["name"]] = variable.get("value") or variable["valueFrom"]
    return variables


def resolved(container: Manifest, objects: list[Manifest], field_of: Callable[[str], str]) -> dict[str, str]:
    """The variables of a container as a kubelet sets them. A value may name variables that come before it.

    `field_of`: what the downward API says at a path.
    """
    found: dict[str, str] = {}
    for name, value in environment(container, objects).items():
        found[name] = filled_in(value, found) if isinstance(value, str) else field_of(value["fieldRef"]["fieldPath"])
    return found


def filled_in(text: str, variables: Mapping[str, str]) -> str:
    """With the values of the variables that it names as $(NAME), as far as they are known."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)
