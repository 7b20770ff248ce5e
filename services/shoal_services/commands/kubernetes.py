"""`shoal k8s render` and `shoal k8s check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

k8s = typer.Typer(
    no_args_is_help=True,
    help="Searches and manifests for Kubernetes with KubeRay.\n\nExamples:\n\n"
    "    shoal k8s render tune_configs/demo.yaml\n\n    shoal k8s check k8s",
)


@k8s.command()
def render(
    config: Annotated[Path, typer.Argument(help="A search: a YAML file as in tune_configs/.")],
    namespace: Annotated[str, typer.Option(help="Namespace to run in.")] = "shoal",
    image: Annotated[str | None, typer.Option(help="Image; by default shoal, tagged with Ray's version.")] = None,
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim that all pods share.")] = "shoal-storage",
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server, as pods reach it; by default the file's, or http://mlflow:5000.")
    ] = None,
    queue: Annotated[str, typer.Option(help="Kueue's queue; '' for none.")] = "shoal",
    memory: Annotated[str, typer.Option(help="Memory of a worker pod.")] = "8Gi",
    scratch: Annotated[str, typer.Option(help="Disk of a pod for /tmp; run.streamed needs room for the model.")] = "20Gi",
    workers_per_pod: Annotated[
        int, typer.Option(min=1, help="Workers in one pod, so that GPUs of one node reach each other directly.")
    ] = 1,
) -> None:
    """Print the RayJob for one search: a Ray cluster of the size that `run` asks for, gone when the search ends.

    Apply it again after a failure or a change of `run`: the search goes on where it stopped. What pods would not find
    (files that are not below /mnt/shoal) and passwords are refused: those come from Secrets.

    Examples:

        shoal k8s render tune_configs/demo.yaml | kubectl apply -f -

        shoal k8s render tune_configs/qwen3-8b.yaml --image registry.example.com/shoal-cuda:2.60.0 --memory 96Gi

        shoal k8s render tune_configs/llama-3.1-70b.yaml --workers-per-pod 8 --memory 512Gi --scratch 600Gi
    """
    from shoal_services.k8s.render import Place, render_search, write_yaml
    from shoal_services.search.config import load_config

    place = Place(namespace, image, claim, tracking_uri, queue or None, memory, scratch, workers_per_pod)
    print(write_yaml(render_search(load_config(config), config.read_text(encoding="utf-8"), place)), end="")


@k8s.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Kustomization, folder or file of manifests; - for standard input.")],
    crds: Annotated[
        Path | None, typer.Option(envvar="SHOAL_KUBERAY_CRDS", help="Folder of CRDs of another KubeRay than 1.7.")
    ] = None,
) -> None:
    """Check manifests before a cluster sees them; exit code 1 if anything is wrong.

    Kubernetes' schemas, the rules that KubeRay's operator enforces, the Serve configuration, what objects say of each
    other, and what a `restricted` namespace admits.

    Examples:

        shoal k8s check k8s/overlays/gpu

        kubectl kustomize k8s | shoal k8s check -
    """
    from shoal_services.k8s.checks import check_manifests
    from shoal_services.k8s.manifests import parse_manifests, read_manifests

    stdin = str(folder) == "-"
    try:
        manifests = parse_manifests(sys.stdin.read(), "standard input") if stdin else read_manifests(folder)
        problems = check_manifests(manifests, crds)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: the checks need pip install 'shoal[k8s]'") from error
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    print(f"{len(manifests)} objects, nothing wrong", file=sys.stderr)
