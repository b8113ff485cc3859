"""What the KubeRay operator does with a RayService of one head pod, as far as serving needs it."""

from __future__ import annotations

import copy
import json
import time
import urllib.error
import urllib.request

import yaml
from kubelet import Cluster, Pod
from support.kustomize import Manifest

READY_SECONDS = 240.0


def serve_service(manifest: Manifest) -> Manifest:
    """The Service that the operator makes for the model's HTTP port."""
    metadata = manifest["metadata"]
    selector = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"]["labels"]
    return {
        "kind": "Service",
        "metadata": {"name": f"{metadata['name']}-serve-svc", "namespace": metadata["namespace"]},
        "spec": {"selector": selector, "ports": [{"port": 8000, "targetPort": "serve"}]},
    }


def start_head(cluster: Cluster, manifest: Manifest) -> Pod:
    """The head's pod, with the command that the operator gives it."""
    cluster_config = manifest["spec"]["rayClusterConfig"]
    assert not cluster_config["workerGroupSpecs"], "only a head can be run here"
    head = copy.deepcopy(cluster_config["headGroupSpec"])
    parameters = {**head["rayStartParams"], "metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"}
    words = " ".join(f"--{name}={value}" for name, value in parameters.items())
    (container,) = head["template"]["spec"]["containers"]
    container["command"] = ["/bin/bash", "-lc", "--"]
    container["args"] = [f"ray start --head --block {words}"]
    metadata = manifest["metadata"]
    return cluster.start_pod(f"{metadata['name']}-head", metadata["namespace"], head["template"])


def deploy(head: Pod, manifest: Manifest) -> None:
    """Give the head the Serve config, and wait until the application runs. Raises RuntimeError if it does not."""
    url = f"http://{head.address}:{head.port('dashboard')}/api/serve/applications/"
    config = json.dumps(yaml.safe_load(manifest["spec"]["serveConfigV2"])).encode()
    headers = {"Content-Type": "application/json"}
    deadline = time.monotonic() + READY_SECONDS
    sent, status = False, "the dashboard does not answer"
    while time.monotonic() < deadline and not head.ended.is_set():
        try:
            if not sent:
                with urllib.request.urlopen(urllib.request.Request(url, config, headers, method="PUT"), timeout=30):
                    sent = True
            with urllib.request.urlopen(url, timeout=10) as answer:
                (application,) = json.load(answer)["applications"].values()
            status = f"{application['status']}: {application['message']}"
            if application["status"] == "RUNNING":
                return
            if application["status"] == "DEPLOY_FAILED":
                break
        except (OSError, ValueError):
            pass
        time.sleep(1)
    raise RuntimeError(f"{head.name}: {status}")
