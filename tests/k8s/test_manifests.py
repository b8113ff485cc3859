"""Every overlay as kubectl renders it: valid, complete in itself, restricted, in step with the code and the sizing."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from referencing import Registry, Resource
from support.kustomize import K8S, Manifest, can_render, environment, filled_in, find, pod_templates, render, resolved

import embedding_service.cli
from embedding_service import tracing
from embedding_service.client.client import TOPOLOGY
from embedding_service.commands.text import parse_bytes
from embedding_service.errors import Unauthenticated
from embedding_service.security.access import TLS_VARIABLE
from embedding_service.security.authority import Authority
from embedding_service.security.certificates import stands_for
from embedding_service.security.policy import read_policy
from embedding_service.security.proofs import Signer
from embedding_service.security.routing import check_routing, sign_routing
from embedding_service.wire import embedding_pb2 as wire
from model_worker.options import POLICY_VARIABLE

DOCKERFILE = K8S.parent / "Dockerfile"

NO_KUBECTL = "kubectl is not installed, and it is what renders k8s/"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_render(), reason=NO_KUBECTL)]

KUBERNETES = "1.37"
# A part of an overlay, applied at a time of its own.
FOLDERS = sorted(file.parent for file in (K8S / "overlays").rglob("kustomization.yaml"))
OVERLAYS = sorted(folder for folder in (K8S / "overlays").iterdir())
# LongCat-Flash-Lite, as DESIGN and k8s/overlays/*/kustomization.yaml count it.
ROWS, ROW_BYTES = 122_683_536, {"ram": 260, "cuda": 260}
# How long the rest of a shard's end may take once it has handed its parts over.
END_SECONDS = 15
PROCESS_BYTES = 1 << 30

_rendered: dict[Path, list[Manifest]] = {}
_valid: set[str] = set()


def objects_of(folder: Path) -> list[Manifest]:
    if folder not in _rendered:
        _rendered[folder] = render(folder)
    return copy.deepcopy(_rendered[folder])


def whole(overlay: Path) -> list[Manifest]:
    """All parts of an overlay together, as they stand in a cluster in the end."""
    return [each for folder in FOLDERS if folder.is_relative_to(overlay) for each in objects_of(folder)]


def containers(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def shards_of(objects: list[Manifest]) -> Manifest:
    """What runs the shards of an overlay: a StatefulSet or a DaemonSet."""
    kinds = ("StatefulSet", "DaemonSet")
    [shards] = [each for each in objects if each["kind"] in kinds and each["metadata"]["name"] == "embedding-shard"]
    return shards


def name_of(folder: Path) -> str:
    return str(folder.relative_to(K8S / "overlays"))


each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=name_of)


# Valid


def validate(manifest: Manifest) -> None:
    """Raises jsonschema's ValidationError. Custom resources: by the schemas in k8s/crd-schemas."""
    text = json.dumps(manifest)
    if text not in _valid:  # most objects are in several overlays, and it takes a while
        _validate(manifest)
        _valid.add(text)


def _validate(manifest: Manifest) -> None:
    if manifest["apiVersion"].partition("/")[0] not in ("ray.io", "monitoring.coreos.com", "cert-manager.io"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    definitions = schema_contents(f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json", KUBERNETES)
    registry: Any = Resource.from_contents(definitions) @ Registry()
    schema = yaml.safe_load((K8S / "crd-schemas" / f"{manifest['kind'].lower()}.yaml").read_text())
    Draft202012Validator(schema, registry=registry).validate(manifest)


@each_folder
def test_every_object_is_valid(folder: Path) -> None:
    objects = objects_of(folder)
    assert objects
    for manifest in objects:
        validate(manifest)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("RayService", ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0)),
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 0)),
        ("ServiceMonitor", ("spec", "endpoints", 0)),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0)),
        ("StatefulSet", ("spec", "template", "spec")),
    ],
)
def test_the_validation_refuses_a_misspelt_field(kind: str, path: tuple[str | int, ...]) -> None:
    manifest = next(each for each in whole(K8S / "overlays/cpu-production") if each["kind"] == kind)
    validate(manifest)
    place: Any = manifest
    for step in path:
        place = place[step]
    place["replicass"] = 1
    with pytest.raises(Exception, match="replicass"):
        validate(manifest)


def test_the_namespace_is_valid_and_the_one_of_the_overlays() -> None:
    namespace = yaml.safe_load((K8S / "namespace.yaml").read_text())
    validate(namespace)
    for folder in FOLDERS:
        inside = [each for each in objects_of(folder) if each["kind"] != "PersistentVolume"]
        assert {each["metadata"]["namespace"] for each in inside} == {namespace["metadata"]["name"]}


# Complete


@each_overlay
def test_whatever_pods_refer_to_is_there(overlay: Path) -> None:
    objects = whole(overlay)
    claims = {each["metadata"]["name"] for each in objects if each["kind"] == "PersistentVolumeClaim"}
    for template in pod_templates(objects):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in containers(template):
            words = " ".join([*container.get("command", []), *container.get("args", [])])
            assert set(re.findall(r"\$\((\w+)\)", words)) <= set(environment(container, objects))
    for stateful in (each for each in objects if each["kind"] == "StatefulSet"):
        find(objects, "Service", stateful["spec"]["serviceName"])
    for each in (each for each in objects if each["kind"] in ("StatefulSet", "DaemonSet")):
        own = [claim["metadata"]["name"] for claim in each["spec"].get("volumeClaimTemplates", [])]
        there = [*own, *(volume["name"] for volume in each["spec"]["template"]["spec"]["volumes"])]
        assert len(there) == len(set(there))
        for container in containers(each["spec"]["template"]):
            assert {mount["name"] for mount in container["volumeMounts"]} == set(there)


@each_overlay
def test_selectors_find_pods_and_ports(overlay: Path) -> None:
    objects = whole(overlay)
    templates = pod_templates(objects)

    def selected(labels: dict[str, str]) -> list[Manifest]:
        found = [each for each in templates if labels.items() <= each["metadata"]["labels"].items()]
        assert found, labels
        return found

    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            ports = {port["targetPort"] for port in spec["ports"]}
            for template in selected(spec["selector"]):
                assert ports <= {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        if each["kind"] in ("StatefulSet", "DaemonSet", "PodDisruptionBudget", "PodMonitor"):
            selected(spec["selector"]["matchLabels"])
        if each["kind"] == "NetworkPolicy":
            named = {port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])}
            offered = {
                port["name"]
                for template in selected(spec["podSelector"]["matchLabels"])
                for port in template["spec"]["containers"][0].get("ports", [])
            }
            assert named <= offered
        if each["kind"] == "HorizontalPodAutoscaler":
            find(objects, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])


def test_prometheus_finds_every_process_of_the_service() -> None:
    objects = whole(K8S / "overlays/cpu-production")
    wanted = find(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    services = [each for each in objects if each["kind"] == "Service"]
    monitored = [each for each in services if wanted.items() <= each["metadata"]["labels"].items()]
    assert {each["spec"]["selector"]["app.kubernetes.io/component"] for each in monitored} == {"shard", "controller"}
    assert all(any(port["name"] == "metrics" for port in each["spec"]["ports"]) for each in monitored)


# In step with the code


def parse(app: typer.Typer, words: list[str]) -> None:
    """As the command line parses them, without running anything. Raises click's UsageError."""
    group: Any = typer.main.get_command(app)
    group.commands[words[0]].make_context(words[0], words[1:])


@each_overlay
def test_arguments_are_those_of_the_commands(overlay: Path) -> None:
    objects = whole(overlay)
    commands = set()
    for template in pod_templates(objects):
        for container in containers(template):
            if "command" not in container and container.get("args"):
                words = words_of(container, objects)
                assert not [word for word in words if "$(" in word]
                parse(embedding_service.cli.app, words)
                commands.add(words[0])
    assert commands == {"controller", "shard", "import"}


def words_of(container: Manifest, objects: list[Manifest]) -> list[str]:
    """A container's arguments, where each field of the pod has its path for a value."""
    variables = resolved(container, objects, lambda path: re.sub(r"\W+", "-", path).strip("-"))
    return [filled_in(word, variables) for word in container["args"]]


@each_overlay
def test_the_serve_config_is_what_ray_and_the_worker_take(overlay: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from model_worker.application import ARGUMENTS, build
    from model_worker.serving import APP

    objects = whole(overlay)
    service = find(objects, "RayService")["spec"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    arguments = ARGUMENTS.validate_python(application.args)
    assert arguments.name == find(objects, "ConfigMap", "embedding-import")["data"]["MODEL"]
    [deployment] = application.deployments
    assert deployment.name == APP
    host, _, port = arguments.embeddings.partition(":")
    assert int(port) in [each["port"] for each in find(_services_named(objects, host), "Service")["spec"]["ports"]]
    assert f"ray=={service['rayClusterConfig']['rayVersion']}" in _requirements()


def _services_named(objects: list[Manifest], name: str) -> list[Manifest]:
    return [each for each in objects if each["kind"] == "Service" and each["metadata"]["name"] == name]


def _requirements() -> list[str]:
    return (K8S.parent / "requirements/all.txt").read_text().splitlines()


def test_what_the_images_leave_out_is_among_the_requirements() -> None:
    text = DOCKERFILE.read_text().replace("\\\n", "")
    left_out = re.findall(r'LEFT_OUT="([^"]+)"', text) + re.findall(r'"\^\(([^$)]+)\)==" pinned', text)
    assert len(left_out) == 4
    names = [line.partition("==")[0] for line in _requirements()]
    for pattern in "|".join(left_out).split("|"):
        assert any(re.fullmatch(pattern, name) for name in names) or pattern == "fbgemm-gpu.*", pattern


def test_the_dockerfile_is_whole() -> None:
    """Each stage is made from one above it, and copies what is there. Targets are those that its head names."""
    text = DOCKERFILE.read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    known = ["${BASE_IMAGE}"]
    for base, stage in stages:
        assert base in known
        known.append(stage)
    assert set(re.findall(r"--from=(\S+)", text)) < set(known)
    assert set(re.findall(r"--target (\S+)", text)) == {"service", "worker", "worker-vllm"} < set(known)
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((DOCKERFILE.parent / each).exists() for each in line.split()), line


def test_the_image_with_vllm_has_what_its_extras_ask_for() -> None:
    """It was pinned by hand for CPUs, where nothing is resolved, and is resolved for GPUs."""
    project = tomllib.loads((K8S.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    [chosen] = re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE.read_text())
    assert {"worker", "vllm", "tls", "tracing"} == set(chosen.split(","))
    lines = (K8S.parent / "requirements/vllm.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(pin.name).removesuffix("-cpu"): pin for pin in pins}
    for words in (project["dependencies"], *(extras[extra] for extra in chosen.split(","))):
        for asked in map(Requirement, words):
            if asked.name == project["name"]:
                assert set(asked.extras) < set(chosen.split(","))
                continue
            [version] = pinned[canonicalize_name(asked.name)].specifier
            assert asked.specifier.contains(version.version), asked


# Restricted


@each_folder
def test_pods_may_do_nothing_they_need_not(folder: Path) -> None:
    for template in pod_templates(objects_of(folder)):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]


@each_folder
def test_every_pod_has_a_network_policy(folder: Path) -> None:
    objects = objects_of(folder)
    policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    for template in pod_templates(objects):
        labels = template["metadata"]["labels"].items()
        matching = [each for each in policies if each["podSelector"]["matchLabels"].items() <= labels]
        types = {kind for each in matching for kind in each["policyTypes"]}
        assert types == {"Ingress", "Egress"}


# Sized


@each_overlay
def test_shards_have_time_to_drain_and_room_for_what_they_offer(overlay: Path) -> None:
    objects = objects_of(overlay)
    decided = find(objects, "ConfigMap", "embedding-")["data"]
    pod = shards_of(objects)["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= int(decided["DRAIN_SECONDS"]) + END_SECONDS
    resources = pod["containers"][0]["resources"]
    if decided["TIER"] == "ram":
        assert parse_bytes(resources["limits"]["memory"]) >= parse_bytes(decided["MEMORY"]) + PROCESS_BYTES
        assert resources["requests"]["memory"] == resources["limits"]["memory"]


@pytest.mark.parametrize(
    ("overlay", "copies", "survivors"), [("cpu-production", 2, 7), ("gpu", 2, 2), ("gpu-near", 2, 1)]
)
def test_longcat_flash_lite_fits(overlay: str, copies: int, survivors: int) -> None:
    """On a node that keeps all of it, two versions of it do, while one takes the other's place."""
    objects = objects_of(K8S / "overlays" / overlay)
    decided = find(objects, "ConfigMap", "embedding-")["data"]
    assert int(decided["COPIES"]) in (copies, 0)
    need = ROWS * ROW_BYTES[decided["TIER"]] * copies
    assert need / survivors < 0.9 * parse_bytes(decided["MEMORY"])


@each_overlay
def test_the_controller_waits_for_as_many_shards_as_there_are(overlay: Path) -> None:
    objects = objects_of(overlay)
    shards = shards_of(objects)
    spec = shards["spec"]
    scalers = [each for each in objects if each["kind"] == "HorizontalPodAutoscaler"]
    decided = find(objects, "ConfigMap", "embedding-")["data"]
    if shards["kind"] == "DaemonSet":  # as many as there are nodes
        assert decided["EXPECT_SHARDS"] == decided["COPIES"] == "0"
        return
    replicas = scalers[0]["spec"]["minReplicas"] if scalers else spec["replicas"]
    assert int(decided["EXPECT_SHARDS"]) == replicas
    assert int(decided["COPIES"]) <= replicas
    # Ready only once all are seen, so one must not wait for the other.
    assert spec["podManagementPolicy"] == "Parallel"


# Near


def on_top(folder: Path, overlay: str, *components: str) -> list[Manifest]:
    """An overlay's objects with components on top of it, as users add them."""
    folder.mkdir(exist_ok=True)
    kustomization = {
        "resources": [os.path.relpath(K8S / "overlays" / overlay, folder)],
        "components": [os.path.relpath(K8S / "components" / name, folder) for name in components],
        "namespace": "embedding",
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(folder)


@pytest.mark.parametrize(
    ("overlay", "components", "worker", "shard_id"),
    [
        ("cpu-production", ["near"], "near/worker", "metadata-name"),
        ("local-small", ["near"], "near/head", "metadata-name"),
        ("local-small", ["per-node"], "near/head", "spec-nodeName"),
        ("gpu-near", [], "", "spec-nodeName"),
    ],
)
def test_shards_and_workers_meet_in_one_folder_of_their_node(
    overlay: str, components: list[str], worker: str, shard_id: str, tmp_path: Path
) -> None:
    service = on_top(tmp_path / "service", overlay, *components)
    objects = [*service, *on_top(tmp_path / "worker", f"{overlay}/worker", *([worker] if worker else []))]
    for each in objects:
        validate(each)
    shard = shards_of(objects)["spec"]["template"]
    cluster = find(objects, "RayService")["spec"]["rayClusterConfig"]
    groups = cluster["workerGroupSpecs"]
    replica = (groups[0] if groups else cluster["headGroupSpec"])["template"]
    mounted = [
        each for each in pod_templates(objects) if "near" in [volume["name"] for volume in each["spec"]["volumes"]]
    ]
    assert mounted == [shard, replica]
    for pod in (shard["spec"], replica["spec"]):
        claim = named(pod["volumes"], "near")["persistentVolumeClaim"]["claimName"]
        assert named(pod["containers"][0]["volumeMounts"], "near")["mountPath"] == "/near"
        assert (pod["securityContext"]["runAsUser"], pod.get("hostUsers", True)) == (10001, True)
        volume = find(objects, "PersistentVolume", find(objects, "PersistentVolumeClaim", claim)["spec"]["volumeName"])
        # At home on every node, and nobody else's.
        assert volume["spec"]["hostPath"] == {"path": "/run/embedding-service", "type": "Directory"}
        assert "nodeAffinity" not in volume["spec"]
        assert volume["spec"]["claimRef"] == {"namespace": "embedding", "name": claim}
    assert named(replica["spec"]["volumes"], "near")["persistentVolumeClaim"]["readOnly"]
    container = shard["spec"]["containers"][0]
    words = words_of(container, objects)
    parse(embedding_service.cli.app, words)
    assert f"--near=/near/{shard_id}" in words
    assert f"--id={shard_id}" in words


def named(those: list[Manifest], name: str) -> Manifest:
    """The one of that name."""
    [found] = [each for each in those if each["name"] == name]
    return found


def test_shards_that_train_write_the_store_and_keep_their_logs(tmp_path: Path) -> None:
    objects = on_top(tmp_path / "service", "local-small", "training")
    for each in objects:
        validate(each)
    shards = find(objects, "StatefulSet", "embedding-shard")["spec"]
    [container] = shards["template"]["spec"]["containers"]
    words = words_of(container, objects)
    parse(embedding_service.cli.app, words)
    assert "--log=/logs" in words
    mounts = {each["name"]: each for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in shards["template"]["spec"]["volumes"]}
    assert mounts["logs"]["mountPath"] == "/logs" and not mounts["store"].get("readOnly")
    assert not volumes["store"]["persistentVolumeClaim"].get("readOnly")
    assert [claim["metadata"]["name"] for claim in shards["volumeClaimTemplates"]] == ["logs"]
    assert find(objects, "PodDisruptionBudget", "embedding-shard")["spec"]["maxUnavailable"] == 0


@pytest.mark.parametrize("components", [["zones"], ["per-node", "zones"]])
def test_shards_and_workers_say_the_zone_of_their_node(components: list[str], tmp_path: Path) -> None:
    objects = on_top(tmp_path / "service", "cpu-production" if len(components) == 1 else "local-small", *components)
    objects += on_top(tmp_path / "worker", "cpu-production/worker", "zones/worker")
    for each in objects:
        validate(each)
    [shard] = shards_of(objects)["spec"]["template"]["spec"]["containers"]
    worker = find(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    zone = {"fieldRef": {"fieldPath": "metadata.labels['topology.kubernetes.io/zone']"}}
    assert environment(shard, objects)["TOPOLOGY"] == environment(worker["containers"][0], objects)[TOPOLOGY] == zone
    words = words_of(shard, objects)
    parse(embedding_service.cli.app, words)
    assert "--topology=metadata-labels-topology-kubernetes-io-zone" in words


def test_shards_and_workers_send_their_spans_to_one_collector(tmp_path: Path) -> None:
    objects = on_top(tmp_path / "service", "cpu-production", "tracing")
    objects += on_top(tmp_path / "worker", "cpu-production/worker", "tracing/worker")
    for each in objects:
        validate(each)
    [shard] = shards_of(objects)["spec"]["template"]["spec"]["containers"]
    worker = find(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    here, there = ({**environment(each, objects)} for each in (shard, worker["containers"][0]))
    told = {name: str(value) for name, value in here.items() if name.startswith("OTEL_")}
    assert told == {name: value for name, value in there.items() if name.startswith("OTEL_")}
    assert tracing.Sampler(told["OTEL_TRACES_SAMPLER"], told["OTEL_TRACES_SAMPLER_ARG"])
    port = int(told["OTEL_EXPORTER_OTLP_ENDPOINT"].rpartition(":")[2])
    for name in ("embedding-shard", "model-worker"):
        ways = find(objects, "NetworkPolicy", name)["spec"]["egress"]
        assert any({"port": port} in way.get("ports", []) for way in ways)


@pytest.mark.parametrize("overlay", ["gpu-near", "local-small"])
def test_shards_one_a_node_are_those_of_the_statefulset_by_another_name(overlay: str, tmp_path: Path) -> None:
    objects = on_top(tmp_path / "service", overlay, *(["per-node"] if overlay == "local-small" else []))
    assert [each["metadata"]["name"] for each in objects if each["kind"] == "StatefulSet"] == ["embedding-controller"]
    assert not [each for each in objects if each["kind"] == "PodDisruptionBudget"]
    spec = shards_of(objects)["spec"]["template"]["spec"]
    usually = objects_of(K8S / "overlays" / "local-small")
    usual = shards_of(usually)["spec"]["template"]["spec"]
    here, there = ({*words_of(pod["containers"][0], of)} for pod, of in ((spec, objects), (usual, usually)))
    assert {"--id=spec-nodeName", "--advertise=status-podIP:7070", "--near=/near/spec-nodeName"} <= here - there
    assert "topologySpreadConstraints" not in spec
    assert spec["containers"][0]["readinessProbe"] == usual["containers"][0]["readinessProbe"]


# Secure


@pytest.mark.parametrize(
    ("overlay", "components", "worker"),
    [("cpu-production", ["near", "zones", "secure"], "secure/worker"), ("local-small", ["secure"], "secure/head")],
)
def test_members_and_workers_show_what_the_policy_knows_them_by(
    overlay: str, components: list[str], worker: str, tmp_path: Path
) -> None:
    objects = on_top(tmp_path / "service", overlay, *components)
    ray = on_top(tmp_path / "worker", f"{overlay}/worker", worker)
    for each in [*objects, *ray]:
        validate(each)
    policy = read_policy(K8S / "components/secure/policy.toml")
    issued = {each["spec"]["secretName"]: each["spec"] for each in objects if each["kind"] == "Certificate"}
    for name in ("embedding-controller", "embedding-shard"):
        pod = find(objects, "StatefulSet", name)["spec"]["template"]["spec"]
        certificate = issued[named(pod["volumes"], "tls")["secret"]["secretName"]]
        assert policy.identities[policy.of_names(certificate["uris"]) or ""].rights == ("member",)
        assert {"server auth", "client auth"} <= set(certificate["usages"])
        mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        words = words_of(pod["containers"][0], objects)
        parse(embedding_service.cli.app, words)
        assert "--insecure" not in words
        tls, rules = mounts["tls"], mounts["policy"]
        files = [f"--tls-cert={tls}/tls.crt", f"--tls-key={tls}/tls.key", f"--tls-ca={tls}/ca.crt"]
        assert {*files, f"--policy={rules}/policy.toml"} <= set(words)
    account = find(ray, "ServiceAccount")["metadata"]
    cluster = find(ray, "RayService")["spec"]["rayClusterConfig"]
    assert policy.jwt
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == account["name"]
        subject = f"system:serviceaccount:{account['namespace']}:{account['name']}"
        identity = policy.identities[policy.of_subject(subject) or ""]
        assert (identity.rights, identity.read) == ((), ("*",))
        secret, token = named(pod["volumes"], "credentials")["projected"]["sources"]
        assert secret["secret"]["name"] in issued
        assert [item["path"] for item in secret["secret"]["items"]] == ["ca.crt"]  # and not the key
        assert token["serviceAccountToken"]["audience"] == policy.jwt.audience
        assert token["serviceAccountToken"]["path"] == "token"
        container = pod["containers"][0]
        folder = named(container["volumeMounts"], "credentials")["mountPath"]
        assert environment(container, ray)[TLS_VARIABLE] == folder


def test_s8_a_secured_worker_knows_whose_keys_count(tmp_path: Path) -> None:
    """Its policy is another one than the service's. The head, which builds the application, and replicas have it."""
    ray = on_top(tmp_path / "worker", "cpu-production/worker", "secure/worker")
    cluster = find(ray, "RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        secret = named(pod["volumes"], "keys")["secret"]["secretName"]
        assert secret != "embedding-policy"
        mount = named(pod["containers"][0]["volumeMounts"], "keys")
        assert mount["readOnly"] and "subPath" not in mount  # which would not follow the Secret
        assert environment(pod["containers"][0], ray)[POLICY_VARIABLE] == f"{mount['mountPath']}/policy.toml"
    example = (K8S / "components/secure/head/policy.toml").read_text()
    assert f"secret generic {secret} --from-file=policy.toml" in example
    assert not read_policy(K8S / "components/secure/head/policy.toml").identities  # nobody is let in as it comes
    filled = re.sub(r"(?m)^# (?=\[|\w+ = )", "", example).replace("sha256:...", f"sha256:{'0' * 64}")
    (tmp_path / "policy.toml").write_text(filled)
    assert read_policy(tmp_path / "policy.toml").identities["team-a"].may("read", "longcat-flash-lite+legal@1")


def test_certificates_speak_for_the_names_that_shards_and_clients_use() -> None:
    certificates = list(yaml.safe_load_all((K8S / "components/secure/certificates.yaml").read_text()))
    controller, shard = (each["spec"]["dnsNames"] for each in certificates)
    assert stands_for(shard, "embedding-shard-3.embedding-shards.embedding.svc", "embedding-shard-3")
    assert not stands_for(shard, "embedding-controller.embedding.svc", "embedding-shard-3")
    assert {"embedding", "embedding.embedding.svc"} <= set(shard)
    assert {"embedding-controller", "embedding-controller.embedding.svc"} <= set(controller)


def test_shards_of_a_daemon_set_advertise_names_that_their_certificate_holds(tmp_path: Path) -> None:
    objects = on_top(tmp_path / "service", "local-small", "per-node", "secure")
    for each in objects:
        validate(each)
    container = find(objects, "DaemonSet")["spec"]["template"]["spec"]["containers"][0]
    words = words_of(container, objects)
    assert "--insecure" not in words and "--policy=/policy/policy.toml" in words
    program = tmp_path / "bin" / "embedding-service"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    pod = {"SHARD_HOST": "10.1.2.3", "POD_NAMESPACE": "embedding", "PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = [*container["command"][2:], *words]  # without tini
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=pod).stdout.splitlines()
    assert told[:-1] == words
    advertised = told[-1].removeprefix("--advertise=")
    assert advertised == "10-1-2-3.embedding-shards.embedding.svc:7070"
    parse(embedding_service.cli.app, told)
    certificates = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "Certificate"}
    assert stands_for(certificates["embedding-shard"]["dnsNames"], advertised.partition(":")[0], "some-node")


def test_prometheus_scrapes_what_is_secured(tmp_path: Path) -> None:
    objects = on_top(tmp_path / "service", "cpu-production", "secure")
    monitor = find(objects, "ServiceMonitor")
    validate(monitor)
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["scheme"] == "https" and endpoint["authorization"]["credentials"]["key"] == "token"
    certificates = [each["spec"] for each in objects if each["kind"] == "Certificate" and each["spec"].get("uris")]
    assert len(certificates) == 2
    assert all(endpoint["tlsConfig"]["serverName"] in each["dnsNames"] for each in certificates)
    assert endpoint["tlsConfig"]["ca"]["secret"]["name"] in {each["secretName"] for each in certificates}


def test_the_controllers_certificate_signs_routings_and_the_shards_does_not(tmp_path: Path) -> None:
    authority = Authority.create()
    routings = []
    for each in yaml.safe_load_all((K8S / "components/secure/certificates.yaml").read_text()):
        folder = tmp_path / each["metadata"]["name"]
        authority.issue(folder, [*each["spec"]["uris"], *each["spec"]["dnsNames"]])
        routing = wire.Routing(term=1, epoch=1)
        routing.signature = sign_routing(routing, Signer(folder / "tls.crt", folder / "tls.key"))
        routings.append(routing)
    controllers, shards = routings
    check_routing(controllers, (0, 0), authority.pem)
    with pytest.raises(Unauthenticated, match="another member"):
        check_routing(shards, (0, 0), authority.pem)


def test_probes_reach_a_port_of_their_own_and_shards_alone_the_controllers(tmp_path: Path) -> None:
    objects = on_top(tmp_path / "service", "cpu-production", "secure")
    for name in ("embedding-controller", "embedding-shard"):
        container = find(objects, "StatefulSet", name)["spec"]["template"]["spec"]["containers"][0]
        [health] = [each["containerPort"] for each in container["ports"] if each["name"] == "health"]
        assert f"--health-listen=0.0.0.0:{health}" in container["args"]
        assert {container[f"{kind}Probe"]["grpc"]["port"] for kind in ("startup", "readiness", "liveness")} == {health}
    assert not [each for each in objects if each["kind"] == "Service" and "h2c" in str(each)]
    rules = find(objects, "NetworkPolicy", "embedding-controller")["spec"]["ingress"]
    [control] = [rule for rule in rules if {"port": "control"} in rule["ports"]]
    [allowed] = control["from"]
    assert allowed["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "shard"
    assert "namespaceSelector" not in allowed
    [services] = [
        each for each in objects if each["kind"] == "Service" and each["metadata"]["name"] == "embedding-controller"
    ]
    [port] = [each["port"] for each in services["spec"]["ports"] if each["name"] == "control"]
    shard = shards_of(objects)["spec"]["template"]["spec"]["containers"][0]
    assert f"--controller=embedding-controller:{port}" in shard["args"]
    out = find(objects, "NetworkPolicy", "embedding-shard")["spec"]["egress"][0]["ports"]
    assert {"port": port} in out
