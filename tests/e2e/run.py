"""The overlay `local-small`, run for real: images built, pods as containers, and everything that may happen to them.

    python tests/e2e/run.py [--keep-images] [--only open|secured]      (make e2e; as root)

While a client checks every row of its lookups and asks a worker for completions, the StatefulSet of shards is scaled
3 -> 5 -> 2 -> 3, rolled, and one pod after another is killed and cut off. One shard shares a node with both and hands
them its rows to read in place (component `near`). In the end a DaemonSet takes over (component `per-node`). Then all
begins again with TLS and a policy (component `secure`), and certificates, tokens and policy are replaced every second.
Ends with exit code 1 if a lookup or a completion failed or was wrong. Takes at most 30 minutes and leaves nothing
behind, but for images if told to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/worker")]

import grpc  # noqa: E402
import images  # noqa: E402
import yaml  # noqa: E402
from credentials import CertManager  # noqa: E402
from kubelet import Cluster, DaemonSet, StatefulSet, claim_folder, node_folder, run_job, wait_ready  # noqa: E402
from podman import Podman  # noqa: E402
from ray_service import deploy, serve_service, start_head  # noqa: E402
from small_model import write_checkpoint  # noqa: E402
from support.checkpoints import longcat_checkpoint  # noqa: E402
from support.kustomize import K8S, Manifest, find, render  # noqa: E402

from embedding_service.client.status import get_status  # noqa: E402
from embedding_service.errors import EmbeddingServiceError  # noqa: E402
from embedding_service.security.authority import new_token  # noqa: E402
from embedding_service.security.policy import digest_of  # noqa: E402
from embedding_service.wire import control_pb2 as control  # noqa: E402
from embedding_service.wire import embedding_pb2 as wire  # noqa: E402
from embedding_service.wire.control_pb2_grpc import ControlServiceStub  # noqa: E402
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub  # noqa: E402

SECONDS = 30 * 60
CALM_SECONDS = 10
CUT_SECONDS = 15
ROTATIONS = 20
# As docs/kubernetes.md says it.
STATUS = ("status", "embedding-controller:7069", "--tls", "/tls")
OVERLAY = K8S / "overlays/local-small"
NEAR, PER_NODE, SECURE = (K8S / "components" / name for name in ("near", "per-node", "secure"))
# Where the client, the worker and a shard are together.
NODE, OTHER_NODE = "node-of-workers", "another-node"
MOST_SHARDS = 5
# The checkpoint whose rows name themselves, and the one that a worker can run.
ROWS, MODEL = "rows", "model"

_began = time.monotonic()


def say(text: str) -> None:
    """A line with the time since the start."""
    print(f"{time.monotonic() - _began:6.1f} s  {text}", flush=True)


class Scenario:
    """The steps. Each tells what the client saw."""

    components: tuple[Path, ...] = (NEAR,)
    worker_components: tuple[Path, ...] = (NEAR / "head",)

    def __init__(self, podman: Podman, work: Path) -> None:
        work.mkdir()
        self.work = work
        self.service = _rendered(work, OVERLAY, components=self.components)
        self.worker = find(_rendered(work, OVERLAY / "worker", components=self.worker_components), "RayService")
        objects = [*self.service, serve_service(self.worker)]
        self.cluster = Cluster(podman, work, objects, say)
        self.cluster.node_of = dict.fromkeys(("client", "model-worker-head", "embedding-shard-0"), NODE)
        self.controller = StatefulSet(self.cluster, find(objects, "StatefulSet", "embedding-controller"))
        self.shards = StatefulSet(self.cluster, find(objects, "StatefulSet", "embedding-shard"))
        self.daemons: DaemonSet | None = None
        self._seen: dict[str, Any] = {}

    def run(self) -> bool:
        """From an empty cluster to the end; whether everything was answered, and rightly."""
        with self.cluster:
            self.import_checkpoints()
            self.bring_up()
            client = self.start_client()
            self.step("calm", lambda: time.sleep(CALM_SECONDS))
            _until(self.worker_reads_in_place, "the worker to read in place beside the client", 30)
            self.step("kill the shard of the client's node", self.kill_near)
            self.step("scale 3 -> 5", lambda: self.scale(5))
            self.step("roll 5", self.roll)
            self.step("restart the controller", self.restart_controller)
            self.step("scale 5 -> 2", lambda: self.scale(2))
            self.step("scale 2 -> 3", lambda: self.scale(3))
            self.step("kill a pod", self.kill_one)
            self.step("cut a pod off", self.cut_one_off)
            self.step("one shard a node instead", self.move_to_daemon_set)
            client.stop()
            return self.verdict()

    # Steps

    def import_checkpoints(self) -> None:
        """Two Jobs of the overlay's, with other settings."""
        volume = claim_folder(self.work, "checkpoint")
        volume.mkdir(parents=True)
        longcat_checkpoint(volume / ROWS)
        write_checkpoint(volume / MODEL)
        for name, dtype in ((ROWS, "fp32"), (MODEL, "int8")):
            settings = {"CHECKPOINT": f"/checkpoint/{name}", "MODEL": name, "DTYPE": dtype, "PART_SIZE": "64KiB"}
            objects = _rendered(self.work, OVERLAY / "import", settings={"embedding-import": settings})
            self.cluster.objects = objects
            run_job(self.cluster, find(objects, "Job"))
        self.cluster.objects = [*self.service, serve_service(self.worker)]
        # The overlay's worker reads /checkpoint itself.
        for file in (volume / MODEL).iterdir():
            file.rename(volume / file.name)

    def bring_up(self) -> None:
        """Controller, shards and worker."""
        for pod in range(MOST_SHARDS):
            name = f"{self.shards.name}-{pod}"
            self.prepare_node(self.cluster.node_of.get(name, f"node-of-{name}"))
        self.controller.scale(1)
        self.shards.scale(self.shards.manifest["spec"]["replicas"])
        self.settle()
        say(f"{len(self.shards.pods)} shards are ready and hold every part {self._copies()} times")
        self.check_restricted()
        head = start_head(self.cluster, self.worker)
        deploy(head, self.worker)
        wait_ready([head])
        say("the worker's application runs")

    def prepare_node(self, node: str) -> None:
        """What the component `near` asks of an administrator."""
        path = find(self.service, "PersistentVolume")["spec"]["hostPath"]["path"]
        folder = node_folder(self.work, node, path)
        folder.mkdir(parents=True)
        os.chown(folder, 10001, 10001)
        folder.chmod(0o700)

    def check_restricted(self) -> None:
        """That a shard's first process may do as little as its manifest says, by the kernel's word."""
        status = self.cluster.podman("exec", self.shards.pods[0].name, "cat", "/proc/1/status")
        said = {
            name: value.split()[0] for name, _, value in (line.partition(":") for line in status.splitlines()) if value
        }
        wanted = {
            "Uid": "10001",
            "Gid": "10001",
            "CapEff": "0" * 16,
            "CapBnd": "0" * 16,
            "NoNewPrivs": "1",
            "Seccomp": "2",
        }
        if {name: said[name] for name in wanted} != wanted:
            raise RuntimeError(f"a shard may do more than its manifest says: {said}")
        say(f"a shard runs with {', '.join(f'{name} {value}' for name, value in wanted.items())}")

    def start_client(self) -> Any:
        """The client's pod: the service's image with the tests' code, and what the worker mounts to read near rows."""
        shard = self.shards.manifest["spec"]["template"]
        worker = self.worker["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
        code = "/tests"
        template: Manifest = {
            "metadata": {"labels": {"embedding-service/client": "true"}},
            "spec": {
                "serviceAccountName": worker.get("serviceAccountName", "default"),
                "securityContext": shard["spec"]["securityContext"],
                "containers": [
                    {
                        "image": shard["spec"]["containers"][0]["image"],
                        "command": ["python3.11", f"{code}/e2e/client.py"],
                        "args": ["embedding:7070", f"{ROWS}/ngram", "http://model-worker-serve-svc:8000/v1/completions",
                                 "/report/report.json"],
                        "env": [
                            {"name": "PYTHONPATH", "value": code},
                            {"name": "OPENAI_API_KEY", "value": API_KEY},
                            *_of_service(worker["containers"][0]["env"]),
                        ],
                        "ports": [],
                        "resources": {"limits": {"memory": "2Gi"}},
                        "securityContext": shard["spec"]["containers"][0]["securityContext"],
                        "volumeMounts": [
                            {"name": "code", "mountPath": code, "readOnly": True},
                            {"name": "report", "mountPath": "/report"},
                            *_of_service(worker["containers"][0]["volumeMounts"]),
                        ],
                    }
                ],
                "volumes": [
                    {"name": "code", "persistentVolumeClaim": {"claimName": "code"}},
                    {"name": "report", "persistentVolumeClaim": {"claimName": "report"}},
                    *_of_service(worker["volumes"]),
                ],
            },
        }  # fmt: skip
        volume = claim_folder(self.work, "code")
        for file in (ROOT / "tests/e2e/client.py", *(ROOT / "tests/support").glob("*.py")):
            copy = volume / file.relative_to(ROOT / "tests")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        client = self.cluster.start_pod("client", self.shards.manifest["metadata"]["namespace"], template)
        _until(
            lambda: self._read().get("completions", {}).get("seconds"), "the client's first lookups and completion", 90
        )
        return client

    def scale(self, replicas: int) -> None:
        """As `kubectl scale` does."""
        self.shards.scale(replicas)
        self.settle()

    def roll(self) -> None:
        """As `kubectl rollout restart` does."""
        self.shards.roll()
        self.settle()

    def restart_controller(self) -> None:
        """As `kubectl delete pod --force` does: no word of farewell."""
        self.controller.pods[0].kill()
        time.sleep(1)
        wait_ready(self.controller.pods)
        self.settle()

    def kill_one(self) -> None:
        """Its container is started again."""
        pod = self.shards.pods[-1]
        pod.kill()
        time.sleep(1)
        wait_ready([pod])
        self.settle()

    def cut_one_off(self) -> None:
        """For longer than the controller waits for it."""
        pod = self.shards.pods[0]
        pod.cut()
        time.sleep(CUT_SECONDS)
        pod.heal()
        wait_ready([pod])
        self.settle()

    def move_to_daemon_set(self) -> None:
        """As `kubectl apply` of the component and `kubectl scale --replicas=0 statefulset` do."""
        everywhere = {"COPIES": "0", "EXPECT_SHARDS": "0"}
        self.service = _rendered(self.work, OVERLAY, components=[PER_NODE], settings={"embedding": everywhere})
        self.cluster.objects = [*self.service, serve_service(self.worker)]
        self.prepare_node(OTHER_NODE)
        self.controller.manifest = find(self.service, "StatefulSet", "embedding-controller")
        self.controller.roll()
        self.daemons = DaemonSet(self.cluster, find(self.service, "DaemonSet"))
        self.daemons.start([NODE, OTHER_NODE])
        self.shards.scale(0)
        self.settle()
        self.all_near()
        self.daemons.roll()
        self.settle()
        self.all_near()

    def all_near(self) -> None:
        """Until the client needs no wire: its node has every part."""
        before = self._near()

        def near() -> bool:
            nonlocal before
            last, before = before, self._near()
            return before["near_rows"] > last["near_rows"] and before["wired_rows"] == last["wired_rows"]

        _until(near, f"all rows to be near: {before}", 60, every=3)

    def worker_reads_in_place(self) -> bool:
        """Whether it is connected to the near socket of the shard that is beside it."""
        sockets = self.cluster.podman("exec", "model-worker-head", "cat", "/proc/net/unix").splitlines()
        return any(line.endswith(f" /near/{self.shards.pods[0].name}") for line in sockets)

    def kill_near(self) -> None:
        """The wire takes over, and what comes back is near again."""
        pod = self.shards.pods[0]
        shard = pod.name
        self.until_near(shard)
        pod.kill()
        _until(lambda: self._near()["shards"].get(shard) != "near", f"{shard} to be near no more", 30)
        before = self._near()["wired_rows"]
        _until(lambda: self._near()["wired_rows"] > before, "rows over the wire", 30)
        wait_ready([pod])
        self.settle()
        self.until_near(shard)

    def until_near(self, shard: str) -> None:
        """Until the client reads this shard's rows in place."""
        before = self._near()["near_rows"]
        _until(
            lambda: self._near()["shards"].get(shard) == "near" and self._near()["near_rows"] > before,
            f"near rows of {shard}: {self._near()}",
            60,
        )

    # What is seen

    def settle(self) -> None:
        """Wait until every shard holds all its parts, and every part has its copies."""
        _until(self._settled, f"{len(self._shards())} shards that hold all their parts", 120)

    def _settled(self) -> bool:
        try:
            status = self.status()
        except (EmbeddingServiceError, grpc.RpcError):
            return False
        parts = sum(model.parts for model in status.models)
        return (
            {shard.shard_id for shard in status.shards} == self._shards()
            and not any(shard.parts_missing or shard.draining for shard in status.shards)
            and len(status.models) == 2
            and all(model.serving for model in status.models)
            and sum(shard.parts for shard in status.shards) == parts * self._copies()
        )

    def status(self) -> control.Status:
        """The controller's view. Raises EmbeddingServiceError, grpc.RpcError."""
        return get_status(f"{self.controller.pods[0].address}:7069", timeout=2)

    def _shards(self) -> set[str]:
        """By their ids: the names of pods, and of nodes where there is one on each."""
        daemons = self.daemons.pods if self.daemons else []
        return {pod.name for pod in self.shards.pods} | {pod.node for pod in daemons}

    def _copies(self) -> int:
        return int(find(self.service, "ConfigMap")["data"]["COPIES"]) or len(self._shards())

    def step(self, title: str, action: Callable[[], None]) -> None:
        """Do it, and tell what the client saw."""
        say(f"{title} ...")
        before, began = self._read(), time.monotonic()
        action()
        time.sleep(2)
        after, seconds = self._read(), time.monotonic() - began
        lines = [f"{title}: {seconds:.0f} s"]
        for kind, counts in after.items():
            new = {name: values[len(before[kind][name]) :] for name, values in counts.items()}
            slowest = max(new["seconds"], default=0)
            lines.append(
                f"{len(new['seconds'])} {kind} ({len(new['failed'])} failed, {len(new['wrong'])} wrong, "
                f"slowest {slowest:.2f} s)"
            )
        say("; ".join(lines))

    def _read(self) -> dict[str, Any]:
        return {kind: counts for kind, counts in self._report().items() if kind != "near"}

    def _near(self) -> dict[str, Any]:
        """Where the client's rows came from so far."""
        return self._report()["near"]

    def _report(self) -> dict[str, Any]:
        report = claim_folder(self.work, "report") / "report.json"
        return json.loads(report.read_text()) if report.exists() else {}

    def verdict(self) -> bool:
        """The sums, with the first of everything that went wrong."""
        near = self._near()
        say(f"of the client's rows, {near['near_rows']} were read in place and {near['wired_rows']} came over the wire")
        good = bool(near["near_rows"])
        for kind, counts in self._read().items():
            done, failed, wrong = (counts[name] for name in ("seconds", "failed", "wrong"))
            say(f"in all: {len(done)} {kind}, {len(failed)} failed, {len(wrong)} wrong")
            for problem in [*failed, *wrong][:3]:
                say(f"  {problem}")
            good = good and bool(done) and not failed and not wrong
        return good


# Of the client's completions, where the worker asks for a key.
API_KEY = "a-key-of-the-client"
_KEYS = '[identities.client]\ntokens = ["sha256:{digest}"]\nread = ["*"]\n'


class Secured(Scenario):
    """With TLS, certificates, service-account tokens and a policy, all of which change under load."""

    components = (NEAR, SECURE)
    worker_components = (NEAR / "head", SECURE / "head")

    def __init__(self, podman: Podman, work: Path) -> None:
        super().__init__(podman, work)
        self.cert_manager, self.admin = CertManager(), new_token()
        self.changes = 0
        self.change_credentials()

    def run(self) -> bool:
        """From an empty cluster to the end; whether everything was answered, and rightly. Raises if others get in."""
        with self.cluster:
            self.import_checkpoints()
            self.bring_up()
            client = self.start_client()
            self.step("calm", lambda: time.sleep(CALM_SECONDS))
            _until(self.worker_reads_in_place, "the worker to read in place beside the client", 30)
            self.step(f"other certificates, tokens and policies {ROTATIONS} times", self.rotate)
            self.step("kill the shard of the client's node", self.kill_near)
            self.step("roll 3", self.roll)
            self.step("restart the controller", self.restart_controller)
            self.turn_strangers_away()
            self.cluster.podman("exec", self.shards.pods[0].name, "embedding-service", *STATUS)
            client.stop()
            return self.verdict()

    def change_credentials(self) -> None:
        """New ones of everything, as when they are renewed."""
        self.changes += 1
        certificates = [each for each in self.service if each["kind"] == "Certificate" and "uris" in each["spec"]]
        policy = (SECURE / "policy.toml").read_text() + (
            f"\n[identities.admin-{self.changes}]\ntokens = ['sha256:{digest_of(self.admin)}']\nrights = ['admin']\n"
        )
        self.cluster.set_secrets(
            {each["spec"]["secretName"]: self.cert_manager.issue(each) for each in certificates}
            | {"embedding-policy": {"policy.toml": policy.encode(), "jwks.json": self.cluster.tokens.jwks()}}
            | {"model-worker-policy": {"policy.toml": _KEYS.format(digest=digest_of(API_KEY)).encode()}}
        )

    def rotate(self) -> None:
        """Each second."""
        for _ in range(ROTATIONS):
            self.change_credentials()
            time.sleep(1)

    def turn_strangers_away(self) -> None:
        """What each of them tries, and how it has to end."""
        worker, other = (self._token(account) for account in ("model-worker", "default"))
        shard, controller = self.shards.pods[0].address, self.controller.pods[0].address
        routing, status = wire.GetRoutingRequest(), control.GetStatusRequest()
        code = grpc.StatusCode
        for who, channel, request, expected in (
            ("a worker", self._channel(f"{shard}:7070", worker), routing, code.OK),
            ("who speaks plain text", grpc.insecure_channel(f"{shard}:7070"), routing, code.UNAVAILABLE),
            ("who has no token", self._channel(f"{shard}:7070", ""), routing, code.UNAUTHENTICATED),
            ("another service account", self._channel(f"{shard}:7070", other), routing, code.UNAUTHENTICATED),
            (
                "a worker who wants the status",
                self._channel(f"{controller}:7069", worker),
                status,
                code.PERMISSION_DENIED,
            ),
            ("the admin", self._channel(f"{controller}:7069", self.admin), status, code.OK),
            ("who has no certificate", self._channel(f"{controller}:7071", self.admin), status, code.UNAVAILABLE),
            ("who asks a probe's port", grpc.insecure_channel(f"{shard}:7079"), routing, code.UNIMPLEMENTED),
        ):
            with channel:
                found = _code_of(channel, request)
            if found is not expected:
                raise RuntimeError(f"{who} got {found.name}, not {expected.name}")
            say(f"{who} gets {found.name}")

    def status(self) -> control.Status:
        """The controller's view, for the admin."""
        with self._channel(f"{self.controller.pods[0].address}:7069", self.admin) as channel:
            return ControlServiceStub(channel).GetStatus(control.GetStatusRequest(), timeout=2)

    def _token(self, account: str) -> str:
        return self.cluster.tokens.token("embedding", account, "embedding-service", 60).decode()

    def _channel(self, address: str, token: str) -> grpc.Channel:
        """To a pod's address, which its certificate does not name."""
        shown = grpc.ssl_channel_credentials(self.cluster.secrets["embedding-shard-tls"]["ca.crt"])
        if token:
            shown = grpc.composite_channel_credentials(shown, grpc.access_token_call_credentials(token))
        name = "embedding" if address.endswith(":7070") else "embedding-controller"
        return grpc.secure_channel(address, shown, [("grpc.ssl_target_name_override", name)])


def _code_of(channel: grpc.Channel, request: Any) -> grpc.StatusCode:
    """How a call ends."""
    status = isinstance(request, control.GetStatusRequest)
    call = ControlServiceStub(channel).GetStatus if status else EmbeddingServiceStub(channel).GetRouting
    try:
        call(request, timeout=5)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined,no-any-return]
    return grpc.StatusCode.OK


def _of_service(named: list[Manifest]) -> list[Manifest]:
    """What a client of the service needs of a worker's environment, volumes or mounts."""
    return [each for each in named if each["name"] in ("near", "credentials", "EMBEDDING_SERVICE_TLS")]


def _rendered(
    work: Path,
    overlay: Path,
    *,
    components: Sequence[Path] = (),
    settings: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Manifest]:
    """The overlay with the images built here, components and other settings, by an overlay on top, as users do it."""
    folder = work / "rendered"
    folder.mkdir(exist_ok=True)
    on_top = {
        "resources": [os.path.relpath(overlay, folder)],
        "components": [os.path.relpath(component, folder) for component in components],
        "images": [{"name": name, "newName": f"localhost/{name}", "newTag": images.TAG} for name in images.IMAGES],
        "configMapGenerator": [
            {"name": name, "behavior": "merge", "literals": [f"{key}={value}" for key, value in values.items()]}
            for name, values in (settings or {}).items()
        ],
        "namespace": "embedding",
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(on_top))
    return render(folder)


SCENARIOS = {"open": Scenario, "secured": Secured}


def _until(condition: Callable[[], object], what: str, seconds: float, every: float = 0.5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)


def _check_tools() -> None:
    missing = [name for name in ("podman", "runc", "iptables", "debootstrap", "kubectl") if not shutil.which(name)]
    if missing:
        sys.exit(
            f"not installed: {', '.join(missing)}. `make e2e` installs Debian's packages; kubectl must be 1.21 or newer"
        )
    if os.geteuid():
        sys.exit("debootstrap and podman's network need root")


def _end(number: int, frame: object) -> None:
    """Of an alarm or a signal: as an exception, so that everything is cleaned up."""
    raise RuntimeError(f"not done after {SECONDS // 60} minutes" if number == signal.SIGALRM else "told to end")


def main() -> None:
    """Build, run, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-images", action="store_true", help="so that the next run need not build them")
    parser.add_argument("--only", choices=SCENARIOS, help="one of the two")
    given = parser.parse_args()
    _check_tools()
    signal.signal(signal.SIGALRM, _end)
    signal.signal(signal.SIGTERM, _end)
    signal.alarm(SECONDS)
    home = ROOT / ".e2e"
    work = home / "work"
    podman = Podman(home / "podman")
    podman.remove_containers()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    good = True
    try:
        images.build_all(podman)
        say("images are built")
        for name, scenario in SCENARIOS.items():
            if given.only in (None, name):
                say(f"{name}:")
                good = scenario(podman, work / name).run() and good
    except BaseException:
        for log in sorted([*work.rglob("*.log"), podman.folder / "build.log"]):
            tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
            print(f"--- {log.name}", *tail, sep="\n", flush=True)
        raise
    finally:
        if given.keep_images:
            podman.remove_containers()
            shutil.rmtree(work, ignore_errors=True)
        else:
            podman.remove()
            shutil.rmtree(home, ignore_errors=True)
        say("cleaned up")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
