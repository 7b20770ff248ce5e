"""Costs from a model's shape, and plans of searches: laws, known sizes, and the command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import make_model
from shoal.cost import HARDWARE, SHAPES, ModelShape
from shoal.distil.trainable import select_trained
from shoal.recipe import Distillation
from shoal.replace.maps import linear_blocks
from shoal_services.cli import app
from shoal_services.search.config import load_config
from shoal_services.search.phases import bytes_per_step, reached_64, sharded_bytes_per_step
from shoal_services.search.plan import plan_search
from typer.testing import CliRunner

H100 = HARDWARE["h100"]


@pytest.fixture
def search(root):
    return load_config(root / "tune_configs/qwen3-8b.yaml")


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_parameters_are_those_of_the_model(family):
    model = make_model(family)
    shape = ModelShape.from_config(model.config.to_dict())
    assert shape.num_parameters == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert shape.without(2).num_blocks == 3


def test_lora_parameters_are_those_of_peft():
    model = make_model("llama")
    shape = ModelShape.from_config(model.config.to_dict())
    assert not linear_blocks(model)
    select_trained(model, Distillation(trained="lora", lora_rank=4))
    assert shape.lora_parameters(4) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "billions"), [("llama-2-7b", 6.74), ("llama-3.1-70b", 70.55), ("llama-3.1-405b", 405.85)])
def test_known_models_have_their_published_size(name, billions):
    assert SHAPES[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.001)


def test_a_forward_pass_takes_two_operations_a_weight():
    shape = SHAPES["llama-3.1-70b"]
    assert shape.forward_operations(0) == pytest.approx(2 * shape.num_parameters, rel=0.02)  # the embedding is looked up
    assert shape.step_operations(512, "all") == 3 * shape.forward_operations(512)
    assert 2 < shape.step_operations(512, "lora", 32) / shape.forward_operations(512) < 2.1


def test_moments_do_not_depend_on_tokens_but_on_blocks_and_width():
    shape = SHAPES["llama-2-7b"]
    assert shape.moments_bytes() == 64 * 32 * 4096**2
    wider = dataclasses.replace(shape, width=2 * shape.width)
    assert wider.moments_bytes() == 4 * shape.moments_bytes()


def test_checkpointing_keeps_less():
    shape = SHAPES["llama-3.1-70b"]
    assert shape.activation_bytes(512, 2, checkpointed=True) < 0.2 * shape.activation_bytes(512, 2)


def test_more_accelerators_are_faster_until_every_trial_has_its_own(search):
    plans = [plan_search(search, SHAPES["llama-2-7b"], H100, count) for count in (8, 16, 64, 128, 512)]
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert plans[-1].concurrent_trials == search.num_trials
    assert all(plan.low_seconds < plan.seconds < plan.high_seconds for plan in plans)
    assert plans[0].trial_seconds == pytest.approx(plans[-1].trial_seconds)


def test_choices_and_solves_are_counted_where_they_are_made(search):
    shape = SHAPES["llama-3.1-8b"]

    def phases(**space) -> dict[str, float]:
        config = search.model_copy(update={"space": search.space.model_copy(update=space)})
        return {phase.name: phase.seconds for phase in plan_search(config, shape, H100, 8).phases}

    assert "choose" in phases() and "choose" not in phases(selection="linearity")
    solved, plain = phases(refit=True), phases(refit=False)
    assert solved["fit"] - plain["fit"] > 0.7 * shape.solve_operations() / reached_64(H100)


def test_larger_models_need_more_of_everything(search):
    plans = [plan_search(search, SHAPES[f"llama-3.1-{size}"], H100, 512) for size in ("8b", "70b", "405b")]
    for field in ("seconds", "storage_bytes", "traffic_bytes", "memory_per_worker"):
        values = [getattr(plan, field) for plan in plans]
        assert values == sorted(values), field
    assert [plan.fits for plan in plans] == [True, False, False]


def test_what_no_accelerator_holds_is_said(search):
    plan = plan_search(search, SHAPES["llama-3.1-70b"], H100, 64)
    assert not plan.fits and plan.workers_to_fit > 4
    assert plan.memory_per_worker > H100.memory


def stream(search, num_workers: int):
    """The same search, with weights shared out over so many workers."""
    return search.model_copy(update={"run": search.run.model_copy(update={"streamed": True, "num_workers": num_workers})})


def test_weights_that_are_shared_out_take_less_memory_and_more_traffic(search):
    shape = SHAPES["llama-3.1-70b"]
    plans = [plan_search(stream(search, workers), shape, H100, 64) for workers in (1, 2, 4, 8, 16)]
    memory = [plan.memory_per_worker for plan in plans]
    assert memory == sorted(memory, reverse=True)
    assert {plan.workers_to_fit for plan in plans} == {needed := plans[0].workers_to_fit}
    assert [plan.fits for plan in plans] == [plan.workers_per_trial >= needed for plan in plans]
    assert plans[0].communication_per_step == 0 < plans[1].communication_per_step


@pytest.mark.parametrize(("name", "gpus"), [("llama-3.1-70b", 8), ("llama-3.1-70b-closed-form", 1)])
def test_the_searches_of_a_large_model_fit(root, name, gpus):
    config = load_config(root / f"tune_configs/{name}.yaml")
    plan = plan_search(config, SHAPES["llama-3.1-70b"], H100, gpus)
    assert plan.fits and plan.memory_per_worker < 0.8 * H100.memory
    whole = config.run_with(streamed=False)
    assert not plan_search(whole, SHAPES["llama-3.1-70b"], H100, gpus).fits


def test_bytes_of_a_step():
    assert bytes_per_step(1000, workers=1) == 0
    assert bytes_per_step(1000, workers=4) == pytest.approx(2 * 4 * 1000 * 3 / 4)
    assert sharded_bytes_per_step(0, gathers=2e9, workers=8, num_passes=1) == pytest.approx(2e9 * 7 / 8)
    assert sharded_bytes_per_step(1000, gathers=0, workers=8, num_passes=2) == pytest.approx(2 * 4 * 1000 * 7 / 8)


def test_the_command_prints_a_column_for_each_size_and_json(root, tmp_path):
    path = str(root / "tune_configs/qwen3-8b.yaml")
    table = CliRunner().invoke(
        app, ["plan", path, "--model-config", "llama-3.1-70b", "--gpus", "8", "--gpus", "64", "--price-per-gpu-hour", "2"]
    )
    assert table.exit_code == 0, table.output
    assert "70.6 billion" in table.output
    assert "cost" in table.output
    assert "assumed" in table.output
    own = tmp_path / "config.json"
    own.write_text(make_model("llama").config.to_json_string())
    done = CliRunner().invoke(app, ["plan", path, "--model-config", str(own), "--gpus", "1", "--json"])
    found = json.loads(done.output)
    assert found["plans"][0]["cost"] is None
    assert found["plans"][0]["workers_to_fit"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "choose one of"),
        (["--model-config", "llama-2-7b", "--gpus", "0"], "give 1 or more"),
        (["--model-config", "missing.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_refused(root, arguments, message):
    path = str(root / "tune_configs/qwen3-8b.yaml")
    assert message in str(CliRunner().invoke(app, ["plan", path, *arguments]).exception)


def test_mixtures_of_experts_are_refused():
    with pytest.raises(ValueError, match="mixture of experts"):
        ModelShape.from_config({"num_local_experts": 8, "hidden_size": 32, "num_attention_heads": 4})


def test_costs_need_no_torch():
    code = "import sys, shoal.cost; assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
