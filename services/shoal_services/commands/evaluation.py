"""`shoal evaluate`: a compressed model beside its dense one, on texts, in tasks, or in single skills."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_services.commands.options import (
    AsJson,
    Dtype,
    EvaluationText,
    EvaluationTokens,
    Model,
    Window,
    make_texts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal.point import TaskScore


def evaluate(
    model: Model,
    dense: Annotated[str | None, typer.Option(help="The dense model; by default that of the folder's recipe.")] = None,
    evaluation_text: EvaluationText = ["wikipedia-sample"],  # noqa: B006
    evaluation_tokens: EvaluationTokens = 16_384,
    window: Window = 1024,
    tasks: Annotated[
        list[str], typer.Option(help="Instead of texts: lm-eval tasks, task files or folders of them, with commas.")
    ] = [],  # noqa: B006
    skills: Annotated[
        bool, typer.Option("--skills", help="Instead: copying, induction, sums, rare and common words of the text.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=2, help="Examples of each task or skill at most.")] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a compressed model beside its dense model: on the same tokens, or in tasks or skills on the same examples.

    In tasks and skills a model without a dense one is evaluated alone.

    Examples:

        shoal evaluate smollm2-135m-linear-6

        shoal evaluate ./my-model --dense ./my-dense --evaluation-text held-out.txt --json

        shoal evaluate smollm2-135m-linear-6 --tasks arc_easy,super-glue-lm-eval-v1 --limit 500

        shoal evaluate smollm2-135m-linear-6 --tasks ./my-task.yaml

        shoal evaluate smollm2-135m-linear-6 --skills --limit 200
    """
    if tasks and skills:
        raise ValueError("give either --tasks or --skills")
    if tasks:
        from shoal.measure.tasks import evaluate_on_tasks

        names = [name for listed in tasks for name in listed.split(",")]
        _tell_scores(model, evaluate_on_tasks(model, dense, names, limit=limit, dtype=dtype), as_json)
        return
    from shoal.measure.beside import evaluate_beside
    from shoal.paper.skills import evaluate_skills

    from shoal_services.commands.terminal import show_progress
    from shoal_services.console import show
    from shoal_services.pages.tables import evaluation_table

    if skills:
        with show_progress() as listen:
            scores = evaluate_skills(model, dense, evaluation_text[0], num_items=limit or 64, dtype=dtype, listen=listen)
        _tell_scores(model, scores, as_json)
        return
    texts = make_texts(evaluation_text, evaluation_text, evaluation_tokens=evaluation_tokens, window=window)
    with show_progress() as listen:
        evaluations = evaluate_beside(model, dense, texts, dtype=dtype, listen=listen)
    if as_json:
        print(json.dumps([json.loads(e.model_dump_json()) for e in evaluations], indent=2))
        return
    show(evaluation_table(model, evaluations))


def _tell_scores(model: str, scores: Sequence[TaskScore], as_json: bool) -> None:
    from shoal_services.console import show
    from shoal_services.pages.tables import task_table

    if as_json:
        print(json.dumps([score.model_dump() | {"difference": score.difference} for score in scores], indent=2))
        return
    show(task_table(model, scores))
