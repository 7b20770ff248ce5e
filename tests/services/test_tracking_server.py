"""A search tracked in MLflow on PostgreSQL with passwords: the team's tracker of `make services`."""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from searches import assert_whole, write_search
from shoal.checkpoints.hashes import hash_folder
from shoal_services.tracking.promote import promote
from shoal_services.tracking.registry import BASE_TAG, PLACE_TAG, SEARCH_TAG, find_registered, ping
from tracking_server import USER, Services, find_postgres


def has_services() -> bool:
    try:
        find_postgres("initdb")
        import flask_wtf  # noqa: F401
        import psycopg2  # noqa: F401
    except (ImportError, FileNotFoundError):
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_services(), reason="needs PostgreSQL and MLflow's extra `auth`"),
]


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    # Not pytest's folder: the user postgres may not enter that.
    folder = Path(tempfile.mkdtemp(prefix="shoal-services-"))
    folder.chmod(0o755)
    made = Services(folder, port=0)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)


@pytest.fixture
def held(services: Services) -> dict[str, str]:
    return json.loads((services.folder / "secrets.json").read_text())


@pytest.fixture
def password(held: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The password, also in the environment of MLflow's clients."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", held["password"])
    return held["password"]


def status_of(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_second_start_changes_nothing(services):
    before = services.find_server()
    assert services.start() == json.loads((services.folder / "secrets.json").read_text())["uri"]
    assert services.find_server() == before is not None


def test_secrets_are_in_private_files_alone(services, held):
    words = [held[name] for name in ("password", "postgres_password", "flask_key")]
    for file in services.folder.rglob("*"):
        if file.is_file() and "data" not in file.parts:
            assert file.stat().st_mode & 0o077 == 0 or not any(word in file.read_text() for word in words), file
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        assert not any(word in line for word in words), "a password on a command line"


def test_strangers_are_turned_away(services, held):
    url = f"{held['uri']}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status_of(url) == 401
    assert status_of(url, Host="elsewhere.example") == 403
    with pytest.raises(RuntimeError, match="refuses the user or the password: set MLFLOW_TRACKING_USERNAME"):
        ping(held["uri"])


def test_a_search_with_a_wrong_password_finishes_and_is_sent_later(services, password, tmp_path, tiny_random):
    """Then the tracker has runs, metrics, pointers and hashes, no weights, and its aliases name the models."""
    uri = services.start()
    search = write_search(tmp_path, search={"num_trials": 2})
    search.tracking_uri = uri
    search.environment |= {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": "not-the-password"}
    search.run()
    assert [result.status for result in search.folder.read_results()] == ["finished"] * 2
    said = " ".join(search.errors().split())
    refusal = "it refuses the user or the password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    num_records = len((search.folder.root / "tracking.jsonl").read_text().splitlines())
    assert f"tracking server {uri} does not answer" in said and f"{num_records} records wait for the tracker" in said
    assert said.count(refusal) == 2 and "not-the-password" not in said

    search.environment["MLFLOW_TRACKING_PASSWORD"] = password
    search.run()
    assert "wait for the tracker" not in search.errors()
    assert not (search.folder.root / "tracking.refused.jsonl").exists()
    assert_whole(search, 2)

    client, (parent, children) = search.client(), search.runs()
    for run in (parent, *children.values()):
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert names and not any(name.endswith((".safetensors", ".bin", ".pt")) or name == "model" for name in names)
    assert sum(file.stat().st_size for file in (services.folder / "artifacts").rglob("*") if file.is_file()) < 20_000_000

    picks = json.loads((search.folder.root / "frontier.json").read_text())["picks"]
    assert picks
    (model,) = client.search_registered_models(f"tags.`{SEARCH_TAG}` = 'smoke'")
    assert model.tags[BASE_TAG] == "tiny-random"
    for alias, artefact in picks.items():
        version = client.get_model_version_by_alias(model.name, alias)
        place = search.folder.root / artefact
        assert version.tags[PLACE_TAG] == str(place) == find_registered(f"models:/{model.name}@{alias}", uri)
        assert promote(f"smoke@{alias}", "served", uri).now.tags[PLACE_TAG] == str(place)
        assert promote(str(place), f"served@{alias}-2", uri).is_checked
        assert version.tags["sha256"] == hash_folder(place)


def test_what_was_tracked_outlives_the_servers(services, password):
    before = ping(services.start())
    services.stop()
    assert services.find_server() is None
    assert ping(services.start()) == before
