"""Manifests: every one of k8s/ is right, and what could be wrong with one is found, each by the check meant for it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from shoal_services.k8s.capacity import read_quantity
from shoal_services.k8s.checks import check_manifests
from shoal_services.k8s.manifests import Manifest, build, name_of, parse_manifests, read_manifests
from shoal_services.k8s.references import SECRETS
from shoal_services.k8s.render import Place, render_search, size_workers, write_yaml
from shoal_services.k8s.schemas import KUBERAY, read_crds
from shoal_services.search.config import load_config

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
FOLDERS = [K8S, K8S / "base", K8S / "overlays" / "cpu-dev", K8S / "overlays" / "gpu"]
RENDERED = {"cpu-dev": ("demo", "8Gi"), "gpu": ("qwen3-8b", "96Gi")}

Objects = dict[str, Manifest]
ENDPOINT, SEARCH, DEV = "RayService/endpoint", "RayJob/search-demo", "RayCluster/dev"


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    """What `kubectl apply -k k8s/` applies."""
    return build(K8S)


@pytest.mark.parametrize("folder", FOLDERS, ids=[str(folder.relative_to(ROOT)) for folder in FOLDERS])
def test_every_folder_of_manifests_is_right(folder: Path):
    assert check_manifests(build(folder)) == []


def test_every_file_is_part_of_an_installation():
    """A manifest or patch that nothing names would never be checked."""
    files = {path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml"}
    named = set()
    for file in K8S.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(file.read_text())
        entries = [*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))]
        named |= {(file.parent / entry).resolve() for entry in entries}
    assert files <= named


def test_every_kind_of_object_is_there(manifests: list[Manifest]):
    kinds = {manifest["kind"] for manifest in manifests}
    assert kinds >= {
        "RayJob", "RayService", "RayCluster", "Deployment", "StatefulSet", "CronJob", "PersistentVolumeClaim",
        "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount", "Namespace", "Service",
    }  # fmt: skip
    assert "Secret" not in kinds


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS, ids=[str(folder.relative_to(ROOT)) for folder in FOLDERS])
def test_kubectl_builds_the_same(folder: Path):
    printed = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
    theirs = {name_of(manifest): manifest for manifest in parse_manifests(printed, "kubectl")}
    assert {name_of(manifest): manifest for manifest in build(folder)} == theirs


@pytest.mark.skipif("SHOAL_KUBERAY_CRDS" not in os.environ, reason="SHOAL_KUBERAY_CRDS names no folder of KubeRay's CRDs")
def test_the_schemas_are_those_of_kuberays_crds():
    """`k8s/README.md` says where the files come from."""
    assert json.loads(KUBERAY.read_text()) == read_crds(Path(os.environ["SHOAL_KUBERAY_CRDS"]))


def test_crds_of_another_version_can_be_given(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no CustomResourceDefinition of RayCluster"):
        read_crds(tmp_path)
    schemas = json.loads(KUBERAY.read_text())
    schemas["RayJob"]["properties"]["spec"]["properties"]["newField"] = {"type": "integer"}
    for kind, schema in schemas.items():
        versions = [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]
        definition = {"kind": "CustomResourceDefinition", "spec": {"names": {"kind": kind}, "versions": versions}}
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(definition))
    job = find(build(K8S))[SEARCH]
    job["spec"]["newField"] = 1
    assert "schema" in {problem.check for problem in check_manifests([job])}
    assert "schema" not in {problem.check for problem in check_manifests([job], tmp_path)}


# Seeded mistakes


def find(manifests: list[Manifest]) -> Objects:
    return {name_of(manifest): manifest for manifest in manifests}


def pod_of(objects: Objects, name: str, group: int | None = None) -> Any:
    """A pod's spec: the head's of a Ray cluster, a worker group's, or that of a Deployment or StatefulSet."""
    spec = objects[name]["spec"]
    if "template" in spec:
        return spec["template"]["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    holder = cluster["headGroupSpec"] if group is None else cluster["workerGroupSpecs"][group]
    return holder["template"]["spec"]


def container_of(objects: Objects, name: str, group: int | None = None) -> Any:
    return pod_of(objects, name, group)["containers"][0]


def group_of(objects: Objects, name: str) -> Any:
    spec = objects[name]["spec"]
    return (spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)["workerGroupSpecs"][0]


def set_serve(change: Callable[[dict[str, Any]], object]) -> Callable[[Objects], object]:
    """A mistake in the Serve configuration."""

    def mutate(objects: Objects) -> None:
        spec = objects[ENDPOINT]["spec"]
        config = yaml.safe_load(spec["serveConfigV2"])
        change(config)
        spec["serveConfigV2"] = yaml.safe_dump(config)

    return mutate


def set_args(**changes: Any) -> Callable[[Objects], object]:
    return set_serve(lambda config: config["applications"][0]["args"].update(changes))


def set_search(text: str, other: str) -> Callable[[Objects], object]:
    """A mistake in the search that the job runs."""

    def mutate(objects: Objects) -> None:
        data = objects["ConfigMap/search-demo"]["data"]
        assert text in data["search.yaml"]
        data["search.yaml"] = data["search.yaml"].replace(text, other)

    return mutate


BIG = {"dense": {"model": "smollm2-135m", "cpus_per_replica": 6}}
HEADLESS = {"dense": {"model": "smollm2-135m"}}
MANY = {"dense": {"model": "smollm2-135m", "cpus_per_replica": 3, "max_replicas": 5}}

# Name, the mistake, the check that is meant for it, and what it says.
MISTAKES: list[tuple[str, Callable[[Objects], object], str, str]] = [
    (
        "a core field misspelt",
        lambda o: o["Deployment/mlflow"]["spec"].update(replica=2),
        "schema",
        "did you mean 'replicas'",
    ),
    (
        "a field misspelt in a pod template",
        lambda o: container_of(o, SEARCH).update(volumeMount=[]),
        "schema",
        "did you mean 'volumeMounts'",
    ),
    (
        "a type that is wrong",
        lambda o: o["Service/mlflow"]["spec"]["ports"][0].update(port="http"),
        "schema",
        "spec.ports.0.port",
    ),
    (
        "an apiVersion that is gone",
        lambda o: o["CronJob/postgres-backup"].update(apiVersion="batch/v1beta1"),
        "schema",
        "no batch/v1beta1 CronJob",
    ),
    (
        "a RayJob field misspelt",
        lambda o: o[SEARCH]["spec"].update(shutdownAfterJobFinish=True),
        "schema",
        "did you mean 'shutdownAfterJobFinishes'",
    ),
    (
        "a worker group field misspelt",
        lambda o: group_of(o, DEV).update(maxReplica=3),
        "schema",
        "did you mean 'maxReplicas'",
    ),
    (
        "a field misspelt deep in a RayService",
        lambda o: group_of(o, ENDPOINT).update(scaleStrategy={"workersToKill": []}),
        "schema",
        "did you mean 'workersToDelete'",
    ),
    (
        "a start parameter that is no text",
        lambda o: group_of(o, DEV).update(rayStartParams={"num-cpus": 4}),
        "schema",
        "rayStartParams.num-cpus: 4 is not of type 'string'",
    ),
    ("a Ray kind misspelt", lambda o: o[DEV].update(kind="RayClusters"), "schema", "did you mean 'RayCluster'"),
    (
        "a name that is too long",
        lambda o: o[SEARCH]["metadata"].update(name="search-" + "x" * 41),
        "operator",
        "has 48 letters; a RayJob's may have 47",
    ),
    ("a name with a dot", lambda o: o[ENDPOINT]["metadata"].update(name="endpoint.v1"), "operator", "must be lower-case"),
    ("more replicas than may be", lambda o: group_of(o, DEV).update(replicas=9), "operator", "does not hold"),
    (
        "no maxReplicas",
        lambda o: group_of(o, SEARCH).pop("maxReplicas"),
        "schema",
        "'maxReplicas' is a required property",
    ),
    ("no token authentication", lambda o: o[DEV]["spec"].pop("authOptions"), "operator", "authOptions.mode is not 'token'"),
    (
        "a Ray that knows no tokens",
        lambda o: o[DEV]["spec"].update(rayVersion="2.51.0"),
        "operator",
        "knows no token authentication",
    ),
    ("the old autoscaler", lambda o: o[DEV]["spec"]["autoscalerOptions"].update(version="v1"), "operator", "must say v2"),
    (
        "restarts under autoscaler v2",
        lambda o: pod_of(o, DEV, 0).update(restartPolicy="Always"),
        "operator",
        "restartPolicy 'Always'",
    ),
    (
        "work on the head",
        lambda o: o[DEV]["spec"]["headGroupSpec"].update(rayStartParams={}),
        "operator",
        'num-cpus must be "0"',
    ),
    (
        "labels as a start parameter",
        lambda o: group_of(o, DEV)["rayStartParams"].update(labels="a=b"),
        "operator",
        "rayStartParams.labels is refused",
    ),
    (
        "resources said twice",
        lambda o: group_of(o, DEV).update(resources={"CPU": "4"}, rayStartParams={"num-cpus": "4"}),
        "operator",
        "exclude each other",
    ),
    (
        "a time to live without an end",
        lambda o: o[SEARCH]["spec"].pop("shutdownAfterJobFinishes"),
        "operator",
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes",
    ),
    (
        "Kueue and autoscaling",
        lambda o: o[SEARCH]["spec"]["rayClusterSpec"].update(
            enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"}
        ),
        "operator",
        "admits a fixed size",
    ),
    (
        "a selector and a backoff",
        lambda o: o[SEARCH]["spec"].update(clusterSelector={"ray.io/cluster": "dev"}),
        "operator",
        "clusterSelector and backoffLimit exclude",
    ),
    ("a submitter that gives up", lambda o: o[SEARCH]["spec"].pop("submitterConfig"), "operator", "backoffLimit below 5"),
    (
        "Redis set in two places",
        lambda o: (
            o[DEV]["spec"].update(gcsFaultToleranceOptions={"redisAddress": "redis:6379"}),
            container_of(o, DEV)["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
        ),
        "operator",
        "RAY_REDIS_ADDRESS is set by gcsFaultToleranceOptions",
    ),
    (
        "an upgrade without a gateway",
        lambda o: o[ENDPOINT]["spec"].update(upgradeStrategy={"type": "NewClusterWithIncrementalUpgrade"}),
        "operator",
        "needs clusterUpgradeOptions.gatewayClassName",
    ),
    (
        "a name for the head's service",
        lambda o: o[ENDPOINT]["spec"]["rayClusterConfig"]["headGroupSpec"].update(
            headService={"metadata": {"name": "head"}}
        ),
        "operator",
        "headService must have no name",
    ),
    ("a Serve key misspelt", set_serve(lambda c: c.update(http_option={})), "serve", "did you mean 'http_options'"),
    (
        "an application key misspelt",
        set_serve(lambda c: c["applications"][0].update(route_prefx="/")),
        "serve",
        "did you mean 'route_prefix'",
    ),
    (
        "a deployment's key misspelt",
        set_serve(lambda c: c["applications"][0].update(deployments=[{"name": "Gateway", "num_replica": 2}])),
        "serve",
        "did you mean 'num_replicas'",
    ),
    (
        "an import path that leads nowhere",
        set_serve(lambda c: c["applications"][0].update(import_path="shoal_services.serving.app:biuld")),
        "serve",
        "leads nowhere",
    ),
    (
        "a route for the rollout",
        set_serve(lambda c: c["applications"][0].update(route_prefix="/")),
        "serve",
        "route_prefix must be null",
    ),
    ("a setting misspelt", set_args(gateway=2), "serve", "did you mean 'gateways'"),
    ("a route to nobody", set_args(routes={"a": {"nobody": 1}}), "serve", "leads to unknown variants"),
    ("an endpoint without keys", set_args(keys=None), "serve", "no API keys are set"),
    ("a setting of shoal serve", set_args(port=9000), "serve", "mean nothing behind Serve's proxy"),
    ("proxies on the head only", set_serve(lambda c: c.update(proxy_location="HeadOnly")), "serve", "need EveryNode"),
    (
        "proxies that listen to themselves",
        set_serve(lambda c: c["http_options"].update(host="127.0.0.1")),
        "serve",
        "say 0.0.0.0",
    ),
    (
        "proxies that cut long answers",
        set_serve(lambda c: c["http_options"].update(request_timeout_s=180)),
        "serve",
        "request_timeout_s 180 cuts answers",
    ),
    ("proxies on another port", set_serve(lambda c: c["http_options"].update(port=8001)), "serve", "leads to 8000"),
    (
        "another image than rayVersion",
        lambda o: container_of(o, SEARCH, 0).update(image="shoal:2.59.0"),
        "versions",
        "is not tagged 2.60.0",
    ),
    (
        "an image without a tag",
        lambda o: container_of(o, "Deployment/mlflow").update(image="shoal"),
        "versions",
        "must have a tag",
    ),
    (
        "another rayVersion than is installed",
        lambda o: o[DEV]["spec"].update(rayVersion="2.59.0"),
        "versions",
        "rayVersion '2.59.0' is not 2.60.0",
    ),
    (
        "a claim that is not there",
        lambda o: pod_of(o, SEARCH)["volumes"][0]["persistentVolumeClaim"].update(claimName="storage"),
        "references",
        "did you mean 'shoal-storage'",
    ),
    (
        "an account that is not there",
        lambda o: pod_of(o, DEV, 0).update(serviceAccountName="ray"),
        "references",
        "ServiceAccount 'ray' is not there",
    ),
    (
        "a volume that the pod has not",
        lambda o: container_of(o, "Deployment/mlflow")["volumeMounts"][0].update(name="stroage"),
        "references",
        "did you mean 'storage'",
    ),
    (
        "a secret that nobody makes",
        lambda o: o[DEV]["spec"]["authOptions"].update(secretName="ray-token"),
        "references",
        "did you mean 'shoal-ray-token'",
    ),
    (
        "a key that the secret has not",
        lambda o: container_of(o, "StatefulSet/postgres")["env"][-1]["valueFrom"]["secretKeyRef"].update(key="pasword"),
        "references",
        "did you mean 'password'",
    ),
    (
        "a tracking server that is not there",
        set_args(tracking_uri="http://mlfow:5000"),
        "references",
        "did you mean 'mlflow'",
    ),
    (
        "a port that the service has not",
        lambda o: o[SEARCH]["spec"].update(entrypoint=o[SEARCH]["spec"]["entrypoint"].replace(":5000", ":5001")),
        "references",
        "has no port 5001",
    ),
    (
        "a service to a port that no pod opens",
        lambda o: o["Service/postgres"]["spec"]["ports"][0].update(targetPort="sql"),
        "references",
        "which no pod opens",
    ),
    (
        "a budget for no pod",
        lambda o: o["PodDisruptionBudget/endpoint"]["spec"]["selector"]["matchLabels"].update(
            {"app.kubernetes.io/component": "serve"}
        ),
        "references",
        "selects no pod",
    ),
    ("a pod under no policy", lambda o: o.pop("NetworkPolicy/backup"), "network", "no NetworkPolicy is for this pod"),
    ("everything is allowed", lambda o: o.pop("NetworkPolicy/deny-all"), "network", "none denies"),
    ("nobody may call", lambda o: o["NetworkPolicy/endpoint"]["spec"]["ingress"].pop(), "network", "reach port 8000"),
    (
        "storage of one node",
        lambda o: o["PersistentVolumeClaim/shoal-storage"]["spec"].update(accessModes=["ReadWriteOnce"]),
        "storage",
        "must be ReadWriteMany",
    ),
    (
        "storage at another path",
        lambda o: container_of(o, ENDPOINT, 0)["volumeMounts"][0].update(mountPath="/data"),
        "storage",
        "must be at /mnt/shoal",
    ),
    (
        "two namespaces",
        lambda o: o["Service/mlflow"]["metadata"].update(namespace="mlflow"),
        "names",
        "namespaces mlflow, shoal",
    ),
    (
        "a password in a variable",
        lambda o: container_of(o, "StatefulSet/postgres")["env"].__setitem__(
            -1, {"name": "POSTGRES_PASSWORD", "value": "hunter2"}
        ),
        "secrets",
        "POSTGRES_PASSWORD stands in the manifest",
    ),
    (
        "a password in a URL",
        lambda o: container_of(o, "Deployment/mlflow")["env"].append(
            {"name": "URI", "value": "postgresql://mlflow:hunter2@postgres/mlflow"}
        ),
        "secrets",
        "a password or token stands in 'postgresql://***@postgres'",
    ),
    (
        "a Secret in the manifests",
        lambda o: o.update(
            {"Secret/x": {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}, "stringData": {"a": "b"}}}
        ),
        "secrets",
        "do not belong in manifests",
    ),
    (
        "a pod that runs as root",
        lambda o: pod_of(o, SEARCH, 0)["securityContext"].update(runAsUser=0),
        "hardening",
        "runAsUser must be given, and other than 0",
    ),
    (
        "privileges that can grow",
        lambda o: container_of(o, ENDPOINT)["securityContext"].pop("allowPrivilegeEscalation"),
        "hardening",
        "securityContext.allowPrivilegeEscalation must be false",
    ),
    (
        "capabilities that are kept",
        lambda o: container_of(o, DEV)["securityContext"].pop("capabilities"),
        "hardening",
        'securityContext.capabilities must be {"drop": ["ALL"]}',
    ),
    (
        "a folder of the node",
        lambda o: pod_of(o, SEARCH, 0)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "hardening",
        "hostPath is not allowed",
    ),
    (
        "a temporary folder without a limit",
        lambda o: pod_of(o, DEV)["volumes"][1].update(emptyDir={}),
        "hardening",
        "needs a sizeLimit",
    ),
    (
        "a token that nobody needs",
        lambda o: pod_of(o, SEARCH).pop("automountServiceAccountToken"),
        "hardening",
        "automountServiceAccountToken must be false",
    ),
    (
        "no readiness probe",
        lambda o: container_of(o, "Deployment/mlflow").pop("readinessProbe"),
        "hardening",
        "has no readinessProbe",
    ),
    (
        "code from a model's folder",
        lambda o: o[SEARCH]["spec"].update(entrypoint=o[SEARCH]["spec"]["entrypoint"] + " # trust_remote_code"),
        "hardening",
        "trust_remote_code",
    ),
    (
        "a namespace that admits all",
        lambda o: o["Namespace/shoal"]["metadata"]["labels"].update({"pod-security.kubernetes.io/enforce": "privileged"}),
        "hardening",
        "must be 'restricted'",
    ),
    (
        "no memory limit",
        lambda o: container_of(o, SEARCH, 0)["resources"]["limits"].pop("memory"),
        "capacity",
        "limits.memory is missing",
    ),
    (
        "memory that is not requested",
        lambda o: container_of(o, DEV, 0)["resources"]["requests"].update(memory="1Gi"),
        "capacity",
        "requests 1Gi and limits 8Gi differ",
    ),
    (
        "a head that is too small",
        lambda o: container_of(o, DEV)["resources"].update(
            requests={"cpu": "1", "memory": "1Gi"}, limits={"cpu": "1", "memory": "1Gi"}
        ),
        "capacity",
        "too little for Ray's head",
    ),
    (
        "a search that does not fit",
        set_search("space:", "run: {cpus_per_worker: 16}\nspace:"),
        "capacity",
        "needs 16 CPUs, and a worker pod has 1",
    ),
    ("a search that is wrong", set_search("num_trials: 4", "num_trial: 4"), "capacity", "num_trial"),
    (
        "a config that is not mounted",
        lambda o: container_of(o, SEARCH)["volumeMounts"].pop(),
        "capacity",
        "no ConfigMap puts",
    ),
    (
        "a variant larger than a worker",
        set_args(variants=BIG, routes={}),
        "capacity",
        "needs 6 CPUs, and a worker pod has 4",
    ),
    (
        "a variant that could be on the head",
        set_args(variants=HEADLESS, routes={}),
        "capacity",
        "reserves neither CPUs nor GPUs",
    ),
    (
        "more replicas than workers hold",
        set_args(variants=MANY, routes={}),
        "capacity",
        "all replicas need 16 CPUs, and all worker pods have 8",
    ),
    (
        "a pod that ends before its streams",
        lambda o: pod_of(o, ENDPOINT, 0).update(terminationGracePeriodSeconds=30),
        "capacity",
        "less than limits.drain_s 120",
    ),
    (
        "a cluster that ends before its streams",
        lambda o: o[ENDPOINT]["spec"].update(rayClusterDeletionDelaySeconds=60),
        "capacity",
        "rayClusterDeletionDelaySeconds 60 is less than limits.drain_s 120",
    ),
]


@pytest.mark.parametrize(("mistake", "check", "says"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_found_by_the_check_meant_for_it(
    manifests: list[Manifest], mistake: Callable[[Objects], object], check: str, says: str
):
    objects = find(copy.deepcopy(manifests))
    mistake(objects)
    problems = check_manifests(list(objects.values()))
    assert [p for p in problems if p.check == check and says in p.message], problems
    assert {p.check for p in problems} == {check}, "nothing else is complained of"


def test_an_object_that_is_there_twice_is_found(manifests: list[Manifest]):
    (problem,) = check_manifests([*manifests, copy.deepcopy(find(manifests)["ServiceAccount/shoal-ray"])])
    assert problem.message == "is there twice"


# Searches


@pytest.mark.parametrize("overlay", RENDERED)
def test_an_overlays_search_is_what_render_prints(overlay: str):
    name, memory = RENDERED[overlay]
    file = ROOT / "tune_configs" / f"{name}.yaml"
    rendered = write_yaml(render_search(load_config(file), file.read_text(), Place(memory=memory)))
    assert (K8S / "overlays" / overlay / "ray-job.search.yaml").read_text() == rendered


SEARCHES = sorted(file for file in (ROOT / "tune_configs").glob("*.yaml") if not file.name.startswith("pretrain-"))


@pytest.mark.parametrize("file", SEARCHES, ids=lambda file: file.stem)
def test_every_search_can_be_rendered(file: Path):
    """Also with other names for everything: the checks hold beside an installation of that kind."""
    installation = build(K8S / "base")
    for manifest in installation:
        if manifest["metadata"]["name"] == "shoal-storage":
            manifest["metadata"]["name"] = "bucket"
    for manifest in [m for m in installation if m["kind"] not in ("PersistentVolumeClaim", "ServiceAccount", "Service")]:
        installation.remove(manifest)
    place = Place("shoal", "registry.example.com:5000/team/shoal-cuda:2.60.0", "bucket", "http://mlflow:5000", None, "64Gi")
    text = file.read_text()
    rendered = render_search(load_config(file), text, place)
    services = {"Service/mlflow", "Service/postgres"}
    rest = [m for m in installation if name_of(m) not in services] + [
        m for m in build(K8S / "base") if m["kind"] in ("Deployment", "StatefulSet") and name_of(m) != "Deployment/mlflow"
    ]
    problems = check_manifests([*rendered, *rest])
    assert [p for p in problems if "RayJob" in p.where and "no service 'mlflow'" not in p.message] == []
    assert rendered[0]["data"]["search.yaml"] == text
    assert "kueue.x-k8s.io/queue-name" not in rendered[1]["metadata"]["labels"]
    assert parse_manifests(write_yaml(rendered), "printed") == rendered


@pytest.mark.parametrize(
    ("run", "per_pod", "pods", "resources"),
    [
        ({}, 1, 1, {"cpu": "1"}),
        ({"num_workers": 4, "cpus_per_worker": 1.5}, 1, 4, {"cpu": "2"}),
        ({"num_workers": 2, "max_concurrent_trials": 3, "gpus_per_worker": 1}, 1, 6, {"cpu": "1", "nvidia.com/gpu": "1"}),
        ({"num_workers": 2, "max_concurrent_trials": 3, "gpus_per_worker": 0.5}, 1, 3, {"cpu": "2", "nvidia.com/gpu": "1"}),
        ({"num_workers": 8, "cpus_per_worker": 4, "gpus_per_worker": 1}, 8, 1, {"cpu": "32", "nvidia.com/gpu": "8"}),
        ({"num_workers": 12, "gpus_per_worker": 1}, 8, 2, {"cpu": "8", "nvidia.com/gpu": "8"}),
    ],
)
def test_workers_have_the_size_that_run_asks_for(run: dict[str, Any], per_pod: int, pods: int, resources: dict[str, str]):
    from shoal_services.search.config import Run

    assert size_workers(Run(**run), Place(workers_per_pod=per_pod)) == (pods, {"memory": "8Gi"} | resources)


def test_a_search_of_a_large_model_has_its_gpus_in_one_pod_and_room_on_disk():
    file = ROOT / "tune_configs" / "llama-3.1-70b.yaml"
    place = Place(memory="512Gi", scratch="600Gi", workers_per_pod=8)
    job = render_search(load_config(file), file.read_text(), place)[1]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    assert group["replicas"] == 1
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "8"}
    assert {"name": "tmp", "emptyDir": {"sizeLimit": "600Gi"}} in pod["volumes"]


def test_a_name_that_is_too_long_is_said(tmp_path: Path):
    file = tmp_path / "long.yaml"
    file.write_text((ROOT / "tune_configs" / "demo.yaml").read_text().replace("name: demo", f"name: {'Long_' * 9}"))
    with pytest.raises(ValueError, match="too long for a RayJob"):
        render_search(load_config(file), file.read_text(), Place())


@pytest.mark.parametrize(
    ("changes", "place", "said"),
    [
        ({"model": "./mine"}, {}, "model: './mine' is not below /mnt/shoal"),
        ({"model": "/data/mine"}, {}, "put it there (/mnt/shoal/mine) and give that path, or give a Hub id"),
        ({"model": "/mnt/shoal/../data/mine"}, {}, "is not below /mnt/shoal"),
        ({"model": "mine.gguf"}, {}, "model: 'mine.gguf'"),
        ({"texts": {"train": "corpus.jsonl"}}, {}, "texts: 'corpus.jsonl' is not below /mnt/shoal"),
        ({"texts": {"evaluation": ["wikipedia-sample", "/data/held-out.txt"]}}, {}, "texts: '/data/held-out.txt'"),
        ({"tasks": {"names": ["/data/task.jsonl"]}}, {}, "tasks: '/data/task.jsonl'"),
        ({"run": {"storage": "/mnt/shared"}}, {}, "run.storage '/mnt/shared' is not below /mnt/shoal"),
        (
            {"run": {"tracking_uri": "https://me:pw12@mlflow"}},
            {},
            "tracking_uri holds a password or token (https://***@mlflow)",
        ),
        (
            {"run": {"tracking_uri": "https://me:pw12@mlflow"}},
            {"tracking_uri": "http://mlflow:5000"},
            "the search's file holds",
        ),
        ({}, {"tracking_uri": "https://me:pw12@mlflow"}, "from the Secret shoal-mlflow"),
        ({}, {"tracking_uri": "http://localhost:5000"}, "in a pod localhost is the pod"),
        ({}, {"tracking_uri": "sqlite:///mlflow.db"}, "is a file that pods do not see"),
        ({}, {"memory": "8GB"}, "--memory '8GB' is no amount in Kubernetes; say it as 8Gi"),
        ({}, {"claim": "My_Claim"}, "--claim 'My_Claim' is no name in Kubernetes"),
    ],
)
def test_what_pods_would_not_find_or_all_would_read_is_not_rendered(tmp_path: Path, changes: Any, place: Any, said: str):
    data = yaml.safe_load((ROOT / "tune_configs" / "demo.yaml").read_text())
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump(data | {key: {**data.get(key, {}), **v} if isinstance(v, dict) else v for key, v in changes.items()})
    )
    with pytest.raises(ValueError) as caught:
        render_search(load_config(file), file.read_text(), Place(**place))
    assert said in str(caught.value) and "pw12" not in str(caught.value)


def test_what_is_on_the_shared_storage_is_rendered(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nmodel: /mnt/shoal/models/mine\n"
        "texts: {train: /mnt/shoal/a.jsonl, evaluation: Salesforce/wikitext:w@test}\n"
        "space: {num_replaced: 2, kind: folded, distillation_tokens: 0, learning_rate: 0.001}\n"
        "run: {storage: /mnt/shoal/mine, tracking_uri: 'http://tracker:80'}\n"
    )
    job = render_search(load_config(file), file.read_text(), Place())[1]
    assert job["spec"]["entrypoint"].endswith("--storage /mnt/shoal/mine --tracking-uri http://tracker:80")


# What a user sees


@pytest.mark.parametrize(("quantity", "value"), [("500m", 0.5), ("2", 2), (3, 3), ("8Gi", 2**33), ("1.5k", 1500)])
def test_quantities_are_read(quantity: object, value: float):
    assert read_quantity(quantity) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resources: []\nhelmCharts: []", "helmCharts"),
        ("resources: [gone.yaml]", "cannot read"),
        ("resources: []\npatches: [{patch: '[]', target: {kind: Service, name: x}}]", "a patch is for Service/x"),
        ("resources: [list.yaml]", "without apiVersion and kind"),
    ],
)
def test_what_cannot_be_built_is_said(tmp_path: Path, text: str, says: str):
    (tmp_path / "kustomization.yaml").write_text(text)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=says):
        build(tmp_path)


def test_a_folder_without_manifests_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no YAML files"):
        read_manifests(tmp_path)


def test_the_readme_tells_to_make_every_secret_that_is_referred_to():
    readme = (K8S / "README.md").read_text()
    for name, keys in SECRETS.items():
        assert f"secret generic {name}" in readme
        for key in keys:
            assert re.search(rf"{name}\b.*?--from-(literal|file)={re.escape(key)}=", readme, re.S), f"{name}: {key}"


def test_the_images_requirements_are_pinned_and_those_of_shoal():
    pins = {}
    for line in (K8S / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            pins[canonicalize_name(requirement.name)] = pin.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {canonicalize_name(r.name): r.specifier for r in map(Requirement, project["dependencies"])}
    torch = re.search(r"torch==(\S+)", (K8S / "Dockerfile").read_text())
    assert torch and wanted.pop("torch").contains(torch[1])
    assert set(pins) == set(wanted) | {"psycopg2-binary"}
    assert [name for name, specifier in wanted.items() if not specifier.contains(pins[name])] == []
    assert pins["ray"] == version("ray") == Place().pinned_image.removeprefix("shoal:")


def test_the_image_runs_as_nobody_in_particular():
    """And names a version in every base, so that it can be built again."""
    lines = (K8S / "Dockerfile").read_text().splitlines()
    assert "USER 1000:1000" in lines
    bases = [line.split()[1] for line in lines if line.startswith("FROM ") and not line.split()[1].startswith("base-")]
    assert len(bases) == 2 and all(re.search(r":\d+\.\d+", base) for base in bases)
    assert not any(re.search(r"^(ENV|ARG) .*(TOKEN|PASSWORD|SECRET)", line) for line in lines)
