"""The frontier is what brute force says; the picks are on it."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.frontier import find_best_within, find_frontier, find_knee, name_picks


class Dot(NamedTuple):
    num_parameters: int
    perplexity: float


# Few sizes and few perplexities, so that ties are common.
perplexities = st.sampled_from([1.0, 1.5, 2.0, 8.0, math.nan, math.inf, -math.inf]) | st.floats(1, 1e6)
dots = st.builds(Dot, st.integers(1, 12), perplexities)


def beats(a: Dot, b: Dot) -> bool:
    no_worse = a.num_parameters <= b.num_parameters and a.perplexity <= b.perplexity
    return no_worse and (a.num_parameters < b.num_parameters or a.perplexity < b.perplexity)


@given(st.lists(dots, max_size=20), st.sampled_from([math.inf, 2.0, 1e4]))
def test_frontier_is_what_no_other_point_beats(points, ceiling):
    alive = {p for p in points if math.isfinite(p.perplexity) and p.perplexity <= ceiling}
    frontier = find_frontier(points, ceiling=ceiling)
    assert set(frontier) == {p for p in alive if not any(beats(other, p) for other in alive)}
    assert len(set(frontier)) == len(frontier)
    assert frontier == sorted(frontier)


@given(st.data(), st.lists(dots, max_size=12))
def test_order_of_the_points_does_not_matter(data, points):
    assert find_frontier(data.draw(st.permutations(points))) == find_frontier(points)


@given(st.lists(dots, max_size=12))
def test_a_frontier_is_its_own_frontier(points):
    assert find_frontier(find_frontier(points)) == find_frontier(points)


def test_of_equal_points_the_first_stays():
    first, second = Dot(1, 2.0), Dot(1, 2.0)
    assert find_frontier([first, second])[0] is first


@given(st.lists(dots, min_size=1, max_size=12))
def test_picks_are_on_the_frontier(points):
    frontier = find_frontier(points)
    picks = name_picks(frontier)
    assert set(picks) == ({"best", "balanced", "smallest"} if frontier else set())
    assert all(pick in frontier for pick in picks.values())
    if frontier:
        assert picks["best"].perplexity == min(p.perplexity for p in frontier)
        assert picks["smallest"].num_parameters == min(p.num_parameters for p in frontier)


@given(st.lists(dots, min_size=3, max_size=12))
def test_the_knee_is_furthest_from_the_line_between_the_ends(points):
    frontier = find_frontier(points)
    if len(frontier) > 2 and frontier[-1].perplexity > 0:
        (x0, y0), *_, (x1, y1) = plane = [(p.num_parameters, math.log(p.perplexity)) for p in frontier]
        below = [(x - x0) * (y1 - y0) - (y - y0) * (x1 - x0) for x, y in plane]
        assert below[frontier.index(find_knee(frontier))] >= max(below) - 1e-9 * (x1 - x0) * (y0 - y1)


def test_the_knee_is_the_bend():
    bend = [Dot(1, 100.0), Dot(2, 11.0), Dot(6, 10.5), Dot(10, 10.0)]
    assert find_knee(bend) == bend[1]


@pytest.mark.parametrize("points", [[Dot(3, 2.0)], [Dot(1, 9.0), Dot(3, 2.0)]])
def test_the_knee_of_two_is_the_better(points):
    assert find_knee(points) == Dot(3, 2.0)


def test_the_knee_of_points_that_hardly_differ():
    """Perplexities so close that their logarithms are equal."""
    near = [Dot(size, 1e9 + (3 - size) * math.ulp(1e9)) for size in (1, 2, 3)]
    assert find_knee(find_frontier(near)) in near


def test_no_knee_without_points():
    with pytest.raises(ValueError, match="frontier is empty"):
        find_knee([])


@given(st.lists(dots, max_size=12), st.integers(0, 13))
def test_the_best_within_a_budget(points, budget):
    fitting = [p.perplexity for p in points if p.num_parameters <= budget and math.isfinite(p.perplexity)]
    if fitting:
        best = find_best_within(points, max_parameters=budget)
        assert best.num_parameters <= budget
        assert best.perplexity == min(fitting)
    else:
        with pytest.raises(ValueError, match=f"no point has {budget} parameters or fewer"):
            find_best_within(points, max_parameters=budget)


def test_a_budget_too_small_names_the_smallest_working_point():
    with pytest.raises(ValueError, match="the smallest has 5"):
        find_best_within([Dot(2, math.nan), Dot(5, 3.0)], max_parameters=4)
