"""The story of a search: check → prepare → trials → frontier → report. Started again, it goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from shoal.checkpoints.names import describe_source
from shoal.files import write_text
from shoal.frontier import find_frontier, name_picks
from shoal.linearity.scores import BlockLinearity, read_scores, write_scores
from shoal.point import Point

from shoal_services.cluster.connect import connect
from shoal_services.cluster.preflight import clear_cluster
from shoal_services.pages.curves_page import write_curves_page
from shoal_services.pages.frontier_page import write_frontier_page
from shoal_services.pages.linearity_page import write_linearity_page
from shoal_services.search.config import SearchConfig
from shoal_services.search.events import SearchEvents
from shoal_services.search.folder import RunFolder, TrialResult
from shoal_services.search.prepare import prepare_search
from shoal_services.search.trials import run_trials
from shoal_services.tracking.registry import BASE_TAG, HASH_TAG, SEARCH_TAG, describe_point
from shoal_services.tracking.tracker import Delivery, Tracker
from shoal_services.training.lock import lock_folder
from shoal_services.training.tune import Audience


@dataclass(frozen=True)
class Outcome:
    """What a search came to."""

    folder: Path
    results: list[TrialResult]
    frontier: list[Point]
    tracking_uri: str
    delivery: Delivery

    def explain_failure(self) -> str:
        """Why there is no frontier: what ended the first trial that ended."""
        first = min(self.results, key=lambda result: result.ended_at or 0)
        return (
            f"no trial finished: of {len(self.results)}, the first, {first.key}, {first.status}: {first.reason}; "
            "mend the cause and give the same command again: it tries those that failed again"
        )


class SearchAudience(Audience, Protocol):
    """Who hears of a search while it runs: also results as they come."""

    def show_linearity(self, model: str, scores: Sequence[BlockLinearity]) -> None: ...

    def show_trial(self, result: TrialResult) -> None: ...


def run_search(config: SearchConfig, audience: SearchAudience, *, num_cpus: int | None = None) -> Outcome:
    """Searches, or finishes the search that was begun, and leaves frontier, pages and MLflow runs behind.

    Raises ValueError or OSError for what cannot work (before any trial), KeyboardInterrupt after a clean stop.
    """
    folder, resolved = RunFolder(config.folder), config.resolved()
    audience("start Ray", 0, 1)
    try:
        connect(config.run.address, num_cpus=num_cpus)
        inputs = (resolved.model, *resolved.texts.train, *resolved.texts.evaluation)
        concurrent = clear_cluster(config.run, folder.root, audience.remark, inputs)
        with lock_folder(folder.root):
            folder.claim_search(config)
            audience("start Ray", 1, 1)
            return _search(resolved, folder, concurrent, audience)
    finally:
        ray.shutdown()


def _search(config: SearchConfig, folder: RunFolder, concurrent: int, audience: SearchAudience) -> Outcome:
    prepare_search(config, folder, concurrent, audience)
    scores = read_scores(folder.scores)
    write_scores(folder.root / "linearity.json", scores)
    write_linearity_page(folder.root / "linearity.html", config.model, scores)
    audience.show_linearity(config.model, scores)

    tracker = Tracker(folder.root, uri=config.run.tracking_uri, experiment=f"shoal-{config.name}")
    events = SearchEvents(config, folder, tracker, on_end=lambda result: _after_trial(config, folder, result, audience))
    with events.running():
        results = run_trials(config, folder, concurrent, events, audience)
        events.record_missed()
        frontier = write_frontier(config, folder)
        _publish(config, folder, frontier, events)
    return Outcome(folder.root, results, frontier, tracker.uri, tracker.delivery)


def _after_trial(config: SearchConfig, folder: RunFolder, result: TrialResult, audience: SearchAudience) -> None:
    """Frontier and page are whole after every trial, not at the end alone."""
    write_frontier(config, folder)
    audience.show_trial(result)
    audience("trials", len(folder.read_results()), config.num_trials)


def write_frontier(config: SearchConfig, folder: RunFolder) -> list[Point]:
    """The frontier of the finished trials, written as JSON and as a page, and of a grid also the curves.

    Dominated weights are deleted if so wished.
    """
    if config.run.keep_models == "frontier":
        folder.drop_dominated_models()
    points = folder.find_points()
    frontier = find_frontier(points)
    # Paths of the file are as seen from the folder, which can be moved.
    inside = [p.model_copy(update={"artefact": os.path.relpath(p.artefact or "", folder.root)}) for p in frontier]
    write_text(folder.root / "frontier.json", json.dumps(describe_frontier(inside), indent=2))
    write_frontier_page(folder.root / "frontier.html", config.name, points)
    if config.search.algorithm == "grid":
        write_curves_page(folder.root / "curves.html", config.name, points)
    return frontier


def describe_frontier(frontier: list[Point]) -> dict[str, Any]:
    """JSON-able: the named picks, as folders of models, and all points, smallest first."""
    picks = {name: point.artefact for name, point in name_picks(frontier).items()}
    return {"picks": picks, "frontier": [json.loads(point.model_dump_json()) for point in frontier]}


def _publish(config: SearchConfig, folder: RunFolder, frontier: list[Point], events: SearchEvents) -> None:
    """The search's own run, and the frontier's models in the registry: under the search's own name, whatever is served."""
    parent, tracker = events.parent, events.tracker
    names = ("config.json", "frontier.json", "frontier.html", "curves.html", "linearity.json", "linearity.html")
    for file in filter(Path.exists, (folder.root / name for name in names)):
        tracker.log_artifact(parent, file)
    tracker.log_table(parent, frontier_columns(frontier), "frontier-table.json")
    tracker.log_metrics(parent, {"num_trials": len(folder.read_results()), "num_frontier": len(frontier)})
    model, about = f"shoal-{parent}", {SEARCH_TAG: config.name, BASE_TAG: config.model}

    def register(key: str, source: str, tags: dict[str, str], aliases: list[str]) -> None:
        tracker.register(model, key, source=source, tags=tags, aliases=aliases, about=about)

    register(parent, describe_source(config.model, config.revision), {BASE_TAG: config.model, "kind": "dense"}, ["dense"])
    keys = {result.point.artefact: result.key for result in folder.read_results() if result.point}
    picks = name_picks(frontier)
    for point in frontier:
        assert point.artefact is not None
        folder.mark_registered(keys[point.artefact], model)
        register(
            f"{parent}/{keys[point.artefact]}",
            point.artefact,
            {**describe_point(point), HASH_TAG: point.artefact_sha256 or ""},
            [name for name, pick in picks.items() if pick is point],
        )
    tracker.end_orphans(parent)
    tracker.end_run(parent, "FINISHED" if frontier else "FAILED")


def frontier_columns(frontier: list[Point]) -> dict[str, list]:
    """The frontier as columns of a table."""
    return {
        "blocks replaced": [point.recipe.num_replaced for point in frontier],
        "kind": [point.recipe.kind for point in frontier],
        "weights": [", ".join(point.recipe.weight_changes) for point in frontier],
        "parameters": [point.num_parameters for point in frontier],
        "bytes": [point.size.num_bytes for point in frontier],
        "perplexity": [point.perplexity for point in frontier],
        "standard error": [point.evaluations[0].standard_error for point in frontier],
        "dense perplexity": [point.evaluations[0].dense_perplexity for point in frontier],
        "KL to dense": [point.evaluations[0].kl for point in frontier],
        "folder": [point.artefact for point in frontier],
    }
