"""Which recipe Tune tries next, and which trial it gives up."""

from __future__ import annotations

import contextlib
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from shoal_services.search.config import SearchConfig
from shoal_services.search.folder import RunFolder, TrialResult
from shoal_services.search.space import Choice, Range
from shoal_services.training.trial_events import read_assignment

OBJECTIVES = ("held_out_perplexity", "num_parameters")
# Proposals that were made before, one after the other, before the sampler gives way to chance, and before chance does.
SAMPLER_REPEATS, ALL_REPEATS = 20, 200


class PointSearcher(Searcher):
    """Optuna, told of every trial in the folder; proposes no recipe that has been tried or is being tried.

    A trial that ended without a point has failed, whatever it reported before.
    """

    def __init__(self, config: SearchConfig, folder: RunFolder, starts: list[dict[str, Any]]):
        super().__init__()
        self.config, self.folder = config.model_dump(mode="json"), folder  # Tune pickles this
        self.space = {name: _distribution(axis) for name, axis in config.space.axes.items()}
        results = folder.read_results()
        self.seed = config.search.seed + len(results)
        sampler = optuna.samplers.TPESampler(seed=self.seed, multivariate=True)
        self.study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for result in results:
            self._add(result)
        for start in starts:
            self.study.enqueue_trial(start)
        self.proposed = {result.key for result in results}
        self.asked: dict[str, tuple[str, optuna.Trial]] = {}

    def _add(self, result: TrialResult) -> None:
        params = {name: result.assignment[name] for name in self.space if name in result.assignment}
        values = [result.held_out_perplexity or 0.0, result.point.num_parameters] if result.point else None
        state = TrialState.COMPLETE if values else TrialState.FAIL
        with contextlib.suppress(ValueError):  # a grid's, from before the search had this algorithm
            self.study.add_trial(optuna.create_trial(params=params, distributions=self.space, values=values, state=state))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Ray declares no FINISHED
        config = SearchConfig.model_validate(self.config)
        for repeat in range(ALL_REPEATS):
            if repeat == SAMPLER_REPEATS:
                self.study.sampler = optuna.samplers.RandomSampler(seed=self.seed)
            trial = self.study.ask(self.space)
            key = config.trial_key(trial.params)
            if key not in self.proposed:
                self.proposed.add(key)
                self.asked[trial_id] = key, trial
                return {"assignment": trial.params}
            self.study.tell(trial, state=TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        key, trial = self.asked.pop(trial_id)
        ended = self.folder.read_result(key)
        values = [result[name] for name in OBJECTIVES] if result and OBJECTIVES[0] in result else None
        if error or ended is None or ended.status in ("collapsed", "failed") or values is None:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, values)


class HopelessTrialStopper(FIFOScheduler):
    """Stops a trial when a finished one is no larger and its held-out perplexity is several times lower.

    Size matters in the comparison: by perplexity alone, every small model would be stopped for being small. The trial gets
    its result here; its workers find it within a second and end, and Tune sees a trial that came to its end. Stopped by
    Tune, the driver's process would go on to the next trial while Train's workers still work at this one.
    """

    def __init__(self, config: SearchConfig, folder: RunFolder):
        super().__init__()
        self.config, self.folder = config, folder

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        ratio = self.config.search.hopeless_ratio
        better = find_better(self.folder.read_results(), result, ratio)
        if better is None or "step" not in result:
            return TrialScheduler.CONTINUE
        assignment = read_assignment(trial.config)
        reason = (
            f"held-out perplexity {result['held_out_perplexity']:.1f} at step {int(result['step'])} with "
            f"{result['num_parameters']:,} parameters: trial {better.key} is no larger and reached "
            f"{better.held_out_perplexity:.1f}, more than {ratio:g} times lower"
        )
        key = self.config.trial_key(assignment)
        self.folder.write_result(TrialResult(key=key, assignment=assignment, status="stopped", reason=reason))
        return TrialScheduler.CONTINUE


def find_better(results: list[TrialResult], report: dict[str, Any], ratio: float) -> TrialResult | None:
    """A finished trial that is no larger than the report's and whose held-out perplexity is over `ratio` times lower."""
    for result in results:
        if (
            result.point is not None
            and result.held_out_perplexity is not None
            and result.point.num_parameters <= report["num_parameters"]
            and result.held_out_perplexity * ratio < report["held_out_perplexity"]
        ):
            return result
    return None


def _distribution(axis: Choice | Range) -> optuna.distributions.BaseDistribution:
    if isinstance(axis, Choice):
        return optuna.distributions.CategoricalDistribution(axis.choice)
    if axis.randint:
        return optuna.distributions.IntDistribution(*axis.randint)
    low, high = axis.loguniform or axis.uniform or (0.0, 0.0)
    return optuna.distributions.FloatDistribution(low, high, log=axis.loguniform is not None)
