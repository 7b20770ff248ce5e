"""A real judge over HTTP: grades add up, what was written or graded is kept, and a judge that fails is told."""

from __future__ import annotations

import json
import math
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fastapi
import pytest
import uvicorn
from pydantic import ValidationError
from shoal.checkpoints.load import load_model
from shoal.models.generate import sample_continuations
from shoal_services.judge import (
    CRITERIA,
    Judge,
    Story,
    StoryFile,
    Writing,
    parse_grades,
    read_beginnings,
    run_judge,
    write_stories,
)

BEGINNINGS = ("Once there was a fox. It", "The rain fell on the roof and", "“Run!” said the boy. The dog")


def grade(text: str) -> dict[str, object]:
    """A judge's answer, by length alone."""
    size = len(text)
    return {"assessment": "Fine.", **{name: 1 + (size + 3 * i) % 10 for i, name in enumerate(CRITERIA)}}


@dataclass
class JudgeServer:
    """An OpenAI-compatible endpoint: what it was asked, and what it says before it begins to grade."""

    url: str = ""
    asked: list[dict] = field(default_factory=list)
    nonsense: list[str] = field(default_factory=list)
    status: int = 200

    def app(self) -> fastapi.FastAPI:
        app = fastapi.FastAPI()

        @app.post("/v1/chat/completions")
        def complete(body: dict) -> fastapi.Response:
            if self.status != 200:
                return fastapi.responses.JSONResponse({"error": {"message": "no such model"}}, self.status)
            self.asked.append(body)
            text = self.nonsense.pop(0) if self.nonsense else json.dumps(grade(body["messages"][-1]["content"]))
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
            return fastapi.responses.JSONResponse(answer)

        return app


@pytest.fixture(scope="module")
def running() -> Iterator[JudgeServer]:
    judge = JudgeServer()
    server = uvicorn.Server(uvicorn.Config(judge.app(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.02)
    judge.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield judge
    server.should_exit = True
    thread.join()


@pytest.fixture
def server(running: JudgeServer) -> JudgeServer:
    running.asked, running.nonsense, running.status = [], [], 200
    return running


@pytest.fixture(scope="module")
def writing(tiny_random: str) -> Writing:
    return Writing(model=tiny_random, dense=tiny_random, beginnings=BEGINNINGS, num_samples=2, num_new=12, dtype="float32")


@pytest.fixture(scope="module")
def written(writing: Writing) -> str:
    """The file of stories that nobody has graded."""
    stories = write_stories(writing, lambda *_: None)
    return StoryFile(writing=writing, judge="wise", stories=stories).model_dump_json()


@pytest.fixture
def file(written: str, tmp_path: Path) -> Path:
    (tmp_path / "s.json").write_text(written)
    return tmp_path / "s.json"


def run(writing: Writing, server: JudgeServer, file: Path):
    return run_judge(writing, Judge(server.url, "wise"), file, lambda *_: None)


def read_stories(file: Path) -> tuple[Story, ...]:
    return StoryFile.model_validate_json(file.read_text()).stories


def test_grades_are_means_over_beginnings_of_what_the_judge_said(writing, server, file):
    summary = run(writing, server, file)
    stories = read_stories(file)
    assert [body["messages"][-1]["content"] for body in server.asked] == [
        f"{story.beginning} *** {story.continuation}" for story in stories
    ]
    assert {body["model"] for body in server.asked} == {"wise"}
    assert len(stories) == 12
    for one in summary:
        means = []
        for beginning in BEGINNINGS:
            own = [s for s in stories if s.writer == "model" and s.beginning == beginning]
            means.append(statistics.fmean(grade(f"{beginning} *** {s.continuation}")[one.criterion] for s in own))
        assert (one.mean, one.num_stories) == (pytest.approx(statistics.fmean(means)), 6)
        assert one.standard_error == pytest.approx(statistics.stdev(means) / math.sqrt(3))
    assert [one.criterion for one in summary] == list(CRITERIA)


def test_the_dense_model_beside_itself_writes_and_is_graded_alike(writing, server, file):
    for one in run(writing, server, file):
        assert (one.mean, one.standard_error) == (one.dense_mean, one.dense_standard_error)
        assert one.difference_standard_error == 0


def test_a_model_without_a_dense_one_is_graded_alone(writing, server, tmp_path):
    (first, *_) = run(writing.model_copy(update={"dense": None}), server, tmp_path / "s.json")
    assert (first.dense_mean, len(server.asked)) == (None, 6)


def test_stories_outlive_a_judge_that_cannot_be_reached(writing, server, tmp_path):
    file = tmp_path / "s.json"
    with pytest.raises(ConnectionError, match=r"1:9/v1 cannot be reached .*kept in .*s\.json.*same command"):
        run_judge(writing, Judge("http://127.0.0.1:9/v1", "wise"), file, lambda *_: None)
    before = read_stories(file)
    assert len(before) == 12 and not any(story.grades for story in before)
    run(writing, server, file)
    assert [story.continuation for story in read_stories(file)] == [story.continuation for story in before]


def test_nothing_is_graded_twice(writing, server, file):
    summary = run(writing, server, file)
    kept = StoryFile.model_validate_json(file.read_text())
    torn = [story.model_copy(update={"grades": None}) if i > 8 else story for i, story in enumerate(kept.stories)]
    file.write_text(kept.model_copy(update={"stories": tuple(torn)}).model_dump_json())
    server.asked.clear()
    assert run(writing, server, file) == summary
    assert len(server.asked) == 3


def test_an_answer_that_is_no_grades_is_asked_for_again(writing, server, file):
    server.nonsense = ["I like it.", '{"grammar": 11}']
    run(writing, server, file)
    assert len(server.asked) == 14


def test_a_judge_that_cannot_grade_is_told_with_its_answer(writing, server, file):
    server.nonsense = ["I like it."] * 3
    with pytest.raises(ValueError, match=r"judge 'wise' answered no grades in 3 attempts, but 'I like it\.'"):
        run(writing, server, file)
    assert len(read_stories(file)) == 12


def test_a_judge_that_refuses_is_told_with_its_reason(writing, server, file):
    server.status = 404
    with pytest.raises(ConnectionError, match=r"answered 404: .*no such model.*check --judge 'wise' and --key"):
        run(writing, server, file)


def test_a_file_of_other_stories_is_left_alone(writing, server, file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="holds stories of other settings or another judge"):
        run(writing.model_copy(update={"seed": 1}), server, file)
    assert file.read_bytes() == before
    file.write_text("{")
    with pytest.raises(ValueError, match="is no file of stories, or damaged"):
        run(writing, server, file)


GOOD = grade("four")


@pytest.mark.parametrize("form", ["{}", " {}\n", "```json\n{}\n```", "```\n{}\n```"])
def test_grades_are_one_json_object(form):
    assert parse_grades(form.replace("{}", json.dumps(GOOD))).model_dump() == GOOD


CHANGES = ({"plot": 0}, {"plot": 7.5}, {"plot": "7"}, {"style": 7})


@pytest.mark.parametrize(
    "answer",
    ["", "good", json.dumps(GOOD) + "!", json.dumps([GOOD]), '{"assessment": "Fine."}']
    + [json.dumps({**GOOD, **change}) for change in CHANGES],
)
def test_other_answers_are_none(answer):
    with pytest.raises(ValidationError):
        parse_grades(answer)


def test_beginnings_are_lines(tmp_path):
    file = tmp_path / "b.txt"
    file.write_text("One day\n\n  Then a cat  \n")
    assert read_beginnings(file) == ("One day", "Then a cat")
    assert len(set(read_beginnings(None))) == 10
    for text in ("One day\n", "One day\nOne day\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="give two or more, each once"):
            read_beginnings(file)


def test_samples_differ_and_come_again_with_their_seed(tiny_random, tokenizer):
    model = load_model(tiny_random, dtype="float32")
    first = sample_continuations(model, tokenizer, "The fox", num_samples=3, num_new=16, seed=5)
    assert len(set(first)) == 3
    assert sample_continuations(model, tokenizer, "The fox", num_samples=3, num_new=16, seed=5) == first
    assert sample_continuations(model, tokenizer, "The fox", num_samples=3, num_new=16, seed=6) != first
    with pytest.raises(ValueError, match="the prompt is empty"):
        sample_continuations(model, tokenizer, "", num_new=2)
