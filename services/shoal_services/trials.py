"""The trials of a search: Ray Tune proposes assignments, Ray Train makes each model, the folder keeps the results.

Results live in the folder, and nowhere else: killed at any moment and started again, a search takes up the finished
trials from there, tells them to Optuna, and begins again with those that were running.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import optuna
import ray.tune
from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from shoal_services.config import SearchConfig
from shoal_services.events import SearchEvents
from shoal_services.folder import RunFolder, TrialResult
from shoal_services.space import Choice, Range, read_assignment
from shoal_services.tuning import Audience, reopen_failed, run_workers, tune_trials
from shoal_services.worker import train_worker

OBJECTIVES = ("held_out_perplexity", "num_parameters")
# Proposals that were made before, one after the other, before the sampler gives way to chance, and before chance does.
SAMPLER_REPEATS, ALL_REPEATS = 20, 200


def run_trials(
    config: SearchConfig, folder: RunFolder, concurrent: int, events: SearchEvents, audience: Audience
) -> list[TrialResult]:
    """Runs trials until the folder holds as many results as the search asks for; returns them all.

    Those that failed before are tried again. Raises KeyboardInterrupt after a clean stop; the same call goes on.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    reopen_failed(folder, audience)
    done = {result.key: result for result in folder.read_results()}
    assignments = _missing_assignments(config, folder, done)
    num_samples = len(assignments) if config.search.algorithm == "grid" else max(0, config.num_trials - len(done))
    audience("trials", len(done), config.num_trials)
    if num_samples:
        _fit_tuner(config, folder, assignments, num_samples, concurrent, events)
    results = folder.read_results()
    if len(results) < config.num_trials:
        audience.remark(
            f"the search ends after {len(results)} of {config.num_trials} trials: no other recipe was found in the space; "
            "widen it, or lower search.num_trials"
        )
    return results


def _missing_assignments(config: SearchConfig, folder: RunFolder, done: dict[str, TrialResult]) -> list[dict[str, Any]]:
    """What to begin with: trials that were cut off, then the configured starts that have no result."""
    cut_off = folder.read_started()
    known = [*cut_off.values(), *(result.assignment for result in done.values())]
    # A start may leave axes to the sampler: it was tried if some trial agrees with what it names.
    fresh = [a for a in config.starting_assignments() if not any(a.items() <= other.items() for other in known)]
    if config.search.algorithm == "optuna":
        return [*cut_off.values(), *fresh]
    missing: dict[str, dict[str, Any]] = {}
    for assignment in (*cut_off.values(), *fresh):
        missing.setdefault(config.trial_key(assignment), assignment)
    return [assignment for key, assignment in missing.items() if key not in done]


def _fit_tuner(
    config: SearchConfig, folder: RunFolder, assignments: list[dict[str, Any]], num_samples: int, concurrent: int,
    events: SearchEvents,
) -> None:  # fmt: skip
    job = {"config": config.model_dump(mode="json"), "root": str(folder.root)}
    is_grid = config.search.algorithm == "grid"
    tune_config = ray.tune.TuneConfig(
        num_samples=1 if is_grid else num_samples,
        max_concurrent_trials=concurrent,
        search_alg=None if is_grid else PointSearcher(config, folder, assignments),
        scheduler=HopelessTrialStopper(config, folder),
        reuse_actors=True,  # a driver has always ended before it gets another trial: none is stopped from outside
    )
    space = {"assignment": ray.tune.grid_search(assignments)} if is_grid else {}
    tune_trials(run_trial, job, space, events, tune_config)


def _distribution(axis: Choice | Range) -> optuna.distributions.BaseDistribution:
    if isinstance(axis, Choice):
        return optuna.distributions.CategoricalDistribution(axis.choice)
    if axis.randint:
        return optuna.distributions.IntDistribution(*axis.randint)
    low, high = axis.loguniform or axis.uniform or (0.0, 0.0)
    return optuna.distributions.FloatDistribution(low, high, log=axis.loguniform is not None)


def run_trial(config: dict[str, Any], job: dict[str, Any]) -> None:
    """One Tune trial: a cheap driver of a Ray Train job."""
    search, folder = SearchConfig.model_validate(job["config"]), RunFolder(Path(job["root"]))
    assignment = read_assignment(config)
    key = search.trial_key(assignment)
    result = folder.read_result(key)
    if result is None:
        result = run_workers(train_worker, job, search.run, folder, key, assignment)
    if result.point is not None:
        ray.tune.report(
            {"held_out_perplexity": result.held_out_perplexity, "num_parameters": result.point.num_parameters, "key": key}
        )


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
