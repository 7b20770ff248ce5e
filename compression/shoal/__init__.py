"""Depth compression of transformer language models. In two lines:

    point = shoal.compress("smollm2-135m", "out/smol-24", num_replaced=6)
    model = shoal.load("out/smol-24")

Everything else is in the rooms below; `shoal.compression` tells the story.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoal.point import Point
    from shoal.texts import Texts

__version__ = "0.1.0"


def compress(base_model: str, folder: str | Path, *, texts: Texts | None = None, **recipe: Any) -> Point:
    """Makes a shallower `base_model` in `folder` and returns its numbers; keywords are those of `shoal.recipe.Recipe`.

    Raises ValueError for a recipe that the model or the texts cannot fulfil.
    """
    from shoal.compression import compress as run
    from shoal.recipe import Recipe

    if recipe.get("blocks") is not None:
        recipe = {"num_replaced": len(recipe["blocks"]), "selection": "listed", **recipe}
    return run(Recipe(base_model=base_model, **recipe), Path(folder), texts=texts)


def load(folder: str | Path, *, dtype: str | None = None) -> PreTrainedModel:
    """The compressed model in `folder` (or any other), without running code from the folder.

    Raises ValueError if there is no such model.
    """
    from shoal.checkpoints.load import load_model

    return load_model(str(folder), dtype=dtype, any_kind=True)
