"""Answers on their way: what counts is that they go on, not how long they take; and how they end when the endpoint does."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx2 as httpx
import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus
from shoal_services.serving.deployments import make_gateway, make_variant
from shoal_services.serving.engine.generation import Call, Delta, EngineFailed, Piece, QueueFull
from shoal_services.serving.http.failures import BrokenOff, describe_failure
from shoal_services.serving.http.gateway import Gateway
from shoal_services.serving.http.health import HEALTHY, read_state
from shoal_services.serving.http.record import RequestRecord
from shoal_services.serving.http.server import GatewayServer
from shoal_services.serving.http.stream import AnswerStream
from shoal_services.serving.replica.channel import Inbox, Outbox, Reply
from shoal_services.serving.settings import Limits, ServeSettings, VariantSettings

CARD = {"app": "a", "model_cache": None, "sleeps": False, "perplexity": None, "num_parameters": None}
CONFIG = {
    "variants": {"dense": CARD}, "routes": {}, "shadows": {}, "observer": None, "keys": None, "origins": [],
    "local_only": True,
}  # fmt: skip


class Replica:
    """Stands where Serve's handle does: sends pieces at its own pace, by the real channel."""

    def __init__(self, num_pieces: int, every_s: float, error: Exception | None = None):
        self.num_pieces, self.every_s, self.error = num_pieces, every_s, error
        self.outbox = Outbox()

    @property
    def generate(self) -> Replica:
        return self

    def remote(self, _call: Call, reply: Reply) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._send(reply))

    async def _send(self, reply: Reply) -> None:
        for number in range(self.num_pieces):
            await asyncio.sleep(self.every_s)
            is_last = number == self.num_pieces - 1 and self.error is None
            self.outbox.put(reply, Piece(Delta(text="x", finish_reason="length" if is_last else None), 1))
            self.outbox.flush()
        await asyncio.sleep(0.1)
        if self.error is not None:
            raise self.error


def open_stream(replica: Replica, timeout_s: float) -> AnswerStream:
    record = RequestRecord("dense", None, [Call("x", 9)] * 2, lambda _record: None)
    return AnswerStream(Inbox("127.0.0.1"), replica, record, timeout_s=timeout_s)  # type: ignore[arg-type]


def test_an_answer_takes_as_long_as_it_goes_on():
    async def run() -> None:
        whole = await open_stream(Replica(8, 0.1), timeout_s=0.4).collect()
        assert [piece.delta.text for piece in whole] == ["x" * 8] * 2
        streamed = open_stream(Replica(8, 0.1), timeout_s=0.4)
        await streamed.take_firsts()
        assert len([index async for index, _ in streamed]) == 16
        for wait in (lambda stream: stream.collect(), lambda stream: stream.take_firsts()):
            slow = open_stream(Replica(2, 5.0), timeout_s=0.2)
            with pytest.raises(TimeoutError, match=r"no token came for 0\.2 s"):
                await wait(slow)
            slow.close()

    asyncio.run(run())


def test_failures_have_a_status_and_no_words_of_the_servers():
    secret = "/srv/models/secret"
    for error, status in (
        (QueueFull("full"), 429), (TimeoutError("late"), 504), (BrokenOff("gone"), 503), (EngineFailed(secret), 503),
        (ActorDiedError(), 503), (RuntimeError(secret), 500), (FileNotFoundError(2, "No such file", secret), 500),
        (ValueError("the prompt has no tokens\nTraceback"), 400),
    ):  # fmt: skip
        found, message = describe_failure(error)
        assert found == status and message and secret not in message and "Traceback" not in message


def ask(port: int, **more: Any) -> httpx.Request:
    body = {"model": "dense", "prompt": "x", **more}
    return httpx.Request("POST", f"http://127.0.0.1:{port}/v1/completions", json=body)


def start(replica: Replica, **limits: float) -> tuple[GatewayServer, int]:
    server = GatewayServer("127.0.0.1", 0)
    gateway: Gateway = server.gateway
    gateway.handles["a"] = replica  # type: ignore[assignment]
    return server, server._socket.getsockname()[1]


@pytest.mark.parametrize(("num_pieces", "drain_s"), [(10, 5.0), (100, 0.5)])
def test_a_stop_lets_answers_end_and_tells_those_that_do_not(num_pieces: int, drain_s: float):
    async def run() -> None:
        server, port = start(Replica(num_pieces, 0.1))
        await server.reconfigure(CONFIG | {"limits": Limits(drain_s=drain_s).model_dump()})
        async with httpx.AsyncClient(timeout=20) as client:
            streamed, whole = (
                asyncio.create_task(client.send(ask(port, stream=stream), stream=False)) for stream in (True, False)
            )
            await asyncio.sleep(0.5)
            started = time.monotonic()
            await server.__del__()
            assert time.monotonic() - started < 5
            events = [json.loads(line[6:]) for line in (await streamed).text.split("\n\n") if line.startswith("data: {")]
            if num_pieces == 10:
                assert len(events) == 10 and (await streamed).text.endswith("[DONE]\n\n")
                assert (await whole).json()["choices"][0]["text"] == "x" * 10
            else:
                assert "the endpoint has stopped" in events[-1]["error"]["message"]
                assert "[DONE]" not in (await streamed).text
                assert (await whole).status_code == 503
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)

    asyncio.run(run())


def test_a_stream_of_a_replica_that_dies_ends_with_an_error():
    async def run() -> None:
        server, port = start(Replica(3, 0.02, ActorDiedError()))
        await server.reconfigure(CONFIG | {"limits": Limits().model_dump()})
        async with httpx.AsyncClient(timeout=20) as client:
            streamed = await client.send(ask(port, stream=True))
            assert "the replica that was answering has died" in streamed.text.split("\n\n")[-2]
            assert (await client.send(ask(port))).status_code == 503
        await server.__del__()

    asyncio.run(run())


def test_serve_waits_longer_than_answers_may_go_on():
    settings = ServeSettings(variants={"dense": VariantSettings(model="m")}, limits=Limits(drain_s=300))
    for application in (make_variant("dense", "m", settings), make_gateway({}, settings, proxied=True)):
        assert application._bound_deployment._deployment_config.graceful_shutdown_timeout_s > 302


@pytest.mark.parametrize(
    ("status", "replicas", "sleeps", "state"),
    [
        (DeploymentStatus.HEALTHY, {"RUNNING": 1}, False, "ready"),
        (DeploymentStatus.UNHEALTHY, {"RUNNING": 1, "STARTING": 1}, False, "ready"),
        (DeploymentStatus.UNHEALTHY, {"STARTING": 1, "STOPPING": 1}, False, "down"),
        (DeploymentStatus.UPDATING, {"STARTING": 1}, False, "starting"),
        (DeploymentStatus.HEALTHY, {}, True, "asleep"),
        (DeploymentStatus.UPSCALING, {"STARTING": 1}, True, "waking"),
        (DeploymentStatus.UNHEALTHY, {"STARTING": 1}, True, "down"),
        (None, {}, False, "gone"),
    ],
)
def test_a_variant_is_well_if_it_answers_or_sleeps(status: Any, replicas: dict[Any, int], sleeps: bool, state: str):
    deployment = DeploymentStatusOverview(status, DeploymentStatusTrigger.UNSPECIFIED, replicas, "")
    application = ApplicationStatusOverview(ApplicationStatus.RUNNING, "", 0.0, {"variant": deployment})
    known = ServeStatus(applications={} if status is None else {"a": application})
    assert read_state(known, CARD | {"sleeps": sleeps}) == state
    assert (state in HEALTHY) == (state in ("ready", "asleep", "waking"))
