"""What a fault costs a search, measured and printed: `make faults`, or `python tests/faults.py worker driver`.

Each row is a fault put into a real search of a tiny model, what was lost, and the bound that the project sets itself.
The exit code is 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster
from safetensors import SafetensorError, safe_open
from scenarios import Row, parse_choice, print_rows
from searches import LIMIT_S, Search, assert_whole, closed_port, end_tree, wait_until, write_search
from shoal_services.search.folder import TrialResult
from shoal_services.tracking.registry import KEY_TAG
from shoal_services.training.folder import OUT_OF_MEMORY
from shoal_services.training.progress_file import read_progress

NUM_STEPS = 512
SPACE = {
    "num_replaced": 2, "kind": {"choice": ["linear"]}, "distillation_tokens": NUM_STEPS * 4 * 64, "learning_rate": 0.001,
}  # fmt: skip
CHECK_EVERY = NUM_STEPS // 8
MIDWAY = 3 * CHECK_EVERY + CHECK_EVERY // 2
NOTICE_S = 6
LONG = 8


@contextmanager
def searching(**changes: dict[str, Any]) -> Iterator[Search]:
    """A search of one long distillation in a folder of its own, with changes."""
    with tempfile.TemporaryDirectory(prefix="shoal-faults-") as folder:
        given: dict[str, dict] = {"search": {"num_trials": 1, "start_with": []}, "run": {"checkpoint_every_s": 0}}
        given = {"space": SPACE, **given, **{name: given.get(name, {}) | values for name, values in changes.items()}}
        yield write_search(Path(folder), **given)


@contextmanager
def started(search: Search, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The search's process while the block runs; what it leaves of itself is ended after that."""
    process = search.start(*options)
    family: list[psutil.Process] = []
    try:
        yield process
        family = children_of(process)
    finally:
        end_tree(process, family)


def children_of(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def find_workers() -> list[psutil.Process]:
    """The Train workers of the search that this script runs."""
    return find_processes("RayTrainWorker")


def find_processes(title: str) -> list[psutil.Process]:
    """Processes that come of this script, with this in their title."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def read_trial(search: Search) -> tuple[str, int]:
    """What the search's trial is at: the stage, and the step in it."""
    for file in search.folder.root.glob("trials/*/progress.json"):
        if progress := read_progress(file):
            return progress[:2]
    return "", 0


def read_step(search: Search) -> int:
    """The step that the search's trial is at, 0 while it does not train."""
    stage, done = read_trial(search)
    return done if stage == "distil" else 0


def finish(search: Search, process: subprocess.Popen) -> TrialResult:
    """Waits for the end; the trial's result."""
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, search.errors()
    (result,) = search.folder.read_results()
    return result


@functools.cache
def run_undisturbed(length: int = 1) -> TrialResult:
    """The result of the same trial with no fault, `length` times as many steps."""
    with searching(space=lengthen(length)) as search, started(search) as process:
        return finish(search, process)


def lengthen(length: int) -> dict[str, Any]:
    """The space of a trial of `length` times as many steps."""
    return {**SPACE, "distillation_tokens": length * NUM_STEPS * 4 * 64}


def compare(result: TrialResult, length: int = 1) -> tuple[str, bool]:
    """The held-out perplexity beside that of the undisturbed run."""
    undisturbed = run_undisturbed(length)
    assert result.held_out_perplexity and undisturbed.held_out_perplexity, result.reason
    ratio = result.held_out_perplexity / undisturbed.held_out_perplexity
    return f"perplexity {result.held_out_perplexity:.4f}, undisturbed {undisturbed.held_out_perplexity:.4f}", abs(
        ratio - 1
    ) < 1e-3


def lost_row(what: str, lost: int, every: int = CHECK_EVERY) -> Row:
    """Steps that were taken twice: those since the last checkpoint, and those before it if its report was under way."""
    return Row(f"{what}: lost", f"{lost} steps", f"≤ 2 checkpoints of {every}", lost <= 2 * every)


def wait_for_step(search: Search, process: subprocess.Popen, step: int) -> int:
    """Waits until the trial is past a step; where it is then."""
    wait_until(lambda: read_step(search) > step, process, search)
    return read_step(search)


def wait_for_others(search: Search, process: subprocess.Popen, before: list[psutil.Process]) -> int:
    """Waits until other workers train in the place of those; the first step that they took."""
    known = {worker.pid for worker in before}
    wait_until(lambda: any(w.pid not in known for w in find_workers()), process, search)
    wait_until(lambda: read_step(search) == 0, process, search)  # they load
    return wait_for_step(search, process, 0)


def go_on(search: Search, at: int, *options: str) -> tuple[int, str, bool]:
    """The command of a search that ended at a step, again: the steps lost, and the result beside the undisturbed one's."""
    with started(search, *options) as process:
        wait_until(lambda: read_step(search) == 0, process, search)  # not the step that was left behind
        lost = at - wait_for_step(search, process, 0) + 1
        said, same = compare(finish(search, process))
    assert_whole(search, 1)
    return lost, said, same


def strike(
    search: Search, process: subprocess.Popen, fault: Callable[[psutil.Process], None]
) -> tuple[int, float, list[psutil.Process]]:
    """Puts a fault into a worker midway: the steps lost, the seconds until others train, and the workers of before."""
    at = wait_for_step(search, process, MIDWAY)
    victims = find_workers()
    fault(victims[0])
    struck = time.monotonic()
    lost = at - wait_for_others(search, process, victims) + 1
    return lost, time.monotonic() - struck, victims


def worker() -> list[Row]:
    """A worker killed with SIGKILL while it trains."""
    with searching() as search, started(search) as process:
        lost, seconds, _ = strike(search, process, psutil.Process.kill)
        said, same = compare(finish(search, process))
    return [
        Row("kill -9 of a worker: training goes on", f"after {seconds:.1f} s", "≤ 30 s", seconds <= 30),
        lost_row("kill -9 of a worker", lost),
        Row("kill -9 of a worker: the result", said, "the same ± 0.1 %", same),
    ]


def driver() -> list[Row]:
    """The search killed with SIGKILL when one of its three trials is over, and started again."""
    with tempfile.TemporaryDirectory(prefix="shoal-faults-") as folder:
        search = write_search(Path(folder))
        with started(search) as process:
            wait_until(lambda: search.folder.read_results(), process, search)
            family = children_of(process)
            process.kill()
            process.wait()
            end_tree(process, family)
        done = {result.key for result in search.folder.read_results()}
        search.run()
        assert_whole(search, 3)
        again = sum((search.folder.trial(key) / "faults.txt").exists() for key in done)
        said = f"{len(done)} trials were over, {3 - len(done)} made after it; one run each, none left running"
    return [Row("kill -9 of the driver, started again", said, "every trial once", again == 0)]


def terminate() -> list[Row]:
    """SIGTERM to the driver, as a cluster sends before it takes a node away; then the same command."""
    with searching() as search:
        with started(search) as process:
            at = wait_for_step(search, process, MIDWAY)
            family = children_of(process)
            process.terminate()
            process.wait(60)
            left = sum(member.is_running() for member in psutil.wait_procs(family, timeout=30)[1])
            end_tree(process, family)
        run = search.runs()[0].info.status
        stopped = f"exit code {process.returncode}, run {run}, {left} processes left"
        clean = process.returncode == 128 + signal.SIGTERM and run == "KILLED" and not left
        lost, said, same = go_on(search, at)
    return [
        Row("SIGTERM to the driver", stopped, "a clean stop", clean),
        lost_row("SIGTERM, the same command", lost),
        Row("SIGTERM, the same command: the result", said, "the same ± 0.1 %", same),
    ]


def measure_training(search: Search) -> float:
    """Seconds from the first metric of a search to its last."""
    times = [record["time_ms"] for record in read_records(search) if record["op"] == "metrics" and record["step"]]
    return (max(times) - min(times)) / 1000


def read_records(search: Search) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (search.folder.root / "tracking.jsonl").read_text().splitlines()]


def tracker() -> list[Row]:
    """No tracking server for the whole search; twice with and without in turn, the faster ones compared."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2):
        for down in (False, True):
            with searching() as search:
                search.tracking_uri = f"http://127.0.0.1:{closed_port()}" if down else None
                with started(search) as process:
                    finish(search, process)
                seconds[down].append(measure_training(search))
                if down:
                    search.tracking_uri = None
                    search.run()
                    assert_whole(search, 1)
                    told = count_told(search)
    ratio = min(seconds[True]) / min(seconds[False])
    times = f"{min(seconds[True]):.1f} s of training, {min(seconds[False]):.1f} s with it: {ratio:.2f} ×"
    return [
        Row("no tracker for the whole search", times, "≤ 1.05 ×", ratio <= 1.05),
        Row("no tracker, then the same command", f"{told[0]} of {told[1]} numbers told later", "all", told[0] == told[1]),
    ]


def count_told(search: Search) -> tuple[int, int]:
    """How many numbers of the trials MLflow has, and how many the spool."""
    client, runs = search.client(), search.runs()[1].values()
    held = sum(len(client.get_metric_history(run.info.run_id, name)) for run in runs for name in run.data.metrics)
    keys = {run.data.tags[KEY_TAG] for run in runs}
    spooled = {
        (record["key"], name, record["step"], record["time_ms"])
        for record in read_records(search) if record["op"] == "metrics" and record["key"] in keys
        for name in record["metrics"]
    }  # fmt: skip
    return held, len(spooled)


def storage() -> list[Row]:
    """A file system that is full from the middle of a training on, and has room again later."""
    with searching() as search, small_disk(search.folder.root) as resize:
        with started(search) as process:
            wait_for_step(search, process, MIDWAY)
            resize(0)
            process.communicate(timeout=LIMIT_S)
        errors, code = search.errors(), process.returncode
        halves = find_halves(search.folder.root)
        resize(ROOMY)
        before = [result.status for result in search.folder.read_results()]
        with started(search) as process:
            told, same = compare(finish(search, process))
        assert_whole(search, 1)
    said = errors.splitlines()[-1]
    clear = code == 1 and "the storage is full" in said and "Traceback" not in errors
    return [
        Row("storage full while it trains", f"exit code {code}: {said}", "says so", clear),
        Row("storage full: half files", f"{halves or 'none'}, results {before}", "none", not halves and not before),
        Row("storage with room again, the same command", told, "the same ± 0.1 %", same),
    ]


def memory() -> list[Row]:
    """Workers that may take 400 MiB more than they have before they load anything: a pass of 1024 windows takes more."""
    space = {**SPACE, "windows_per_step": 1024, "windows_per_pass": 1024, "distillation_tokens": 4 * 1024 * 64}
    results = []
    for room in (None, 400 * 2**20):
        with searching(space=space) as search, started(search) as process:
            if room:
                limit_workers(search, process, room)
            results.append(finish(search, process))
            errors = " ".join(search.errors().split())
    free, short = results
    assert free.held_out_perplexity and short.held_out_perplexity, short.reason
    told = len(short.faults) == 1 and short.faults[0].startswith(OUT_OF_MEMORY) and short.faults[0][:40] in errors
    ratio = short.held_out_perplexity / free.held_out_perplexity
    said = f"perplexity {short.held_out_perplexity:.4f}, with enough {free.held_out_perplexity:.4f}"
    return [
        Row("too little memory for a pass", "; ".join(short.faults)[:100], "said, one retry", told),
        Row("too little memory: in passes of one window", said, "the same ± 0.1 %", abs(ratio - 1) < 1e-3),
    ]


def limit_workers(search: Search, process: subprocess.Popen, room: int) -> None:
    """Limits the memory of the next two workers, each when it begins to load."""
    limited: set[int] = set()

    def limit_new() -> bool:
        if read_trial(search)[0] == "load":
            for one in find_workers():
                if one.pid not in limited:
                    one.rlimit(psutil.RLIMIT_AS, (one.memory_info().vms + room,) * 2)
                    limited.add(one.pid)
        return len(limited) == 2

    wait_until(limit_new, process, search)


def hang() -> list[Row]:
    """One of two workers stopped by SIGSTOP while it trains; a step may take 15 s."""
    run = {"num_workers": 2, "step_limit_s": 15}
    with searching(run=run) as search, started(search) as process:
        lost, seconds, victims = strike(search, process, psutil.Process.suspend)
        said, same = compare(finish(search, process))
        left = sum(victim.is_running() for victim in victims)
    goes_on = f"after {seconds:.1f} s, {left} workers left behind"
    return [
        Row("a worker hangs: training goes on", goes_on, "≤ 15 s + 30 s, 0", seconds <= 45 and not left),
        lost_row("a worker hangs", lost),
        Row("a worker hangs: the result", said, "the same ± 0.1 %", same),
    ]


def node() -> list[Row]:
    """One of two nodes dies."""
    return lose_node("a node dies", notice_s=0)


def preemption() -> list[Row]:
    """One of two nodes is taken away, some seconds after Ray was told so; the only checkpoint is made upon that."""
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"  # clouds give half a minute, this script seconds
    return lose_node("a node is taken away with notice", notice_s=NOTICE_S, checkpoint_every_s=3600)


def lose_node(what: str, *, notice_s: int, checkpoint_every_s: int = 0) -> list[Row]:
    """One of two nodes, that of the trial's driver; one worker is enough (`num_workers: [1, 2]`)."""
    with (
        nodes(2, with_drivers=not notice_s) as cluster,
        searching(run={"num_workers": [1, 2], "checkpoint_every_s": checkpoint_every_s}) as search,
        started(search, "--address", cluster.address) as process,
    ):
        at = wait_for_step(search, process, MIDWAY)
        victims, drivers = find_workers(), find_processes("ImplicitFunc")
        driver_family = {member.pid for member in drivers[0].parents()}
        dying = [one for one in cluster.worker_nodes if raylet_of(one) in driver_family]
        gone = (dying or list(cluster.worker_nodes))[0]
        if notice_s:
            give_notice(cluster, gone, notice_s)
            at = read_step(search) or at
        told = time.monotonic()
        cluster.remove_node(gone, allow_graceful=False)
        lost = at - wait_for_others(search, process, victims) + 1
        seconds, now = time.monotonic() - told, len(find_workers())
        said, same = compare(finish(search, process))
    what += ", no other checkpoint" * bool(notice_s)
    goes_on = f"after {seconds:.1f} s, {now} of {len(victims)} workers{', and another driver' if dying else ''}"
    held = seconds <= 120 and (now, len(victims)) == (1, 2)
    return [
        Row(f"{what}: training goes on", goes_on, "≤ 120 s, 1 of 2", held),
        lost_row(what, lost),
        Row(f"{what}: the result", said, "the same ± 0.1 %", same),
    ]


def growth() -> list[Row]:
    """A second node comes while a trial trains on the first (`num_workers: [1, 2]`); Train looks for more every minute."""
    with (
        nodes(1) as cluster,
        searching(space=lengthen(LONG), run={"num_workers": [1, 2]}) as search,
        started(search, "--address", cluster.address) as process,
    ):
        wait_for_step(search, process, CHECK_EVERY)
        before = find_workers()
        cluster.add_node(num_cpus=1)
        come = time.monotonic()
        wait_until(
            lambda: len({worker.pid for worker in find_workers()} - {one.pid for one in before}) == 2, process, search
        )
        at = read_step(search)
        lost = at - wait_for_others(search, process, before) + 1 if at else 0
        seconds, now = time.monotonic() - come, len(find_workers())
        result = finish(search, process)
    said, same = compare(result, LONG)
    goes_on = f"after {seconds:.1f} s, {now} workers in the place of {len(before)}, {len(result.faults)} faults"
    held = seconds <= 120 and (len(before), now) == (1, 2) and not result.faults
    return [
        Row("a node comes: training goes on", goes_on, "≤ 120 s, 2 for 1, no fault", held),
        lost_row("a node comes", lost, LONG * CHECK_EVERY),
        Row("a node comes: the result", said, "the same ± 0.1 %", same),
    ]


def head() -> list[Row]:
    """The head's GCS dies and comes back 5 s later, its state on disk."""
    with (
        lasting_gcs(),
        nodes(2) as cluster,
        searching() as search,
        started(search, "--address", cluster.address) as process,
    ):
        wait_for_step(search, process, MIDWAY)
        before = {worker.pid for worker in find_workers()}
        cluster.head_node.kill_gcs_server()
        time.sleep(5)
        cluster.head_node.start_gcs_server()
        back = time.monotonic()
        at = read_step(search)
        wait_for_step(search, process, at)
        seconds, kept = time.monotonic() - back, before == {worker.pid for worker in find_workers()}
        result = finish(search, process)
    said, same = compare(result)
    goes_on = f"after {seconds:.1f} s, {'the same' if kept else 'other'} workers, {len(result.faults)} restarts"
    return [
        Row("the head's GCS dies: training goes on", goes_on, "≤ 30 s, no restart", seconds <= 30 and not result.faults),
        Row("the head's GCS dies: the result", said, "the same ± 0.1 %", same),
    ]


def machine() -> list[Row]:
    """The head's machine is lost, and with it the search's driver; then the same command on another cluster."""
    with searching() as search:
        with nodes(2) as cluster, started(search, "--address", cluster.address) as process:
            at = wait_for_step(search, process, MIDWAY)
            gone = time.monotonic()
            cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
            process.wait(LIMIT_S)
            seconds, code = time.monotonic() - gone, process.returncode
        with nodes(2) as cluster:
            lost, said, same = go_on(search, at, "--address", cluster.address)
    return [
        Row(
            "the head's machine is lost",
            f"exit code {code} after {seconds:.1f} s",
            "1, ≤ 120 s",
            code == 1 and seconds <= 120,
        ),
        lost_row("the head's machine, the same command on another cluster", lost),
        Row("the head's machine: the result", said, "the same ± 0.1 %", same),
    ]


@contextmanager
def lasting_gcs() -> Iterator[None]:
    """Inside, a cluster that is started keeps its head's state on disk (Ray's RocksDB store), instead of in memory."""
    with tempfile.TemporaryDirectory(prefix="shoal-gcs-") as folder:
        settings = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": folder}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name in settings:
                del os.environ[name]


def give_notice(cluster: Cluster, one: Node, seconds: int) -> None:
    """What a cloud tells before it takes a node away, as Ray's autoscaler passes it on; returns when the time is up."""
    words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away", "--node-id", one.node_id]
    words += ["--deadline-remaining-seconds", str(seconds), "--address", cluster.address]
    begun = time.monotonic()
    subprocess.run([Path(sys.executable).with_name("ray"), "drain-node", *words], check=True, capture_output=True)
    time.sleep(max(0.0, begun + seconds - time.monotonic()))


@contextmanager
def nodes(count: int, *, with_drivers: bool = False) -> Iterator[Cluster]:
    """A Ray cluster of a head without CPUs and nodes of one CPU, which the trials' drivers are on if so wished."""
    head_args = {"num_cpus": 0} | ({"memory": 1} if with_drivers else {})
    cluster = Cluster(initialize_head=True, head_node_args=head_args)
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def raylet_of(one: Node) -> int:
    (process,) = one.all_processes["raylet"]
    return process.process.pid


ROOMY = 3 * 2**30


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """A file system of its own at the folder, with so many bytes of room as the last call said."""

    def resize(room: int) -> None:
        used = shutil.disk_usage(folder).used if folder.is_mount() else 0
        action = "remount," if folder.is_mount() else ""
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{action}size={used + max(room, 4096)}", "tmpfs", folder], check=True
        )

    folder.mkdir(parents=True, exist_ok=True)
    resize(ROOMY)
    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def find_halves(root: Path) -> list[str]:
    """Files that a reader would take for whole and that are not, and folders of models without their weights."""
    broken = []
    for file in root.rglob("*"):
        try:
            # Tune's own folder is its scratch: a search that goes on begins by deleting it.
            if file.name.startswith(".") or not file.is_file() or file.is_relative_to(root / "tune"):
                continue
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    list(opened.keys())
        except (ValueError, SafetensorError):
            broken.append(str(file.relative_to(root)))
    models = [place for place in root.glob("trials/*/model") if not (place / "model.safetensors").exists()]
    return broken + [str(place.relative_to(root)) for place in models]


SCENARIOS: list[Callable[[], list[Row]]] = [
    worker, driver, terminate, tracker, storage, memory, hang, node, preemption, growth, head, machine,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, chosen = parse_choice(parser, SCENARIOS)
    rows = (row for scenario in chosen for row in scenario())
    print_rows(f"faults in searches on {os.cpu_count()} cores", "what was lost", rows)


if __name__ == "__main__":
    main()
