"""What a cluster's nodes hold, now and when its autoscaler has done all it may. A worker fits on one node or nowhere."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import ray
from ray.experimental.internal_kv import _internal_kv_get

UNLIMITED = 4096
AUTOSCALER_STATUS_KEY = b"__autoscaling_status"


@dataclass(frozen=True)
class NodeShape:
    """CPUs and GPUs of a worker or of a node."""

    cpus: float = 0.0
    gpus: float = 0.0

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")

    def count_in(self, nodes: Iterable[NodeShape]) -> int:
        """How many of these fit on the nodes, each wholly on one of them."""
        return sum(min(_fit(self.cpus, node.cpus), _fit(self.gpus, node.gpus)) for node in nodes)


@dataclass(frozen=True)
class Maximum:
    """The nodes that may be there at most: `groups` of (shape, count); None where the cluster does not say.

    `is_unknown` if an autoscaler adds nodes, but does not tell how many.
    """

    groups: list[tuple[NodeShape, int]] | None
    is_unknown: bool

    def named(self) -> dict[str, NodeShape]:
        """The nodes of the groups, numbered."""
        counted = itertools.chain.from_iterable([shape] * count for shape, count in self.groups or [])
        return {f"possible node {number}": shape for number, shape in enumerate(counted, 1)}

    def shapes(self, nodes: dict[str, NodeShape]) -> list[NodeShape]:
        """The shapes of the nodes at most: never fewer CPUs than those of the present nodes."""
        return max(list(nodes.values()), list(self.named().values()), key=lambda shapes: sum(s.cpus for s in shapes))


def read_nodes() -> dict[str, NodeShape]:
    """The shapes of the nodes that are alive, by address; several nodes of one address are told apart by a number."""
    shapes: dict[str, NodeShape] = {}
    for node in ray.nodes():
        if node["Alive"]:
            address = name = node["NodeManagerAddress"]
            number = 1
            while name in shapes:
                number += 1
                name = f"{address} ({number})"
            shapes[name] = NodeShape(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
    return shapes


def read_maximum() -> Maximum:
    """What the cluster's autoscaler tells of its limits.

    Ray keeps node groups with their limits in the GCS where a platform reports them; its own autoscalers
    (KubeRay's among them) report the nodes that they run and not their limits.
    """
    config = ray._private.state.state.get_cluster_config()
    if config is not None and config.node_group_configs:
        groups = [
            (NodeShape(group.resources.get("CPU", 0), group.resources.get("GPU", 0)), _read_count(group.max_count))
            for group in config.node_group_configs
        ]
        return Maximum(groups, is_unknown=False)
    return Maximum(None, is_unknown=_has_autoscaler(_internal_kv_get(AUTOSCALER_STATUS_KEY)))


def _has_autoscaler(status: bytes | None) -> bool:
    """Whether what the autoscaler reports names types of nodes: without one, Ray names a type for every single node."""
    if not status:
        return False
    report = json.loads(status).get("autoscaler_report") or {}
    kinds = {
        *(report.get("active_nodes") or {}),
        *(report.get("idle_nodes") or {}),
        *(report.get("pending_launches") or {}),
    }
    return any(not kind.startswith("node_") for kind in kinds)


def _read_count(max_count: int) -> int:
    """-1 stands for no limit."""
    return UNLIMITED if max_count < 0 else max_count


def _fit(needed: float, there: float) -> int:
    # Shares such as 0.1 do not divide evenly in binary.
    return math.floor(there / needed + 1e-9) if needed else UNLIMITED
