"""Which blocks to replace: most linear, most alike in cosine, one window, or greedy on KL with the maps in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from shoal.linearity.moments import Moments
from shoal.linearity.scores import BlockLinearity, require_tokens, score_blocks
from shoal.measure.perplexity import score_windows
from shoal.measure.targets import TeacherTargets
from shoal.models.structure import check_block_indices
from shoal.recipe import Recipe
from shoal.replace.fit import fit_independent
from shoal.replace.maps import make_replaced
from shoal.text.windows import TokenWindows

# Candidates that each greedy step tries beyond those still wanted: more did not change the choice (SmolLM2-135M).
SHORTLIST = 4


# `linearity` is what ranks unless something else is asked for (see `shoal.linearity.scores.RANKING_REASON`);
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
    recipe: Recipe,
    moments: Moments,
    *,
    scores: Sequence[BlockLinearity] | None = None,
    rank_by_kl: Callable[[tuple[int, ...]], float] | None = None,
) -> tuple[int, ...]:
    """The recipe's blocks, sorted, by `scores` of the moments if they are known.

    `rank_by_kl` judges a set of blocks for selection='greedy_kl'.

    Raises ValueError if the recipe asks for more blocks than can be replaced, or lists blocks that do not exist.
    """
    if recipe.num_replaced == 0:
        return ()
    require_tokens(moments)
    if recipe.blocks is not None:
        check_block_indices(recipe.blocks, moments.num_blocks)
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
    rank = RANKINGS.get(recipe.selection, RANKINGS["linearity"])
    free.sort(key=rank, reverse=True)
    if recipe.selection == "greedy_kl":
        assert rank_by_kl is not None
        return _grow_greedily([score.block for score in free], recipe.num_replaced, rank_by_kl)
    return tuple(sorted(score.block for score in free[: recipe.num_replaced]))


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


def _grow_greedily(ranked: list[int], num_replaced: int, cost: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Adds, one at a time, the block that costs least with all maps in place, out of a shortlist by linearity."""
    chosen: tuple[int, ...] = ()
    while len(chosen) < num_replaced:
        left = [block for block in ranked if block not in chosen][: num_replaced - len(chosen) + SHORTLIST]
        chosen = min((tuple(sorted((*chosen, block))) for block in left), key=cost)
    return chosen


def make_kl_cost(
    model: PreTrainedModel, moments: Moments, windows: TokenWindows, dense: TeacherTargets, recipe: Recipe
) -> Callable[[tuple[int, ...]], float]:
    """A function from blocks to the KL from the dense model on `windows`, with independently fitted maps in place.

    `windows` should be text that the moments have not seen: sinks differ between kinds of text.
    """

    @torch.no_grad()
    def cost(blocks: tuple[int, ...]) -> float:
        replacement = fit_independent(moments, blocks, ridge=recipe.ridge, rank=recipe.rank)
        if recipe.kind == "dropped":
            replacement.maps.clear()
        return float(score_windows(make_replaced(model, replacement), windows, dense).kl.mean())

    return cost
