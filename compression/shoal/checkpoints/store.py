"""A compressed model as a folder that loads everywhere, with the recipe that made it and the numbers it reached.

    config.json  model*.safetensors  tokenizer files  recipe.json  point.json  README.md  [modeling_shoal.py]

Folded and dropped kinds are stock checkpoints, sparse or not: zeros are stored like any other value, because no format
that leaves them out loads in transformers 5 or vLLM. Linear kinds and factored weights bring `modeling_shoal.py`, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where Shoal is not installed;
`shoal.load(folder)` never runs code from the folder.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.checkpoints.card import write_card
from shoal.checkpoints.companions import copy_companions, drop_stale_settings
from shoal.checkpoints.hashes import hash_folder
from shoal.checkpoints.read_back import check_saved
from shoal.files import require_path, write_aside, write_text
from shoal.large.on_disk import is_on_disk
from shoal.models import modeling_shoal
from shoal.models.structure import find_blocks, holds_own_modules, is_causal
from shoal.point import Point
from shoal.recipe import Recipe


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, recipe: Recipe) -> None:
    """Writes the model's folder, aside and renamed last: a reader never sees half a model.

    Raises FileExistsError if the folder is there already, OSError if it cannot be written, ValueError for a URI, or if
    what was written does not load as `model` (nothing is left behind).
    """
    require_path(folder, "folder")
    if folder.exists():
        raise FileExistsError(f"{str(folder)!r} exists already; delete it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(folder) as aside:
        own = holds_own_modules(model)
        # Transformers renames some weights of its own classes on the way in and out, but not those of other classes.
        # Shard by shard, where the blocks are on disk: a shard then holds about one block.
        sharding: dict[str, Any] = {"max_shard_size": _largest_part(model)} if is_on_disk(model) else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(aside, save_original_format=not own, **sharding)
        tokenizer.save_pretrained(aside)
        copy_companions(model, recipe.base_model, recipe.revision, aside)
        drop_stale_settings(aside)
        if own:
            _name_remote_code(aside, model)
        (aside / "recipe.json").write_text(recipe.model_dump_json(indent=2))
        check_saved(aside, model, tokenizer)


def _largest_part(model: PreTrainedModel) -> int:
    """Bytes of the model's largest block or other parameter."""
    blocks = find_blocks(model)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    return max(sizes + [p.nbytes for p in model.parameters()])


def _name_remote_code(folder: Path, model: PreTrainedModel) -> None:
    """A model type of its own: a loader that does not know our modules refuses, instead of loading without them."""
    config = json.loads((folder / "config.json").read_text())
    model_class, config_class = (f"Shoal{type(part).__name__.removeprefix('Shoal')}" for part in (model, model.config))
    config["model_type"] = f"shoal-{model.config.model_type.removeprefix('shoal-')}"
    config["architectures"] = [model_class]
    config["auto_map"] = {
        "AutoConfig": f"modeling_shoal.{config_class}",
        _auto_class(model): f"modeling_shoal.{model_class}",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    shutil.copy(modeling_shoal.__file__, folder / "modeling_shoal.py")


def _auto_class(model: PreTrainedModel) -> str:
    """The class of transformers that loads models of this kind."""
    if is_causal(model.config):
        return "AutoModelForCausalLM"
    if model.config.is_encoder_decoder:
        return "AutoModelForSeq2SeqLM"
    return "AutoModel" if model.get_output_embeddings() is None else "AutoModelForMaskedLM"


def save_point(folder: Path, point: Point) -> Point:
    """Puts the numbers and the model card beside the weights; returns the point with folder and hash filled in.

    In the file the folder is ".": it can be moved.
    """
    point = point.model_copy(update={"artefact": ".", "artefact_sha256": hash_folder(folder)})
    write_text(folder / "point.json", point.model_dump_json(indent=2))
    point = point.model_copy(update={"artefact": str(folder)})
    write_text(folder / "README.md", write_card(point))
    return point


def load_point(folder: Path) -> Point:
    """The numbers of a compressed model's folder. Raises ValueError if they are missing or damaged."""
    try:
        point = Point.model_validate_json((folder / "point.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} is not a whole compressed model folder: point.json: {error}") from error
    return point.model_copy(update={"artefact": str(folder)})
