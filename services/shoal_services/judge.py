"""Stories of a model and of its dense one, graded by a judge behind any OpenAI-compatible endpoint.

The protocol of TinyStories (arXiv 2305.07759): the judge reads a beginning and, after ***, the continuation, writes an
assessment, and grades grammar, creativity, consistency and plot from 1 to 10.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import openai
from pydantic import Field, ValidationError
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.names import recipe_of
from shoal.files import write_text
from shoal.models.generate import sample_continuations
from shoal.progress import Listener
from shoal.value import Value

CRITERIA = ("grammar", "creativity", "consistency", "plot")
NUM_ATTEMPTS = 3
BEGINNINGS = (
    "Once upon a time there was a little girl named Mia who was afraid of the dark. One night the lamp went out and",
    "Tom had a red kite. It was his best toy. On a windy day he took it to the hill, but the string",
    "The old dog slept by the door all day. When the snow began to fall, he lifted his head, because he heard",
    "“Do not open the blue box,” said Grandma. Ben promised. But when she went to the garden, the box",
    "A small duck could not swim. All the other ducks laughed. Then one day a boy fell into the pond, and the duck",
    "Lily and Sam found a map under the bed. It showed a tree with a big hole in it. They put on their boots and",
    "The baker made a cake for the king. It was so big that it did not fit through the door. The baker thought and",
    "Every morning the same bird sat at Anna’s window. Today it carried something shiny in its beak. Anna",
    "Max wanted to win the race. His friend Leo fell down just before the end. Max looked at the line and at Leo. He",
    "There was a robot who had never seen rain. When the first drops fell on its head, it asked the farmer",
)
INSTRUCTIONS = (
    "You grade exercises. A student was given the beginning of a story and had to complete it. *** marks where the "
    "student's part begins. Judge the student's part alone: its grammar, its creativity, whether it is consistent with the "
    "beginning, and whether its plot makes sense. Answer with one JSON object and nothing else: "
    '{"assessment": "two sentences", "grammar": 1-10, "creativity": 1-10, "consistency": 1-10, "plot": 1-10}; grades are '
    "whole numbers, 10 is best."
)


class Grades(Value):
    """What the judge answers."""

    assessment: str
    grammar: int = Field(ge=1, le=10)
    creativity: int = Field(ge=1, le=10)
    consistency: int = Field(ge=1, le=10)
    plot: int = Field(ge=1, le=10)


Writer = Literal["model", "dense"]


class Story(Value):
    """A beginning, what a model made of it, and the grades once there are any."""

    writer: Writer
    beginning: str
    continuation: str
    grades: Grades | None = None


class Writing(Value):
    """What is written: a model's stories and, if one is known, its dense model's, from the same beginnings and seeds."""

    model: str
    dense: str | None = None
    beginnings: tuple[str, ...] = Field(min_length=2)
    num_samples: int = Field(default=3, ge=1)
    num_new: int = Field(default=200, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    seed: int = 0
    dtype: str | None = None


@dataclass(frozen=True)
class Judge:
    """A model behind an endpoint."""

    url: str
    model: str
    key: str | None = None


class StoryFile(Value):
    """What is kept on disk, so that nothing is written or graded twice."""

    writing: Writing
    judge: str
    stories: tuple[Story, ...]


class CriterionGrade(Value):
    """A criterion's mean over beginnings, with standard errors: that of the difference is of the paired one."""

    criterion: str
    num_stories: int
    mean: float
    standard_error: float
    dense_mean: float | None = None
    dense_standard_error: float | None = None
    difference_standard_error: float | None = None


def read_beginnings(file: Path | None) -> tuple[str, ...]:
    """The lines of a file, or Shoal's own beginnings. Raises ValueError for fewer than two or for one given twice."""
    if file is None:
        return BEGINNINGS
    lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(lines) < 2 or len(set(lines)) < len(lines):
        raise ValueError(
            f"{str(file)!r} has {len(lines)} beginnings, {len(set(lines))} of them different: give two or more, each once"
        )
    return lines


def run_judge(writing: Writing, judge: Judge, file: Path, listen: Listener) -> list[CriterionGrade]:
    """Writes the stories to `file`, lets the judge grade them, and sums up; goes on with a file that is there.

    Raises ValueError for a model that cannot be used, a file of other stories, or a judge that answers no grades;
    ConnectionError for one that cannot be reached or refuses.
    """
    if file.exists():
        kept = _read_stories(file, writing, judge)
    else:
        kept = StoryFile(writing=writing, judge=judge.model, stories=write_stories(writing, listen))
        _save(file, kept)
    stories = list(kept.stories)
    with openai.OpenAI(base_url=judge.url, api_key=judge.key or "none") as client:
        for index, story in enumerate(stories):
            if story.grades is None:
                stories[index] = story.model_copy(update={"grades": _grade(client, judge, story, file)})
                _save(file, kept.model_copy(update={"stories": tuple(stories)}))
            listen("grade stories", index + 1, len(stories))
    return sum_up(stories)


def write_stories(writing: Writing, listen: Listener) -> tuple[Story, ...]:
    """The stories of both models, ungraded."""
    recipe = recipe_of(writing.model)
    models: list[tuple[str, str | None]] = [(writing.model, None)]
    if writing.dense is not None:
        models.append((writing.dense, None))
    elif recipe is not None:
        models.append((recipe.base_model, recipe.revision))
    stories = []
    for number, (name, revision) in enumerate(models):
        model = load_model(name, revision=revision, dtype=writing.dtype)
        tokenizer = load_tokenizer(name, revision=revision)
        for index, beginning in enumerate(writing.beginnings):
            continuations = sample_continuations(
                model, tokenizer, beginning, num_samples=writing.num_samples, num_new=writing.num_new,
                temperature=writing.temperature, seed=writing.seed + index,
            )  # fmt: skip
            writer: Writer = "dense" if number else "model"
            stories += [Story(writer=writer, beginning=beginning, continuation=text) for text in continuations]
            done = number * len(writing.beginnings) + index + 1
            listen("write stories", done, len(models) * len(writing.beginnings))
    return tuple(stories)


def _read_stories(file: Path, writing: Writing, judge: Judge) -> StoryFile:
    try:
        kept = StoryFile.model_validate_json(file.read_text())
    except ValidationError as error:
        raise ValueError(f"{str(file)!r} is no file of stories, or damaged: give another --out") from error
    if (kept.writing, kept.judge) != (writing, judge.model):
        raise ValueError(f"{str(file)!r} holds stories of other settings or another judge: delete it or give another --out")
    return kept


def _save(file: Path, kept: StoryFile) -> None:
    write_text(file, kept.model_dump_json(indent=2))


def _grade(client: openai.OpenAI, judge: Judge, story: Story, file: Path) -> Grades:
    """The judge's grades; an answer that is none is asked for again."""
    answer = ""
    for _ in range(NUM_ATTEMPTS):
        try:
            completion = client.chat.completions.create(
                model=judge.model, temperature=0,
                messages=[
                    {"role": "system", "content": INSTRUCTIONS},
                    {"role": "user", "content": f"{story.beginning} *** {story.continuation}"},
                ],
            )  # fmt: skip
        except openai.APIConnectionError as error:
            raise ConnectionError(
                f"the judge at {judge.url} cannot be reached ({error.__cause__ or error}); the stories are kept in "
                f"{str(file)!r}: give the same command again when it is up"
            ) from error
        except openai.APIStatusError as error:
            raise ConnectionError(
                f"the judge at {judge.url} answered {error.status_code}: {error.message[:200]}; the stories are kept in "
                f"{str(file)!r}: check --judge {judge.model!r} and --key, and give the command again"
            ) from error
        answer = completion.choices[0].message.content or ""
        try:
            return parse_grades(answer)
        except ValidationError:
            continue
    raise ValueError(
        f"judge {judge.model!r} answered no grades in {NUM_ATTEMPTS} attempts, but {answer[:200]!r}: choose a model that "
        f"follows instructions; the stories are kept in {str(file)!r}"
    )


def parse_grades(answer: str) -> Grades:
    """The grades in an answer: one JSON object, which may stand in a code fence. Raises ValidationError."""
    text = answer.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.removeprefix("```").removeprefix("json").removesuffix("```")
    return Grades.model_validate_json(text, strict=True)


def sum_up(stories: Sequence[Story]) -> list[CriterionGrade]:
    """Each criterion's mean over beginnings: stories of one beginning are not independent."""
    summary = []
    for criterion in CRITERIA:
        own = _by_beginning(stories, "model", criterion)
        grade = CriterionGrade(
            criterion=criterion, num_stories=sum(story.writer == "model" for story in stories),
            mean=statistics.fmean(own), standard_error=_standard_error(own),
        )  # fmt: skip
        dense = _by_beginning(stories, "dense", criterion)
        if dense:
            update = {
                "dense_mean": statistics.fmean(dense),
                "dense_standard_error": _standard_error(dense),
                "difference_standard_error": _standard_error([a - b for a, b in zip(own, dense, strict=True)]),
            }
            grade = grade.model_copy(update=update)
        summary.append(grade)
    return summary


def _by_beginning(stories: Sequence[Story], writer: Writer, criterion: str) -> list[float]:
    """A writer's mean grade for each beginning."""
    grades: dict[str, list[int]] = {}
    for story in stories:
        if story.writer == writer and story.grades is not None:
            grades.setdefault(story.beginning, []).append(getattr(story.grades, criterion))
    return [statistics.fmean(values) for values in grades.values()]


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
