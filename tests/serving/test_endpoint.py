"""The endpoint over real HTTP: OpenAI's own client, whatever a stranger may send, and changes under load."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import mlflow
import openai
import psutil
import pytest
import ray
import schemathesis
from conftest import make_point
from hypothesis import HealthCheck, given, settings
from mlflow.entities import Run
from searches import closed_port
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.store import save
from shoal.recipe import Recipe
from shoal_services.serving.endpoint import Endpoint
from shoal_services.serving.http.keys import Key, KeyRing, add_key, revoke_key
from shoal_services.serving.http.routes import Router, UnknownModel
from shoal_services.serving.load import Load, run_load
from shoal_services.serving.settings import Limits, ModelCacheSettings, ServeSettings, ShadowSettings, VariantSettings
from shoal_services.serving.sources import read_sources
from shoal_services.tracking.promote import promote
from shoal_services.tracking.registry import find_registered
from shoal_services.tracking.tracker import Tracker

LIMITS = Limits(max_batch_size=4, max_queued=8, max_context=256, max_tokens=16, max_body_bytes=65536)
COMPLETIONS = "/v1/completions"
SMALL = {"model": "dense", "prompt": "The sea", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tiny_random: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two folders that hold the same tiny model."""
    root = tmp_path_factory.mktemp("models")
    model, tokenizer = load_model(tiny_random, dtype="float32"), load_tokenizer(tiny_random)
    for name in ("first", "second"):
        save(model, tokenizer, root / name, recipe=Recipe(base_model=tiny_random, num_replaced=0))
    return [str(root / name) for name in ("first", "second")]


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    made = Endpoint(
        ServeSettings(
            port=closed_port(),
            variants={
                "dense": VariantSettings(model=folders[0], dtype="float32", perplexity=20.0, num_parameters=1000),
                "balanced": VariantSettings(model=folders[1], dtype="float32"),
            },
            routes={"tiny": {"dense": 90, "balanced": 10}},
            limits=LIMITS,
            results=tmp_path_factory.mktemp("results"),
            report_every_s=0.5,
        )
    )
    made.start(lambda *_: None)
    yield made
    made.stop()


@pytest.fixture
def http(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0)


# OpenAI's client


def test_models_and_routes_are_listed(client: openai.OpenAI):
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {"dense", "balanced", "tiny"}
    assert found["dense"].perplexity == 20.0  # type: ignore[attr-defined]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="did you mean 'dense'"):
        client.models.retrieve("densee")


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI):
    arguments = {"model": "dense", "prompt": "Once", "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**arguments)
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 12)
    assert len({chunk.id for chunk in chunks}) == 1


def test_prompts_choices_and_seeds(client: openai.OpenAI):
    arguments = {"model": "dense", "prompt": ["one", "two"], "n": 2, "max_tokens": 8, "seed": 7}
    first, again = (client.completions.create(**arguments) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert first.choices[0].text != first.choices[1].text, "each choice has a seed of its own"
    alone = client.completions.create(model="dense", prompt="two", max_tokens=8, seed=8)
    assert alone.choices[0].text == first.choices[3].text


def test_token_ids_are_a_prompt_too(client: openai.OpenAI, http: httpx.Client):
    ids = http.post("/tokenize", json={"model": "dense", "prompt": "Hello"}).json()
    assert (ids["count"], ids["max_model_len"]) == (5, 256)
    by_text, by_ids = (
        client.completions.create(model="dense", prompt=prompt, max_tokens=6, temperature=0)
        for prompt in ("Hello", ids["tokens"])
    )
    assert by_text.choices[0].text == by_ids.choices[0].text


def test_log_probabilities_come_with_the_tokens(client: openai.OpenAI):
    answer = client.completions.create(model="dense", prompt="ab", max_tokens=3, temperature=0, logprobs=2, echo=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens[:2] == ["a", "b"]
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    # Two bytes that are no character by themselves have one text.
    assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs[1:])
    assert logprobs.text_offset[:3] == [0, 1, 2]


def test_a_stop_string_ends_the_text(client: openai.OpenAI):
    arguments = {"model": "dense", "prompt": "ab", "max_tokens": 16, "seed": 3, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**arguments).choices[0].text
    cut = next(character for character in text if text.index(character) > 0)
    stopped = client.completions.create(**arguments, stop=[cut]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(cut)], "stop")


def test_a_model_without_chat_template_refuses_chats(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="dense", messages=[{"role": "user", "content": "Hello"}])


# What a stranger may send


def without(name: str) -> dict:
    return {key: value for key, value in SMALL.items() if key != name}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "JSON"),
        (b"\xff\xfe", 400, ""),
        (b"[]", 400, ""),
        (b"null", 400, ""),
        (without("model"), 400, "model"),
        (without("prompt"), 400, "prompt"),
        (SMALL | {"model": "dens"}, 404, "did you mean 'dense'"),
        (SMALL | {"max_tokens": "4"}, 400, "max_tokens"),
        (SMALL | {"max_tokens": -1}, 400, "max_tokens"),
        (SMALL | {"max_tokens": 4.5}, 400, "max_tokens"),
        (SMALL | {"max_tokens": 1000}, 400, "maximum context length is 256 tokens"),
        (SMALL | {"prompt": "x" * 2000}, 400, "maximum context length is 256 tokens"),
        (SMALL | {"prompt": "x" * 100_000}, 413, "65536 bytes"),
        (SMALL | {"prompt": ""}, 400, "no tokens"),
        (SMALL | {"prompt": []}, 400, "prompt"),
        (SMALL | {"prompt": [999_999]}, 400, "outside the vocabulary"),
        (SMALL | {"prompt": ["x"] * 33}, 400, "prompt"),
        (SMALL | {"temperature": 3}, 400, "temperature"),
        (SMALL | {"top_p": 0}, 400, "top_p"),
        (SMALL | {"n": 1000}, 400, "n"),
        (SMALL | {"seed": 2**70}, 400, "seed"),
        (SMALL | {"stop": ["a"] * 5}, 400, "stop"),
        (SMALL | {"stop": ""}, 400, "stop"),
        (SMALL | {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        (SMALL | {"logit_bias": {"1": 1}}, 400, "unsupported parameter 'logit_bias'"),
        (SMALL | {"best_of": 3}, 400, "best_of"),
        (SMALL | {"prompt": "half \ud83d a pair"}, 400, "surrogate"),
        (b'{"model": "dense", "prompt": "x", "temperature": NaN}', 400, "temperature"),
        (b"[" * 50_000, 400, ""),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(http: httpx.Client, body: dict | bytes, status: int, says: str):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    response = http.post(COMPLETIONS, content=raw, headers=headers)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert says in error["message"]
    assert error["type"] and "Traceback" not in response.text
    streamed = http.post(
        COMPLETIONS, content=raw.replace(b'"max_tokens"', b'"stream": true, "max_tokens"'), headers=headers
    )
    assert streamed.status_code == status or "stream_options" in body
    assert http.post(COMPLETIONS, json=SMALL).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_context_that_is_exceeded_has_its_code(client: openai.OpenAI, stream: bool):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as caught:
        client.completions.create(model="dense", prompt="The sea", max_tokens=250, stream=stream)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_counted_once_whatever_comes_of_it(client: openai.OpenAI, stream: bool):
    arguments = {"model": "dense", "prompt": ["one", "three"], "n": 3, "max_tokens": 2, "extra_body": {"ignore_eos": True}}
    if stream:
        usage = [*client.completions.create(**arguments, stream=True, stream_options={"include_usage": True})][-1].usage
    else:
        usage = client.completions.create(**arguments).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (8, 12)


def test_unknown_paths_and_methods_have_the_shape_too(http: httpx.Client):
    assert http.get("/v1/nothing").json()["error"]["message"]
    assert http.get(COMPLETIONS).status_code == 405
    assert http.get("/health").json() == {"status": "ok", "variants": {"dense": "ready", "balanced": "ready"}}


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_nothing_that_the_schema_allows_or_forbids_breaks_it(endpoint: Endpoint, mode: schemathesis.GenerationMode):
    schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            assert case.call(timeout=60).status_code < 500

        if mode is schemathesis.GenerationMode.POSITIVE or operation.body:
            check()


def test_prometheus_finds_what_each_variant_does(endpoint: Endpoint, http: httpx.Client):
    http.post(COMPLETIONS, json=SMALL | {"max_tokens": 5})
    (node,) = ray.nodes()
    wanted = {"time_to_first_token_ms_count", "inter_token_ms_count", "prompt_tokens_total", "generated_tokens_total"}
    wanted |= {"batch_size", "queue_length"}
    deadline = time.monotonic() + 60  # Ray gathers every few seconds
    missing = wanted
    while missing and time.monotonic() < deadline:
        time.sleep(1)
        page = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics").text
        lines = [line for line in page.splitlines() if line.startswith("ray_shoal_") and 'variant="dense"' in line]
        missing = {name for name in wanted if not any(line.startswith(f"ray_shoal_{name}{{") for line in lines)}
    assert not missing, lines
    assert http.get("/metrics").status_code == 404, "not for strangers"


# Routes


def test_a_route_keeps_its_weights_and_its_users():
    router = Router({"dense": {}, "balanced": {}}, {"tiny": {"dense": 90, "balanced": 10}})
    found = Counter(router.choose("tiny", f"user {i}") for i in range(2000))
    assert 130 < found["balanced"] < 270  # 200 ± 5 standard errors
    assert all(router.choose("tiny", f"user {i}") == router.choose("tiny", f"user {i}") for i in range(50))
    assert set(Counter(router.choose("tiny", None) for _ in range(300))) == {"dense", "balanced"}
    with pytest.raises(UnknownModel, match="there are dense, balanced, tiny"):
        router.choose("gpt-4", None)


def test_the_answer_names_the_variant_that_a_route_chose(client: openai.OpenAI):
    models = {client.completions.create(**(ROUTED | {"user": f"{i}"})).model for i in range(30)}
    assert models == {"dense", "balanced"}
    assert len({client.completions.create(**(ROUTED | {"user": "one"})).model for _ in range(5)}) == 1


ROUTED = {"model": "tiny", "prompt": "a", "max_tokens": 1}


def find_runs(endpoint: Endpoint, **params: str) -> list[Run]:
    """What MLflow has of these variants of routes, or shadows."""
    if not (endpoint.settings.results / "tracking.runs.position").exists():
        return []  # two processes that make the same database get in each other's way
    client = mlflow.MlflowClient(f"sqlite:///{endpoint.settings.results / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(endpoint.settings.experiment)
    wanted = " and ".join(f"params.{name} = '{value}'" for name, value in params.items())
    return list(client.search_runs([experiment.experiment_id], wanted)) if experiment else []


def wait_for_metrics(endpoint: Endpoint, least: dict[str, float], **params: str) -> dict[str, float]:
    """The metrics of the one run of that kind, once each of `least` has at least that value."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        runs = find_runs(endpoint, **params)
        if runs and all(runs[0].data.metrics.get(name, -1) >= value for name, value in least.items()):
            assert len(runs) == 1
            return dict(runs[0].data.metrics)
        time.sleep(0.2)
    raise AssertionError(f"no run of {params} with {least}: {[run.data.metrics for run in runs]}")


def test_mlflow_shows_what_came_of_a_routes_requests(endpoint: Endpoint, client: openai.OpenAI):
    dense = next(f"u{i}" for i in range(99) if Router({}, endpoint.settings.routes).choose("tiny", f"u{i}") == "dense")
    for stream in (False, True):
        answer = client.completions.create(model="tiny", prompt="The sea", max_tokens=4, user=dense, stream=stream)
        if stream:
            list(answer)
    # Requests of other tests, none of them streamed, may still be on their way: two of them are not enough.
    metrics = wait_for_metrics(endpoint, {"requests": 2, "first_token_ms_mean": 0}, route="tiny", variant="dense")
    assert metrics["answered"] >= 2
    assert metrics["latency_ms_p99"] >= metrics["latency_ms_p50"] > 0 and metrics["first_token_ms_mean"] > 0


def test_a_shadow_of_the_same_weights_agrees(endpoint: Endpoint, client: openai.OpenAI):
    before = endpoint.settings
    endpoint.reconcile(before.model_copy(update={"shadows": {"dense": ShadowSettings(variant="balanced")}}))
    for stream in (False, True):
        answer = client.completions.create(model="dense", prompt="A ship", max_tokens=8, temperature=0, stream=stream)
        if stream:
            list(answer)
    client.completions.create(model="dense", prompt="A ship", max_tokens=8, temperature=1)  # chance is not compared
    metrics = wait_for_metrics(endpoint, {"requests": 2}, shadow="dense", variant="balanced")
    assert metrics["requests"] == 2 and metrics["agreement"] == metrics["identical"] == 1
    assert metrics["shadow_latency_ms_mean"] > 0 and metrics["latency_ms_mean"] > 0
    endpoint.reconcile(before)


# Under load


def send(endpoint: Endpoint, model: str, num_requests: int, **more) -> list[int]:
    """The status of each of many requests at once; 0 for an answer that broke off."""
    load = Load(f"{endpoint.url}/v1", model, ["The sea", "A ship"], num_requests, **{"num_new": 8, **more})
    return [
        answer.status if answer.finished or answer.status != 200 else 0 for answer in asyncio.run(run_load(load)).answers
    ]


def test_a_full_queue_says_429_and_when_to_come_back(endpoint: Endpoint, http: httpx.Client):
    found = Counter(send(endpoint, "dense", 60, num_new=100))
    assert set(found) == {200, 429}, found
    assert found[200] >= 2 * LIMITS.max_batch_size, "those that were let in are answered"
    with ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(lambda _: http.post(COMPLETIONS, json=SMALL | {"max_tokens": 200}), range(40)))
    refused = [response for response in responses if response.status_code == 429]
    assert refused and all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert send(endpoint, "dense", 4) == [200] * 4


@pytest.mark.slow
def test_shared_variants_take_turns_in_one_process(endpoint: Endpoint, folders: list[str]):
    before = endpoint.settings
    shared = {f"rare-{i}": VariantSettings(model=folders[i % 2], dtype="float32", shared=True) for i in range(3)}
    more = {"variants": before.variants | shared, "model_cache": ModelCacheSettings(max_loaded=2)}
    endpoint.reconcile(before.model_copy(update=more))
    with ThreadPoolExecutor(3) as pool:
        statuses = pool.map(lambda name: send(endpoint, name, 6, concurrency=2), [*shared, *shared])
        assert [*statuses] == [[200] * 6] * 6, "also while they make room for each other"
    family = psutil.Process().children(recursive=True)
    assert sum("ServeReplica:model_cache" in " ".join(process.cmdline()) for process in family) == 1
    endpoint.reconcile(before)
    assert set(send(endpoint, "rare-0", 1)) == {404}


def test_a_shared_variant_that_cannot_be_loaded_is_refused_at_once(endpoint: Endpoint, folders: list[str], tmp_path: Path):
    before, damaged = endpoint.settings, tmp_path / "damaged"
    shutil.copytree(folders[0], damaged)
    (damaged / "model.safetensors").write_bytes(b"cut off")
    shared = {"rare": VariantSettings(model=str(damaged), shared=True)}
    (said,) = endpoint.reconcile(before.model_copy(update={"variants": before.variants | shared}))
    assert said.startswith("rare stays as it is: variant 'rare' cannot be loaded") and str(damaged) in said
    assert set(send(endpoint, "rare", 1)) == {404}
    endpoint.reconcile(before)


def test_clients_that_go_away_harm_nobody(endpoint: Endpoint, http: httpx.Client):
    for _ in range(12):
        with http.stream("POST", COMPLETIONS, json=SMALL | {"max_tokens": 200, "stream": True}) as response:
            next(response.iter_lines())
    started = time.monotonic()
    assert send(endpoint, "dense", 4, concurrency=4) == [200] * 4
    assert time.monotonic() - started < 20


def test_who_goes_away_before_the_answer_is_there_frees_the_row(endpoint: Endpoint):
    body = json.dumps(SMALL | {"max_tokens": 200}).encode()
    headers = ["host: localhost", "content-type: application/json", f"content-length: {len(body)}"]
    head = "\r\n".join([f"POST {COMPLETIONS} HTTP/1.1", *headers, "", ""])

    def wait_behind_others(*, leave: bool) -> float:
        others = [socket.create_connection((endpoint.settings.host, endpoint.settings.port)) for _ in range(10)]
        for other in others:
            other.sendall(head.encode() + body)
        time.sleep(0.3)
        for other in others if leave else []:
            other.close()
        started = time.monotonic()
        assert send(endpoint, "dense", 1, num_new=1) == [200]
        seconds = time.monotonic() - started
        for other in others:
            other.close()
        return seconds

    # Ten requests on four rows: who comes eleventh waits for most of them, unless they are gone.
    assert wait_behind_others(leave=True) < wait_behind_others(leave=False) / 2


def test_a_killed_replica_costs_the_requests_on_it_and_no_others(endpoint: Endpoint, http: httpx.Client):
    def find_replica() -> int | None:
        family = psutil.Process().children(recursive=True)
        return next((p.pid for p in family if "ServeReplica:balanced" in " ".join(p.cmdline())), None)

    replica = find_replica()
    assert replica is not None
    with ThreadPoolExecutor(1) as pool:
        statuses = pool.submit(send, endpoint, "balanced", 90, rate_per_s=6.0)
        time.sleep(3)
        os.kill(replica, signal.SIGKILL)
        while (health := http.get("/health")).status_code == 200:
            assert not statuses.done(), "health never said it"
            time.sleep(0.1)
        assert health.json()["variants"]["dense"] == "ready" != health.json()["variants"]["balanced"]
        assert http.get("/health/live").status_code == 200
        found = Counter(statuses.result())
    # A request takes far less than a second here: few of six a second are on the replica at one time. Those that come
    # before the next replica is up wait for it, as many as the queue holds.
    assert found[0] + found[503] <= LIMITS.max_batch_size + LIMITS.max_queued, "those that it ran, and its queue"
    assert set(found) <= {0, 200, 429, 503} and found[200] > 8
    assert find_replica() not in (None, replica)
    assert send(endpoint, "balanced", 4) == [200] * 4


def test_another_version_is_rolled_out_and_back_without_a_failed_request(endpoint: Endpoint, folders: list[str]):
    changed = endpoint.settings.variants["balanced"].model_copy(update={"model": folders[0]})
    before = endpoint.settings
    after = before.model_copy(update={"variants": before.variants | {"balanced": changed}})
    with ThreadPoolExecutor(1) as pool:
        # Few enough for the small queue, also while the next version's imports take the cores for seconds.
        statuses = pool.submit(send, endpoint, "balanced", 40, rate_per_s=1.5)
        time.sleep(2)
        assert endpoint.reconcile(after) == [f"balanced is now {folders[0]}"]
        started = time.monotonic()
        assert endpoint.reconcile(before) == [f"balanced is now {folders[1]}"]
        assert time.monotonic() - started < 5, "the version before is still there"
        assert Counter(statuses.result()) == {200: 40}


@pytest.mark.slow
def test_a_version_that_does_not_start_leaves_the_old_one(endpoint: Endpoint, tmp_path: Path):
    broken = endpoint.settings.variants["balanced"].model_copy(update={"model": str(tmp_path)})
    before = endpoint.settings
    after = before.model_copy(update={"variants": before.variants | {"balanced": broken}})
    (said,) = endpoint.reconcile(after)
    assert "balanced stays as it is" in said and str(tmp_path) in said
    assert send(endpoint, "balanced", 2) == [200] * 2
    assert endpoint.reconcile(after) == [], "said once"
    endpoint.reconcile(before)


@pytest.mark.slow
def test_moving_an_alias_in_the_registry_moves_the_endpoint(endpoint: Endpoint, folders: list[str], tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(tmp_path, uri=uri, experiment="tiny")
    tracker.start_run("search", name="search")
    for key, folder, aliases in (("a", folders[0], ["dense"]), ("b", folders[1], ["balanced"])):
        tracker.start_run(key, name=key, parent="search")
        tracker.register("tiny", key, source=folder, tags={}, aliases=aliases)
    assert tracker.close() == 0
    before = endpoint.settings
    named = before.variants["balanced"].model_copy(update={"model": "models:/tiny@balanced"})
    variants = before.variants | {"balanced": named}
    endpoint.reconcile(before.model_copy(update={"variants": variants, "tracking_uri": uri}))
    assert endpoint.served["balanced"].place == folders[1]
    done = promote("models:/tiny@dense", "tiny@balanced", uri)
    assert (done.before.source, done.now.source) == (folders[1], folders[0])
    assert endpoint.reconcile() == [f"balanced is now {folders[0]}"]
    assert send(endpoint, "balanced", 2) == [200] * 2
    with pytest.raises(ValueError, match="registry has no 'models:/tiny@gone'"):
        find_registered("models:/tiny@gone", uri)
    endpoint.reconcile(before)


# Keys


def test_with_keys_strangers_stay_out(endpoint: Endpoint, tmp_path: Path):
    file = tmp_path / "keys.json"
    secret, slow = add_key(file, "ours", None), add_key(file, "slow", 6)
    assert secret not in file.read_text() and file.stat().st_mode & 0o077 == 0
    before = endpoint.settings
    endpoint.reconcile(before.model_copy(update={"keys": file}))
    try:
        url = f"{endpoint.url}/v1"
        with pytest.raises(openai.AuthenticationError, match="valid API key"):
            openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0).models.list()
        assert httpx.get(f"{endpoint.url}/health").status_code == 200
        assert len(openai.OpenAI(base_url=url, api_key=secret).models.list().data) == 3
        limited = openai.OpenAI(base_url=url, api_key=slow, max_retries=0)
        limited.models.list()
        with pytest.raises(openai.RateLimitError, match="6 requests a minute") as caught:
            limited.models.list()
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for name in ("ours", "slow"):
            revoke_key(file, name)
        (said,) = endpoint.reconcile()
        assert said.startswith("nobody gets in: ") and endpoint.reconcile() == []
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key=secret, max_retries=0).models.list()
        anybody = before.model_copy(update={"host": "0.0.0.0", "keys": None, "allow_anonymous": False})
        endpoint.settings = anybody.model_copy(update={"keys": file})
        with pytest.raises(ValueError, match="no API keys are set"):
            endpoint.reconcile(before)  # a file that says another host does not move where it listens
        endpoint.settings = before.model_copy(update={"keys": file})
    finally:
        endpoint.reconcile(before)


@pytest.mark.slow
def test_a_stop_waits_for_streams_longer_than_half_a_minute(tiny_random: str, tmp_path: Path):
    """By the command itself: who streams at SIGTERM gets all of it, nobody else gets in, and nothing red is printed."""
    port, log = closed_port(), tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(["shoal", "serve", tiny_random, "--port", str(port)], stdout=output, stderr=output)
    base = f"http://127.0.0.1:{port}"

    def find_health() -> int:
        try:
            return httpx.get(f"{base}/health", timeout=60).status_code
        except httpx.TransportError:
            return 0

    while find_health() != 200:
        assert process.poll() is None, log.read_text()
        time.sleep(0.5)
    family = psutil.Process(process.pid).children(recursive=True)
    (replica,) = (p for p in family if f"ServeReplica:{Path(tiny_random).name}" in " ".join(p.cmdline()))
    request = {"model": Path(tiny_random).name, "prompt": "The sea", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{base}{COMPLETIONS}", json=request, timeout=300) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        replica.suspend()
        process.send_signal(signal.SIGTERM)
        time.sleep(34)
        assert find_health() == 0 and process.poll() is None
        replica.resume()
        *pieces, last = lines
    assert last == "data: [DONE]" and len(pieces) == 499
    assert process.wait(timeout=120) == 0
    _, left = psutil.wait_procs(family, timeout=10)
    assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []  # where nobody reaps orphans
    said = log.read_text()
    assert "running requests finish first" in said and "retries" not in said and "\x1b[31m" not in said, said


def test_a_rate_is_kept_over_time():
    ring, key = KeyRing([]), Key(name="k", sha256="0" * 64, requests_per_minute=60)
    waits = [ring.take(key, now=0.0) for _ in range(12)]
    assert waits[:10] == [0.0] * 10 and all(wait > 0 for wait in waits[10:])
    assert ring.take(key, now=1.1) == 0.0
    assert ring.take(key, now=1.1) > 0.0


def test_other_machines_need_keys():
    variants = {"dense": VariantSettings(model="tiny-random")}
    with pytest.raises(ValueError, match="shoal keys add"):
        ServeSettings(host="0.0.0.0", variants=variants)
    assert ServeSettings(host="0.0.0.0", variants=variants, allow_anonymous=True).host == "0.0.0.0"
    assert ServeSettings(host="::1", variants=variants).keys is None


def test_a_port_that_is_taken_is_said_before_anything_starts():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        settings = ServeSettings(port=port, variants={"dense": VariantSettings(model="tiny-random")})
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            Endpoint(settings).start(lambda *_: None)


def test_a_searchs_folder_gives_its_variants_also_after_it_was_moved(tmp_path: Path):
    points = []
    for count, kind in ((2, "linear"), (4, "folded"), (6, "linear")):
        place = Path("trials", f"key{count}", "model")
        (tmp_path / place).mkdir(parents=True)
        arguments = {"num_replaced": count, "blocks": tuple(range(count)), "kind": kind}
        points.append(make_point(1000 - count, 20.0 + count, artefact="/gone" / place, **arguments))
    picks = {"best": points[0].artefact, "balanced": points[0].artefact, "smallest": points[2].artefact}
    frontier = [point.model_dump(mode="json") for point in points]
    (tmp_path / "frontier.json").write_text(json.dumps({"picks": picks, "frontier": frontier}))
    variants = read_sources([str(tmp_path)]).variants
    assert list(variants) == ["dense", "best", "folded-4", "smallest"]
    assert variants["best"].model == str(tmp_path / "trials" / "key2" / "model")
    assert [variant.shared for variant in variants.values()] == [False, False, True, False]
    (tmp_path / "frontier.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        read_sources([str(tmp_path)])


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        (["./gone"], "no model folder './gone'"),
        (["gone.yaml"], "cannot read 'gone.yaml'"),
        (["tiny-random", "tiny-random"], "two variants named 'tiny-random'"),
    ],
)
def test_sources_that_are_not_there_are_said_at_once(sources: list[str], says: str):
    with pytest.raises(ValueError, match=says):
        read_sources(sources)


def test_vllm_has_settings_of_its_own():
    with pytest.raises(ValueError, match="engine_options are vLLM's"):
        VariantSettings(model="m", engine_options={"enforce_eager": True})
    with pytest.raises(ValueError, match="cannot set trust_remote_code"):
        VariantSettings(model="m", engine="vllm", engine_options={"trust_remote_code": True})
    with pytest.raises(ValueError, match="cannot be shared"):
        VariantSettings(model="m", engine="vllm", shared=True)


def test_shadows_must_be_other_variants():
    variants = {name: VariantSettings(model="m") for name in ("a", "b")}
    for name, shadow, says in (("a", "c", "no variant 'c'"), ("c", "a", "no variant 'c'"), ("a", "a", "own shadow")):
        with pytest.raises(ValueError, match=says):
            ServeSettings(variants=variants, shadows={name: ShadowSettings(variant=shadow)})


def test_routes_must_lead_somewhere():
    variants = {"dense": VariantSettings(model="tiny-random")}
    for routes in ({"a": {"gone": 1.0}}, {"dense": {"dense": 1.0}}, {"a": {}}, {"a": {"dense": 0.0}}):
        with pytest.raises(ValueError, match="route"):
            ServeSettings(variants=variants, routes=routes)
