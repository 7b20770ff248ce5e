"""The trials of a search: Ray Tune proposes assignments, Ray Train makes each model, the folder keeps the results.

Results live in the folder and not in Tune's pickles: killed at any moment and started again, a search takes up the
finished trials from there, begins again with those that were running, and lets Optuna go on from its own journal.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import ray.tune
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from shoal_services.config import SearchConfig
from shoal_services.events import SearchEvents
from shoal_services.folder import RunFolder, TrialResult
from shoal_services.space import Choice, Range, read_assignment
from shoal_services.tuning import run_workers, tune_trials
from shoal_services.worker import train_worker

if TYPE_CHECKING:
    from shoal.prepare import Listener

OBJECTIVES = {"held_out_perplexity": "min", "num_parameters": "min"}


def run_trials(
    config: SearchConfig, folder: RunFolder, concurrent: int, events: SearchEvents, listen: Listener
) -> list[TrialResult]:
    """Runs trials until the folder holds as many results as the search asks for; returns them all.

    Raises KeyboardInterrupt after a clean stop; the same call goes on.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    done = {result.key: result for result in folder.read_results()}
    assignments = _missing_assignments(config, folder, done)
    num_samples = len(assignments) if config.search.algorithm == "grid" else max(0, config.num_trials - len(done))
    listen("trials", len(done), config.num_trials)
    if num_samples:
        _fit_tuner(config, folder, assignments, num_samples, concurrent, events)
    return folder.read_results()


def _missing_assignments(config: SearchConfig, folder: RunFolder, done: dict[str, TrialResult]) -> list[dict[str, Any]]:
    """What to begin with: trials that were cut off, then the configured starts that have no result."""
    cut_off = folder.read_started()
    known = [*cut_off.values(), *(result.assignment for result in done.values())]
    # A start may leave axes to the sampler: it was tried if some trial agrees with what it names.
    fresh = [a for a in config.starting_assignments() if not any(a.items() <= other.items() for other in known)]
    return [*cut_off.values(), *fresh]


def _fit_tuner(
    config: SearchConfig, folder: RunFolder, assignments: list[dict[str, Any]], num_samples: int, concurrent: int,
    events: SearchEvents,
) -> None:  # fmt: skip
    job = {"config": config.model_dump(mode="json"), "root": str(folder.root)}
    searcher, space = _make_searcher(config, folder, assignments)
    tune_config = ray.tune.TuneConfig(
        num_samples=1 if searcher is None else num_samples,
        max_concurrent_trials=concurrent,
        search_alg=searcher,
        scheduler=HopelessTrialStopper(config, folder),
        reuse_actors=True,
    )
    tune_trials(run_trial, job, space, events, tune_config)


def _make_searcher(
    config: SearchConfig, folder: RunFolder, assignments: list[dict[str, Any]]
) -> tuple[OptunaSearch | None, dict[str, Any]]:
    if config.search.algorithm == "grid":
        return None, {"assignment": ray.tune.grid_search(assignments)}
    storage = JournalStorage(JournalFileBackend(str(folder.root / "optuna.journal")))
    _end_cut_off_optuna_trials(storage)
    study = optuna.create_study(
        storage=storage, study_name=config.name, directions=["minimize" for _ in OBJECTIVES], load_if_exists=True
    )
    for start in assignments:  # here and not by Ray, which refuses one that leaves axes to the sampler
        study.enqueue_trial({f"assignment/{name}": value for name, value in start.items()})
    searcher = PointSearcher(
        config, folder,
        space={f"assignment/{name}": _distribution(axis) for name, axis in config.space.axes.items()},
        metric=list(OBJECTIVES), mode=list(OBJECTIVES.values()),
        sampler=optuna.samplers.TPESampler(seed=config.search.seed + len(folder.read_results()), multivariate=True),
        study_name=config.name, storage=storage,
    )  # fmt: skip
    return searcher, {}


def _distribution(axis: Choice | Range) -> optuna.distributions.BaseDistribution:
    if isinstance(axis, Choice):
        return optuna.distributions.CategoricalDistribution(axis.choice)
    if axis.randint:
        return optuna.distributions.IntDistribution(*axis.randint)
    low, high = axis.loguniform or axis.uniform or (0.0, 0.0)
    return optuna.distributions.FloatDistribution(low, high, log=axis.loguniform is not None)


def _end_cut_off_optuna_trials(storage: JournalStorage) -> None:
    """Trials that were running when the search was killed: their assignments are proposed again."""
    for study in storage.get_all_studies():
        for trial in storage.get_all_trials(study._study_id, deepcopy=False):
            if not trial.state.is_finished():
                storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)


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


class PointSearcher(OptunaSearch):
    """Optuna, to which a trial that ended without a point has failed, whatever it reported before."""

    def __init__(self, config: SearchConfig, folder: RunFolder, **options: Any):
        super().__init__(**options)
        self.config, self.folder = config.model_dump(mode="json"), folder  # Tune pickles this
        self.keys: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict | None:
        suggested = super().suggest(trial_id)
        if suggested:
            config = SearchConfig.model_validate(self.config)
            self.keys[trial_id] = config.trial_key(read_assignment(suggested))
        return suggested

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        ended = self.folder.read_result(self.keys[trial_id])
        failed = error or ended is None or ended.status in ("collapsed", "failed")
        super().on_trial_complete(trial_id, None if failed else result, error=failed)


class HopelessTrialStopper(FIFOScheduler):
    """Stops a trial when a finished one is no larger and its held-out perplexity is several times lower.

    Size matters in the comparison: by perplexity alone, every small model would be stopped for being small.
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
        return TrialScheduler.STOP


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
