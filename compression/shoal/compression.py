"""The story, top to bottom, on one machine: load → moments → choose → fit → replace → thin → distil → evaluate → store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.checkpoints.config import is_memory_short
from shoal.checkpoints.hashes import hash_weights
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.store import save, save_point
from shoal.distil.run import DistillationRun
from shoal.distil.teacher import Lesson
from shoal.large.on_disk import copy_model
from shoal.linearity.moments import Moments
from shoal.linearity.scores import require_calibration
from shoal.measure.perplexity import evaluate
from shoal.measure.size_and_speed import measure_size, measure_speeds
from shoal.models.shorten import require_shortenable
from shoal.models.structure import find_blocks
from shoal.point import Evaluation, Point, Size, Speed
from shoal.prepare import Preparation, prepare
from shoal.progress import Listener, ignore
from shoal.recipe import Recipe
from shoal.replace.choose import choose_blocks
from shoal.replace.fit import fit_independent
from shoal.replace.in_order import fit_in_order
from shoal.replace.judge import Judge
from shoal.replace.maps import Replacement, apply_replacement
from shoal.text.corpus import Corpus, load_corpus
from shoal.text.windows import TokenWindows
from shoal.texts import Texts
from shoal.thin.sparsify import sparsify
from shoal.thin.svd import factor_weights
from shoal.units import whole_blocks


@dataclass
class Stopwatch:
    """Seconds spent, by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0) + time.perf_counter() - start, 3)


def compress(
    recipe: Recipe, folder: Path, *, texts: Texts | None = None, streamed: bool | None = None, listen: Listener = ignore
) -> Point:
    """Makes the model that the recipe describes, writes it to `folder`, and returns the numbers that it reached.

    `streamed`: with the blocks on disk, a block at a time in memory; if not given, where memory would be short.

    Raises ValueError for a recipe that the model or the texts cannot fulfil, FileExistsError if `folder` is there,
    `shoal.measure.perplexity.Collapsed` if the result is not a working model.
    """
    require_free(folder)
    watch = Stopwatch()
    with watch.time("load"):
        listen("load", 0, 1)
        streamed = choose_streamed(recipe, streamed)
        model = load_model(recipe.base_model, revision=recipe.revision, dtype=recipe.dtype, streamed=streamed)
        if recipe.replaces_blocks:
            require_shortenable(model, None if recipe.blocks is None else whole_blocks(recipe.blocks))
        tokenizer, corpus = load_texts(recipe, model, texts)
        if recipe.replaces_blocks:
            require_calibration(corpus.calibration, model)
        recipe = name_inputs(recipe.settle(streamed=streamed), model, corpus)
        listen("load", 1, 1)
    with watch.time("prepare"):
        preparation = prepare(model, corpus, listen=listen)
    with watch.time("fit"):
        recipe = choose(recipe, model, corpus, preparation, listen=listen)
        replacement = fit(recipe, model, corpus.calibration, preparation.moments, listen=listen)
        student = replace(model, replacement)
    if recipe.weight_changes:
        with watch.time("thin"):
            thin_weights(recipe, student, corpus, listen=listen)
    with watch.time("distil"):
        if recipe.distillation is not None:
            run = DistillationRun(
                student, model, make_lesson(corpus, preparation), recipe.distillation,
                replaced=replacement.blocks, keep_zeros=recipe.sparsity is not None, seed=recipe.seed,
            )  # fmt: skip
            for metrics in run:
                listen("distil", int(metrics["step"]), recipe.distillation.num_steps)
            student = run.finish()
    with watch.time("evaluate"):
        evaluations = evaluate_all(student, corpus, preparation, listen=listen)
        # A streamed model would be timed reading its files.
        speeds = (None, None) if streamed else tuple(measure_speeds([model, student]))
    with watch.time("store"):
        save(student, tokenizer, folder, recipe=recipe)
    sizes = measure_size(model), measure_size(student, is_sparse=recipe.sparsity is not None)
    return save_point(folder, make_point(recipe, evaluations, sizes, speeds, watch, student))


def require_free(folder: Path) -> None:
    """Raises FileExistsError if the folder is there."""
    if folder.exists():
        raise FileExistsError(f"{str(folder)!r} exists already; delete it or choose another folder")


def choose_streamed(recipe: Recipe, wanted: bool | None) -> bool:
    """Whether the blocks stay on disk: as wanted, or where memory would not hold the model and its student.

    Raises ValueError if a streamed model should be distilled, its weights thinned, or its blocks chosen by KL.
    """
    if wanted and recipe.distillation is not None:
        raise ValueError(
            "a streamed model cannot be distilled by one process: every step would read it from disk; leave the "
            "distillation out, distil where the model fits in memory, or in a search with run.streamed and several workers"
        )
    is_thinned = recipe.sparsity is not None or recipe.weight_share is not None
    if wanted and is_thinned:
        raise ValueError("a streamed model cannot be made sparse or factored; leave out sparsity and weight_share")
    if wanted and recipe.asks_for_kl:
        raise ValueError(
            "selection='kl' would read a streamed model from disk for every set of blocks that it tries; choose by "
            "linearity, or list the blocks"
        )
    if wanted is not None or recipe.distillation is not None or is_thinned or recipe.asks_for_kl:
        return bool(wanted)
    return is_memory_short(recipe.base_model, revision=recipe.revision, dtype=recipe.dtype, num_copies=2)


def load_texts(recipe: Recipe, model: PreTrainedModel, texts: Texts | None) -> tuple[PreTrainedTokenizerBase, Corpus]:
    """The model's tokenizer, and the token windows that the recipe needs, for every role."""
    tokenizer, settings = load_tokenizer(recipe.base_model, revision=recipe.revision), recipe.distillation
    needs = {"distillation_tokens": settings.num_tokens, "distillation_window": settings.window} if settings else {}
    return tokenizer, load_corpus(texts or Texts(), tokenizer, model.config, **needs)


def name_inputs(recipe: Recipe, model: PreTrainedModel, corpus: Corpus) -> Recipe:
    """The recipe with the hashes of what it is made from."""
    return recipe.model_copy(
        update={
            "weights_sha256": recipe.weights_sha256 or hash_weights(model),
            "calibration": (corpus.calibration.describe(),),
            "distillation_text": corpus.distillation.describe() if corpus.distillation and recipe.distillation else None,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
    )


def choose(
    recipe: Recipe, model: PreTrainedModel, corpus: Corpus, preparation: Preparation, *,
    kept_in: Path | None = None, listen: Listener = ignore,
) -> Recipe:  # fmt: skip
    """The recipe with its blocks filled in. In the folder `kept_in`, choices for one model and corpus share their costs."""
    units = choose_blocks(
        recipe, preparation.moments, scores=preparation.scores,
        judge=lambda: Judge(
            model, corpus.calibration, corpus.selection, preparation.selection, recipe, kept_in=kept_in
        ),
        listen=listen,
    )  # fmt: skip
    return recipe.model_copy(update={"blocks": units, "num_replaced": len(units)})


def fit(
    recipe: Recipe, model: PreTrainedModel, windows: TokenWindows, moments: Moments, *, listen: Listener = ignore
) -> Replacement:
    """The recipe's replacement in closed form, on calibration windows and their moments."""
    assert recipe.blocks is not None
    if recipe.kind == "dropped" and (recipe.fit == "independent" or not recipe.refit):
        return Replacement(recipe.blocks)
    if recipe.fit == "independent":
        return fit_independent(moments, whole_blocks(recipe.blocks), ridge=recipe.ridge, rank=recipe.rank)
    return fit_in_order(
        model, recipe.blocks, windows, kind=recipe.kind, rank=recipe.rank, ridge=recipe.ridge,
        refit_outputs=recipe.refit,
        on_progress=lambda done: listen("fit", done, moments.num_blocks),
    )  # fmt: skip


def replace(model: PreTrainedModel, replacement: Replacement) -> PreTrainedModel:
    """A student: a copy of the model with the replacement in the place of its blocks."""
    student = copy_model(model)
    apply_replacement(student, replacement)
    return student


def thin_weights(recipe: Recipe, student: PreTrainedModel, corpus: Corpus, *, listen: Listener = ignore) -> None:
    """Factors and zeros in the blocks that stay, in place, as far as the recipe asks for them."""
    depth = len(find_blocks(student))
    if recipe.weight_share is not None:
        factor_weights(
            student, corpus.calibration, recipe.weight_share, on_progress=lambda done: listen("factor", done, depth)
        )
    if recipe.sparsity is not None:
        sparsify(student, corpus.calibration, recipe.sparsity, on_progress=lambda done: listen("sparsify", done, depth))


def make_lesson(corpus: Corpus, preparation: Preparation) -> Lesson:
    """What a student learns from and is checked on."""
    assert corpus.distillation is not None
    return Lesson(corpus.distillation, preparation.distillation, corpus.selection, preparation.selection)


def evaluate_all(
    student: PreTrainedModel, corpus: Corpus, preparation: Preparation, *, listen: Listener = ignore
) -> tuple[Evaluation, ...]:
    """The student on every evaluation text, beside the dense model."""
    results = []
    for index, (windows, dense) in enumerate(zip(corpus.evaluation, preparation.evaluation, strict=True)):
        listen("evaluate", index, len(corpus.evaluation))
        results.append(evaluate(student, windows, dense))
    listen("evaluate", len(corpus.evaluation), len(corpus.evaluation))
    return tuple(results)


def make_point(
    recipe: Recipe,
    evaluations: tuple[Evaluation, ...],
    sizes: tuple[Size, Size],
    speeds: tuple[Speed | None, ...],
    watch: Stopwatch,
    model: PreTrainedModel,
) -> Point:
    """The numbers of a finished model; pairs are (dense, compressed)."""
    return Point(
        recipe=recipe,
        evaluations=evaluations,
        dense_size=sizes[0],
        size=sizes[1],
        dense_speed=speeds[0],
        speed=speeds[1],
        seconds=watch.seconds,
        device=model.device.type,
    )
