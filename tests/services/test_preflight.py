"""What the cluster cannot do is refused before any work, with what is missing and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import ray
from shoal_services.cluster.preflight import (
    MIN_FREE_BYTES,
    NodeReport,
    check_cluster,
    check_nodes,
    check_writable,
    describe_versions,
    fit_trials,
    look_from_node,
    require_equal,
)
from shoal_services.cluster.resources import Maximum, NodeShape, read_maximum, read_nodes
from shoal_services.search.config import Run


def refusal_of(run: Run, storage: Path) -> str:
    """What is said about a run that cannot be, within seconds."""
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        check_cluster(run, storage)
    assert time.monotonic() - started < 5
    return str(caught.value)


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
    cleared = check_cluster(Run(**run), tmp_path / "not" / "there" / "yet")
    assert (cleared.concurrent, cleared.remarks) == (concurrent, [])


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


FIXED = Maximum(None, is_unknown=False)
NODES = {"10.0.0.1": NodeShape(0), "10.0.0.2": NodeShape(4), "10.0.0.3": NodeShape(4, gpus=1)}


@pytest.mark.parametrize(
    ("run", "concurrent"),
    [
        ({}, 8),
        ({"cpus_per_worker": 3}, 2),  # 8 CPUs hold 2 workers of 3, and 2 more CPUs are in two places
        ({"cpus_per_worker": 3, "num_workers": 2}, 1),
        ({"cpus_per_worker": 0.1}, 80),
        ({"gpus_per_worker": 0.5}, 2),
        ({"cpus_per_worker": 3, "gpus_per_worker": 0.5}, 1),
    ],
)
def test_a_worker_fits_on_one_node_or_nowhere(run, concurrent):
    assert fit_trials(Run(**run), NODES, FIXED).concurrent == concurrent


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"cpus_per_worker": 6}, "a worker needs 6 CPUs on one node"),
        (
            {"cpus_per_worker": 2.5, "num_workers": 3},
            "has 3 of them; 10.0.0.1 has 0 CPUs and holds 0, 10.0.0.2 has 4 CPUs and",
        ),
        ({"num_workers": 9}, "needs 9 CPUs (9 workers of 1), and the cluster has 8; lower run.num_workers or run.cpus_per"),
        ({"cpus_per_worker": 2, "gpus_per_worker": 0.4, "num_workers": 3}, "needs 1.2 GPUs"),
        (
            {"cpus_per_worker": 4, "gpus_per_worker": 0.5, "num_workers": 2},
            "a worker needs 4 CPUs and 0.5 GPUs on one node",
        ),
    ],
)
def test_a_worker_that_fits_nowhere_is_refused(run, said):
    with pytest.raises(ValueError) as caught:
        fit_trials(Run(**run), NODES, FIXED)
    assert said in str(caught.value)
    assert str(caught.value).endswith(("or add nodes", "or add larger nodes"))


def test_a_cluster_that_grows_is_measured_by_what_it_may_become():
    grown = Maximum([(NodeShape(0), 1), (NodeShape(8), 3)], is_unknown=False)
    cleared = fit_trials(Run(cpus_per_worker=6), NODES, grown)
    assert cleared.concurrent == 3
    assert "the cluster may grow, and the search waits" in cleared.remarks[0]
    with pytest.raises(ValueError, match=r"a worker needs 9 CPUs on one node.*; possible node 1 has 0 CPUs and holds 0, "):
        fit_trials(Run(cpus_per_worker=9), NODES, grown)
    # The present nodes are never more than there may be.
    assert fit_trials(Run(), NODES, Maximum([(NodeShape(1), 1)], is_unknown=False)).concurrent == 8


def test_a_cluster_that_grows_without_saying_how_far_is_not_refused():
    cleared = fit_trials(Run(cpus_per_worker=6), NODES, Maximum(None, is_unknown=True))
    assert cleared.concurrent == 1
    assert "a worker needs 6 CPUs on one node" in cleared.remarks[0]
    assert "how far cannot be read from it: the search waits for nodes" in cleared.remarks[0]


def test_a_local_cluster_does_not_grow(ray_cluster):
    assert read_maximum() == FIXED
    assert list(read_nodes().values()) == [NodeShape(2, ray.cluster_resources().get("GPU", 0))]


def test_limits_that_the_cluster_reports_are_read(ray_cluster):
    """As a platform reports them, to the same place of the GCS."""
    from ray.core.generated import autoscaler_pb2
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    place = {"namespace": ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode()}
    key = ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode()
    config = autoscaler_pb2.ClusterConfig()
    config.node_group_configs.add(resources={"CPU": 8, "GPU": 2}, max_count=5)
    _internal_kv_put(key, config.SerializeToString(), **place)
    try:
        assert read_maximum() == Maximum([(NodeShape(8, 2), 5)], is_unknown=False)
    finally:
        _internal_kv_del(key, **place)


def make_report(**changes: object) -> NodeReport:
    values = {
        "node": "10.0.0.2",
        "versions": describe_versions(),
        "sees_marker": True,
        "complaint": None,
        "own_marker": "/",
    }
    return NodeReport(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {**describe_versions(), "torch": "1.0"}}, "node 10.0.0.2 runs torch 1.0, this machine "),
        ({"versions": {}}, "node 10.0.0.2 runs python None"),
        ({"sees_marker": False}, "node 10.0.0.2 does not see storage '/mnt/runs'"),
        ({"complaint": "storage '/mnt/runs' cannot be written (Read-only file system); choose"}, "node 10.0.0.2: storage "),
        ({"own_marker": "/not/there"}, "what node 10.0.0.2 writes to storage '/mnt/runs' is not seen here"),
    ],
)
def test_a_node_that_differs_is_named(changes, said):
    require_equal([make_report()], describe_versions(), Path("/mnt/runs"))
    with pytest.raises(ValueError) as caught:
        require_equal([make_report(), make_report(**changes)], describe_versions(), Path("/mnt/runs"))
    assert said in str(caught.value)


def test_a_node_reports_what_it_sees_and_writes(tmp_path):
    (tmp_path / "marker").write_text("")
    report = look_from_node("here", str(tmp_path / "marker"), ("/bin", "/no/such/model"))
    assert report.sees_marker and report.complaint is None and Path(report.own_marker).parent == tmp_path
    assert Path(report.own_marker).exists()
    assert not look_from_node("here", str(tmp_path / "other"), ()).sees_marker


def test_nodes_are_asked_and_leave_nothing(ray_cluster, tmp_path):
    check_nodes(ray.nodes(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write to, such as /proc")
def test_a_node_that_cannot_write_says_so():
    report = look_from_node("here", "/proc/self/status", ())
    assert report.sees_marker and "cannot be written" in report.complaint


def test_a_silent_tracker_is_a_remark(ray_cluster, tmp_path):
    cleared = check_cluster(Run(tracking_uri="http://127.0.0.1:1"), tmp_path)
    (said,) = cleared.remarks
    assert said.startswith("tracking server http://127.0.0.1:1 does not answer") and "the search goes on" in said
    assert check_cluster(Run(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path).remarks == []
