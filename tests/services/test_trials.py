"""Which trials a search runs, and how they end: each recipe once, and a stopped one for good."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
import ray.train
import ray.tune
import yaml
from conftest import make_point
from searches import Search, end_tree, wait_until, write_search
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal_services.search.config import SearchConfig
from shoal_services.search.folder import RunFolder, TrialResult
from shoal_services.search.searcher import PointSearcher
from shoal_services.training.progress_file import read_progress
from shoal_services.training.train import run_workers
from shoal_services.training.tune import tune_trials
from shoal_services.training.workers import Workers

AXES = {
    "num_replaced": {"randint": [1, 3]},
    "kind": {"choice": ["linear", "folded"]},
    "learning_rate": {"uniform": [0.1, 0.2]},
}


NUM_STEPS = 256


@pytest.fixture
def make_search(tmp_path: Path, tiny_random: str) -> Callable[..., Search]:
    return functools.partial(write_search, tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> tuple[SearchConfig, RunFolder]:
    """A search of six recipes: nothing is distilled, so that the learning rate changes none of them."""
    config = SearchConfig.model_validate(
        {"name": "mine", "model": "tiny-random", "space": AXES, "search": {"num_trials": 20}, "run": {"storage": tmp_path}}
    )
    folder = RunFolder(config.folder)
    folder.claim_search(config)
    return config, folder


def finish(folder: RunFolder, key: str, assignment: dict[str, Any], num_parameters: int, perplexity: float) -> None:
    """A trial with its model's folder."""
    folder.model(key).mkdir(parents=True)
    point = make_point(num_parameters, perplexity, artefact=folder.model(key))
    folder.write_result(
        TrialResult(
            key=key, assignment=assignment, status="finished", point=point, held_out_perplexity=perplexity
        )
    )  # fmt: skip


def propose(searcher: PointSearcher) -> list[dict[str, Any]]:
    """All proposals until there are no more, none of them having ended."""
    proposals: list[dict[str, Any]] = []
    while isinstance(proposal := searcher.suggest(str(len(proposals))), dict):
        proposals.append(proposal["assignment"])
    assert proposal == "FINISHED"
    return proposals


def test_every_recipe_of_the_space_is_proposed_once_and_then_none(small):
    config, folder = small
    starts = [{"num_replaced": 2}, {"num_replaced": 3, "kind": "folded"}, {"num_replaced": 3, "kind": "folded"}]
    proposals = propose(PointSearcher(config, folder, starts))
    assert proposals[0]["num_replaced"] == 2
    assert (proposals[1]["num_replaced"], proposals[1]["kind"]) == (3, "folded")
    assert sorted((one["num_replaced"], one["kind"]) for one in proposals) == [
        (count, kind) for count in (1, 2, 3) for kind in ("folded", "linear")
    ]


def test_what_has_ended_is_not_proposed_and_is_known_to_the_sampler(small):
    config, folder = small
    ended = {"num_replaced": 2, "kind": "linear", "learning_rate": 0.15}
    finish(folder, config.trial_key(ended), ended, 100, 10.0)
    cut_off = {"num_replaced": 1, "kind": "linear", "learning_rate": 0.15}
    folder.write_started(config.trial_key(cut_off), cut_off)
    searcher = PointSearcher(config, folder, [cut_off])
    assert [trial.values for trial in searcher.study.trials[:1]] == [[10.0, 100]]
    proposals = propose(searcher)
    assert proposals[0] == cut_off and len(proposals) == 5
    assert config.trial_key(ended) not in {config.trial_key(one) for one in proposals}


@pytest.mark.slow
def test_a_stopped_trial_ends_with_its_workers_and_the_next_one_begins(make_search, tmp_path):
    """One at a time, with a model by a relative path; a finished trial of one parameter makes all others hopeless."""
    load_model("tiny-random", dtype="float32").save_pretrained(tmp_path / "models" / "mine")
    load_tokenizer("tiny-random").save_pretrained(tmp_path / "models" / "mine")
    search = make_search(
        search={"num_trials": 3, "hopeless_ratio": 1.0001}, run={"max_concurrent_trials": 1},
        space={"distillation_tokens": NUM_STEPS * 256},
    )  # fmt: skip
    data = yaml.safe_load(search.config.read_text()) | {"model": "models/mine"}
    search.config.write_text(yaml.safe_dump(data))
    config = SearchConfig.model_validate({**data, "run": {"storage": search.storage}})
    search.folder.claim_search(config)
    finish(search.folder, "least", {"num_replaced": 3, "kind": "linear", "learning_rate": 1e-4}, 1, 1.0)
    search.cwd = tmp_path
    search.run()
    *stopped, _ = sorted(search.folder.read_results(), key=lambda result: result.key == "least")
    assert [result.status for result in stopped] == ["stopped", "stopped"], search.errors()
    for result in stopped:
        assert "trial least is no larger and reached 1.0, more than 1.0001 times lower" in result.reason
        assert read_progress(search.folder.trial(result.key) / "progress.json")[1] < NUM_STEPS
        files = {path.name for path in search.folder.trial(result.key).iterdir()}
        assert files == {"assignment.json", "progress.json", "result.json"}, "neither model nor checkpoints are left"
    children = search.runs()[1]
    assert [children[result.key].info.status for result in stopped] == ["KILLED", "KILLED"]


@pytest.mark.slow
def test_where_every_trial_failed_the_search_has_and_the_same_command_tries_again(make_search):
    search = make_search(
        search={"num_trials": 3, "start_with": []}, space={"num_replaced": 5, "kind": {"choice": ["linear", "folded"]},
        "learning_rate": 0.001},
    )  # fmt: skip
    for attempt in range(2):
        process = search.start()
        process.communicate(timeout=300)
        said = " ".join(search.errors().split())
        assert process.returncode == 1, said
        assert "shoal: no trial finished: of 2, the first, " in said and "num_replaced=5 is more than" in said
        assert ("2 trials failed before and are tried again: " in said) == (attempt == 1)
        assert "the search ends after 2 of 3 trials: no other recipe was found in the space; widen it, or" in said
        parent, children = search.runs()
        assert parent.info.status == "FAILED"
        assert [run.info.status for run in children.values()] == ["FAILED", "FAILED"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_dense_model_is_measured_ends_it_in_one_line(make_search, number):
    search = make_search(texts={"calibration_tokens": 200_000})
    process = search.start()
    wait_until(lambda: list(search.folder.root.glob("prepared/progress-*.json")), process, search)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    try:
        process.wait(timeout=60)
        assert process.returncode == 128 + number, search.errors()
        assert search.errors().splitlines()[-1] == "stopped; the same command goes on from here"
        assert "Stack" not in search.errors() and "Traceback" not in search.errors()
    finally:
        end_tree(process, family)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_tmpdir_fails_no_trial(make_search, tmp_path):
    """Checkpoints are written beside the trial; Ray itself has a folder of its own."""
    search = make_search(search={"num_trials": 1}, run={"checkpoint_every_s": 0})
    with faults.small_disk(tmp_path / "full") as resize:
        search.environment |= {"TMPDIR": str(tmp_path / "full"), "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", "/tmp")}
        process = search.start()
        wait_until(lambda: list(search.folder.root.glob("trials/*/assignment.json")), process, search)
        resize(0)
        process.communicate(timeout=300)
    assert process.returncode == 0, search.errors()
    assert [(r.status, r.faults) for r in search.folder.read_results()] == [("finished", ())], search.errors()


def drive(config: dict[str, Any], job: dict[str, Any]) -> None:
    run_workers(
        "ranks:lose_a_rank", job, Workers(num_workers=2, cpus_per_worker=0.5), RunFolder(Path(job["root"])), "one", {}
    )


class Quiet(ray.tune.Callback):
    """Nobody hears of these trials."""

    def end(self, error: BaseException) -> None: ...

    def raise_if_ending(self) -> None: ...


@pytest.mark.slow
def test_ranks_do_not_wait_for_one_that_failed(ray_cluster, tmp_path):
    started = time.monotonic()
    (tmp_path / "trials").mkdir()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    space = {"assignment": ray.tune.grid_search([{}])}
    tune_trials(drive, {"root": str(tmp_path)}, space, Quiet(), ray.tune.TuneConfig(max_concurrent_trials=1))
    assert RunFolder(tmp_path).read_result("one").reason == "rank 1 has no such file"
    assert time.monotonic() - started < 120
