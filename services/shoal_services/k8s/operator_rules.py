"""What KubeRay's operator refuses although its schemas allow it (v1.7), and what it accepts and then cannot run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shoal_services.k8s.manifests import CLUSTERS, Manifest, Problem, iter_clusters, name_of

# DNS-1035 names; what the operator adds to them must still fit a label.
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
FIRST_WITH_TOKENS = (2, 52)
RESOURCE_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}
REDIS_VARIABLES = {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}
GCS_ANNOTATION = "ray.io/ft-enabled"
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")


def check_operator_rules(manifests: list[Manifest]) -> list[Problem]:
    """Broken rules of the operator."""
    problems = []
    for manifest in manifests:
        if manifest["kind"] not in CLUSTERS:
            continue
        complaints = [*_check_name(manifest)]
        for cluster in iter_clusters(manifest):
            complaints += [*_check_cluster(manifest, cluster), *_check_groups(cluster)]
        complaints += {"RayJob": _check_job, "RayService": _check_service}.get(manifest["kind"], lambda _: ())(manifest)
        problems += [Problem("operator", name_of(manifest), complaint) for complaint in complaints]
    return problems


def _check_name(manifest: Manifest) -> Iterator[str]:
    name, limit = manifest["metadata"]["name"], MAX_NAME[manifest["kind"]]
    if not NAME.fullmatch(name):
        yield f"name {name!r} must be lower-case letters, digits and '-', and begin with a letter"
    if len(name) > limit:
        yield f"name {name!r} has {len(name)} letters; a {manifest['kind']}'s may have {limit}"


def _check_cluster(manifest: Manifest, cluster: Manifest) -> Iterator[str]:
    auth, version = cluster.get("authOptions", {}), cluster.get("rayVersion", "")
    if auth.get("mode") != "token":
        yield "authOptions.mode is not 'token': whoever reaches the dashboard could run code"
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"rayVersion {version!r} must be a version, as 2.60.0"
    elif tuple(map(int, version.split(".")[:2])) < FIRST_WITH_TOKENS:
        yield f"rayVersion {version!r} knows no token authentication; 2.52 is the first that does"
    if auth.get("enableK8sTokenAuth") and manifest["kind"] != "RayCluster":
        yield f"authOptions.enableK8sTokenAuth is not for a {manifest['kind']}; use mode: token"
    scaling = cluster.get("enableInTreeAutoscaling", False)
    if scaling and cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "autoscalerOptions.version must say v2, the autoscaler that counts with what Ray has placed"
    if not scaling and "autoscalerOptions" in cluster:
        yield "autoscalerOptions without enableInTreeAutoscaling: true do nothing"
    for part, group in _list_groups(cluster):
        policy = group["template"]["spec"].get("restartPolicy")
        if scaling and policy not in (None, "Never"):
            yield f"{part}: restartPolicy {policy!r} does not go with autoscaler v2; say Never"
    yield from _check_gcs(manifest, cluster)


def _check_gcs(manifest: Manifest, cluster: Manifest) -> Iterator[str]:
    """GCS fault tolerance is set in one place."""
    if "gcsFaultToleranceOptions" not in cluster:
        return
    if GCS_ANNOTATION in manifest["metadata"].get("annotations", {}):
        yield f"annotation {GCS_ANNOTATION} and gcsFaultToleranceOptions exclude each other; leave the annotation out"
    for part, group in _list_groups(cluster):
        containers = group["template"]["spec"]["containers"]
        names = {variable["name"] for container in containers for variable in container.get("env", [])}
        for name in sorted(names & REDIS_VARIABLES):
            yield f"{part}: {name} is set by gcsFaultToleranceOptions; leave the variable out"


def _check_groups(cluster: Manifest) -> Iterator[str]:
    for part, group in _list_groups(cluster):
        parameters = group.get("rayStartParams", {})
        if "labels" in parameters:
            yield f"{part}: rayStartParams.labels is refused; use the group's labels"
        if "resources" in group and RESOURCE_PARAMS & set(parameters):
            yield f"{part}: resources and rayStartParams.{min(RESOURCE_PARAMS & set(parameters))} exclude each other"
    if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'head group: rayStartParams.num-cpus must be "0", or work takes the memory of Ray\'s own processes'
    for part, group in _list_groups(cluster)[1:]:
        least, most = group["minReplicas"], group["maxReplicas"]
        if not least <= (now := group.get("replicas", least)) <= most:
            yield f"{part}: minReplicas {least} ≤ replicas {now} ≤ maxReplicas {most} does not hold"


def _check_job(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    mode, ends = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes", False)
    cluster = spec.get("rayClusterSpec")
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode {mode!r} is none of {', '.join(SUBMISSION_MODES)}"
    if not spec.get("entrypoint") and mode != "InteractiveMode":
        yield "entrypoint is missing"
    if spec.get("ttlSecondsAfterFinished", 0) and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes: true"
    if "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {}):
        if not ends:
            yield "a queue of Kueue's suspends the job, which needs shutdownAfterJobFinishes: true"
        if cluster and cluster.get("enableInTreeAutoscaling"):
            yield "a queue of Kueue's admits a fixed size; enableInTreeAutoscaling must be off"
    if "clusterSelector" in spec:
        forbidden = [key for key in ("backoffLimit", "suspend") if spec.get(key)]
        yield from (f"clusterSelector and {key} exclude each other" for key in forbidden)
        if mode == "SidecarMode":
            yield "clusterSelector and submissionMode SidecarMode exclude each other"
    elif cluster is None:
        yield "rayClusterSpec or clusterSelector must be given"
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & set(spec):
        yield "SidecarMode has no submitter; leave submitterPodTemplate and submitterConfig out"
    if mode == "K8sJobMode" and spec.get("submitterConfig", {}).get("backoffLimit", 2) < 5:
        yield "submitterConfig.backoffLimit below 5 gives the job up while its head is still starting"
    yield from _check_deletion(spec, cluster or {}, ends)


def _check_deletion(spec: Manifest, cluster: Manifest, ends: bool) -> Iterator[str]:
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if rules and ends:
        yield "deletionStrategy.deletionRules and shutdownAfterJobFinishes exclude each other"
    if cluster.get("enableInTreeAutoscaling") and any(rule.get("policy") == "DeleteWorkers" for rule in rules):
        yield "the deletion policy DeleteWorkers does not go with autoscaling"


def _check_service(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    cluster, strategy = spec["rayClusterConfig"], spec.get("upgradeStrategy", {})
    kind, options = strategy.get("type", "NewCluster"), strategy.get("clusterUpgradeOptions", {})
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService must have no name: two clusters live side by side while one replaces the other"
    if kind not in UPGRADES:
        yield f"upgradeStrategy.type {kind!r} is none of {', '.join(UPGRADES)}"
    if kind == "NewClusterWithIncrementalUpgrade":
        if not cluster.get("enableInTreeAutoscaling"):
            yield "an incremental upgrade needs enableInTreeAutoscaling: true"
        if not options.get("gatewayClassName"):
            yield "an incremental upgrade needs clusterUpgradeOptions.gatewayClassName"
        if options.get("stepSizePercent", 0) > options.get("maxSurgePercent", 100):
            yield "clusterUpgradeOptions: stepSizePercent is more than maxSurgePercent"
    if cluster.get("gcsFaultToleranceOptions", {}).get("externalStorageNamespace"):
        yield "gcsFaultToleranceOptions.externalStorageNamespace must be unset: the next cluster would share the state"


def _list_groups(cluster: Manifest) -> list[tuple[str, Manifest]]:
    workers = [(f"worker group {group['groupName']}", group) for group in cluster.get("workerGroupSpecs", [])]
    return [("head group", cluster["headGroupSpec"]), *workers]
