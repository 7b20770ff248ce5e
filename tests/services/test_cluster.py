"""Connecting to Ray: once, and quickly told where nobody listens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import ray
from shoal_services.cluster.connect import connect


def test_connecting_twice_is_connecting_once(ray_cluster):
    before = ray.get_runtime_context().gcs_address
    connect(None)
    connect("auto", num_cpus=7)
    assert ray.get_runtime_context().gcs_address == before
    assert ray.cluster_resources()["CPU"] == 2


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_told_at_once(address):
    """In a process of its own: this one is connected."""
    code = f"from shoal_services.cluster.connect import connect; connect({address!r})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"ConnectionError: no Ray cluster at '{address}': ")
    assert said.endswith("; check the address, or leave it out to run here")
