"""Which blocks to replace: most linear, most alike in cosine, one window, or what costs least with the maps in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from shoal.linearity.moments import Moments
from shoal.linearity.scores import BlockLinearity, require_tokens, score_blocks
from shoal.models.structure import check_block_indices
from shoal.progress import Listener, ignore
from shoal.recipe import Recipe
from shoal.replace.judge import Judge, Places
from shoal.replace.look_ahead import LookAhead, Saving, list_moves
from shoal.units import Unit, list_places, name_units

MakeJudge = Callable[[], Judge]

# `linearity` ranks where KL would cost too much (see `shoal.linearity.scores.RANKING_REASON`);
# `linearity_in_sample` is the paper's score, which sinks lift to 0.99 in the middle of most models.
RANKINGS: dict[str, Callable[[BlockLinearity], float]] = {
    "linearity": lambda score: score.held_out,
    "linearity_in_sample": lambda score: score.score,
    "linearity_without_residual": lambda score: score.held_out_without_residual,
    "cosine": lambda score: score.cosine,
}


def protected_blocks(scores: Sequence[BlockLinearity]) -> set[int]:
    """Blocks that stay: the first, the last, and those that make or erase sinks.

    The last block scores high and cannot be spared; a replaced sink maker ruins the attention of all later blocks.
    """
    return {0, len(scores) - 1} | {score.block for score in scores if score.moves_sinks}


def choose_blocks(
    recipe: Recipe, moments: Moments, *, scores: Sequence[BlockLinearity] | None = None, judge: MakeJudge | None = None,
    listen: Listener = ignore,
) -> tuple[Unit, ...]:  # fmt: skip
    """The recipe's units in order, by `scores` of the moments if they are known; `judge` makes what selection='kl' asks.

    Raises ValueError if the recipe asks for more than can be replaced, or lists blocks that do not exist.
    """
    if not recipe.replaces_blocks:
        return ()
    require_tokens(moments)
    if recipe.blocks is not None:
        check_block_indices([place // 2 for place in list_places(recipe.blocks)], moments.num_blocks)
        return recipe.blocks
    scores = scores or score_blocks(moments)
    free = [score for score in scores if score.block not in protected_blocks(scores)]
    if recipe.num_replaced > len(free):
        stay = sorted(protected_blocks(scores))
        raise ValueError(
            f"num_replaced={recipe.num_replaced} is more than the {len(free)} replaceable blocks of {moments.num_blocks} "
            f"(blocks {stay} stay: the first, the last, and those that make or erase massive activations); "
            f"choose {len(free)} or fewer, or list the blocks"
        )
    if recipe.selection == "window":
        return _most_alike_window(moments, recipe.num_replaced, {score.block for score in free})
    if recipe.selection == "kl":
        assert judge is not None
        free.sort(key=RANKINGS["linearity"], reverse=True)
        return _look_ahead(recipe, judge(), [score.block for score in free], listen)
    assert recipe.selection is not None, "settle() says by which rule"
    free.sort(key=RANKINGS[recipe.selection], reverse=True)
    return tuple(sorted(score.block for score in free[: recipe.num_replaced]))


def _look_ahead(recipe: Recipe, judge: Judge, free: list[int], listen: Listener) -> tuple[Unit, ...]:
    """The units that cost least, so many or down to so many parameters, of the `free` blocks, the most linear first."""
    search = LookAhead(
        judge, *_find_goal(recipe, judge, free), likely=list_moves(free, ()),
        on_progress=lambda done, total: listen("choose", done, total),
    )  # fmt: skip
    finalists = search.find()
    judge.remember()
    if len(finalists) == 1 or recipe.fit == "independent":
        return name_units(finalists[0])
    listen("finalists", 0, 1)
    costs = judge.read_in_order(finalists)
    listen("finalists", 1, 1)
    return name_units(finalists[costs.index(min(costs))])


def _find_goal(recipe: Recipe, judge: Judge, free: list[int]) -> tuple[list[Places], Callable[[Places], float], float]:
    """What may go together, what a set of places saves, and how much is to be saved.

    Raises ValueError if all that may go is not enough.
    """
    if recipe.budget is None:
        return list_moves(free, ()), lambda places: len(places) / 2, recipe.num_replaced
    name, share = recipe.budget
    apart = [block for block in free if judge.parts[block] is not None] if recipe.parts else []
    if name == "kv_cache":
        moves = [*list_moves(free, ()), *(frozenset((2 * block,)) for block in apart)]
        total, count = len(judge.parts), _count_attentions
    else:
        saving = Saving.of(judge.model, judge.parts, has_map=recipe.kind != "dropped", rank=recipe.rank)
        moves, total, count = list_moves(free, apart), saving.num_parameters, saving.of_places
    goal, most = math.ceil((1 - share) * total), count(frozenset[int]().union(*moves))
    if most < goal:
        raise ValueError(
            f"{name}={share:g} is out of reach: without all that can be replaced, {1 - most / total:.2f} of the dense "
            "model's is left; ask for that or more"
        )
    return moves, count, goal


def _count_attentions(places: Places) -> int:
    """Attentions, of one KV cache each, among the units at these places."""
    return sum(place % 2 == 0 for place in places)


def _most_alike_window(moments: Moments, length: int, free: set[int]) -> tuple[int, ...]:
    """The run of `length` blocks whose input and output have the highest cosine (angular distance, arXiv 2403.17887)."""
    starts = [s for s in range(moments.num_blocks - length + 1) if free.issuperset(range(s, s + length))]
    if not starts:
        raise ValueError(
            f"no {length} neighbouring blocks can all be replaced: the replaceable ones are {sorted(free)}; "
            "choose fewer, or another selection"
        )
    best = max(starts, key=lambda start: float(moments.similarity[start, start + length]))
    return tuple(range(best, best + length))
