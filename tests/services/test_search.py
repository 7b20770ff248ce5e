"""A search, whole: from the command to the frontier and MLflow; killed, interrupted, and without its tracker."""

from __future__ import annotations

import functools
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import shoal
import torch
import yaml
from conftest import write_task
from pages import Page
from searches import SMOKE, Search, assert_whole, closed_port, end_tree, wait_until, write_search
from shoal.checkpoints.hashes import hash_folder
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.frontier import find_frontier, name_picks
from shoal.models.projections import find_zeros
from shoal.point import Point
from shoal_services.tracking.registry import BASE_TAG, SEARCH_TAG

SHOAL = Path(sys.executable).with_name("shoal")
LIMIT_S = 600


@pytest.fixture
def make_search(tmp_path: Path, tiny_random: str) -> Callable[..., Search]:
    return functools.partial(write_search, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_random: str) -> tuple[Search, dict[str, Any]]:
    """The smoke search as it is in tune_configs, run once for the tests below, and what `--json` printed."""
    storage = tmp_path_factory.mktemp("storage")
    search = Search(SMOKE, storage)
    return search, json.loads(search.run("--json"))


def test_the_frontier_is_that_of_the_results(finished):
    search, printed = finished
    points = search.folder.find_points()
    assert len(points) == 3
    frontier = [Point.model_validate(point) for point in printed["frontier"]]
    assert frontier == find_frontier(points)
    assert printed["picks"] == {name: point.artefact for name, point in name_picks(frontier).items()}
    inside = json.dumps(printed).replace(f"{search.folder.root}/", "")
    assert json.loads(inside) == json.loads((search.folder.root / "frontier.json").read_text())


def test_weights_are_kept_on_the_frontier_alone(finished):
    search, printed = finished
    kept = {str(path.parent) for path in search.folder.root.glob("trials/*/model/model.safetensors")}
    assert kept == {point["artefact"] for point in printed["frontier"]}
    for point in printed["frontier"]:
        assert hash_folder(Path(point["artefact"])) == point["artefact_sha256"]


def test_a_point_names_its_inputs_and_its_dense_model(finished):
    search, _ = finished
    for point in search.folder.find_points():
        assert point.evaluations[0].dense_perplexity > 0
        assert point.evaluations[0].standard_error > 0
        assert point.evaluations[0].text.num_tokens == 2048
        assert point.recipe.weights_sha256 and point.recipe.calibration[0].sha256
        assert len(point.recipe.blocks) == point.recipe.num_replaced
        assert set(point.seconds) >= {"load", "fit", "distil", "evaluate", "store"}


def test_mlflow_has_one_parent_and_one_run_a_trial(finished):
    search, _ = finished
    assert_whole(search, 3)
    parent, children = search.runs()
    assert parent.data.params["model"] == "tiny-random"
    assert parent.data.metrics["num_trials"] == 3
    for result in search.folder.read_results():
        run = children[result.key]
        assert run.data.params == {name: str(value) for name, value in result.assignment.items()}
        assert run.data.tags["artefact"] == result.point.artefact


def test_mlflow_has_the_course_of_every_trial(finished):
    """Several steps of the loss and of the held-out perplexity, and what the worker took of the machine."""
    search, _ = finished
    client = search.client()
    for result in search.folder.read_results():
        _, children = search.runs()
        run = children[result.key]
        course = client.get_metric_history(run.info.run_id, "held_out_perplexity")
        assert [metric.step for metric in course] == sorted({metric.step for metric in course})
        assert course[0].step == 0 and len(course) >= 3
        assert course[-1].value == pytest.approx(result.held_out_perplexity)
        assert len(client.get_metric_history(run.info.run_id, "loss")) >= 2
        assert run.data.metrics["system/process_memory_megabytes"] > 50


def test_mlflow_has_the_pages_and_the_recipes(finished):
    search, _ = finished
    client = search.client()
    parent, children = search.runs()
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files >= {"config.json", "frontier.json", "frontier.html", "linearity.html", "frontier-table.json"}
    for key, run in children.items():
        assert "result.json" in {file.path for file in client.list_artifacts(run.info.run_id)}, key


def test_the_registry_has_the_frontier_under_its_aliases(finished):
    search, printed = finished
    client = search.client()
    (model,) = client.search_registered_models()
    assert model.tags[SEARCH_TAG] == "smoke" and model.tags[BASE_TAG] == "tiny-random"
    assert len(client.search_model_versions(f"name = '{model.name}'")) == 1 + len(printed["frontier"])
    for alias, artefact in printed["picks"].items():
        assert client.get_model_version_by_alias(model.name, alias).source == artefact
    dense = client.get_model_version_by_alias(model.name, "dense")
    assert dense.source not in printed["picks"].values()
    assert Path(dense.source, "model.safetensors").is_file()


def test_the_same_command_again_repeats_nothing(finished):
    search, printed = finished
    before = {path: path.stat().st_mtime_ns for path in search.folder.root.glob("trials/*/result.json")}
    runs = {run.info.run_id for run in search.runs()[1].values()}
    started = time.monotonic()
    assert json.loads(search.run("--json")) == printed
    assert time.monotonic() - started < 60
    assert {path: path.stat().st_mtime_ns for path in search.folder.root.glob("trials/*/result.json")} == before
    assert {run.info.run_id for run in search.runs()[1].values()} == runs
    assert len(search.client().search_model_versions()) == 1 + len(printed["frontier"])
    assert_whole(search, 3)


@pytest.mark.slow
def test_another_search_of_the_name_is_refused(finished, tmp_path):
    search, _ = finished
    data = yaml.safe_load(search.config.read_text())
    data["space"]["num_replaced"] = {"randint": [1, 4]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(data))
    other = Search(tmp_path / "other.yaml", search.storage, search.environment)
    process = other.start()
    process.wait(timeout=60)
    assert process.returncode == 1
    assert "holds another search named 'smoke': space differ; choose another name" in " ".join(other.errors().split())


@pytest.mark.slow
def test_a_search_that_was_killed_makes_every_trial_once(make_search):
    """kill -9 at the worst moment: the first result is on disk, and nobody has told MLflow."""
    search = make_search()
    process = search.start()
    results = search.folder.root / "trials"
    wait_until(lambda: list(results.glob("*/result.json")), process, search)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end_tree(process, family)
    done = {path: path.stat().st_mtime_ns for path in results.glob("*/result.json")}
    assert 1 <= len(done) < 3
    started = set(search.folder.read_started())

    search.run()
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was finished is not made again"
    assert started <= {result.key for result in search.folder.read_results()}, "what was cut off is taken up again"
    assert_whole(search, 3)


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(make_search):
    search = make_search()
    process = search.start()
    wait_until(lambda: list((search.folder.root / "trials").glob("*/result.json")), process, search)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    try:
        assert process.returncode == 130, search.errors()
        assert "stopped; the same command goes on from here" in search.errors()
        assert "Traceback" not in search.errors()
        parent, children = search.runs()
        assert parent.info.status == "KILLED"
        assert "RUNNING" not in {run.info.status for run in children.values()}
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, "Ray's processes end with the search"
    finally:
        end_tree(process, family)
    search.run()
    assert_whole(search, 3)


@pytest.mark.slow
def test_a_search_without_its_tracker_finishes_and_keeps_the_records(make_search):
    search = make_search(search={"num_trials": 1})
    search.run("--tracking-uri", f"http://127.0.0.1:{closed_port()}")
    assert [result.status for result in search.folder.read_results()] == ["finished"]
    said = " ".join(search.errors().split())
    num_records = len((search.folder.root / "tracking.jsonl").read_text().splitlines())
    assert f"{num_records} records wait for the tracker" in said
    assert "give the same command again when it is up" in said
    search.run()  # tracked in SQLite now: nothing was lost
    assert_whole(search, 1)


@pytest.mark.slow
def test_models_that_collapse_are_told_and_are_not_on_the_frontier(make_search, tmp_path):
    """One is worse than its ceiling allows, one ran away while it learned, one works."""
    model = load_model("tiny-random", dtype="float32")
    with torch.no_grad():
        model.model.norm.weight.mul_(10)  # sure of itself, so that blocks matter: perplexity × 1.18 without four of them
    model.save_pretrained(tmp_path / "sharp")
    load_tokenizer("tiny-random").save_pretrained(tmp_path / "sharp")
    starts = {
        "over": {"num_replaced": 4, "kind": "dropped", "distillation_tokens": 0, "learning_rate": 1e-3},
        "away": {"num_replaced": 1, "kind": "linear", "distillation_tokens": 2048, "learning_rate": 1e30},
        "works": {"num_replaced": 1, "kind": "linear", "distillation_tokens": 0, "learning_rate": 1e-3},
    }
    search = make_search(
        space={
            "kind": {"choice": ["linear", "dropped"]}, "distillation_tokens": {"choice": [0, 2048]},
            "num_replaced": {"choice": [1, 4]}, "learning_rate": {"choice": [1e-3, 1e30]},
        },
        search={"num_trials": 3, "max_perplexity_ratio": 1.1, "start_with": list(starts.values())},
    )  # fmt: skip
    data = yaml.safe_load(search.config.read_text()) | {"model": str(tmp_path / "sharp")}
    search.config.write_text(yaml.safe_dump(data))
    search.run()
    results = {name: r for r in search.folder.read_results() for name, start in starts.items() if r.assignment == start}
    assert {name: result.status for name, result in results.items()} == {
        "over": "collapsed", "away": "collapsed", "works": "finished",
    }  # fmt: skip
    assert "over the ceiling" in results["over"].reason and "1.1 × dense" in results["over"].reason
    frontier = json.loads((search.folder.root / "frontier.json").read_text())["frontier"]
    assert [point["artefact"] for point in frontier] == [f"trials/{results['works'].key}/model"]
    parent, children = search.runs()
    assert parent.info.status == "FINISHED"
    assert children[results["works"].key].info.status == "FINISHED"
    said = " ".join(search.errors().split())
    for name in ("over", "away"):
        result, run = results[name], children[results[name].key]
        assert run.info.status == "FAILED"
        assert run.data.tags["reason"] == result.reason
        assert f"trial {result.key} collapsed: " in said


@pytest.mark.slow
def test_a_trial_that_fails_before_its_first_number_is_told_and_the_others_go_on(make_search):
    """The space cannot know which blocks of a model have to stay."""
    search = make_search(search={"num_trials": 2, "start_with": [{"num_replaced": 5}, {"num_replaced": 1}]},
                         space={"num_replaced": {"choice": [1, 5]}})  # fmt: skip
    search.run()
    failed, finished = sorted(search.folder.read_results(), key=lambda result: result.status)
    assert (failed.status, finished.status) == ("failed", "finished")
    assert "num_replaced=5 is more than" in failed.reason
    assert "num_replaced=5 is more than" in " ".join(search.errors().split())


@pytest.mark.slow
def test_equal_recipes_are_made_once(make_search):
    """The sampler proposes different learning rates, and nothing is distilled: all are the same model."""
    search = make_search(
        space={"num_replaced": {"choice": [1, 2]}, "kind": "linear", "distillation_tokens": 0},
        search={"num_trials": 4, "start_with": []},
    )
    search.run()
    assert_whole(search, 2)
    assert "the search ends after 2 of 4 trials: no other recipe was found" in " ".join(search.errors().split())


@pytest.mark.slow
def test_a_grid_tries_every_combination_and_draws_its_curves(make_search, tmp_path):
    search = make_search(
        space={"num_replaced": {"choice": [1, 2]}, "learning_rate": 0.001, "distillation_tokens": 0, "kind": "folded"},
        search={"algorithm": "grid", "start_with": []},
        tasks={"names": [str(write_task(tmp_path, "colours"))], "limit": 10},
    )
    search.run()
    assert_whole(search, 2)
    assert sorted(result.assignment["num_replaced"] for result in search.folder.read_results()) == [1, 2]
    runs = search.runs()[1]
    for result in search.folder.read_results():
        (score,) = result.point.tasks
        assert (score.task, score.metric, score.num_examples) == ("colours", "acc", 10)
        assert score.dense_score is not None
        assert runs[result.key].data.metrics["tasks/colours/acc"] == pytest.approx(score.score)
    header, dense, *rows = Page(search.folder.root / "curves.html").rows[:4]
    assert (header, dense[0], [row[0] for row in rows]) == (["changed blocks", "folding"], "0", ["1", "2"])
    assert "colours" in Page(search.folder.root / "curves.html").texts


@pytest.mark.slow
def test_two_workers_make_one_model(make_search):
    search = make_search(search={"num_trials": 1}, run={"num_workers": 2, "cpus_per_worker": 1})
    search.run()
    assert_whole(search, 1)


@pytest.mark.slow
def test_workers_that_share_the_weights_make_the_models_of_one(finished, make_search):
    """The same recipes with their blocks on disk, and distilled by two workers."""
    plain, _ = finished
    search = make_search(search={"num_trials": 2}, run={"streamed": True, "num_workers": 2, "keep_models": "all"})
    search.run()
    assert_whole(search, 2)
    expected = {result.key: result.point for result in plain.folder.read_results()}
    for result in search.folder.read_results():
        point = expected[result.key]
        assert result.point.perplexity == pytest.approx(point.perplexity, rel=1e-4)
        assert result.point.evaluations[0].kl == pytest.approx(point.evaluations[0].kl, rel=1e-2)
        assert result.point.size == point.size
        assert load_model(result.point.artefact).num_parameters() == point.num_parameters


@pytest.mark.slow
def test_zeros_and_factors_are_axes_beside_depth(make_search):
    """Two workers agree on the zeros, and distillation keeps them."""
    search = make_search(
        space={
            "num_replaced": {"choice": [0, 2]}, "kind": "folded",
            "sparsity": "2:4", "weight_share": {"choice": [None, 0.8]},
        },
        search={"num_trials": 2, "start_with": [
            {"num_replaced": 0, "weight_share": 0.8, "learning_rate": 0.001},
            {"num_replaced": 2, "weight_share": None, "learning_rate": 0.001},
        ]},
        run={"num_workers": 2, "cpus_per_worker": 1, "keep_models": "all"},
    )  # fmt: skip
    search.run()
    assert_whole(search, 2)
    for result in search.folder.read_results():
        zeros = find_zeros(shoal.load(result.point.artefact, dtype="float32"))
        assert all((zero.view(len(zero), -1, 4).sum(-1) == 2).all() for zero in zeros.values())
        assert result.point.size.num_bitmask_bytes < result.point.size.num_bytes
    assert "SVD 80 %, 2:4 sparse" in (search.folder.root / "frontier.json").with_suffix(".html").read_text()
