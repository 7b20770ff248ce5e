"""What Tune tells about trials, passed on: to MLflow as runs and metrics, and to a listener as progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import ray.tune

from shoal_services.interrupts import interruptible
from shoal_services.tracking.tracker import Tracker
from shoal_services.training.faults import raise_storage_error
from shoal_services.training.folder import TrialEnd, TrialFolder

RUN_STATUS = {"finished": "FINISHED", "collapsed": "FAILED", "failed": "FAILED", "stopped": "KILLED"}


class Trials(Protocol):
    """What a configuration says of its trials."""

    name: str

    @property
    def folder(self) -> Path: ...

    @property
    def science(self) -> dict[str, Any]: ...

    def trial_key(self, assignment: dict[str, Any]) -> str: ...


E = TypeVar("E", bound=TrialEnd)


class TrialEvents(ray.tune.Callback, Generic[E]):
    """A Tune callback for one set of trials; what a trial is, its subclasses know."""

    metrics: tuple[str, ...] = ()

    def __init__(self, config: Trials, folder: TrialFolder[E], tracker: Tracker, *, on_end: Callable[[E], None]):
        self.config, self.folder, self.tracker, self.on_end = config, folder, tracker, on_end
        # The same whenever the same search is started.
        self.parent = f"{config.name}-{tracker.identity}"
        self.ending: BaseException | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the parent run counts as running; what goes wrong ends it, and its children. Then all is sent.

        Ctrl-C and SIGTERM end it as killed, anything else as failed, with the error as its tag `last_error`.
        """
        self.tracker.start_run(self.parent, name=self.config.name, params=flatten(self.config.science))
        try:
            with interruptible():
                yield
        except BaseException as error:
            is_asked = isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
            with contextlib.suppress(OSError):  # no room for a record: the error itself is what must be told
                if not is_asked:
                    self.tracker.log_tags(self.parent, {"last_error": f"{type(error).__name__}: {error}"})
                self.tracker.end_orphans(self.parent)
                self.tracker.end_run(self.parent, "KILLED" if is_asked else "FAILED")
            raise
        finally:
            self.tracker.close()

    def name_trial(self, assignment: dict[str, Any]) -> str:
        """What a trial's run is called."""
        raise NotImplementedError

    def record_result(self, run: str, result: E) -> None:
        """Tells MLflow what is in a result."""
        raise NotImplementedError

    def end(self, error: BaseException) -> None:
        """Remembers what ends the search, to be raised where Tune lets it through."""
        self.ending = error

    def raise_if_ending(self) -> None:
        """Raises KeyboardInterrupt if the search was asked to stop, OSError if its storage failed."""
        if self.ending is not None:
            raise self.ending

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.raise_if_ending()

    def __getstate__(self) -> dict:
        """Nothing: Tune pickles its callbacks for a restore of its own, and a search restores from its folder."""
        return {}

    def run_key(self, trial_key: str) -> str:
        return f"{self.parent}/{trial_key}"

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._start(*self._identify(trial))

    def _start(self, key: str, assignment: dict[str, Any]) -> None:
        self.tracker.start_run(self.run_key(key), name=self.name_trial(assignment), parent=self.parent, params=assignment)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "step" not in result:
            return
        key, _ = self._identify(trial)
        metrics = {name: float(result[name]) for name in self.metrics if name in result}
        # Tune nests names with a slash: {"system": {"…": 1}} and "system/…" both occur.
        system = {name: value for name, value in result.items() if name.startswith("system/")}
        system |= {f"system/{name}": value for name, value in (result.get("system") or {}).items()}
        self.tracker.log_metrics(self.run_key(key), metrics | system, step=int(result["step"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        try:
            if self.folder.read_result(self._identify(trial)[0]) is None and trial.error_file:
                raise_storage_error(Path(trial.error_file).read_text(), self.folder.root)
            self._end(trial)
        except OSError as error:  # no trial's fault: it runs again when there is room
            self.end(error)

    def _end(self, trial: Any) -> None:
        key, assignment = self._identify(trial)
        result = self.folder.read_result(key)
        if result is None:  # the driver died, not its model
            reason = f"the trial's driver died: {trial.error_file or 'no error file'}"
            failed = self.folder.result_class(key=key, assignment=assignment, status="failed", reason=reason)
            result = cast(E, failed)
            self.folder.write_result(result)
        self.record_end(result)
        self.on_end(result)

    def record_missed(self) -> None:
        """Records results whose end was never told, because the search was killed in between."""
        ended = self.tracker.find_ended()
        for result in self.folder.read_results():
            if not ended.get(self.run_key(result.key)):
                self._start(result.key, result.assignment)
                self.record_end(result)

    def record_end(self, result: E) -> None:
        """Tells MLflow a trial's result, and ends the run."""
        run = self.run_key(result.key)
        told = {"reason": result.reason, "faults": "\n".join(result.faults)}
        if tags := {name: text for name, text in told.items() if text}:
            self.tracker.log_tags(run, tags)
        self.record_result(run, result)
        self.tracker.log_artifact(run, self.folder.trial(result.key) / "result.json")
        self.tracker.end_run(run, RUN_STATUS[result.status])

    def _identify(self, trial: Any) -> tuple[str, dict[str, Any]]:
        assignment = read_assignment(trial.config)
        return self.config.trial_key(assignment), assignment


def flatten(value: dict, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, object] = {}
    for name, inner in value.items():
        path = f"{prefix}{name}"
        flat |= flatten(inner, f"{path}.") if isinstance(inner, dict) else {path: inner}
    return flat


def read_assignment(config: dict[str, Any]) -> dict[str, Any]:
    """The assignment in a Tune trial's configuration: nested by `grid`, under flat names by Optuna."""
    if "assignment" in config:
        return dict(config["assignment"])
    return {name.removeprefix("assignment/"): value for name, value in config.items() if name.startswith("assignment/")}
