"""What ends workers is told apart; the quick scenarios of `faults.py` keep their bounds."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import time

import faults
import pytest
import torch
from searches import write_search
from shoal_services.cluster.preflight import fit_trials
from shoal_services.cluster.resources import Maximum, NodeShape
from shoal_services.finetuning.config import FinetuneConfig
from shoal_services.search.config import Run
from shoal_services.search.folder import RunFolder, TrialResult
from shoal_services.training.faults import FaultNotes, describe_fault, limit_steps, raise_storage_error
from shoal_services.training.folder import OUT_OF_MEMORY


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    (tmp_path / "trials" / "one").mkdir(parents=True)
    return RunFolder(tmp_path)


@pytest.fixture
def lack() -> RuntimeError:
    """What torch raises on a CPU that has not so much memory."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


def test_lack_of_memory_is_told_from_other_faults(lack):
    assert describe_fault(lack).startswith(f"{OUT_OF_MEMORY}: RuntimeError")
    assert describe_fault(torch.OutOfMemoryError("CUDA out of memory")).startswith(OUT_OF_MEMORY)
    assert describe_fault(MemoryError()).startswith(OUT_OF_MEMORY)
    assert describe_fault(RuntimeError("the actor\nis dead")) == "RuntimeError: the actor is dead"


def test_lack_of_memory_ends_training_the_second_time(folder, lack):
    """A fault of another kind in between does not count."""
    notes = FaultNotes(folder, "one")
    notes.after_exception(None, {0: lack})
    notes.after_exception(None, {1: RuntimeError("died")})
    with pytest.raises(MemoryError, match="with one window a pass too: use a smaller window, workers with more memory, or"):
        notes.after_exception(None, {0: lack})
    folder.write_result(TrialResult(key="one", assignment={}, status="failed", reason="out of memory"))
    told = folder.read_result("one").faults
    assert [fault.startswith(OUT_OF_MEMORY) for fault in told] == [True, False, True]


def test_full_storage_ends_training_at_once(folder):
    """Whatever library met it; and it is no fault of the trial's."""
    for said in (
        "[Errno 28] Error writing bytes to file. Detail: No space left on device",
        "I/O error: Disk quota exceeded",
    ):
        with pytest.raises(OSError) as raised:
            FaultNotes(folder, "one").after_exception(None, {0: RuntimeError(said)})
        assert raised.value.errno in (errno.ENOSPC, errno.EDQUOT) and raised.value.filename == str(folder.root)
    assert folder.read_faults("one") == ()
    with pytest.raises(OSError) as raised:
        raise_storage_error("OSError: [Errno 28] No space left on device: '/tmp/shoal-blocks-1/x'", folder.root)
    assert raised.value.filename == "/tmp/shoal-blocks-1/x"
    raise_storage_error("the actor is dead", folder.root)


def test_a_process_that_takes_no_step_says_where_it_is_and_ends(root):
    code = """
        import time
        from shoal_services.training.faults import limit_steps
        with limit_steps(1) as live:
            for _ in range(4):
                time.sleep(0.5)
                live()
            print("steps taken", flush=True)
            time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=55, check=False
    )
    assert (done.returncode, done.stdout) == (1, "steps taken\n")
    assert "Timeout" in done.stderr and 'File "<string>", line 9' in done.stderr


def test_the_limit_ends_with_the_steps():
    with limit_steps(0.2) as live:
        live()
    time.sleep(0.4)


def test_a_pair_of_workers_grows_with_the_cluster():
    run = Run.model_validate({"num_workers": [1, 8]})
    assert (run.num_workers, run.most_workers) == (1, 8)
    assert Run.model_validate(run.model_dump(mode="json")) == run
    assert Run(num_workers=2).most_workers == 2
    nodes = {"a": NodeShape(cpus=4, gpus=0)}
    assert fit_trials(run, nodes, Maximum(None, False)).concurrent == 1, "fewer than it may have, and it runs"
    assert fit_trials(Run(num_workers=2), nodes, Maximum(None, False)).concurrent == 2
    with pytest.raises(ValueError, match=r"num_workers: \[8, 1\] shrinks; give the smaller number first"):
        Run.model_validate({"num_workers": [8, 1]})
    with pytest.raises(ValueError, match="num_workers must be one number"):
        FinetuneConfig.model_validate({"name": "mine", "model": "m", "data": "d.jsonl", "run": {"num_workers": [1, 2]}})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["worker", "driver", "hang"])
def test_a_scenario_keeps_its_bounds(name, tiny_random):
    rows = getattr(faults, name)()
    assert all(row.held for row in rows), [row for row in rows if not row.held]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_storage_loses_nothing(tiny_random):
    rows = faults.storage()
    assert all(row.held for row in rows), [row for row in rows if not row.held]


@pytest.mark.slow
def test_as_many_workers_as_there_is_room_for_make_the_same_model(tmp_path, tiny_random):
    """Up to two on two CPUs, and one alone."""
    numbers = []
    for name, count in (("one", 1), ("elastic", [1, 2])):
        (tmp_path / name).mkdir()
        search = write_search(
            tmp_path / name, search={"num_trials": 1}, run={"num_workers": count, "max_concurrent_trials": 1}
        )
        search.run()
        (result,) = search.folder.read_results()
        numbers.append((result.key, result.held_out_perplexity, result.point.perplexity))
    assert numbers[1][0] == numbers[0][0]
    assert numbers[1][1:] == pytest.approx(numbers[0][1:], rel=1e-5)
