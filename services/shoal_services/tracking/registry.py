"""An MLflow server's registry: is it there, where are the weights that an alias names, and new versions of a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoal_services.console import mask_passwords

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from shoal.point import Point

# MLflow's own patience is minutes per call (7 retries of 120 s): the thread would hang on a dead server.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
# Tags: a run's key; where a version's weights are, and their hash; on a model, the search that registers it, and its base.
KEY_TAG, PLACE_TAG, HASH_TAG = "shoal.key", "shoal.place", "sha256"
SEARCH_TAG, BASE_TAG = "shoal.search", "shoal.base_model"
REGISTRY, HUB = "models:/", "hf://"
# A file beside weights that were promoted.
PROMOTED = "promoted.json"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Weights:
    """Where weights are, their hash if it is known, what else a version of the registry says of them, and their run."""

    place: str
    sha256: str | None
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None


def connect_tracker(uri: str | None) -> MlflowClient:
    """A client that gives up on a silent server within seconds."""
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # a database's errors come as exceptions too
    return mlflow.MlflowClient(uri)


def ping(uri: str) -> str:
    """What an MLflow server at `uri` holds. Raises RuntimeError or OSError if none answers."""
    client = connect_tracker(uri)
    from mlflow.exceptions import MlflowException

    try:
        return f"{mask_passwords(uri)}: {len(client.search_experiments())} experiments"
    except MlflowException as error:
        raise RuntimeError(explain_failure(error)) from error


def explain_failure(error: Exception) -> str:
    """Why a tracker did not take or give something, on one line."""
    code = getattr(error, "error_code", None)
    if code == "UNAUTHENTICATED":
        return "it refuses the user or the password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if code == "PERMISSION_DENIED":
        return (
            "it denies this user the permission to do that: ask whoever keeps it for EDIT, or set MLFLOW_TRACKING_USERNAME"
        )
    if isinstance(error, ImportError) and error.name:
        return f"its artefact store needs the package {error.name!r}, which is not installed here: pip install {error.name}"
    text = mask_passwords(" ".join(str(error).split()))[:200]
    return text if type(error) is RuntimeError else f"{type(error).__name__}: {text}"


def find_registered(name: str, uri: str | None) -> str:
    """Where the weights of `models:/NAME@ALIAS` or `models:/NAME/VERSION` are: a folder or a Hub id.

    Raises ValueError if there is no such version, or if it does not say where its weights are; RuntimeError if the
    server does not answer.
    """
    return find_version(connect_tracker(uri), name).tags[PLACE_TAG].removeprefix(HUB)


def find_version(client: MlflowClient, name: str) -> ModelVersion:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names. Raises as `find_registered` does."""
    from mlflow.exceptions import MlflowException

    model, at, alias = name.removeprefix(REGISTRY).partition("@")
    model, _, number = model.partition("/")
    try:
        version = client.get_model_version_by_alias(model, alias) if at else client.get_model_version(model, number)
    except MlflowException as error:
        if error.error_code in ABSENT:
            raise ValueError(
                f"the registry has no {name!r} ({error.message}); see `mlflow ui`, or give a folder"
            ) from error
        raise RuntimeError(f"the tracking server does not answer: {explain_failure(error)}") from error
    if not version.tags.get(PLACE_TAG):
        raise ValueError(
            f"{name!r} does not say where its weights are (tag {PLACE_TAG}): neither a search nor `shoal promote` made it"
        )
    return version


def require_model(client: MlflowClient, name: str, about: Mapping[str, str]) -> None:
    """Makes a registered model with the tags `about`, unless it is there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags=dict(about))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def put_version(client: MlflowClient, model: str, weights: Weights) -> str:
    """The number of the version that stands for these weights: equal hashes (or places, without one) are one version.

    Where the same weights are at another place now, their version says so.
    """
    versions = client.search_model_versions(f"name = '{model}'")
    same = [version for version in versions if _is_same(version, weights)]
    if not same:
        tags = {**weights.tags, PLACE_TAG: weights.place} | ({HASH_TAG: weights.sha256} if weights.sha256 else {})
        return client.create_model_version(model, _make_source(client, weights), run_id=weights.run_id, tags=tags).version
    first = min(same, key=lambda version: int(version.version))
    if first.tags.get(PLACE_TAG) != weights.place:
        client.set_model_version_tag(model, first.version, PLACE_TAG, weights.place)
    return first.version


def _is_same(version: ModelVersion, weights: Weights) -> bool:
    if weights.sha256 or version.tags.get(HASH_TAG):
        return version.tags.get(HASH_TAG) == weights.sha256
    return version.tags.get(PLACE_TAG) == weights.place


def _make_source(client: MlflowClient, weights: Weights) -> str:
    """What MLflow shows as the source. A server refuses paths of its clients: there the tag tells where the weights are."""
    if "://" in weights.place or not str(client.tracking_uri).startswith("http"):
        return weights.place
    return f"runs:/{weights.run_id}/model" if weights.run_id else f"shoal://{weights.place}"


def describe_point(point: Point) -> dict[str, str]:
    """What a version in the registry says of its weights."""
    return {
        BASE_TAG: point.recipe.base_model,
        "kind": point.recipe.kind,
        "weights": ", ".join(point.recipe.weight_changes),
        "perplexity": f"{point.perplexity:.4f}",
    }
