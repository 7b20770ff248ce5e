"""Recipes and points travel as JSON unchanged, and nonsense is refused with a message that names it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from shoal.point import Evaluation, Point, Size, Speed
from shoal.recipe import Distillation, LossWeights, Recipe
from shoal.texts import Text

positive = st.floats(min_value=1e-9, max_value=1e9)
counts = st.integers(1, 2**40)
names = st.text(min_size=1, max_size=20)
texts = st.builds(Text, name=names, sha256=st.none() | names, num_tokens=counts)
weights = st.builds(LossWeights, logit_kl=positive, layer_mse=positive, square_head=positive, cosine=positive)
distillations = st.builds(
    Distillation, num_tokens=counts, learning_rate=positive, temperature=positive, loss=weights,
    trained=st.sampled_from(["lora", "all"]), window=st.integers(8, 4096), patience=st.none() | st.integers(1, 9),
)  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    blocks = draw(st.none() | st.lists(st.integers(0, 99), unique=True, max_size=8))
    kind = draw(st.sampled_from(["linear", "low_rank", "folded", "dropped"]))
    return Recipe(
        base_model=draw(names), kind=kind, rank=draw(st.integers(1, 64)) if kind == "low_rank" else None,
        num_replaced=draw(st.integers(0, 99)) if blocks is None else len(blocks),
        blocks=blocks, selection="linearity" if blocks is None else "listed",
        ridge=draw(st.none() | st.floats(0, 1e6)), calibration=tuple(draw(st.lists(texts, max_size=2))),
        distillation_text=draw(st.none() | texts), distillation=draw(st.none() | distillations),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


numbers = st.floats(allow_nan=False, allow_infinity=False)
evaluations = st.builds(Evaluation, text=texts, **{name: numbers for name in Evaluation.model_fields if name != "text"})
sizes = st.builds(Size, num_parameters=counts, num_bytes=counts, kv_bytes_per_token=counts)
speeds = st.builds(Speed, prefill_tokens_per_s=positive, decode_tokens_per_s=positive)
points = st.builds(
    Point, recipe=recipes(), evaluations=st.lists(evaluations, min_size=1, max_size=3).map(tuple), size=sizes,
    dense_size=sizes, speed=st.none() | speeds, dense_speed=st.none() | speeds,
    seconds=st.dictionaries(names, numbers, max_size=3),
)  # fmt: skip


@given(recipes() | points)
def test_dict_and_json_round_trips_are_the_identity(value):
    assert type(value).model_validate_json(value.model_dump_json()) == value
    assert type(value).model_validate(value.model_dump()) == value
    assert type(value).model_validate(json.loads(json.dumps(value.model_dump(mode="json")))) == value


@given(recipes())
def test_equal_recipes_have_equal_keys(recipe):
    assert Recipe.model_validate_json(recipe.model_dump_json()).key == recipe.key
    assert recipe.model_copy(update={"seed": recipe.seed + 1}).key != recipe.key


def test_the_order_of_blocks_does_not_matter():
    recipe, same = (
        Recipe(base_model="m", num_replaced=2, blocks=blocks, selection="listed") for blocks in [(7, 3), (3, 7)]
    )
    assert recipe == same
    assert recipe.key == same.key
    assert recipe.blocks == (3, 7)


@pytest.mark.parametrize("value", [Recipe, Distillation, LossWeights, Point, Text])
def test_an_unknown_key_is_refused_by_name(value):
    with pytest.raises(ValidationError, match="num_workers"):
        value.model_validate({"num_workers": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [3, 5, 3], "num_replaced": 3}, r"blocks lists \[3\] more than once"),
        ({"blocks": [1, 2, 3]}, "num_replaced=2 but blocks names 3"),
        ({"blocks": [-1, 2]}, "unit -1 is no block: give its index"),
        ({"blocks": [2, "2.mlp"]}, r"blocks lists \[2\] more than once"),
        ({"blocks": [1, "2.mlp"], "kind": "folded", "selection": "listed"}, "attention and MLP go apart"),
        ({"parameters": 0.8}, "leave num_replaced and selection out"),
        ({"num_replaced": 0, "parts": True}, "parts=True needs parameters or kv_cache"),
        ({"num_replaced": 0, "parameters": 0.8, "kv_cache": 0.8}, "two budgets"),
        ({"kv_cache": 0.8}, "leave num_replaced and selection out"),
        ({"selection": "listed"}, "needs blocks"),
        ({"rank": 8}, "give rank with kind='low_rank'"),
        ({"kind": "low_rank"}, "rank=None"),
        ({"kind": "low_rank", "rank": 0}, "greater than or equal to 1"),
        ({"kind": "folded", "fit": "independent"}, "use fit='in_order'"),
        ({"kind": "dropped", "distillation": {"trained": "maps"}}, "leaves no maps to train"),
        ({"kind": "pruned"}, "'linear', 'low_rank', 'folded' or 'dropped'"),
        ({"selection": "random"}, "'kl'"),
        ({"num_replaced": -1}, "greater than or equal to 0"),
        ({"num_replaced": 1.5}, "integer"),
        ({"ridge": -0.1}, "greater than or equal to 0"),
        ({"ridge": math.inf}, "finite"),
        ({"base_model": None}, "string"),
        ({"weight_share": 0}, "greater than 0"),
        ({"weight_share": 1}, "less than 1"),
        ({"sparsity": 1.0}, r"sparsity=1\.0 is neither a share of zeros from 0 to below 1 nor '2:4' or '4:8'"),
        ({"sparsity": -0.1}, r"sparsity=-0\.1 is neither"),
        ({"sparsity": "1:4"}, r"sparsity='1:4' is neither"),
        ({"sparsity": math.nan}, r"sparsity=nan is neither"),
        ({"sparsity": True}, r"sparsity=True is neither"),
        ({"sparsity": [0.5]}, r"sparsity=\[0\.5\] is neither"),
        ({"sparsity": 124}, r"YAML reads 2:4 as 124 unless it is in quotes"),
        ({"num_replaced": 0, "distillation": {"trained": "maps"}}, "num_replaced=0 leaves no maps to train"),
    ],
)  # fmt: skip
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({"base_model": "m", "num_replaced": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "greater than or equal to 1"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": -1e-3}, "greater than 0"),
        ({"learning_rate": math.nan}, "finite"),
        ({"temperature": 0}, "greater than 0"),
        ({"trained": "bias"}, "'maps', 'lora', 'blocks' or 'all'"),
        ({"lora_rank": 0}, "greater than or equal to 1"),
        ({"window": 4}, "greater than or equal to 8"),
        ({"windows_per_step": 0}, "greater than or equal to 1"),
        ({"warmup_fraction": 1}, "less than 1"),
        ({"max_gradient_norm": 0}, "greater than 0"),
        ({"patience": 0}, "greater than or equal to 1"),
        ({"loss": {"logit_kl": 0}}, "every loss weight is 0"),
        ({"loss": {"logit_kl": -1}}, "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_impossible_distillations_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Distillation.model_validate(changes)


def test_values_are_frozen():
    recipe = Recipe(base_model="m", num_replaced=1)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1


def test_steps_use_up_the_tokens():
    assert Distillation(num_tokens=8192, window=512, windows_per_step=4).num_steps == 4
    assert Distillation(num_tokens=1).num_steps == 1


@pytest.mark.parametrize(
    ("weights", "needed"), [({}, False), ({"cosine": 1}, True), ({"logit_kl": 0, "layer_mse": 1}, True)]
)
def test_only_losses_on_streams_need_hidden_states(weights, needed):
    assert LossWeights(**weights).needs_hidden_states == needed


@pytest.mark.parametrize(
    ("changes", "told", "name", "stock"),
    [
        ({"kind": "low_rank", "rank": 8}, "2 blocks low_rank(8)", "low_rank-2", False),
        ({"kind": "folded", "sparsity": "2:4"}, "2 blocks folded, 2:4 sparse", "folded-2-sparse2of4", True),
        ({"num_replaced": 0, "sparsity": 0.5}, "50 % sparse", "sparse50", True),
        ({"num_replaced": 0, "weight_share": 0.8}, "SVD 80 %", "svd80", False),
        (
            {"weight_share": 0.85, "sparsity": 0.5},
            "2 blocks linear, SVD 85 %, 50 % sparse",
            "linear-2-svd85-sparse50",
            False,
        ),
        ({"num_replaced": 0}, "0 blocks linear", "linear-0", True),
    ],
)
def test_a_recipe_says_what_it_changes(changes, told, name, stock):
    recipe = Recipe.model_validate({"base_model": "m", "num_replaced": 2, **changes})
    assert (recipe.changes, recipe.short_name, recipe.is_stock) == (told, name, stock)


def test_one_sparsity_written_in_several_ways_is_one_recipe():
    keys = [
        {Recipe.model_validate({"base_model": "m", "num_replaced": 2, "sparsity": value}).key for value in values}
        for values in [(0.5, "0.5"), (None, 0, 0.0, "0"), ("2:4",), ("4:8",)]
    ]
    assert [len(group) for group in keys] == [1, 1, 1, 1]
    assert len(set.union(*keys)) == 4
