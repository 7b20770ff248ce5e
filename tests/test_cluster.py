"""What the cluster cannot do is refused before any work, with what is missing and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from shoal_services.cluster import (
    MIN_FREE_BYTES,
    check_cluster,
    check_writable,
    connect,
    count_concurrent_trials,
    describe_versions,
)
from shoal_services.config import Run


def refusal_of(run: Run, storage: Path) -> str:
    """What is said about a run that cannot be, within seconds."""
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        check_cluster(run, storage)
    assert time.monotonic() - started < 5
    return str(caught.value)


def test_connecting_twice_is_connecting_once(ray_cluster):
    before = ray.get_runtime_context().gcs_address
    connect(None)
    connect("auto", num_cpus=7)
    assert ray.get_runtime_context().gcs_address == before
    assert ray.cluster_resources()["CPU"] == 2


@pytest.mark.parametrize(
    ("run", "concurrent"),
    [
        ({}, 2),
        ({"num_workers": 2}, 1),
        ({"cpus_per_worker": 2}, 1),
        ({"cpus_per_worker": 0.5}, 4),
        ({"cpus_per_worker": 0.5, "num_workers": 3}, 1),
        ({"cpus_per_worker": 0.5, "max_concurrent_trials": 3}, 3),
        ({"max_concurrent_trials": 1}, 1),
        ({"max_concurrent_trials": 9}, 2),
    ],
)
def test_as_many_trials_run_as_the_cpus_hold(ray_cluster, tmp_path, run, concurrent):
    assert count_concurrent_trials(Run(**run)) == concurrent
    assert check_cluster(Run(**run), tmp_path / "not" / "there" / "yet") == concurrent


@pytest.mark.parametrize(
    ("run", "missing"),
    [
        ({"num_workers": 3}, "needs 3 CPUs (3 workers of 1), and the cluster has 2; lower run.num_workers or run.cpus_per"),
        ({"cpus_per_worker": 2.5}, "needs 2.5 CPUs (1 workers of 2.5), and the cluster has 2"),
        ({"gpus_per_worker": 1}, "needs 1 GPUs (1 workers of 1), and the cluster has 0; lower run.num_workers or run.gpus"),
        ({"num_workers": 2, "gpus_per_worker": 0.5}, "needs 1 GPUs (2 workers of 0.5), and the cluster has 0"),
    ],
)  # fmt: skip
def test_what_the_cluster_does_not_have_is_named_at_once(ray_cluster, tmp_path, run, missing):
    if "gpus_per_worker" in run and ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    said = refusal_of(Run(**run), tmp_path)
    assert missing in said
    assert "or add nodes" in said


def test_storage_that_is_a_file_is_refused(ray_cluster, tmp_path):
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        said = refusal_of(Run(), storage)
        assert f"{str(tmp_path / 'file')!r} is a file; choose another run.storage" in said


def test_the_check_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write to, such as /proc")
def test_storage_that_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match=r"storage '/proc.*' cannot be written \(.+\); choose another run\.storage"):
        check_writable(Path("/proc/shoal-runs"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else for a moment")
def test_storage_of_somebody_else_is_refused(tmp_path):
    """Both a folder that may be read but not written, and one that may not even be looked into."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\); choose another run\.storage"):
            check_writable(tmp_path / "runs")
        with pytest.raises(
            ValueError, match=r"closed.*cannot be written \(Permission denied\); choose another run\.storage"
        ):
            check_writable(tmp_path / "closed" / "runs")
    finally:
        os.seteuid(0)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_nearly_full_is_refused(small_disk):
    with pytest.raises(
        ValueError, match=r"has 0\.0 GiB free, less than 2 GiB; free some space or choose another run\.storage"
    ):
        check_writable(small_disk / "runs")
    assert list(small_disk.iterdir()) == []


def test_this_disk_is_not_nearly_full(tmp_path):
    """The other side of the bound: with that much free, nothing is said."""
    assert shutil.disk_usage(tmp_path).free > MIN_FREE_BYTES, "the tests themselves need the space"
    check_writable(tmp_path)


def test_versions_are_those_that_matter():
    versions = describe_versions()
    assert set(versions) == {"python", "ray", "torch", "transformers", "shoal"}
    assert versions["ray"] == ray.__version__


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_told_at_once(address):
    """In a process of its own: this one is connected."""
    code = f"from shoal_services.cluster import connect; connect({address!r})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"ConnectionError: no Ray cluster at '{address}': ")
    assert said.endswith("; check the address, or leave it out to run here")
