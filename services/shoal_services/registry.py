"""Looking things up at an MLflow server: is it there, and where are the weights that an alias names?"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from shoal_services.console import mask_passwords

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own patience is minutes per call (7 retries of 120 s): the thread would hang on a dead server.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
PLACE_TAG = "shoal.place"
REGISTRY = "models:/"


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
    if getattr(error, "error_code", None) == "UNAUTHENTICATED":
        return "it refuses the user or the password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return f"{type(error).__name__}: {mask_passwords(' '.join(str(error).split()))[:200]}"


def find_registered(name: str, uri: str | None) -> str:
    """Where the weights of `models:/NAME@ALIAS` or `models:/NAME/VERSION` are: a folder or a Hub id.

    Raises ValueError if there is no such version, or if it was not registered by a search; RuntimeError if the
    server does not answer.
    """
    client = connect_tracker(uri)
    from mlflow.exceptions import MlflowException

    model, at, alias = name.removeprefix(REGISTRY).partition("@")
    model, _, number = model.partition("/")
    try:
        version = client.get_model_version_by_alias(model, alias) if at else client.get_model_version(model, number)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ValueError(
                f"the registry has no {name!r} ({error.message}); see `mlflow ui`, or give a folder"
            ) from error
        raise RuntimeError(f"the tracking server does not answer: {explain_failure(error)}") from error
    place = version.tags.get(PLACE_TAG)
    if not place:
        raise ValueError(f"{name!r} does not say where its weights are (tag {PLACE_TAG}): no search registered it")
    return place.removeprefix("hf://")
