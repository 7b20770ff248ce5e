"""The endpoint as a declarative Serve application: deployed through Ray's dashboard, answering behind Serve's proxy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve.schema import ServeDeploySchema
from searches import closed_port
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.store import save
from shoal.recipe import Recipe
from shoal_services.serving.app import build, read_settings
from shoal_services.serving.load import Load, run_load
from shoal_services.serving.settings import ServeSettings

ARGS: dict[str, Any] = {"variants": {"dense": {"model": "tiny-random"}}, "allow_anonymous": True}


def test_the_builder_makes_a_rollout_of_strict_settings():
    rollout = build(ARGS | {"gateways": 3})._bound_deployment
    assert (rollout.name, rollout.num_replicas) == ("rollout", 1)
    settings = ServeSettings.model_validate(rollout.init_args[0])
    assert (settings.variants["dense"].model, settings.gateways) == ("tiny-random", 3)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (ARGS | {"port": 80}, "port mean nothing behind Serve's proxy"),
        (ARGS | {"variant": {}}, "unknown key 'variant' in args; did you mean 'variants'"),
        (ARGS | {"allow_anonymous": False}, "no API keys are set"),
        (ARGS | {"variants": {}}, "variants"),
    ],
)
def test_wrong_settings_are_said_when_it_is_built(args: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        build(args)


def test_json_is_enough_to_carry_the_settings():
    settings = read_settings(ARGS | {"keys": "/etc/shoal/keys.json", "results": "/mnt/shoal/results"})
    values = settings.model_dump(mode="json", exclude={"host", "port", "address"})
    assert read_settings(values) == settings


@pytest.fixture
def client(ray_cluster: None) -> Iterator[ServeSubmissionClient]:
    from ray._private.worker import _global_node

    assert _global_node is not None
    yield ServeSubmissionClient(f"http://{_global_node.webui_url}")
    serve.shutdown()


def wait_until(holds: Callable[[], bool], *, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.3)


def find_processes(name: str) -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if f"ServeReplica:{name}" in " ".join(p.cmdline())}


@pytest.mark.slow
def test_a_declared_application_serves_follows_and_survives(
    client: ServeSubmissionClient, tiny_random: str, tmp_path: Path
):
    """Deployed as KubeRay does it: answers, streams, rolls out, outlives its rollout, and changes under load."""
    folder = tmp_path / "model"
    save(
        load_model(tiny_random, dtype="float32"), load_tokenizer(tiny_random), folder,
        recipe=Recipe(base_model=tiny_random, num_replaced=0),
    )  # fmt: skip
    port = closed_port()
    args = {
        "variants": {
            "dense": {"model": str(folder), "dtype": "float32"},
            "later": {"model": "models:/tiny@balanced", "dtype": "float32"},
        },
        "routes": {"tiny": {"dense": 1, "later": 1}},
        "results": str(tmp_path / "results"), "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
        "allow_anonymous": True, "watch_every_s": 0.5, "rollback_s": 1,
    }  # fmt: skip
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def deploy(changes: dict[str, Any]) -> None:
        config = {
            "proxy_location": "EveryNode", "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [
                {
                    "name": "shoal", "route_prefix": None, "import_path": "shoal_services.serving.app:build",
                    "args": args | changes,
                }
            ],
        }  # fmt: skip
        ServeDeploySchema.model_validate(config)
        client.deploy_applications(config)

    def find_statuses() -> dict[str, str]:
        return {name: app["status"] for name, app in client.get_serve_details()["applications"].items()}

    def send(count: int) -> Counter[int]:
        load = Load(f"http://127.0.0.1:{port}/v1", "dense", ["The sea"], count, 4, rate_per_s=4.0)
        return Counter(answer.status if answer.finished else 0 for answer in asyncio.run(run_load(load)).answers)

    deploy({})
    wait_until(lambda: find_statuses().get("shoal") == "RUNNING")
    assert http.get("/-/healthz").text == "success"
    assert {card["id"] for card in http.get("/v1/models").json()["data"]} == {"dense", "tiny"}, "`later` is not there yet"

    request = {"model": "tiny", "prompt": "The sea", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    whole = http.post("/v1/completions", json=request).json()["choices"][0]["text"]
    with http.stream("POST", "/v1/completions", json=request | {"stream": True}) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole
    assert http.post("/v1/completions", json=request | {"model": "nobody"}).status_code == 404

    first = next(name for name in find_statuses() if name.startswith("dense-"))
    (folder / "point.txt").write_text("another version")
    wait_until(lambda: first not in find_statuses())  # the next one has taken over, and `rollback_s` has passed
    assert http.post("/v1/completions", json=request).status_code == 200

    variants, gateways, (rollout,) = map(find_processes, ("dense", "gateway", "shoal:rollout"))
    os.kill(rollout, signal.SIGKILL)
    assert http.post("/v1/completions", json=request).status_code == 200
    wait_until(lambda: len(find_processes("shoal:rollout") - {rollout}) == 1 and find_statuses()["shoal"] == "RUNNING")
    assert find_processes("dense") == variants, "the next rollout finds what runs, and leaves it"

    with ThreadPoolExecutor(1) as pool:
        statuses = pool.submit(send, 60)
        deploy({"limits": {"max_context": 256}})
        tokens = {"model": "dense", "prompt": "The sea"}
        wait_until(lambda: http.post("/tokenize", json=tokens).json()["max_model_len"] == 256)
        assert statuses.result() == {200: 60}
    assert find_processes("gateway") == gateways, "told of the change, not replaced"

    client.deploy_applications({"applications": []})
    wait_until(lambda: find_statuses() == {})
