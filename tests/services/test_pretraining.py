"""A sweep over regularisers and seeds: its configuration, its statistics, and the whole of it, killed and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from conftest import write_prose
from shoal.checkpoints.load import load_model
from shoal.paper.pretrain_recipe import Regularizer
from shoal_services.pretraining.config import PretrainConfig, load_pretrain_config
from shoal_services.pretraining.page import write_pretraining_page
from shoal_services.pretraining.results import Estimate, PretrainFolder, PretrainResult, compare, group_runs, summarise
from shoal_services.pretraining.sweep import sweep

FILES = sorted((Path(__file__).parents[2] / "tune_configs").glob("pretrain-*.yaml"))
COMMAND = [sys.executable, "-c", "from shoal_services.cli import main; main()", "pretrain"]
SCORES = {f"mean_{name}": 0.5 for name in ("score", "score_without_residual", "held_out", "held_out_without_residual")}


def make_data(prose: Path | str = "wikipedia-sample", **changes: Any) -> dict[str, Any]:
    """The smallest sweep as YAML would give it, with changes."""
    data: dict[str, Any] = {
        "name": "mine",
        "architecture": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 32,
        },
        "texts": {
            "train": str(prose), "validation": str(prose), "vocab_size": 300, "validation_tokens": 1024,
            "linearity_tokens": 1024,
        },
        "training": {
            "num_tokens": 2048, "window": 32, "windows_per_step": 8, "windows_per_pass": 8, "num_checks": 2,
            "learning_rate": 0.01,
        },
        "dtype": "float32",
        "sweep": {"cosine": [0.5], "seeds": [0, 1]},
    }  # fmt: skip
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and key in data else value
    return data


def load(tmp_path: Path, data: dict[str, Any]) -> PretrainConfig:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_pretrain_config(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_pretraining_file_is_a_sweep_of_its_name(file):
    config = load_pretrain_config(file)
    assert config.name == file.stem
    assert len(config.sweep.seeds) >= 3
    assert config.sweep.regularizers[0] == Regularizer()
    assert len({config.trial_key(one) for one in config.assignments()}) == len(config.assignments())
    assert PretrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_papers_models_have_the_papers_size_and_regularisers():
    for file, millions in (("150m", 150), ("650m", 650)):
        config = load_pretrain_config(next(f for f in FILES if file in f.name))
        a = config.architecture
        kv = a.hidden_size * a.num_key_value_heads // a.num_attention_heads
        block = 2 * a.hidden_size**2 + 2 * a.hidden_size * kv + 3 * a.hidden_size * a.intermediate_size
        size = a.num_hidden_layers * block + config.texts.vocab_size * a.hidden_size
        assert size / 1e6 == pytest.approx(millions, rel=0.02)
        assert {one.label for one in config.sweep.regularizers} == {"none", "cosine 0.5", "mse 0.5", "mse 2"}


def test_weight_0_is_trained_once_whatever_is_listed(tmp_path):
    config = load(tmp_path, make_data(sweep={"cosine": [2, 0, 0.5], "mse": [0], "seeds": [3]}))
    assert [one.label for one in config.sweep.regularizers] == ["none", "cosine 0.5", "cosine 2"]
    assert [one["weight"] for one in config.assignments()] == [0, 0.5, 2]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sweep": {"cosine": [0.5, -1.0]}}, r"sweep.cosine: λ is -1; a regulariser's weight must be 0 \(none\) or more"),
        ({"sweep": {"cosin": [0.5]}}, r"unknown key 'sweep.cosin' in mine.yaml; did you mean 'cosine'\?"),
        ({"training": {"num_token": 1}}, r"unknown key 'training.num_token' in mine.yaml; did you mean 'num_tokens'\?"),
        ({"architecture": {"hidden_sise": 1}}, r"did you mean 'hidden_size'\?"),
        ({"run": {"keep_models": "all"}}, r"unknown key 'run.keep_models'"),
        ({"sweep": {"seeds": [1, 1]}}, r"seeds lists \[1\] more than once"),
        ({"sweep": {"seeds": [-1]}}, r"seed"),
        ({"training": {"window": 64}}, r"training.window=64 is longer than architecture.max_position_embeddings=32"),
        ({"architecture": {"num_attention_heads": 3}}, r"hidden_size=16 is no multiple of num_attention_heads=3"),
        ({"texts": {"vocab_size": 100}}, r"texts.vocab_size: .*258"),
    ],
)
def test_what_is_wrong_is_told_by_name(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path, make_data(**changes))


def make_result(weight: float, seed: int, perplexity: float, *, kind: str = "cosine") -> PretrainResult:
    check = {"step": 4, "num_tokens": 2048, "validation_perplexity": perplexity, "validation_standard_error": 1.0, **SCORES}
    check |= {"mean_removed": 0.2, "mean_mapped": 0.1}
    text = {"name": "prose", "sha256": "0123456789", "num_tokens": 1024}
    one = Regularizer.of(kind, weight)  # type: ignore[arg-type]
    return PretrainResult.model_validate(
        {
            "key": f"{one.label}-{seed}", "assignment": {"kind": one.kind, "weight": weight, "seed": seed},
            "status": "finished", "checks": [{**check, "step": 0, "validation_perplexity": 300.0}, check],
            "blocks": [{"block": b, "held_out_without_residual": 0.5} for b in range(2)], "validation": text,
            "linearity": text, "num_parameters": 1000, "device": "cpu",
        }
    )  # fmt: skip


def test_means_errors_and_paired_differences():
    plain = [make_result(0, seed, perplexity) for seed, perplexity in ((0, 10), (1, 20), (2, 30))]
    better = [make_result(0.5, seed, perplexity) for seed, perplexity in ((2, 29), (1, 18), (0, 9))]
    groups = group_runs([*better, make_result(2, 7, 50), *plain])
    assert [one.label for one in groups] == ["none", "cosine 0.5", "cosine 2"]
    assert Estimate.of([10, 20, 30]) == Estimate(20, pytest.approx(10 / 3**0.5), 3)
    difference = compare(groups[Regularizer.of("cosine", 0.5)], plain, "validation_perplexity")
    assert difference == Estimate(pytest.approx(-4 / 3), pytest.approx(1 / 3), 3), "far surer than the spread of seeds"
    assert difference.text(2, sign=True) == "-1.33 ± 0.33"
    assert compare(groups[Regularizer.of("cosine", 2)], plain, "validation_perplexity") is None, "no seed in common"
    assert Estimate.of([5.0]).text(1) == "5.0", "one seed has no error"
    rows = summarise([*plain, *better])
    assert [row["validation_perplexity"]["mean"] for row in rows] == [20, pytest.approx(56 / 3)]


def test_the_page_needs_nothing_but_itself(tmp_path):
    results = [make_result(weight, seed, 20 + seed) for weight in (0, 0.5) for seed in (0, 1)]
    write_pretraining_page(tmp_path / "page.html", "mine & yours", [*results, make_result(1, 0, 30, kind="mse")])
    page = (tmp_path / "page.html").read_text()
    assert "mine &amp; yours" in page and "cosine, λ = 0.5" in page and "mse, λ = 1" in page
    assert "20.50 ± 0.50" in page and "+0.00 ± 0.00" in page
    assert page.count("Plotly.newPlot(") == 5
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    write_pretraining_page(tmp_path / "empty.html", "mine", [])
    assert "No run has finished yet" in (tmp_path / "empty.html").read_text()


class Listening:
    """Hears of a sweep."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.results: list[PretrainResult] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.stages.append(stage)

    def show_run(self, result: PretrainResult) -> None:
        self.results.append(result)

    def remark(self, text: str) -> None:
        self.stages.append(text)


@pytest.mark.slow
def test_a_sweep_on_the_cluster_and_the_same_once_more(ray_cluster, tmp_path):
    prose = write_prose(tmp_path / "prose.txt")
    run = {"storage": str(tmp_path), "keep_checkpoints": True}
    config = load(tmp_path, make_data(prose, sweep={"cosine": [0.5], "seeds": [0]}, run=run))
    folder, heard = PretrainFolder(config.folder), Listening()
    outcome = sweep(config, folder, heard)
    assert [result.status for result in outcome.results] == ["finished"] * 2 == [r.status for r in heard.results]
    assert outcome.delivery.complaints() == []
    told = json.loads((folder.root / "pretraining.json").read_text())
    assert [(row["kind"], row["weight"]) for row in told["summary"]] == [("none", 0), ("cosine", 0.5)]
    for result in outcome.results:
        assert [check["step"] for check in result.checks] == [0, 4, 8]
        assert load_model(str(folder.trial(result.key) / "checkpoint-000004")).config.num_hidden_layers == 2
        assert load_model(str(result.model)).config.model_type == "mistral"
        assert not (folder.trial(result.key) / "train").exists()
    client = mlflow.MlflowClient(outcome.tracking_uri)
    experiment = client.get_experiment_by_name("shoal-mine")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"mine", "none 0 seed 0", "cosine 0.5 seed 0"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(runs["cosine 0.5 seed 0"].info.run_id, "mean_held_out")
    assert [metric.step for metric in history] == [0, 4, 8]
    again = sweep(config, folder, Listening())
    assert again.results == outcome.results, "nothing is trained twice"


def test_another_sweep_of_the_same_name_is_refused(tmp_path):
    config = load(tmp_path, make_data(run={"storage": str(tmp_path)}))
    folder = PretrainFolder(config.folder)
    folder.claim(config.name, config.science, extensible="sweep")
    more = load(tmp_path, make_data(sweep={"seeds": [0, 1, 2]}))
    folder.claim(more.name, more.science, extensible="sweep")
    other = load(tmp_path, make_data(training={"window": 16}))
    with pytest.raises(ValueError, match=r"holds another search named 'mine': training differ; choose another name"):
        folder.claim(other.name, other.science, extensible="sweep")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_from_its_checkpoint(tmp_path):
    prose = write_prose(tmp_path / "prose.txt")
    changes = {"training": {"num_tokens": 2048 * 40, "num_checks": 40}, "sweep": {"cosine": [], "seeds": [0]}}
    config = load(tmp_path, make_data(prose, **changes))
    command = [*COMMAND, str(tmp_path / "mine.yaml"), "--storage", str(tmp_path), "--num-cpus", "2"]
    folder = PretrainFolder(tmp_path / "mine")
    key = config.trial_key(config.assignments()[0])
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 600
    while len(list(folder.trial(key).glob("train/checkpoint*"))) == 0 or _steps_done(folder, key) < 60:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for member in family:
        if member.is_running():
            member.kill()
    psutil.wait_procs(family, timeout=10)
    assert folder.read_result(key) is None
    subprocess.run(command, check=True, timeout=600)
    result = folder.read_result(key)
    assert result is not None and result.status == "finished"
    assert [check["step"] for check in result.checks] == list(range(0, 321, 8))
    resumed = mlflow.MlflowClient(f"sqlite:///{folder.root / 'mlflow.db'}")
    (experiment,) = [e for e in resumed.search_experiments() if e.name == "shoal-mine"]
    assert len(resumed.search_runs([experiment.experiment_id])) == 2, "the sweep and its run, once"


def _steps_done(folder: PretrainFolder, key: str) -> int:
    file = folder.trial(key) / "progress.json"
    return json.loads(file.read_text())["done"] if file.exists() else 0
