"""What is served moves by `shoal promote` alone, to weights whose hash is the recorded one, and back again."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
from conftest import make_point
from safetensors.torch import save_file
from shoal.checkpoints.hashes import hash_folder
from shoal.checkpoints.store import save_point
from shoal_services.cli import main
from shoal_services.search.folder import RunFolder, TrialResult
from shoal_services.tracking.promote import promote
from shoal_services.tracking.registry import BASE_TAG, HASH_TAG, PLACE_TAG, SEARCH_TAG, find_registered
from shoal_services.tracking.tracker import Tracker
from torch import tensor

TARGET = "smol@live"


def make_model(place: Path, value: float, num_parameters: int = 100) -> Path:
    """A model's folder: weights of one number, and a point with their hash."""
    place.mkdir(parents=True)
    save_file({"weight": tensor([value])}, place / "model.safetensors")
    save_point(place, make_point(num_parameters, 20.0 - value, kind="folded"))
    return place


def make_search(root: Path, uri: str, *, model: str = "base", first: float = 1.0) -> tuple[Path, str]:
    """A search's folder with two trials, registered as a search does it; and its registered model's name."""
    root.mkdir(parents=True)
    picks = {}
    tracker = Tracker(root, uri=uri, experiment=f"shoal-{root.name}")
    parent = f"{root.name}-{tracker.identity}"
    tracker.start_run(parent, root.name)
    for number, (key, pick) in enumerate({"aaaa": "best", "bbbb": "smallest"}.items()):
        place = make_model(root / "trials" / key / "model", first + number, 100 - number)
        picks[pick] = str(place)
        tracker.start_run(f"{parent}/{key}", key, parent=parent)
        tags = {HASH_TAG: hash_folder(place)}
        about = {SEARCH_TAG: root.name, BASE_TAG: model}
        tracker.register(f"shoal-{parent}", f"{parent}/{key}", source=str(place), tags=tags, aliases=[pick], about=about)
    tracker.end_run(parent, "FINISHED")
    assert tracker.close() == 0 and not tracker.delivery.complaints()
    (root / "frontier.json").write_text(json.dumps({"picks": picks, "frontier": []}))
    return root, f"shoal-{parent}"


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def search(uri: str, tmp_path: Path) -> tuple[Path, str]:
    return make_search(tmp_path / "runs" / "demo", uri)


def place_of(uri: str, target: str = TARGET) -> str:
    return find_registered(f"models:/{target}", uri)


def test_every_way_to_name_weights_leads_to_them(search, uri, monkeypatch):
    root, registered = search
    monkeypatch.chdir(root.parent)
    best, smallest = (str(root / "trials" / key / "model") for key in ("aaaa", "bbbb"))
    for source, place in {
        f"{root}@best": best, "demo@smallest": smallest, f"models:/{registered}@best": best,
        f"models:/{registered}/2": smallest, f"{root}@aaaa": best, "demo/trials/bbbb/model": smallest,
    }.items():  # fmt: skip
        assert promote(source, TARGET, uri).now.tags[PLACE_TAG] == place == place_of(uri), source
    monkeypatch.chdir("/")  # the same name, now of the registry
    assert promote("demo@best", "smol", uri).alias == "best"
    versions = mlflow.MlflowClient(uri).search_model_versions("name = 'smol'")
    assert {version.tags[PLACE_TAG] for version in versions} == {best, smallest} and len(versions) == 2


def test_a_promotion_says_what_was_served_and_goes_back(search, uri, monkeypatch, capsys):
    root, _ = search

    def shoal(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", "promote", *words, "--tracking-uri", uri])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    code, said = shoal(f"{root}@best", TARGET)
    assert code == 0 and "before: nothing" in said and "back:" not in said
    code, said = shoal(f"{root}@smallest", TARGET)
    assert code == 0 and "before: version 1: " in said and "now:    version 2: " in said and "perplexity 18.0000" in said
    (back,) = [line for line in said.splitlines() if line.startswith("back:")]
    assert shoal(*back.split()[3:])[0] == 0
    assert place_of(uri) == str(root / "trials" / "aaaa" / "model")
    code, said = shoal(f"{root}@best", "no/name@live")
    assert code == 1 and "'no/name@live' is no name of a model" in said and "Traceback" not in said


def test_a_second_search_of_the_model_moves_nothing_that_is_served(tmp_path, search, uri):
    root, registered = search
    promote(f"{root}@best", "smol@best", uri)
    other, theirs = make_search(tmp_path / "others" / "demo", uri, first=5.0)
    assert theirs != registered
    assert place_of(uri, "smol@best") == place_of(uri, f"{registered}@best") == str(root / "trials" / "aaaa" / "model")
    assert place_of(uri, f"{theirs}@best") == str(other / "trials" / "aaaa" / "model")
    with pytest.raises(ValueError, match=r"2 searches are named 'demo'; say which: models:/shoal-demo.*models:/shoal-demo"):
        promote("demo@best", TARGET, uri)
    with pytest.raises(
        ValueError, match="belongs to the search 'demo', which moves its aliases itself; promote to another name"
    ):
        promote(f"{other}@best", f"{registered}@best", uri)


def test_weights_that_are_not_those_that_were_measured_stay_out(search, uri):
    root, registered = search
    promote(f"{root}@smallest", TARGET, uri)
    before = place_of(uri)
    save_file({"weight": tensor([7.0])}, root / "trials" / "aaaa" / "model" / "model.safetensors")
    for source in (f"{root}@best", f"models:/{registered}@best", str(root / "trials" / "aaaa" / "model")):
        with pytest.raises(ValueError, match="are not those that were measured: their hash is"):
            promote(source, TARGET, uri)
    shutil.rmtree(root / "trials" / "aaaa" / "model")
    with pytest.raises(ValueError, match="this machine has no such folder; promote where the search's storage is mounted"):
        promote(f"models:/{registered}@best", TARGET, uri)
    assert place_of(uri) == before


def test_what_cannot_be_promoted_is_said(search, uri):
    for source, target, said in [
        ("models:/gone@best", TARGET, "the registry has no 'models:/gone@best'"),
        ("models:/gone/3", TARGET, "the registry has no 'models:/gone/3'"),
        ("models:/gone", TARGET, "names no version"),
        ("gone@best", TARGET, "neither a folder 'gone' nor a model or search of this name"),
        ("./gone@best", TARGET, "there is no folder './gone'"),
        ("ROOT", TARGET, "is a search; say which point: demo@best, demo@smallest"),
        ("ROOT@largest", TARGET, "has no 'largest'; there are best, smallest, and the keys of its trials"),
        ("ROOT/trials@best", TARGET, "is no search's folder"),
        ("ROOT/trials", TARGET, "holds no weights"),
        ("ROOT/trials/aaaa/model", "smol", "names no alias; say which one moves: smol@live"),
        ("ROOT@best", "smol@latest", "'latest' cannot be an alias"),
        ("ROOT@best", "smol@v1", "'v1' cannot be an alias"),
    ]:
        with pytest.raises(ValueError) as caught:
            promote(source.replace("ROOT", str(search[0])), target, uri)
        assert said in str(caught.value), source


def test_the_same_weights_are_one_version_wherever_they_lie(search, uri):
    root, _ = search
    first = promote(f"{root}@best", TARGET, uri)
    assert promote(f"{root}@best", TARGET, uri).now.version == first.now.version
    moved = shutil.copytree(root / "trials" / "aaaa" / "model", root.parent / "kept")
    assert promote(str(moved), TARGET, uri).now.version == first.now.version
    assert place_of(uri) == str(moved)


def test_of_two_at_once_one_wins_and_nothing_is_half_done(search, uri):
    root, _ = search

    def run(source: str) -> str:
        try:
            return promote(source, TARGET, uri).now.tags[PLACE_TAG]
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(run, [f"{root}@best", f"{root}@smallest"]))
    assert place_of(uri) in told
    assert all(str(root) in one for one in told)


def test_promoted_weights_stay_when_the_search_finds_better_ones(search, uri):
    root, _ = search
    run = RunFolder(root)
    for key, parameters in {"aaaa": 100, "bbbb": 99, "cccc": 50}.items():
        place = root / "trials" / key / "model"
        if key == "cccc":
            make_model(place, 10.0, parameters)
        point = make_point(parameters, 20.0 - {"aaaa": 1, "bbbb": 0, "cccc": 10}[key], artefact=place, kind="folded")
        run.write_result(TrialResult(key=key, assignment={}, status="finished", point=point))
    promote(f"{root}@best", TARGET, uri)
    run.drop_dominated_models()
    assert [key for key in ("aaaa", "bbbb", "cccc") if (root / "trials" / key / "model").exists()] == ["aaaa", "cccc"]
