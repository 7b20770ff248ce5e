"""What the words after `shoal serve` mean: a search's folder, registry names, model folders, or a YAML file."""

from __future__ import annotations

import json
from pathlib import Path

from shoal.checkpoints.names import describe_source
from shoal.checkpoints.packaged import ALIASES
from shoal.point import Point
from shoal.value import fingerprint

from shoal_services.complaints import read_strict
from shoal_services.serving.settings import ServeSettings, VariantSettings
from shoal_services.tracking.registry import REGISTRY


def read_sources(sources: list[str]) -> ServeSettings:
    """The settings that the sources describe. Raises ValueError for what cannot be served."""
    if len(sources) == 1 and sources[0].endswith((".yaml", ".yml")):
        return read_strict(Path(sources[0]), ServeSettings, example="services/README.md")
    variants: dict[str, VariantSettings] = {}
    for source in sources:
        found = _read_search(Path(source)) if _is_search(source) else {_name(source): describe_variant(source)}
        twice = sorted(set(found) & set(variants))
        if twice:
            raise ValueError(f"two variants named {twice[0]!r}; name them in a YAML file: shoal serve serve.yaml")
        variants |= found
    return ServeSettings(variants=variants)


def describe_variant(model: str) -> VariantSettings:
    """A variant for a model, with the numbers that its folder holds."""
    if model.startswith((".", "/", "~")) and not Path(model).exists():
        raise ValueError(f"there is no model folder {model!r}; check the path, or give a search's folder or a Hub id")
    file = Path(model) / "point.json"
    if not file.is_file():
        return VariantSettings(model=model)
    try:
        point = Point.model_validate_json(file.read_text())
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    return VariantSettings(model=model, perplexity=point.perplexity, num_parameters=point.num_parameters)


def find_version(place: str, *settings: object) -> str:
    """A short hash that changes with the settings, and with the files if the place is a folder."""
    folder = Path(describe_source(place))
    files = sorted(folder.iterdir()) if folder.is_dir() and place not in ALIASES else []
    sizes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    return fingerprint([str(folder), *settings, sizes])


def _is_search(source: str) -> bool:
    return (Path(source) / "frontier.json").is_file()


def _read_search(folder: Path) -> dict[str, VariantSettings]:
    """The dense model and every frontier point: `dense`, `best`, `balanced`, `smallest`, and others as `linear-8`.

    Points without a name of their own share a process, which loads those that are asked for.
    """
    try:
        payload = json.loads((folder / "frontier.json").read_text())
        points = [Point.model_validate(point) for point in payload["frontier"]]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{str(folder / 'frontier.json')!r} is damaged: {error}") from error
    if not points:
        raise ValueError(f"{str(folder)!r} holds no frontier yet; let the search finish at least one trial")
    recipe, evaluation = points[0].recipe, points[0].evaluations[0]
    variants = {
        "dense": VariantSettings(
            model=recipe.base_model,
            perplexity=evaluation.dense_perplexity,
            num_parameters=points[0].dense_size.num_parameters,
        )
    }
    names = {artefact: name for name, artefact in reversed(payload["picks"].items())}
    for point in sorted(points, key=lambda point: -point.num_parameters):
        assert point.artefact is not None
        name = names.get(point.artefact)
        variants[name or point.recipe.short_name] = VariantSettings(
            model=_find_artefact(folder, point.artefact), perplexity=point.perplexity,
            num_parameters=point.num_parameters, shared=name is None,
        )  # fmt: skip
    return variants


def _find_artefact(folder: Path, artefact: str) -> str:
    """The model's folder, also where the search's folder was moved as a whole."""
    moved = folder / "trials" / Path(artefact).parent.name / "model"
    found = next((path for path in (moved, Path(artefact)) if path.is_dir()), None)
    if found is None:
        raise ValueError(f"the frontier's model {artefact!r} is gone; run the search again")
    return str(found.resolve())


def _name(source: str) -> str:
    """`models:/shoal-x@balanced` → balanced; a folder or Hub id → its last part."""
    if source.startswith(REGISTRY):
        return source.rpartition("@")[2] if "@" in source else source.removeprefix(REGISTRY).replace("/", "-")
    if source in ALIASES:
        return source
    return Path(source).name
