"""As much of Kubernetes as the overlays need, on podman: a small kubelet, StatefulSet controller and kube-proxy.

Every pod is a container with an address and a name of its own. What a manifest says of it holds: command, arguments,
environment (the downward API too), mounts, user, read-only root, capabilities, memory, probes, termination grace. What
is left out: scheduling (a pod is alone on a node of its own, or where `Cluster.node_of` says), network policies,
sidecars, disruption budgets.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import grpc
from credentials import TokenIssuer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from podman import Podman
from support.kustomize import Manifest, filled_in, resolved

NETWORK = "embedding-e2e"
CHAIN = "EMBEDDING-E2E"
SERVICE_NETWORK = ip_network("10.96.77.0/24")
REFUSE = ["-d", str(SERVICE_NETWORK), "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"]
# As kubelets do: at once the first time, then 10 s, 20 s, 40 s.
FIRST_BACKOFF = 10.0
READY_SECONDS = 180.0
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


class Cluster:
    """One namespace of pods. Entering makes the network; leaving removes every trace.

    Attributes:
        node_of: The nodes of pods, by the pods' names, that are to share one.
        secrets: The content of Secrets, by their names.
    """

    def __init__(self, podman: Podman, folder: Path, objects: list[Manifest], say: Callable[[str], None]) -> None:
        self.podman, self.folder, self.objects, self.say = podman, folder, objects, say
        self.pods: dict[str, Pod] = {}
        self.node_of: dict[str, str] = {}
        self.secrets: dict[str, dict[str, bytes]] = {}
        self.tokens = TokenIssuer()
        self.services: dict[str, tuple[Manifest, str]] = {}
        self._numbers = itertools.count(10)
        self._lock = threading.Lock()

    def __enter__(self) -> Cluster:
        self.podman("network", "create", NETWORK)
        (network,) = json.loads(self.podman("network", "inspect", NETWORK))
        self.subnet = ip_network(network["subnets"][0]["subnet"])
        self._remove_rules()  # of a rehearsal that was killed
        _iptables("-N", CHAIN)
        _iptables("-A", "PREROUTING", "-j", CHAIN)
        # A pod that reaches a pod through a Service must be answered through it.
        _iptables("-I", "POSTROUTING", *self._hairpin())
        # A Service without a ready pod refuses; nothing for it may leave this machine.
        _iptables("-I", "FORWARD", *REFUSE, table="filter")
        for manifest in self.objects:
            if manifest["kind"] == "Service":
                self.add_service(manifest)
        return self

    def __exit__(self, *error: Any) -> None:
        for pod in self.pods.values():
            pod.ended.set()
        self.save_logs()
        self.podman.remove_containers()
        self._remove_rules()

    def _remove_rules(self) -> None:
        _iptables("-D", "PREROUTING", "-j", CHAIN, check=False)
        _iptables("-F", CHAIN, check=False)
        _iptables("-X", CHAIN, check=False)
        _iptables("-D", "POSTROUTING", *self._hairpin(), check=False)
        _iptables("-D", "FORWARD", *REFUSE, table="filter", check=False)

    def _hairpin(self) -> list[str]:
        ours = str(self.subnet)
        return ["-s", ours, "-d", ours, "-m", "conntrack", "--ctstate", "DNAT", "-j", "MASQUERADE"]

    def add_service(self, manifest: Manifest) -> None:
        """A Service. Headless ones are the names of pods; others get an address."""
        if manifest["spec"].get("clusterIP") != "None":
            name = manifest["metadata"]["name"]
            self.services[name] = (manifest, str(SERVICE_NETWORK[len(self.services) + 1]))

    def hosts(self) -> list[str]:
        """What pods know of Services, as podman's --add-host takes it."""
        return [
            f"{host}:{address}"
            for name, (manifest, address) in self.services.items()
            for host in (name, f"{name}.{manifest['metadata']['namespace']}.svc")
        ]

    def next_address(self) -> str:
        """An address that no pod had before."""
        return str(self.subnet[next(self._numbers)])

    def update_endpoints(self) -> None:
        """Let each Service's address lead to one of its ready pods, by chance: kube-proxy's part, and as atomic."""
        with self._lock:
            rules = [rule for manifest, address in self.services.values() for rule in self._rules(manifest, address)]
            lines = ["*nat", f":{CHAIN} - [0:0]", *(f"-A {CHAIN} {rule}" for rule in rules), "COMMIT", ""]
            subprocess.run(["iptables-restore", "--wait", "--noflush"], input="\n".join(lines), text=True, check=True)

    def _rules(self, service: Manifest, address: str) -> Iterable[str]:
        selector = service["spec"]["selector"].items()
        pods = [pod for pod in self.pods.values() if pod.ready and selector <= pod.labels.items()]
        for port in service["spec"]["ports"]:
            for left, pod in zip(range(len(pods), 0, -1), pods, strict=True):
                chance = f"-m statistic --mode random --probability {1 / left:.6f}"
                target = f"{pod.address}:{pod.port(port['targetPort'])}"
                yield f"-d {address} -p tcp --dport {port['port']} {chance} -j DNAT --to-destination {target}"

    def start_pod(self, name: str, namespace: str, template: Manifest, governing_service: str = "") -> Pod:
        """Make a pod and run it until it is stopped."""
        pod = Pod(self, name, namespace, template, governing_service)
        self.pods[name] = pod
        pod.thread.start()
        return pod

    def set_secrets(self, content: dict[str, dict[str, bytes]]) -> None:
        """Change Secrets, and the volumes of pods that show them."""
        self.secrets |= content
        for pod in list(self.pods.values()):
            pod.write_volumes()

    def save_logs(self) -> None:
        """What every container that is still there has printed."""
        for name in self.pods:
            self.podman("logs", name, check=False, log=self.folder / f"{name}.log")


class Pod:
    """A pod of one container, run by a thread of its own that starts, probes and restarts it."""

    def __init__(self, cluster: Cluster, name: str, namespace: str, template: Manifest, governing_service: str) -> None:
        self.cluster, self.name, self.namespace, self.template = cluster, name, namespace, template
        self.labels: dict[str, str] = template["metadata"]["labels"]
        self.container: Manifest = template["spec"]["containers"][0]
        self.node = cluster.node_of.get(name, f"node-of-{name}")
        self.address = cluster.next_address()
        self.names = [f"{name}.{governing_service}.{namespace}.svc"] if governing_service else []
        self.ready, self.restarts, self.exit_code = False, 0, None
        self.ready_since = 0.0
        self.ended, self.cut_off = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._pid = 0

    def port(self, name_or_number: str | int) -> int:
        """The number of a container port."""
        named = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        return named.get(name_or_number, name_or_number)  # type: ignore[return-value]

    # Its life

    def _live(self) -> None:
        try:
            self._run()
        finally:
            self.ended.set()

    def _run(self) -> None:
        self.cluster.podman("run", "--detach", *self._options(), self._image(), *self._words("args"))
        while not self.ended.is_set():
            inspected = self.cluster.podman("inspect", "--format={{.State.Pid}}", self.name)
            self._pid = int(inspected)
            self._probe_until_it_exits()
            self._set_ready(False)
            if self.ended.is_set() or self.template["spec"].get("restartPolicy") == "Never":
                break
            self.cluster.say(f"{self.name} exited: restarted")
            self.ended.wait(FIRST_BACKOFF * 2 ** (self.restarts - 1) if self.restarts else 0)
            self.restarts += 1
            self.cluster.podman("start", self.name)

    def running(self) -> bool:
        """Whether its container's first process is there."""
        return Path(f"/proc/{self._pid}").exists()

    def _probe_until_it_exits(self) -> None:
        startup, readiness, liveness = (
            _Probe(self, self.container.get(f"{kind}Probe")) for kind in ("startup", "readiness", "liveness")
        )
        while self.running() and not self.ended.is_set():
            if self.cut_off.is_set():
                self._set_ready(False)
            elif not startup.passed:
                if startup.ask() is False:
                    self._kill("startup")
            else:
                ready = readiness.ask()
                self._set_ready(self.ready if ready is None else ready)
                if liveness.ask() is False:
                    self._kill("liveness")
            self.ended.wait(0.1)

    def _kill(self, probe: str) -> None:
        self.cluster.say(f"{self.name} failed its {probe} probe: killed")
        self.cluster.podman("kill", self.name, check=False)

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready, self.ready_since = ready, time.monotonic()
            self.cluster.update_endpoints()

    # What may happen to it

    def stop(self) -> None:
        """SIGTERM, the grace, SIGKILL; then it is gone."""
        grace = self.template["spec"].get("terminationGracePeriodSeconds", 30)
        began = time.monotonic()
        self.ended.set()
        self.thread.join()
        self.cluster.podman("stop", f"--time={grace}", self.name, timeout=grace + 60)
        self.exit_code = int(self.cluster.podman("inspect", "--format={{.State.ExitCode}}", self.name))  # type: ignore[assignment]
        self.cluster.say(f"{self.name} took {time.monotonic() - began:.1f} s to end, exit code {self.exit_code}")
        self.cluster.podman("logs", self.name, check=False, log=self.cluster.folder / f"{self.name}.log")
        self.cluster.podman("rm", "--force", self.name)
        self.cluster.pods.pop(self.name)
        shutil.rmtree(self._own_folder(), ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL to its processes, as a node without memory would."""
        self.cluster.podman("kill", "--signal=KILL", self.name)

    def cut(self) -> None:
        """Take its network away, and with it its node's word to the control plane."""
        self.cut_off.set()
        self.cluster.podman("network", "disconnect", NETWORK, self.name)

    def heal(self) -> None:
        """Give it its network back."""
        aliases = [f"--alias={name}" for name in self.names]
        self.cluster.podman("network", "connect", *self._place(), *aliases, NETWORK, self.name)
        self.cut_off.clear()

    # Its container

    def _image(self) -> str:
        return str(self.container["image"])

    def _words(self, field: str) -> list[str]:
        variables = self._environment()
        return [filled_in(word, variables) for word in self.container.get(field, [])]

    def _environment(self) -> dict[str, str]:
        fields = {
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "spec.nodeName": self.node,
            "status.podIP": self.address,
        }
        return resolved(self.container, self.cluster.objects, fields.__getitem__)

    def _options(self) -> list[str]:
        security = self.template["spec"]["securityContext"] | self.container["securityContext"]
        limit = self.container["resources"]["limits"]["memory"]
        options = [
            f"--name={self.name}",
            f"--hostname={self.name}",
            f"--network={NETWORK}",
            *self._place(),
            f"--dns-search={self.namespace}.svc",
            f"--user={security['runAsUser']}:{security['runAsGroup']}",
            f"--memory={int(limit[:-2]) * UNITS[limit[-2:]]}",
            f"--read-only={security['readOnlyRootFilesystem']}".lower(),
            "--read-only-tmpfs=false",
            *(f"--cap-drop={name}" for name in security["capabilities"]["drop"]),
            *(f"--network-alias={name}" for name in self.names),
            *(f"--add-host={host}" for host in self.cluster.hosts()),
            *(f"--env={name}={value}" for name, value in self._environment().items()),
            *(f"--volume={mount}" for mount in self._mounts()),
        ]
        if not security["allowPrivilegeEscalation"]:
            options.append("--security-opt=no-new-privileges")
        if command := self._words("command"):
            options.append(f"--entrypoint={json.dumps(command)}")
        return options

    def _place(self) -> list[str]:
        """Its address, on the network and on the wire: a pod keeps both when its container is started again."""
        wire = ":".join(f"{byte:02x}" for byte in (2, 0, *ip_address(self.address).packed))
        return [f"--ip={self.address}", f"--mac-address={wire}"]

    def _mounts(self) -> Iterable[str]:
        self.write_volumes()
        volumes = {volume["name"]: volume for volume in self.template["spec"]["volumes"]}
        group = self.template["spec"]["securityContext"]["fsGroup"]
        for mount in self.container["volumeMounts"]:
            volume = volumes[mount["name"]]
            folder = self._folder_of_node(volume)
            if folder is None:
                claim = volume.get("persistentVolumeClaim")
                folder = (
                    claim_folder(self.cluster.folder, claim["claimName"])
                    if claim
                    else self._own_folder() / volume["name"]
                )
                folder.mkdir(parents=True, exist_ok=True)
                if "secret" not in volume and "projected" not in volume:
                    give_to_group(folder, group)
            yield f"{folder}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}"

    def write_volumes(self) -> None:
        """Volumes of Secrets and tokens, with what they show by now."""
        for volume in self.template["spec"]["volumes"]:
            sources = (
                [{"secret": volume["secret"]}] if "secret" in volume else volume.get("projected", {}).get("sources")
            )
            if sources:
                files = {name: text for source in sources for name, text in self._files_of(source).items()}
                write_volume(self._own_folder() / volume["name"], files, self.template["spec"]["securityContext"])

    def _files_of(self, source: Manifest) -> dict[str, bytes]:
        if "serviceAccountToken" in source:
            wanted = source["serviceAccountToken"]
            account = self.template["spec"]["serviceAccountName"]
            issue = self.cluster.tokens.token
            token = issue(self.namespace, account, wanted["audience"], wanted["expirationSeconds"])
            return {wanted["path"]: token}
        about = source["secret"]
        content = self.cluster.secrets[about.get("secretName") or about["name"]]
        if "items" in about:
            return {item["path"]: content[item["key"]] for item in about["items"]}
        return content

    def _folder_of_node(self, volume: Manifest) -> Path | None:
        """What is mounted of this node, if the volume is a folder of the nodes. Kubelets leave its owner alone."""
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        for each in self.cluster.objects:
            if each["kind"] == "PersistentVolume" and each["spec"]["claimRef"]["name"] == claim:
                assert each["spec"]["hostPath"]["type"] == "Directory"
                folder = node_folder(self.cluster.folder, self.node, each["spec"]["hostPath"]["path"])
                if not folder.is_dir():
                    raise RuntimeError(f"{self.name} cannot start: {self.node} has no folder {folder}")
                return folder
        return None

    def _own_folder(self) -> Path:
        return self.cluster.folder / "pods" / self.name


class _Probe:
    """One of a container's probes; without a manifest it always passes."""

    def __init__(self, pod: Pod, manifest: Manifest | None) -> None:
        self.passed = manifest is None
        self._pod, self._manifest = pod, manifest or {}
        self._next = time.monotonic() + self._manifest.get("initialDelaySeconds", 0)
        self._failures = 0

    def ask(self) -> bool | None:
        """True and False as the thresholds say; None while nothing is decided."""
        if not self._manifest:
            return True
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + self._manifest.get("periodSeconds", 10)
        if self._serving():
            self._failures, self.passed = 0, True
            return True
        self._failures += 1
        return False if self._failures >= self._manifest.get("failureThreshold", 3) else None

    def _serving(self) -> bool:
        about = self._manifest["grpc"]
        request = health_pb2.HealthCheckRequest(service=about.get("service", ""))
        try:
            # A connection of its own each time, as kubelets make it, not one that waits since the last failure.
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(f"{self._pod.address}:{about['port']}", options) as channel:
                check = health_pb2_grpc.HealthStub(channel).Check
                answer = check(request, timeout=self._manifest.get("timeoutSeconds", 1))
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class StatefulSet:
    """Pods with ordinals, as a StatefulSet's controller keeps them."""

    def __init__(self, cluster: Cluster, manifest: Manifest) -> None:
        self.cluster, self.manifest = cluster, manifest
        self.name: str = manifest["metadata"]["name"]

    @property
    def pods(self) -> list[Pod]:
        """By ordinal."""
        ours = [pod for name, pod in self.cluster.pods.items() if re.fullmatch(rf"{self.name}-\d+", name)]
        return sorted(ours, key=lambda pod: int(pod.name.rpartition("-")[2]))

    def scale(self, replicas: int) -> None:
        """Scale to this many pods, all at once or one after the other by its policy. Returns when they are ready."""
        ordinals = range(len(self.pods), replicas)
        leaving = self.pods[replicas:][::-1]
        if self.manifest["spec"].get("podManagementPolicy") == "Parallel":
            at_once([pod.stop for pod in leaving])
            wait_ready([self._start(ordinal) for ordinal in ordinals])
            return
        for pod in leaving:
            pod.stop()
        for ordinal in ordinals:
            wait_ready([self._start(ordinal)])

    def roll(self) -> None:
        """Replace every pod, from the last, each when the one before was ready for minReadySeconds."""
        for pod in self.pods[::-1]:
            pod.stop()
            wait_ready([self._start(int(pod.name.rpartition("-")[2]))], self.manifest["spec"].get("minReadySeconds", 0))

    def _start(self, ordinal: int) -> Pod:
        spec, namespace = self.manifest["spec"], self.manifest["metadata"]["namespace"]
        return self.cluster.start_pod(f"{self.name}-{ordinal}", namespace, spec["template"], spec["serviceName"])


class DaemonSet:
    """A pod on each of some nodes, with another name each time it is made."""

    def __init__(self, cluster: Cluster, manifest: Manifest) -> None:
        self.cluster, self.manifest = cluster, manifest
        self.pods: list[Pod] = []

    def start(self, nodes: list[str]) -> None:
        """Returns when all are ready."""
        metadata = self.manifest["metadata"]
        for node in nodes:
            name = f"{metadata['name']}-x{secrets.token_hex(2)}"
            self.cluster.node_of[name] = node
            self.pods.append(self.cluster.start_pod(name, metadata["namespace"], self.manifest["spec"]["template"]))
        wait_ready(self.pods)

    def roll(self) -> None:
        """Replace every pod, one after the other."""
        for pod in list(self.pods):
            pod.stop()
            self.pods.remove(pod)
            self.start([pod.node])
            wait_ready(self.pods, self.manifest["spec"].get("minReadySeconds", 0))


def run_job(cluster: Cluster, manifest: Manifest, seconds: float = 120) -> None:
    """Run a Job's pod to its end. Raises RuntimeError if it fails."""
    template = manifest["spec"]["template"] | {
        "spec": manifest["spec"]["template"]["spec"] | {"restartPolicy": "Never"}
    }
    pod = cluster.start_pod(manifest["metadata"]["name"], manifest["metadata"]["namespace"], template)
    pod.thread.join(seconds)
    pod.stop()
    if pod.exit_code:
        raise RuntimeError(f"job {pod.name} ended with {pod.exit_code}: see {cluster.folder / pod.name}.log")


def wait_ready(pods: list[Pod], for_seconds: float = 0) -> None:
    """Until they are ready, and were for so long. Raises RuntimeError when they are not in time."""
    deadline = time.monotonic() + READY_SECONDS
    while not all(pod.ready and time.monotonic() - pod.ready_since >= for_seconds for pod in pods):
        if time.monotonic() > deadline or any(pod.ended.is_set() for pod in pods):
            raise RuntimeError(f"not ready: {', '.join(pod.name for pod in pods if not pod.ready)}")
        time.sleep(0.1)


def at_once(calls: list[Callable[[], Any]]) -> None:
    """All of them in threads; raises what one of them raised."""
    with ThreadPoolExecutor(max(len(calls), 1)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def claim_folder(folder: Path, claim: str) -> Path:
    """Where the volume behind a claim lies on this machine."""
    return folder / "volumes" / claim


def node_folder(folder: Path, node: str, path: str) -> Path:
    """Where a folder of a node lies on this machine."""
    return folder / "nodes" / node / path.lstrip("/")


def write_volume(folder: Path, files: dict[str, bytes], security: Manifest) -> None:
    """Replace all files of a volume at once, as kubelets do: names lead through one link to a folder of this moment."""
    folder.mkdir(parents=True, exist_ok=True)
    now = folder / f"..{time.time_ns()}"
    now.mkdir()
    for name, content in files.items():
        (now / name).write_bytes(content)
        os.chown(now / name, 0, security["fsGroup"])
        (now / name).chmod(0o440)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    before = (folder / "..data").resolve()
    (folder / "..data.new").symlink_to(now.name)
    (folder / "..data.new").replace(folder / "..data")
    if before != folder / "..data" and before.is_dir():
        shutil.rmtree(before)


def give_to_group(folder: Path, group: int) -> None:
    """Let a pod's fsGroup read and write a volume, as kubelets do."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, -1, group)
        path.chmod(path.stat().st_mode | (0o2770 if path.is_dir() else 0o660))


def _iptables(*arguments: str, table: str = "nat", check: bool = True) -> None:
    subprocess.run(["iptables", "--wait", "-t", table, *arguments], check=check, capture_output=not check)
