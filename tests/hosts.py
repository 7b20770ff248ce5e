"""Several hosts on one machine: network and mount namespaces with addresses of their own, a raylet in each. Needs root."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
START_LIMIT_S = 240
RAY_START = ("--block", "--disable-usage-stats", "--object-store-memory=100000000")


@dataclass
class Hosts:
    """A switch and the hosts on it. The first host that is started is the head of a Ray cluster with a token."""

    name: str
    environment: dict[str, str]
    logs: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    raylets: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def dashboard(self) -> str:
        return "http://10.92.0.1:8265"

    def address(self, index: int) -> str:
        return f"10.92.0.{index}"

    def namespace(self, index: int) -> str:
        return f"{self.name}-{index}"

    def plug_in(self, index: int) -> None:
        """Makes a host with an address on the switch."""
        inside, cable = self.namespace(index), f"cable{index}"
        _run(f"ip netns add {inside}")
        _run(f"ip -n {self.name} link add {cable} type veth peer name eth0 netns {inside}")
        _run(f"ip -n {self.name} link set {cable} master switch up")
        _run(f"ip -n {inside} addr add {self.address(index)}/24 dev eth0")
        for device in ("lo", "eth0"):
            _run(f"ip -n {inside} link set {device} up")

    def start_raylet(self, index: int, *, num_cpus: int, private: Path | None = None) -> None:
        """A node of the cluster; `private` is a folder that it has as a disk of its own instead of sharing it."""
        self.plug_in(index)
        role = ("--head", "--dashboard-host=0.0.0.0") if index == 1 else (f"--address={self.address(1)}:6379",)
        words = [str(BIN / "ray"), "start", *role, f"--node-ip-address={self.address(index)}", f"--num-cpus={num_cpus}"]
        # Ray's folder is each host's own: nodes that share it delete each other's working directories.
        own = [self.environment["RAY_TMPDIR"], *([str(private)] if private else [])]
        mounts = "".join(f"mount -t tmpfs tmpfs {shlex.quote(folder)} && " for folder in own)
        script = f"{mounts}exec {shlex.join([*words, *RAY_START])}"
        log = self.logs / f"raylet{index}.txt"
        with log.open("w") as file:
            process = self.start(index, "unshare", "--mount", "sh", "-c", script, stdout=file, stderr=file)
        self.raylets[self.namespace(index)] = process
        deadline = time.monotonic() + START_LIMIT_S
        while "Ray runtime started" not in (said := log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.5)

    def start(self, index: int, *words: str, **options) -> subprocess.Popen:
        """A process on a host, which has the cluster's token."""
        command = ["ip", "netns", "exec", self.namespace(index), *words]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
        return subprocess.Popen(command, env=self.environment | self.secret, text=True, start_new_session=True, **options)

    @property
    def secret(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def run(self, index: int, *words: str, limit_s: float = 300, **changes: str) -> subprocess.CompletedProcess[str]:
        """A process on a host, to its end."""
        command = ["ip", "netns", "exec", self.namespace(index), *words]
        environment = self.environment | self.secret | changes
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=limit_s, check=False)

    def remove(self, index: int) -> None:
        """Ends every process of a host, and the host."""
        inside = self.namespace(index)
        if (process := self.raylets.pop(inside, None)) is not None:
            process.send_signal(signal.SIGTERM)
            _wait(process, 10)
        for pid in _run(f"ip netns pids {inside}").split():
            with _suppressed():
                os.kill(int(pid), signal.SIGKILL)
        if process:
            _wait(process, 10)
        _run(f"ip netns del {inside}")

    def close(self) -> None:
        found = [line.split()[0] for line in _run("ip netns list").splitlines()]
        for namespace in found:
            if namespace.startswith(f"{self.name}-"):
                self.remove(int(namespace.rpartition("-")[2]))
        _run(f"ip netns del {self.name}")


@contextmanager
def make_hosts(environment: dict[str, str], logs: Path) -> Iterator[Hosts]:
    """A switch without hosts; all hosts and their processes end with the block."""
    hosts = Hosts(f"shoal{os.getpid()}", environment, logs)
    _run(f"ip netns add {hosts.name}")
    try:
        _run(f"ip -n {hosts.name} link add switch type bridge")
        _run(f"ip -n {hosts.name} link set switch up")
        yield hosts
    finally:
        hosts.close()


def can_make_hosts() -> bool:
    """Whether this is root on a Linux that allows network and mount namespaces."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False).returncode == 0


@contextmanager
def _suppressed() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return


def _wait(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _run(command: str) -> str:
    return subprocess.run(shlex.split(command), check=True, capture_output=True, text=True).stdout
