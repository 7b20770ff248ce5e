"""The trials of a search: Ray Tune proposes assignments, Ray Train makes each model, the folder keeps the results.

Results live in the folder, and nowhere else: killed at any moment and started again, a search takes up the finished
trials from there, tells them to Optuna, and begins again with those that were running.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import ray.tune

from shoal_services.search.config import SearchConfig
from shoal_services.search.events import SearchEvents
from shoal_services.search.folder import RunFolder, TrialResult
from shoal_services.search.searcher import HopelessTrialStopper, PointSearcher
from shoal_services.training.train import run_workers
from shoal_services.training.trial_events import read_assignment
from shoal_services.training.tune import Audience, reopen_failed, tune_trials


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
    tune_trials(drive_trial, job, space, events, tune_config)


def drive_trial(config: dict[str, Any], job: dict[str, Any]) -> None:
    """One Tune trial: a cheap driver of a Ray Train job."""
    search, folder = SearchConfig.model_validate(job["config"]), RunFolder(Path(job["root"]))
    assignment = read_assignment(config)
    key = search.trial_key(assignment)
    result = folder.read_result(key)
    if result is None:
        result = run_workers("shoal_services.search.trial:train_trial", job, search.run, folder, key, assignment)
    if result.point is not None:
        ray.tune.report(
            {"held_out_perplexity": result.held_out_perplexity, "num_parameters": result.point.num_parameters, "key": key}
        )
