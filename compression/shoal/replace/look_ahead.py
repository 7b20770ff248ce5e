"""Which units go: by what it costs to be without them, looking further than one step.

A greedy step takes the cheapest unit and never sees that a longer run, in whose place one map stands, would be cheap. So
the search begins with the greedy set, with the cheapest runs and with what another rule would take, and swaps units of the
best as long as that helps. Annealing for 90 s on a GPU found nothing cheaper (SmolLM2-135M, 6 and 8 blocks, parts too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from torch import nn
from transformers import PreTrainedModel

from shoal.models.structure import find_blocks, text_config
from shoal.replace.judge import Judge, Places
from shoal.replace.unit_stack import Parts
from shoal.units import find_runs, list_places, name_units

# Candidates that a step looks at quickly beside those next to a run, and of swaps those that are read whole.
NUM_QUICK, NUM_WHOLE = 8, 3
NUM_RUNS = 3
# Finalists cost at most so many times as much as the best of them.
NUM_FINALISTS, MAX_WORSE = 4, 1.25
MAX_SWAPS = 4


@dataclass
class LookAhead:
    """A search over sets of places. `moves` are the sets that go together: a block's two, or one part.

    `worth` says how far a set of places brings the model toward the goal: what it saves. `likely` are moves in the order in
    which another rule takes them.
    """

    judge: Judge
    moves: list[Places]
    worth: Callable[[Places], float]
    goal: float
    likely: Sequence[Places] = ()
    on_progress: Callable[[int, int], None] = lambda _done, _total: None

    def find(self) -> list[Places]:
        """Sets that reach the goal, the cheapest first, a few. Raises ValueError if no set reaches it."""
        everything = frozenset[int]().union(*self.moves)
        if self.worth(everything) < self.goal:
            raise ValueError(
                f"all units that may go save {self.worth(everything):,.0f}, and {self.goal:,.0f} are asked for"
            )
        for index in range(0, len(self.moves), self.judge.world_size):
            self._tell(index / len(self.moves))
            self.judge.read(self.moves[index : index + self.judge.world_size], quick=True)
        starts = {self._grow(frozenset()), *self._list_best_runs(), *self._take_likely()}
        self.judge.read(starts)
        best = min(starts, key=self.judge.cost)
        for swap in range(MAX_SWAPS):
            self._tell(2 + swap / MAX_SWAPS)
            better = self._swap(best)
            if better == best:
                break
            best = better
        self._tell(3)
        others = sorted(starts - {best}, key=self.judge.cost)[: NUM_FINALISTS - 1]
        return [best, *(other for other in others if self.judge.cost(other) <= MAX_WORSE * self.judge.cost(best))]

    def _tell(self, done: float) -> None:
        """How much is done of the three thirds: single moves, growth, swaps."""
        self.on_progress(round(100 * done), 300)

    def _grow(self, chosen: Places) -> Places:
        """Adds what costs least for what it saves, until the goal is reached."""
        while self.worth(chosen) < self.goal:
            self._tell(1 + self.worth(chosen) / self.goal)
            chosen = self._step(chosen)
        return self._shrink(chosen)

    def _step(self, chosen: Places) -> Places:
        before, reached = (self.judge.cost(chosen, quick=True) if chosen else 0.0), self.worth(chosen)

        def price(candidate: Places) -> float:
            gain = min(self.worth(candidate), self.goal) - reached
            return (self.judge.cost(candidate, quick=True) - before) / gain

        candidates = [chosen | move for move in self._list_near(chosen) if self.worth(chosen | move) > reached]
        self.judge.read(candidates, quick=True)
        return min(candidates, key=price)

    def _take_likely(self) -> list[Places]:
        """What the other rule takes to reach the goal."""
        chosen = frozenset[int]()
        for move in self.likely:
            if self.worth(chosen) >= self.goal:
                break
            chosen |= move
        return [chosen] if self.worth(chosen) >= self.goal else []

    def _list_near(self, chosen: Places) -> list[Places]:
        """The moves worth a look: those next to a run, and the cheapest by themselves for what they save."""
        left = [move for move in self.moves if not move <= chosen]
        near = [m for m in left if chosen & {min(m) - 1, max(m) + 1} or m & chosen]
        by_price = sorted(left, key=lambda move: self.judge.cost(move, quick=True) / max(self.worth(move), 1e-9))
        return list(dict.fromkeys([*near, *by_price[:NUM_QUICK]]))

    def _list_best_runs(self) -> list[Places]:
        """The cheapest single runs that reach the goal."""
        free = frozenset[int]().union(*self.moves)
        runs = []
        for start in sorted(free):
            run = frozenset[int]()
            for place in range(start, max(free) + 1):
                if place not in free:
                    break
                run |= {place}
                if self._is_allowed(run) and self.worth(run) >= self.goal:
                    runs.append(run)
                    break
        return self._list_cheapest(runs)[:NUM_RUNS]

    def _is_allowed(self, places: Places) -> bool:
        """Whether the set is a union of moves."""
        return places == frozenset[int]().union(*(move for move in self.moves if move <= places))

    def _list_fewer(self, chosen: Places) -> set[Places]:
        """The sets that lack one move of this one."""
        return {fewer for move in self.moves if move <= chosen and self._is_allowed(fewer := chosen - move)}

    def _shrink(self, chosen: Places) -> Places:
        """Without units that the goal does not need."""
        while True:
            spare = [fewer for fewer in self._list_fewer(chosen) if self.worth(fewer) >= self.goal]
            if not spare:
                return chosen
            chosen = self._list_cheapest(spare)[0]

    def _swap(self, chosen: Places) -> Places:
        """The set itself, or a cheaper one with a unit for another."""
        relief = self._list_cheapest(filter(None, self._list_fewer(chosen)))[:NUM_WHOLE]
        candidates = set[Places]()
        for base in relief:
            reaching = [c for m in self._list_near(base) if self.worth(c := base | m) >= self.goal and c != chosen]
            candidates |= set(reaching)
        close = self._list_cheapest(candidates)[:NUM_WHOLE]
        self.judge.read(close)
        return min([chosen, *close], key=self.judge.cost)

    def _list_cheapest(self, candidates: Iterable[Places]) -> list[Places]:
        """The cheapest at a quick look first."""
        # In an order of their own: sets come in another one in every process.
        ordered = sorted(candidates, key=sorted)
        self.judge.read(ordered, quick=True)
        return sorted(ordered, key=lambda places: self.judge.cost(places, quick=True))


def list_moves(blocks: Iterable[int], apart: Iterable[int]) -> list[Places]:
    """Sets of places that can go together: the blocks, and the attention and the MLP of each block in `apart`."""
    whole = [frozenset((2 * block, 2 * block + 1)) for block in blocks]
    return whole + [frozenset((place,)) for block in apart for place in (2 * block, 2 * block + 1)]


@dataclass(frozen=True)
class Saving:
    """What the parameters come to that go with units. `parts` [2 · depth] by place, `blocks` [depth] whole, norms too."""

    num_parameters: int
    parts: list[int]
    blocks: list[int]
    map_size: int

    @classmethod
    def of(cls, model: PreTrainedModel, parts: Sequence[Parts | None], *, has_map: bool, rank: int | None) -> Self:
        """Those of a model, with a map in the place of each run if there is to be one."""
        blocks, width = find_blocks(model), text_config(model).hidden_size
        sizes = []
        for block, own in zip(blocks, parts, strict=True):
            sizes += [_count(block.get_submodule(part.name)) for part in own] if own else [0, 0]
        map_size = (width * (rank or width) * (2 if rank else 1) + width) if has_map else 0
        return cls(_count(model), sizes, [_count(block) for block in blocks], map_size)

    def of_places(self, places: Places) -> int:
        """Parameters that go with the units at these places, less those of the maps."""
        sizes = (self.blocks[u] if isinstance(u, int) else self.parts[list_places([u])[0]] for u in name_units(places))
        return sum(sizes) - self.map_size * len(find_runs(places))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in module.parameters()}.values())
