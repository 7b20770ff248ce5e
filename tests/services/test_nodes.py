"""A cluster of hosts with addresses of their own: a search submitted from a laptop, and nodes that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hosts import BIN, Hosts, can_make_hosts, make_hosts
from shoal_services.search.folder import RunFolder

HEAD, NODES, LAPTOP, STRANGER = 1, (2, 3), 9, 4
SHOAL = str(BIN / "shoal")
LIMIT_S = 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_hosts(), reason="needs root and Linux's network and mount namespaces"),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, tiny_random: str) -> Iterator[Hosts]:
    """A head without CPUs, two nodes of one CPU, and a laptop that is in no cluster."""
    # Ray's sockets need a short path.
    ray_folder = Path(f"/tmp/shoal-{os.getpid()}")
    ray_folder.mkdir()
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "COLUMNS": "160"}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    try:
        with make_hosts(environment, tmp_path_factory.mktemp("logs")) as made:
            made.start_raylet(HEAD, num_cpus=0)
            for index in NODES:
                made.start_raylet(index, num_cpus=1)
            made.plug_in(LAPTOP)
            yield made
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def write_config(root: Path, folder: Path, **run: object) -> Path:
    data = yaml.safe_load((root / "tune_configs" / "smoke.yaml").read_text())
    file = folder / "smoke.yaml"
    file.write_text(yaml.safe_dump({**data, "run": run}))
    return file


def wait_until(happened: Callable[[], object], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def read_numbers(folder: RunFolder) -> dict[str, tuple[float, float, int]]:
    """By trial: held-out perplexity, perplexity and parameters."""
    results = folder.read_results()
    assert [result.status for result in results] == ["finished"] * len(results)
    return {r.key: (r.held_out_perplexity, r.point.perplexity, r.point.num_parameters) for r in results}


def read_first_step(folder: RunFolder) -> float:
    """When the first training step was reported, in seconds of the epoch."""
    records = map(json.loads, (folder.root / "tracking.jsonl").read_text().splitlines())
    return min(r["time_ms"] for r in records if r["op"] == "metrics" and "loss" in r["metrics"]) / 1000


def find_nodes_of_workers(hosts: Hosts) -> list[str]:
    """The node of every Train worker that the cluster has had."""
    code = (
        "import json; from ray.util.state import list_actors; "
        f"found = list_actors({hosts.dashboard!r}, filters=[('class_name', '=', 'RayTrainWorker')], limit=500); "
        "print(json.dumps([actor.node_id for actor in found]))"
    )
    return json.loads(hosts.run(LAPTOP, sys.executable, "-c", code).stdout.splitlines()[-1])


def test_a_search_from_a_laptop_that_is_closed(hosts, storage, root, tmp_path):
    """Submitted and followed; refused a second time; detached, taken up again, and whole."""
    words = [SHOAL, "submit", str(root / "tune_configs" / "smoke.yaml"), "--address", hosts.dashboard]
    words += ["--storage", str(storage)]
    log, errors = tmp_path / "log.txt", tmp_path / "errors.txt"
    submitted_at = time.time()
    with log.open("w") as out, errors.open("w") as err:
        first = hosts.start(LAPTOP, *words, stdout=out, stderr=err)
    wait_until(lambda: "Running entrypoint" in log.read_text(), first, errors)
    job = errors.read_text().split()[1]

    second = hosts.run(LAPTOP, *words)
    assert second.returncode == 1 and f"is running as job {job}" in second.stderr

    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    assert f"job {job} runs on" in errors.read_text() and f"shoal logs {job} --follow" in errors.read_text()

    followed = hosts.run(LAPTOP, SHOAL, "logs", "smoke", "--follow", "--address", hosts.dashboard, limit_s=LIMIT_S)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert f"job {job}: SUCCEEDED, results in {storage / 'smoke'}" in followed.stderr
    assert hosts.token not in followed.stdout

    folder = RunFolder(storage / "smoke")
    print(f"submit to first training step: {read_first_step(folder) - submitted_at:.1f} s")
    assert len(json.loads((folder.root / "frontier.json").read_text())["frontier"]) >= 1
    assert len(set(find_nodes_of_workers(hosts))) == 2, "one CPU a node: two trials at once are on two nodes"

    alone = hosts.run(LAPTOP, SHOAL, "search", words[2], "--storage", str(tmp_path), "--num-cpus", "1", limit_s=LIMIT_S)
    assert alone.returncode == 0, alone.stderr
    there, here = read_numbers(folder), read_numbers(RunFolder(tmp_path / "smoke"))
    assert there.keys() == here.keys() and len(there) == 3
    for key, numbers in there.items():
        assert numbers == pytest.approx(here[key], rel=1e-5)


def test_workers_on_two_hosts_share_a_models_weights(hosts, storage, root, tmp_path):
    """After the test above, whose search of whole models has the same trials."""
    config, shared = write_config(root, tmp_path, streamed=True, num_workers=2), tmp_path / "shared"
    shared.mkdir()
    words = ["submit", str(config), "--address", hosts.dashboard, "--storage", str(shared)]
    said = hosts.run(LAPTOP, SHOAL, *words, limit_s=LIMIT_S)
    assert said.returncode == 0, said.stdout + said.stderr
    found, expected = (read_numbers(RunFolder(place / "smoke")) for place in (shared, storage))
    assert found.keys() == expected.keys()
    for key, numbers in found.items():
        assert numbers == pytest.approx(expected[key], rel=1e-4)


def test_a_stopped_search_leaves_no_run_behind(hosts, root, tmp_path):
    storage = tmp_path / "shared"
    storage.mkdir()
    words = ["--storage", str(storage), "--address", hosts.dashboard]
    sent = hosts.run(LAPTOP, SHOAL, "submit", str(root / "tune_configs" / "smoke.yaml"), *words, "--detach")
    job = sent.stderr.split()[1]
    folder = RunFolder(storage / "smoke")
    deadline = time.monotonic() + LIMIT_S
    while not folder.read_started():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    stopped = hosts.run(LAPTOP, SHOAL, "stop", "smoke", "--address", hosts.dashboard)
    assert f"job {job}: STOPPED" in stopped.stderr, stopped.stderr
    ended = [json.loads(line) for line in (folder.root / "tracking.jsonl").read_text().splitlines()]
    assert [(r["op"], r.get("status")) for r in ended][-2:] == [("orphans", None), ("end", "KILLED")]


def refusal_of(hosts: Hosts, config: Path, storage: Path) -> str:
    """What the job of a search that cannot run says at its end."""
    words = ["submit", str(config), "--address", hosts.dashboard, "--storage", str(storage)]
    said = hosts.run(LAPTOP, SHOAL, *words, limit_s=LIMIT_S)
    assert said.returncode == 1, said.stdout + said.stderr
    assert "Traceback" not in said.stdout
    return " ".join(said.stdout.split())


def test_a_worker_that_fits_on_no_node_is_refused(hosts, root, tmp_path):
    config = write_config(root, tmp_path, cpus_per_worker=2)
    said = refusal_of(hosts, config, tmp_path)
    assert "a worker needs 2 CPUs on one node, and a trial has 1 of them; 10.92.0.1 has 0 CPUs and holds 0, " in said
    assert "or add larger nodes" in said


def test_a_cluster_takes_its_token_alone(hosts):
    said = hosts.run(LAPTOP, SHOAL, "jobs", "--address", hosts.dashboard, RAY_AUTH_TOKEN="f" * 64)
    assert said.returncode == 1 and "to the cluster's token" in said.stderr
    assert json.loads(hosts.run(LAPTOP, SHOAL, "jobs", "--json", "--address", hosts.dashboard).stdout)


def test_a_node_that_does_not_share_the_storage_is_named(hosts, root, tmp_path):
    storage = tmp_path / "shared"
    storage.mkdir()
    hosts.start_raylet(STRANGER, num_cpus=1, private=storage)
    try:
        said = refusal_of(hosts, root / "tune_configs" / "smoke.yaml", storage)
        assert f"node {hosts.address(STRANGER)} does not see storage '{storage}/smoke'" in said
        assert "run.storage must be a folder that all of them share" in said
    finally:
        hosts.remove(STRANGER)
