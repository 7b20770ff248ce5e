"""The folder of a search: claimed by one search, results that survive, weights of the frontier alone."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from conftest import make_point
from shoal_services.search.config import SearchConfig
from shoal_services.search.folder import RunFolder, TrialResult
from shoal_services.search.run import write_frontier
from shoal_services.serving.sources import read_sources
from shoal_services.training.progress_file import ProgressFile, read_progress


def make_config(storage: Path, **changes) -> SearchConfig:
    data = {
        "name": "mine",
        "model": "tiny-random",
        "space": {"num_replaced": {"randint": [1, 3]}},
        "run": {"storage": storage},
    }
    return SearchConfig.model_validate({**data, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    config = make_config(tmp_path)
    folder = RunFolder(config.folder)
    folder.claim_search(config)
    return folder


def finish(folder: RunFolder, key: str, num_parameters: int, perplexity: float) -> TrialResult:
    """A finished trial with weights on disk."""
    artefact = folder.trial(key) / "model"
    artefact.mkdir(parents=True)
    (artefact / "model.safetensors").write_bytes(b"weights")
    point = make_point(num_parameters, perplexity, artefact=artefact)
    result = TrialResult(key=key, assignment={"num_replaced": 2}, status="finished", point=point, held_out_perplexity=12.5)
    assert folder.write_result(result)
    return ended(folder, result)


def ended(folder: RunFolder, result: TrialResult) -> TrialResult:
    """The result with the time at which it was written."""
    held = folder.read_result(result.key)
    assert held is not None and held == result.model_copy(update={"ended_at": held.ended_at})
    return held


def weights(folder: RunFolder) -> set[str]:
    """Keys of the trials whose weights are there."""
    return {path.parent.parent.name for path in folder.root.glob("trials/*/model/model.safetensors")}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "smollm2-135m"}, "model"),
        ({"space": {"num_replaced": {"randint": [1, 4]}}}, "space"),
        ({"texts": {"window": 64}, "dtype": "float32"}, "dtype, texts"),
    ],
)
def test_another_search_of_the_name_is_refused(folder, tmp_path, changes, named):
    before = (folder.root / "config.json").read_text()
    with pytest.raises(
        ValueError, match=f"holds another search named 'mine': {named} differ; choose another name, or delete the folder"
    ):
        folder.claim_search(make_config(tmp_path, **changes))
    assert (folder.root / "config.json").read_text() == before


@pytest.mark.parametrize("changes", [{}, {"search": {"num_trials": 99}}, {"run": {"num_workers": 2}}])
def test_the_same_search_goes_on(folder, tmp_path, changes):
    result = finish(folder, "aaa", 100, 10.0)
    config = make_config(tmp_path, **changes)
    folder.claim_search(config)
    folder.claim_search(config)
    assert folder.read_results() == [result]


def test_a_damaged_configuration_is_told_with_its_remedy(folder, tmp_path):
    (folder.root / "config.json").write_text('{"name": "mi')
    with pytest.raises(ValueError, match=r"config\.json' is damaged .*; delete it to go on"):
        folder.claim_search(make_config(tmp_path))


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        RunFolder(config.folder).claim_search(config)


def test_results_survive_their_file(folder):
    finished = finish(folder, "bbb", 100, 10.0)
    others = [
        TrialResult(key=key, assignment={"kind": "dropped", "learning_rate": 1e-3}, status=status, reason="perplexity 1e9")
        for key, status in (("aaa", "collapsed"), ("ccc", "stopped"), ("ddd", "failed"))
    ]
    for result in others:
        folder.write_result(result)
    others = [ended(folder, result) for result in others]
    assert folder.read_results() == [others[0], finished, *others[1:]]
    assert folder.read_result("bbb") == finished
    assert folder.find_points() == [finished.point]
    assert folder.read_result("eee") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "aaa"}', '{"key": "aaa", "assignment": {}, "status": "done"}'])
def test_a_damaged_result_is_told_with_its_remedy(folder, content):
    finish(folder, "aaa", 100, 10.0)
    (folder.trial("aaa") / "result.json").write_text(content)
    with pytest.raises(ValueError, match=r"aaa/result\.json' is damaged .*; delete the trial's folder to run it again"):
        folder.read_results()


def test_a_trial_has_started_until_it_has_a_result(folder):
    for key in ("aaa", "bbb"):
        folder.write_started(key, {"num_replaced": 2, "kind": "linear"})
    assert folder.read_started() == {key: {"num_replaced": 2, "kind": "linear"} for key in ("aaa", "bbb")}
    finish(folder, "aaa", 100, 10.0)
    assert list(folder.read_started()) == ["bbb"]
    folder.write_result(TrialResult(key="bbb", assignment={}, status="failed", reason="no memory"))
    assert folder.read_started() == {}


def test_weights_off_the_frontier_are_deleted_and_their_numbers_stay(folder):
    results = [
        finish(folder, key, n, p) for key, n, p in (("a", 100, 20.0), ("b", 120, 25.0), ("c", 140, 10.0), ("d", 140, 11.0))
    ]
    folder.write_result(TrialResult(key="e", assignment={}, status="collapsed", reason="perplexity 1e9"))
    folder.drop_dominated_models()
    assert weights(folder) == {"a", "c"}
    assert folder.read_results()[:4] == results
    folder.drop_dominated_models()  # what is gone is gone
    assert weights(folder) == {"a", "c"}


def test_of_equal_points_the_first_in_time_stays(folder):
    for key in "cab":
        finish(folder, key, 100, 20.0)
    folder.drop_dominated_models()
    assert weights(folder) == {"c"}


def test_weights_that_a_registry_names_are_kept(folder):
    finish(folder, "a", 100, 20.0)
    folder.mark_registered("a", "shoal-tiny")
    finish(folder, "b", 90, 10.0)
    folder.drop_dominated_models()
    assert weights(folder) == {"a", "b"}


def test_a_copy_has_models_of_its_own_and_deletes_those_alone(folder, tmp_path):
    for key, perplexity in (("a", 20.0), ("b", 10.0)):
        finish(folder, key, 100, perplexity)
    (tmp_path / "elsewhere").mkdir()
    copy = RunFolder(tmp_path / "elsewhere" / "copy")
    shutil.copytree(folder.root, copy.root)
    config = make_config(tmp_path / "elsewhere", name="copy")
    assert write_frontier(config, copy) == [copy.read_result("b").point]
    assert (weights(copy), weights(folder)) == ({"b"}, {"a", "b"})
    assert copy.read_result("b").point.artefact == str(copy.model("b"))
    for file in copy.root.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
    shutil.rmtree(folder.root)
    (served,) = [v for name, v in read_sources([str(copy.root)]).variants.items() if name != "dense"]
    assert served.model == str(copy.model("b"))


def test_weights_behind_a_link_that_leads_out_are_left_alone(folder, tmp_path):
    for key, perplexity in (("a", 20.0), ("b", 10.0)):
        finish(folder, key, 100, perplexity)
    (folder.root / "trials").rename(tmp_path / "others")
    (folder.root / "trials").symlink_to(tmp_path / "others")
    folder.drop_dominated_models()
    assert weights(folder) == {"a", "b"}


def test_the_first_result_stays(folder):
    stopped = TrialResult(key="a", assignment={}, status="stopped", reason="hopeless")
    assert folder.write_result(stopped)
    first = ended(folder, stopped)
    assert not folder.write_result(stopped.model_copy(update={"status": "finished"}))
    assert folder.read_result("a") == first
    assert [path.name for path in folder.trial("a").iterdir()] == ["result.json"]


def test_failed_trials_are_begun_again_and_others_are_not(folder):
    for key, status in (("a", "failed"), ("b", "collapsed"), ("c", "stopped")):
        folder.write_started(key, {"num_replaced": 2})
        folder.note_fault(key, "out of memory: of the machine before")
        folder.write_result(TrialResult(key=key, assignment={"num_replaced": 2}, status=status, reason="so"))
    assert folder.reopen_failed() == ["a"]
    assert list(folder.read_started()) == ["a"] and folder.read_faults("a") == ()
    assert [result.key for result in folder.read_results()] == ["b", "c"]
    assert folder.reopen_failed() == []


def test_progress_is_read_where_it_was_written(tmp_path):
    file = tmp_path / "below" / "progress.json"
    assert read_progress(file) is None
    listen = ProgressFile(file)
    assert read_progress(file) is None
    listen("fit", 1, 6)
    assert read_progress(file) == ("fit", 1, 6)


def test_progress_is_written_at_new_stages_at_ends_and_now_and_then(tmp_path):
    listen = ProgressFile(tmp_path / "progress.json")
    seen = []
    for stage, done in [("fit", 0), ("fit", 1), ("fit", 6), ("distil", 0), ("distil", 1)]:
        listen(stage, done, 6)
        seen.append(read_progress(listen.path))
    assert seen == [("fit", 0, 6), ("fit", 0, 6), ("fit", 6, 6), ("distil", 0, 6), ("distil", 0, 6)]
    time.sleep(0.55)
    listen("distil", 2, 6)
    assert read_progress(listen.path) == ("distil", 2, 6)


@pytest.mark.parametrize("content", ["", "{", '{"stage": "fi'])
def test_half_a_progress_file_is_none(tmp_path, content):
    (tmp_path / "progress.json").write_text(content)
    assert read_progress(tmp_path / "progress.json") is None
