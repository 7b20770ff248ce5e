"""What is wrong with manifests, before a cluster sees them: every check, in order, over all objects together."""

from __future__ import annotations

from pathlib import Path

from shoal_services.k8s.capacity import check_capacity
from shoal_services.k8s.hardening import check_hardening
from shoal_services.k8s.manifests import Manifest, Problem
from shoal_services.k8s.operator_rules import check_operator_rules
from shoal_services.k8s.references import check_references
from shoal_services.k8s.schemas import check_schemas
from shoal_services.k8s.serve_config import check_serve_config


def check_manifests(manifests: list[Manifest], crds: Path | None = None) -> list[Problem]:
    """All problems; none for manifests that can be applied. `crds` is a folder of KubeRay's CRDs, or None for those of 1.7.

    Raises ValueError if the folder lacks one, ImportError without kubernetes-validate.
    """
    problems = check_schemas(manifests, crds)
    problems = problems or [*check_operator_rules(manifests), *check_serve_config(manifests)]
    if problems:
        return problems  # further checks take the objects' form, and that of the Serve settings, for granted
    return [*check_references(manifests), *check_hardening(manifests), *check_capacity(manifests)]
