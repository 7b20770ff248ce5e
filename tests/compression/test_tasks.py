"""Scores are what the examples add up to; a model beside itself differs by nothing; what cannot be had is told."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from conftest import write_task
from shoal.checkpoints.load import load_model
from shoal.measure.task_scores import TaskResult, compare_results, load_results, save_results
from shoal.measure.tasks import evaluate_on_tasks, load_tasks, measure_tasks


@pytest.fixture
def model(tiny_random):
    return load_model(tiny_random, dtype="float32")


@torch.no_grad()
def choose(model, tokenizer, question: str, choices: list[str]) -> int:
    """The likeliest continuation, summed token by token."""
    sums = []
    for choice in choices:
        encoded = tokenizer(question + choice, return_tensors="pt")["input_ids"]
        log_probs = model(input_ids=encoded).logits.log_softmax(-1)[0]
        start = len(tokenizer(question)["input_ids"])
        sums.append(sum(float(log_probs[i - 1, encoded[0, i]]) for i in range(start, encoded.shape[1])))
    return sums.index(max(sums))


def test_accuracy_is_that_of_the_likeliest_choices(model, tokenizer, tmp_path):
    file = write_task(tmp_path, "colours")
    (result,) = measure_tasks(model, tokenizer, load_tasks([str(file)]))
    rows = [json.loads(line) for line in (tmp_path / "colours.jsonl").read_text().splitlines()]
    expected = [float(choose(model, tokenizer, row["question"], row["choices"]) == row["label"]) for row in rows]
    assert list(result.values) == expected
    assert (result.task, result.metric, result.num_examples) == ("colours", "acc", 24)
    assert result.score == pytest.approx(statistics.fmean(expected))
    assert result.standard_error == pytest.approx(statistics.stdev(expected) / math.sqrt(24))


def test_a_folder_is_all_its_tasks_and_a_limit_takes_the_first_examples(model, tokenizer, tmp_path):
    for name in ("one", "two"):
        write_task(tmp_path, name)
    (tmp_path / "shared.yaml").write_text("output_type: multiple_choice\n")
    tasks = load_tasks([str(tmp_path)])
    whole, some = measure_tasks(model, tokenizer, tasks), measure_tasks(model, tokenizer, tasks, limit=5)
    assert [result.task for result in whole] == ["one", "two"]
    assert [result.values for result in some] == [result.values[:5] for result in whole]


def test_the_dense_model_beside_itself_differs_by_nothing(tiny_random, tmp_path):
    file = write_task(tmp_path, "colours")
    (score,) = evaluate_on_tasks(tiny_random, tiny_random, [str(file)])
    assert (score.difference, score.difference_standard_error) == (0, 0)
    (alone,) = evaluate_on_tasks(tiny_random, None, [str(file)])
    assert (alone.score, alone.dense_score, alone.difference) == (score.score, None, None)


def make_result(values: tuple[float, ...], *, task: str = "t") -> TaskResult:
    mean = statistics.fmean(values)
    return TaskResult(task=task, metric="acc", num_examples=4, score=mean, standard_error=0.1, values=values)


def test_the_difference_is_paired():
    (score,) = compare_results([make_result((1, 0, 1, 0))], [make_result((1, 1, 1, 0))])
    assert score.difference == pytest.approx(-0.25)
    assert score.difference_standard_error == pytest.approx(statistics.stdev([0, -1, 0, 0]) / 2)


def test_what_is_no_mean_over_the_same_examples_is_not_paired():
    f1 = make_result((1, 0, 1, 0)).model_copy(update={"values": ()})
    (score,) = compare_results([f1], [f1])
    assert (score.difference, score.difference_standard_error) == (0, None)
    (alone,) = compare_results([make_result((1, 0), task="a")], [make_result((1, 0), task="b")])
    assert alone.dense_score is None


def test_results_survive_their_file(tmp_path):
    results = [make_result((1, 0, 1, 0)), make_result((0, 0, 1, 0), task="other")]
    save_results(tmp_path / "r.json", results)
    assert load_results(tmp_path / "r.json") == results


def test_what_cannot_be_loaded_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"task file '.*gone\.yaml' does not exist; check the path"):
        load_tasks([str(tmp_path / "gone.yaml")])
    with pytest.raises(ValueError, match=r"holds no task: no \.yaml file in it"):
        load_tasks([str(tmp_path)])
    (tmp_path / "nameless.yaml").write_text("output_type: multiple_choice\n")
    with pytest.raises(ValueError, match="has no key 'task'"):
        load_tasks([str(tmp_path / "nameless.yaml")])
    (tmp_path / "torn.yaml").write_text("task: [\n")
    with pytest.raises(ValueError, match=r"torn\.yaml' cannot be read: "):
        load_tasks([str(tmp_path / "torn.yaml")])
    with pytest.raises(ValueError, match=r"cannot load task 'lost': .*nowhere\.jsonl"):
        load_tasks([str(write_task(tmp_path, "lost", data="nowhere.jsonl"))])


@pytest.mark.slow  # lm-eval reads its thousands of task files
def test_an_unknown_task_names_the_nearest_and_a_known_one_wants_the_hub():
    with pytest.raises(ValueError, match="unknown task 'arc_eazy'; did you mean 'arc_easy' or "):
        load_tasks(["arc_eazy"])
    with pytest.raises(ValueError, match=r"cannot load task 'arc_easy': .*; without the Hub, give a task file"):
        load_tasks(["arc_easy"])
