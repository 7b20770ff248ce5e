"""One trial, on the workers of Ray Train, whatever it makes."""

from __future__ import annotations

import shutil
from typing import Any, TypeVar, cast

import ray.train
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from shoal_services.training.faults import FaultNotes, raise_storage_error
from shoal_services.training.folder import TrialEnd, TrialFolder
from shoal_services.training.network import NodeAddressConfig
from shoal_services.training.worker import run_loop
from shoal_services.training.workers import Workers

START_TIMEOUT_FAILURES = 3
# Workers that wait in a collective do so while another one reads the model, which its node may have to download first.
# For what rank 0 does alone they wait without one, dead workers are noticed by Ray, and slow steps by `run.step_limit_s`.
COLLECTIVE_LIMIT_S = 2 * 3600

E = TypeVar("E", bound=TrialEnd)


def run_workers(
    loop: str, job: dict[str, Any], workers: Workers, folder: TrialFolder[E], key: str,
    assignment: dict[str, Any],
) -> E:  # fmt: skip
    """The result that `loop` (see `run_loop`) left of one trial on Train's workers, or a failed one."""
    folder.write_started(key, assignment)
    reason = train_on_workers({**job, "loop": loop, "key": key, "assignment": assignment}, workers, folder)
    if reason is not None:
        failed = folder.result_class(key=key, assignment=assignment, status="failed", reason=reason)
        folder.write_result(cast(E, failed))
    result = folder.read_result(key)
    assert result is not None
    return result


def train_on_workers(job: dict[str, Any], workers: Workers, folder: TrialFolder) -> str | None:
    """Runs the job's loop on Train's workers, with checkpoints in the trial's folder that a later call goes on from.

    Returns None, or why it failed for good; the checkpoints are gone then. Raises OSError if the storage fails.
    """
    place = folder.trial(job["key"])
    least, most = workers.num_workers, workers.most_workers
    resources = {"CPU": workers.cpus_per_worker} | ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})
    trainer = TorchTrainer(
        run_loop,
        train_loop_config=job,
        torch_config=NodeAddressConfig(timeout_s=COLLECTIVE_LIMIT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=least if least == most else (least, most),  # type: ignore[arg-type]  # v1's classes are declared
            use_gpu=workers.gpus_per_worker > 0, resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="train", storage_path=str(place),
            callbacks=[TuneReportCallback(), FaultNotes(folder, job["key"])],  # type: ignore[list-item]
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]  # ray.train's v1 classes are declared
                max_failures=workers.max_failures, controller_failure_limit=START_TIMEOUT_FAILURES
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )  # fmt: skip
    reason = None
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise_storage_error(str(error), folder.root)
        reason = " ".join(str(error).split())[-500:]
    shutil.rmtree(place / "train", ignore_errors=True)
    return reason
