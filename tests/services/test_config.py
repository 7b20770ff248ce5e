"""Every search file loads; everything that is wrong in one is told by name, with what would be right."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.recipe import Recipe
from shoal.text.rows import read_rows
from shoal.text.sources import load_documents
from shoal_services.cluster.preflight import check_writable
from shoal_services.search.config import SearchConfig, load_config
from shoal_services.search.space import Choice, Range, parse_kind
from shoal_services.training.trial_events import read_assignment

FILES = sorted((Path(__file__).parents[2] / "tune_configs").glob("*.yaml"))
CONFIGS = [file for file in FILES if not file.stem.startswith("pretrain-")]
AXES = {
    "num_replaced": {"randint": [1, 3]},
    "kind": {"choice": ["linear", "low_rank(8)", "dropped"]},
    "distillation_tokens": {"choice": [0, 4096]},
    "learning_rate": {"loguniform": [1e-4, 1e-2]},
}


def make_data(space: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A right configuration as YAML would give it, with changes."""
    return {"name": "mine", "model": "tiny-random", "space": {**AXES, **(space or {})}, **changes}


def load(tmp_path: Path, data: object) -> SearchConfig:
    file = tmp_path / "mine.yaml"
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return load_config(file)


def first_of(config: SearchConfig) -> dict[str, Any]:
    """The assignment of every axis' first value."""
    return {
        name: axis.choice[0] if isinstance(axis, Choice) else (axis.uniform or axis.loguniform or axis.randint)[0]
        for name, axis in config.space.axes.items()
    }


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_file_of_tune_configs_is_a_search_of_its_name(file):
    config = load_config(file)
    assert config.name == file.stem
    assert config.num_trials >= len(config.starting_assignments()) > 0 or not config.search.start_with
    for assignment in [first_of(config), *config.starting_assignments()]:
        recipe = config.make_recipe({**first_of(config), **assignment})
        assert isinstance(recipe, Recipe)
        assert recipe.base_model == config.model
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert SearchConfig.model_validate(config.model_dump(mode="json")) == config, "workers get it as JSON"


def test_there_are_files_to_load():
    assert {"smoke", "demo"} <= {file.stem for file in CONFIGS}


@pytest.mark.parametrize(
    ("data", "unknown", "nearest"),
    [
        (make_data(modle="x"), "modle", "model"),
        (make_data({"num_prune": 3}), "space.num_prune", "num_replaced"),
        (make_data(texts={"windw": 64}), "texts.windw", "window"),
        (make_data(search={"num_trails": 3}), "search.num_trails", "num_trials"),
        (make_data(run={"gpu_per_worker": 1}), "run.gpu_per_worker", "gpus_per_worker"),
        (make_data({"kind": {"choise": ["linear"]}}), "space.kind.choise", "choice"),
        (make_data({"temperature": {"unifrom": [1, 2]}}), "space.temperature.unifrom", "uniform"),
        (make_data(search={"start_with": [{"learning_rat": 1e-3}]}), "learning_rat", "learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path, data, unknown, nearest):
    with pytest.raises(ValueError, match=rf"unknown key {re.escape(repr(unknown))}.*did you mean '{nearest}'\?"):
        load(tmp_path, data)


def test_an_unknown_key_that_is_near_to_none_names_them_all(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"unknown key 'space\.zzz' in mine\.yaml; known keys: num_replaced, parameters, kv_cache, parts, kind",
    ):
        load(tmp_path, make_data({"zzz": 1}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_data(name="../elsewhere"), r"mine\.yaml: name: .*'\.\./elsewhere'"),
        (make_data(dtype="float8"), r"dtype: .*'bfloat16', 'float16' or 'float32'.*'float8'"),
        (make_data({"num_replaced": "three"}), r"space\.num_replaced: .*integer.*'three'"),
        (make_data({"num_replaced": {"choice": [1, "two"]}}), r"space\.num_replaced\.1: .*integer.*'two'"),
        (
            make_data({"trained": {"choice": ["lora", "adapters"]}}),
            r"space\.trained\.1: .*'maps', 'lora', 'blocks' or 'all'",
        ),
        (make_data({"num_replaced": {"randint": [1, 2.5]}}), r"space\.num_replaced\.randint\.1: .*integer.*2\.5"),
        (make_data({"num_replaced": {"choice": []}}), r"space\.num_replaced: .*at least 1 item"),
        (make_data({"trained": "adapters"}), r"space\.trained: .*'maps', 'lora', 'blocks' or 'all'.*'adapters'"),
        (make_data({"selection": "magic"}), r"space\.selection: .*'linearity'.*'magic'"),
        (make_data({"temperature": [1.0, 2.0]}), r"space\.temperature: .*number.*\[1\.0, 2\.0\]"),
        (make_data(search={"num_trials": 0}), r"search\.num_trials: .*greater than or equal to 1, not 0"),
        (make_data(search={"algorithm": "random"}), r"search\.algorithm: .*'optuna' or 'grid'.*'random'"),
        (make_data(search={"max_perplexity_ratio": 1}), r"search\.max_perplexity_ratio: .*greater than 1"),
        (make_data(run={"num_workers": 0}), r"run\.num_workers: .*greater than or equal to 1, not 0"),
        (make_data(run={"cpus_per_worker": 0}), r"run\.cpus_per_worker: .*greater than 0"),
        (make_data(texts={"window": 4}), r"texts\.window: .*greater than or equal to 8, not 4"),
        (make_data(run={"streamed": True}, tasks={"names": ["arc_easy"]}), r"run\.streamed: .*leave tasks out"),
        (make_data({"sparsity": "2:4"}, run={"streamed": True}), r"run\.streamed: .*leave out sparsity"),
        (
            make_data({"selection": "kl"}, run={"streamed": True}),
            r"run\.streamed: selection kl, and budgets, would read",
        ),
        ({"name": "mine", "space": AXES}, r"mine\.yaml lacks 'model'"),
        ({"name": "mine", "model": "m", "space": {}}, r"space\.num_replaced must be 1 or more"),
        ({**make_data(), "space": None}, r"mine\.yaml: space: "),
    ],
)
def test_a_wrong_value_is_told_with_key_and_value(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, data)


@pytest.mark.parametrize(
    "kind", ["lowrank(8)", "low_rank", "low_rank()", "low_rank(-1)", "low_rank(0)", "low_rank(8", "linear(8)", 3]
)
@pytest.mark.parametrize("as_choice", [False, True])
def test_a_kind_that_is_none_is_refused(tmp_path, kind, as_choice):
    with pytest.raises(ValueError, match=r"kind|rank"):
        load(tmp_path, make_data({"kind": {"choice": ["linear", kind]} if as_choice else kind}))


@pytest.mark.parametrize(("kind", "parsed"), [("low_rank(64)", ("low_rank", 64)), ("linear", ("linear", None))])
def test_a_kind_may_carry_a_rank(kind, parsed):
    assert parse_kind(kind) == parsed


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"uniform": [2.0, 1.0]}, r"uniform: \[2\.0, 1\.0\] is no range; give the lower end first"),
        ({"loguniform": [0.0, 1.0]}, r"loguniform: \[0\.0, 1\.0\] is no range; .*above 0"),
        ({"uniform": [1, 2], "loguniform": [1, 2]}, "give exactly one of choice, uniform, loguniform, randint"),
        ({"choice": [1.0], "uniform": [1, 2]}, "uniform"),
        ({}, "give exactly one of choice, uniform, loguniform, randint"),
        ({"uniform": [1.0]}, r"space\.temperature\.uniform"),
        ({"uniform": [1.0, 2.0, 3.0]}, r"space\.temperature\.uniform"),
        ({"uniform": [1.0, float("inf")]}, r"space\.temperature\.uniform"),
    ],
)
def test_an_axis_is_one_proper_range(tmp_path, axis, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, make_data({"temperature": axis}))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"num_replaced": 0}, r"num_replaced must be 1 or more, or space.parameters below 1"),
        ({"sparsity": 124}, r"sparsity=124.* is neither .*YAML reads 2:4 as 124 unless it is in quotes"),
        ({"sparsity": {"choice": [None, "3:4"]}}, r"sparsity='3:4' is neither a share"),
        ({"weight_share": {"uniform": [0.5, 1.0]}}, r"weight_share: Input should be less than 1"),
        ({"num_replaced": -1}, r"num_replaced: .*greater than or equal to 0"),
        ({"num_replaced": {"randint": [0, 3]}}, r"num_replaced must be 1 or more"),
        ({"num_replaced": {"randint": [3, 1]}}, r"randint: \[3, 1\] is no range"),
        ({"num_replaced": {"choice": [2, -2]}}, r"num_replaced: .*greater than or equal to 0"),
        (
            {"kind": "dropped", "trained": "maps", "distillation_tokens": 4096},
            "leaves no maps to train; use trained='blocks'",
        ),
        ({"kind": {"choice": ["linear", "folded"]}, "fit": "independent"}, r"'kind': 'folded'.*use fit='in_order'"),
        ({"logit_kl": 0.0, "distillation_tokens": 4096}, r"every loss weight is 0"),
        ({"learning_rate": 0.0, "distillation_tokens": 4096}, r"learning_rate: .*greater than 0"),
        ({"temperature": {"choice": [1.0, -1.0]}, "distillation_tokens": 4096}, r"temperature: .*greater than 0"),
        ({"ridge": -1.0}, r"ridge: .*greater than or equal to 0"),
        ({"num_replaced": {"uniform": [1, 3]}}, r"num_replaced is a whole number; use randint or choice"),
        ({"kind": {"randint": [0, 3]}}, r"kind is no number; use choice"),
        ({"trained": {"uniform": [0, 3]}}, r"trained is no number; use choice"),
        ({"window": 2, "distillation_tokens": 4096}, r"window: .*greater than or equal to 8"),
    ],
)
def test_a_space_with_an_impossible_corner_is_refused_before_the_search(tmp_path, space, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, make_data(space))


def test_an_impossible_start_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe for .*'num_replaced': -3"):
        load(tmp_path, make_data(search={"start_with": [{"num_replaced": -3}]}))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"seed": 3}, r"start_with: seed does not vary in this space"),
        ({"num_replaced": 99}, r"start_with: num_replaced: 99 is not in the space, which has \{"),
        ({"kind": "dropped"}, r"start_with: kind: 'dropped' is not in the space, which has \{'choice': "),
    ],
)
def test_a_start_outside_the_space_is_refused(tmp_path, start, message):
    space = {"num_replaced": {"randint": [1, 3]}, "kind": {"choice": ["linear", "folded"]}}
    with pytest.raises(ValueError, match=message):
        load(tmp_path, make_data(space, search={"start_with": [start]}))
    load(tmp_path, make_data(space, search={"start_with": [{"num_replaced": 3}]}))  # the rest is the sampler's


def test_a_grid_has_no_ranges(tmp_path):
    with pytest.raises(
        ValueError, match=r"algorithm='grid' needs every axis to be a choice or a constant; or use algorithm='optuna'"
    ):
        load(tmp_path, make_data(search={"algorithm": "grid"}))


def test_a_missing_file_is_told_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read '.*nowhere\.yaml': No such file or directory; check the path"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match=r"cannot read .*Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [unclosed", r"mine\.yaml' is not YAML: .*line"),
        ("a: b: c", r"mine\.yaml' is not YAML"),
        ("- name\n- model\n", r"mine\.yaml' holds no mapping; see tune_configs/demo\.yaml"),
        ("", r"holds no mapping"),
        ("just words", r"holds no mapping"),
        ("!!python/object/apply:os.getpid []", r"is not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"name: \xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mine\.yaml' is not YAML"):
        load_config(file)


def test_all_complaints_come_at_once(tmp_path):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, make_data({"kinds": "linear"}, modle="x", run={"num_workers": 0}))
    assert len(str(caught.value).splitlines()) == 3


def test_the_key_of_a_trial_is_that_of_its_recipe(tmp_path):
    config = load(tmp_path, make_data())
    assignment = {"num_replaced": 2, "kind": "linear", "distillation_tokens": 4096, "learning_rate": 1e-3}
    key = config.trial_key(assignment)
    assert key == config.trial_key(dict(reversed(assignment.items()))) == load(tmp_path, make_data()).trial_key(assignment)
    others = {"num_replaced": 3, "kind": "low_rank(8)", "distillation_tokens": 0, "learning_rate": 2e-3}
    keys = {config.trial_key({**assignment, name: value}) for name, value in others.items()}
    assert len(keys | {key}) == 5
    assert config.trial_key({**assignment, "kind": "low_rank(16)"}) not in keys


def test_what_is_not_distilled_has_no_learning_rate(tmp_path):
    """The same model must not be made twice for settings that do not matter."""
    config = load(tmp_path, make_data())
    first, second = (
        {"num_replaced": 2, "kind": "linear", "distillation_tokens": 0, "learning_rate": rate} for rate in (1e-3, 2e-3)
    )
    assert config.trial_key(first) == config.trial_key(second)


def test_how_it_is_run_changes_no_key(tmp_path):
    plain, other = (
        load(tmp_path, make_data(run=run)) for run in ({}, {"num_workers": 2, "storage": "elsewhere", "max_failures": 0})
    )
    assert plain.trial_key(first_of(plain)) == other.trial_key(first_of(other))
    assert plain.science == other.science
    assert plain.folder != other.folder


def test_a_grid_is_the_product_of_its_choices_for_each_start(tmp_path):
    space = {"num_replaced": {"choice": [1, 2, 3]}, "learning_rate": 1e-3}
    config = load(tmp_path, make_data(space, search={"algorithm": "grid"}))
    tried = [(a["num_replaced"], a["kind"], a["distillation_tokens"]) for a in config.starting_assignments()]
    assert sorted(tried) == sorted(itertools.product([1, 2, 3], AXES["kind"]["choice"], [0, 4096]))
    assert config.num_trials == len(tried) == 18
    assert len({config.trial_key(a) for a in config.starting_assignments()}) == 18

    starts = [{"kind": "dropped", "distillation_tokens": 0}, {"kind": "linear"}]
    config = load(tmp_path, make_data(space, search={"algorithm": "grid", "start_with": starts}))
    tried = [(a["num_replaced"], a["kind"], a["distillation_tokens"]) for a in config.starting_assignments()]
    wanted = [(n, "dropped", 0) for n in (1, 2, 3)] + [(n, "linear", tokens) for n in (1, 2, 3) for tokens in (0, 4096)]
    assert sorted(tried) == sorted(wanted)


def test_optuna_starts_with_what_is_written_and_samples_the_rest(tmp_path):
    config = load(tmp_path, make_data(search={"start_with": [{"num_replaced": 2}], "num_trials": 7}))
    assert config.starting_assignments() == [{"num_replaced": 2}]
    assert config.num_trials == 7


def test_axes_and_constants_share_out_the_space(tmp_path):
    space = load(tmp_path, make_data({"temperature": {"choice": [2.0, 4.0]}})).space
    assert set(space.axes) == {*AXES, "temperature"}
    assert set(space.axes) | set(space.constants) == set(type(space).model_fields)
    assert isinstance(space.num_replaced, Range)
    assert space.temperatures == (1.0, 2.0, 4.0)
    assert (space.highest("distillation_tokens"), space.highest("num_replaced"), space.highest("seed")) == (4096, 3, 0)


def test_an_assignment_is_read_from_both_forms_that_tune_gives():
    wanted = {"num_replaced": 2, "kind": "linear"}
    assert read_assignment({"assignment": wanted}) == wanted
    assert read_assignment({"assignment/num_replaced": 2, "assignment/kind": "linear", "other": 1}) == wanted


@pytest.mark.parametrize("storage", ["s3://bucket/runs", "gs://bucket", "hdfs://name/x", "file:///mnt/runs"])
def test_storage_is_a_folder_and_no_uri(tmp_path, storage):
    """Path takes `s3://bucket` for a folder `bucket` in `s3:`."""
    said = rf"storage '{storage.replace(':///', '://')}' is a URI, and Shoal reads and writes files; mount it"
    with pytest.raises(ValueError, match=said):
        load(tmp_path, make_data(run={"storage": storage}))
    with pytest.raises(ValueError, match=said):
        load(tmp_path, make_data()).run_with(storage=Path(storage))
    with pytest.raises(ValueError, match=said):
        check_writable(Path(storage))
    for read, what in (
        (load_model, "model"),
        (load_tokenizer, "model"),
        (load_documents, "text"),
        (read_rows, "data"),
    ):
        with pytest.raises(ValueError, match=f"{what} '{storage.replace(':///', '://')}.* is a URI"):
            read(f"{storage}/it")


@pytest.mark.parametrize(
    ("address", "instead"),
    [
        ("ray://head:10001", "http://head:8265"), ("ray://10.0.0.7:10001", "http://10.0.0.7:8265"),
        ("http://head:8266", "http://head:8266"),
    ],
)  # fmt: skip
def test_addresses_of_clients_are_refused_with_what_takes_them(tmp_path, address, instead):
    """With Ray's client the driver of the trials runs elsewhere, without the search's callbacks."""
    said = rf"'{address}' is an address for clients .*`shoal submit FILE --address {instead}`, or .*`--address auto`"
    with pytest.raises(ValueError, match=said):
        load(tmp_path, make_data(run={"address": address}))
    with pytest.raises(ValueError, match=said):
        load(tmp_path, make_data()).run_with(address=address)
    for inside in ("auto", "local", "head:6379", None):
        assert load(tmp_path, make_data(run={"address": inside})).run.address == inside


def test_files_and_folders_are_named_so_that_every_worker_finds_them(tmp_path, monkeypatch):
    """Names that are no files stay, also packaged ones beside which a folder of that name lies."""
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "tiny-random"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a.txt").touch()
    texts = {"train": ["a.txt", "org/data:x"], "evaluation": "wikipedia-sample"}
    config = load(tmp_path, make_data(model="mine", texts=texts, tasks={"names": ["arc_easy", "mine"]}))
    resolved = config.resolved()
    assert resolved.model == str(tmp_path / "mine")
    assert resolved.texts.train == (str(tmp_path / "a.txt"), "org/data:x")
    assert resolved.texts.evaluation == ("wikipedia-sample",)
    assert resolved.tasks.names == ("arc_easy", str(tmp_path / "mine"))
    for name in ("tiny-random", "org/model", "gpt2"):
        assert load(tmp_path, make_data(model=name)).resolved().model == name
    assert resolved.resolved() == resolved
