"""What is served moves here and nowhere else: find the weights → check their hash → move the alias."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.checkpoints.hashes import hash_folder
from shoal.files import write_text
from shoal.point import Point

from shoal_services.tracking.registry import (
    HASH_TAG,
    HUB,
    PLACE_TAG,
    PROMOTED,
    REGISTRY,
    SEARCH_TAG,
    Weights,
    connect_tracker,
    describe_point,
    explain_failure,
    find_version,
    put_version,
    require_model,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SOURCE_TAG = "shoal.promoted_from"


@dataclass(frozen=True)
class Promotion:
    """What an alias named before (None: nothing) and what it names now; `is_checked` if a recorded hash agreed."""

    name: str
    alias: str
    before: ModelVersion | None
    now: ModelVersion
    is_checked: bool


def promote(source: str, target: str, uri: str) -> Promotion:
    """Moves the alias `target` (NAME@ALIAS, or NAME and the alias of the source) to the weights that `source` names.

    Raises ValueError for a source that is not there, weights whose hash is not the recorded one, and a target that is
    no name or a search's own; RuntimeError if the tracking server does not answer.
    """
    client = connect_tracker(uri)
    with _explained():
        weights, alias = find_weights(client, source)
        name, alias = _read_target(client, target, alias)
        recorded = weights.sha256
        weights = replace(weights, sha256=check_weights(weights, source), tags={**weights.tags, SOURCE_TAG: source})
        before = _find_alias(client, name, alias)
        require_model(client, name, {})
        client.set_registered_model_alias(name, alias, put_version(client, name, weights))
        now = find_version(client, f"{REGISTRY}{name}@{alias}")
    _note_promotion(weights, f"{name}@{alias}")
    if (now.tags.get(HASH_TAG), now.tags[PLACE_TAG]) != (weights.sha256, weights.place):
        raise ValueError(
            f"{name}@{alias} is now version {now.version} ({now.tags[PLACE_TAG]}): somebody else promoted at the same "
            "time; agree with them, and promote again"
        )
    return Promotion(name, alias, before, now, recorded is not None)


def _note_promotion(weights: Weights, target: str) -> None:
    """A search never deletes weights with this note beside them, however far off its frontier they come to be."""
    if weights.sha256:
        with contextlib.suppress(OSError):  # read-only storage is served as well
            write_text(Path(weights.place) / PROMOTED, json.dumps({"promoted": target}))


def check_weights(weights: Weights, told: str) -> str | None:
    """The hash of the weights as they lie there now; None for a model of the Hub.

    Raises ValueError if they are not there, or not those whose hash was recorded.
    """
    if weights.place.startswith(HUB):
        return None
    folder = Path(weights.place)
    if not folder.is_dir():
        raise ValueError(
            f"the weights of {told!r} are in {weights.place!r}, and this machine has no such folder; promote where the "
            "search's storage is mounted"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"the folder {weights.place!r} of {told!r} holds no weights (*.safetensors)")
    found = hash_folder(folder)
    if weights.sha256 and found != weights.sha256:
        raise ValueError(
            f"the weights in {weights.place!r} are not those that were measured: their hash is {found[:12]}…, and "
            f"{weights.sha256[:12]}… was recorded for {told!r}; somebody has changed them, or made them again"
        )
    return found


def find_weights(client: MlflowClient, source: str) -> tuple[Weights, str | None]:
    """The weights that a source names, and its alias if it names one.

    A source is a model's folder, a search's folder and one of its points (`shoal-runs/demo@best`, or `@KEY` of a trial),
    `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a search's name and one of its aliases (`demo@best`).
    """
    path, at, pick = source.rpartition("@") if "@" in source else (source, "", "")
    for place, alias in ((source, ""), (path, pick)):
        if not source.startswith(REGISTRY) and Path(place).is_dir():
            return _find_in_folder(Path(place).resolve(), alias), alias or None
    if source.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {path!r}; check the path, or name a version: models:/NAME@ALIAS")
    name = source if source.startswith(REGISTRY) else f"{REGISTRY}{_find_model(client, path)}{at}{pick}"
    if not re.search(r"@[^@/]+$|/\d+$", name.removeprefix(REGISTRY)):
        raise ValueError(f"{source!r} names no version; say which: models:/NAME@ALIAS or models:/NAME/VERSION")
    version = find_version(client, name)
    tags = {key: value for key, value in version.tags.items() if key not in (PLACE_TAG, HASH_TAG, SOURCE_TAG)}
    weights = Weights(version.tags[PLACE_TAG], version.tags.get(HASH_TAG) or None, tags, version.run_id or None)
    return weights, name.rpartition("@")[2] if "@" in name else None


def _find_model(client: MlflowClient, name: str) -> str:
    """The registered model of this name, or the one of the only search of this name."""
    plain = name.partition("/")[0]
    if client.search_registered_models(f"name = '{_require_name(plain, name)}'"):
        return name
    found = [model.name for model in client.search_registered_models(f"tags.`{SEARCH_TAG}` = '{plain}'")]
    if len(found) == 1:
        return found[0] + name.removeprefix(plain)
    if found:
        raise ValueError(
            f"{len(found)} searches are named {plain!r}; say which: {', '.join(REGISTRY + one for one in found)}"
        )
    raise ValueError(
        f"there is neither a folder {name!r} nor a model or search of this name in the registry; see `mlflow ui`"
    )


def _find_in_folder(folder: Path, pick: str) -> Weights:
    """A model's folder, or a point of a search's folder."""
    if not (folder / "frontier.json").is_file():
        if pick:
            raise ValueError(
                f"{str(folder)!r} is no search's folder, so that it has no {pick!r}: give shoal-runs/NAME@{pick}"
            )
        return _describe_folder(folder)
    picks = json.loads((folder / "frontier.json").read_text())["picks"]
    if not pick:
        raise ValueError(
            f"{str(folder)!r} is a search; say which point: {', '.join(f'{folder.name}@{one}' for one in picks)}"
        )
    if pick in picks:  # the folder may have been moved since
        return _describe_folder(folder.joinpath(*Path(picks[pick]).parts[-3:]))
    if (folder / "trials" / pick).is_dir():
        return _describe_folder(folder / "trials" / pick / "model")
    raise ValueError(
        f"the search {folder.name!r} has no {pick!r}; there are {', '.join(picks)}, and the keys of its trials"
    )


def _describe_folder(folder: Path) -> Weights:
    file = folder / "point.json"
    if not file.is_file():
        return Weights(str(folder), None)
    try:
        point = Point.model_validate_json(file.read_text())
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    return Weights(str(folder), point.artefact_sha256, describe_point(point))


def _read_target(client: MlflowClient, target: str, alias: str | None) -> tuple[str, str]:
    name, at, given = target.removeprefix(REGISTRY).partition("@")
    _require_name(name, target)
    alias = given if at else alias
    if not alias:
        raise ValueError(f"{target!r} names no alias; say which one moves: {name}@live")
    if not re.fullmatch(r"[\w\-]{1,255}", alias) or alias == "latest" or re.fullmatch(r"v\d+", alias, re.IGNORECASE):
        raise ValueError(f"{alias!r} cannot be an alias in MLflow: letters, digits, _ and -, but not 'latest' or 'v1'")
    for model in client.search_registered_models(f"name = '{name}'"):
        if SEARCH_TAG in model.tags:
            raise ValueError(
                f"{name!r} belongs to the search {model.tags[SEARCH_TAG]!r}, which moves its aliases itself; "
                "promote to another name"
            )
    return name, alias


def _require_name(name: str, told: str) -> str:
    if not re.fullmatch(r"[\w.\- ]{1,250}", name) or name in (".", ".."):
        raise ValueError(f"{told!r} is no name of a model in MLflow: letters, digits, and . _ - in between")
    return name


def _find_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


@contextmanager
def _explained() -> Iterator[None]:
    """Inside, an error of MLflow's is told in our words."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise RuntimeError(f"the tracking server does not take it: {explain_failure(error)}") from error
