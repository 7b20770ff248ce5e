"""What the name of a model means: a packaged alias, a folder, a GGUF file or a Hub id."""

from __future__ import annotations

from pathlib import Path

from shoal.checkpoints.packaged import ALIASES, cache_folder, convert_packaged, gguf_arguments
from shoal.files import require_path
from shoal.recipe import Recipe


def locate(name: str, revision: str | None) -> tuple[str, dict]:
    """What to give to `from_pretrained`: a folder or Hub id, and keyword arguments."""
    require_path(name, "model")
    if name in ALIASES:
        return str(convert_packaged(name)), {}
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ValueError(f"GGUF file {name!r} does not exist; check the path")
        return str(path.parent), gguf_arguments(path)
    if path.is_dir():
        return name, {}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"model folder {name!r} does not exist; check the path, or give a Hub id or one of {', '.join(ALIASES)}"
        )
    return name, {"revision": revision} if revision else {}


def describe_source(name: str, revision: str | None = None) -> str:
    """Where a model comes from, as a place that others can load: an absolute folder, a file, or a Hub id."""
    if name in ALIASES:
        return str(cache_folder() / name)
    if Path(name).exists():
        return str(Path(name).resolve())
    return f"hf://{name}" + (f"@{revision}" if revision else "")


def recipe_of(name: str) -> Recipe | None:
    """The recipe in a compressed model's folder, None for other models. Raises ValueError for a damaged one or a URI."""
    require_path(name, "model")
    file = Path(name) / "recipe.json"
    if not file.is_file():
        return None
    try:
        return Recipe.model_validate_json(file.read_text())
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error


def explain(error: Exception) -> str:
    """The part of a transformers error that tells a user something, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "is not a valid model identifier" in text or "couldn't connect" in text or "offline" in text.lower():
        return "no such folder, no such model on the Hub, or the Hub cannot be reached; check the name and the network"
    if "custom code" in text:
        return (
            "it needs code that comes with it, and Shoal runs none; take a checkpoint of a family that transformers has "
            "(many were converted: look for -hf in the name)"
        )
    if "GGUF" in text or "gguf" in text:
        return f"transformers cannot read this GGUF file ({text[:200]}); convert the model to safetensors first"
    return text[:600]
