"""A finished model's perplexity beside its dense model's, on texts that neither was made with."""

from __future__ import annotations

from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.names import recipe_of
from shoal.measure.perplexity import evaluate
from shoal.measure.targets import measure_targets
from shoal.models.structure import text_config
from shoal.point import Evaluation
from shoal.progress import Listener, count_on, ignore
from shoal.text.corpus import load_evaluation
from shoal.texts import Texts


def evaluate_beside(
    name: str, dense: str | None, texts: Texts, *, dtype: str | None = None, listen: Listener = ignore
) -> list[Evaluation]:
    """Model `name` on every evaluation text, beside the dense model that its recipe names (or `dense`).

    Of a text that the recipe trained on, the part that was kept for evaluation is used.

    Raises ValueError if no dense model is known, or the two do not share their vocabulary.
    """
    recipe = recipe_of(name)
    if dense is None and recipe is None:
        raise ValueError(f"{name!r} has no recipe.json that names its dense model; give --dense")
    if dense is not None or recipe is None:
        base, revision = str(dense), None
    else:
        base, revision = recipe.base_model, recipe.revision
    listen("load", 0, 1)
    model, teacher = load_model(name, dtype=dtype), load_model(base, revision=revision, dtype=dtype)
    sizes = [text_config(one).vocab_size for one in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name!r} has a vocabulary of {sizes[0]} tokens and {base!r} one of {sizes[1]}: they cannot be compared "
            "token by token"
        )
    trained_on = recipe.training_texts if recipe else []
    evaluation = load_evaluation(texts, load_tokenizer(base, revision=revision), teacher.config, trained_on)
    listen("load", 1, 1)
    results = []
    for windows in evaluation:
        stage, total = f"evaluate on {windows.name}", 2 * len(windows)
        targets = measure_targets(teacher, windows, on_progress=count_on(listen, stage, 0, total))
        results.append(evaluate(model, windows, targets, on_progress=count_on(listen, stage, len(windows), total)))
    return results
