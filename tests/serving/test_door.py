"""The endpoint's door over real sockets: who gets in, how much is read, and what is said to those who stay out."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from shoal_services.serving.fleet import Fleet
from shoal_services.serving.http import wire
from shoal_services.serving.http.gateway import Gateway
from shoal_services.serving.http.keys import Key, KeyRing, add_key, read_keys, revoke_key
from shoal_services.serving.http.routes import Router
from shoal_services.serving.http.server import bind
from shoal_services.serving.http.web import make_app
from shoal_services.serving.http.wire import Connection
from shoal_services.serving.settings import Limits, ServeSettings, VariantSettings

CARD = {"app": "dense-1", "model_cache": None, "sleeps": False, "perplexity": 20.0, "num_parameters": None}
SECRET = "sk-shoal-secret"


@contextmanager
def listening(app: Any) -> Iterator[tuple[str, int]]:
    """A server as the endpoint's own, on a thread; its address."""
    made = bind("127.0.0.1", 0, shared=False)
    server = uvicorn.Server(uvicorn.Config(app, http=Connection, ws="none", log_config=None, lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[made])))
    thread.start()
    yield made.getsockname()
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def gateway() -> Gateway:
    """A gateway that knows names, and nobody who answers: requests that get in end with 503 at the latest."""
    made = Gateway()
    made.router = Router({"dense": CARD, "org/name": CARD}, {"a b/ü": {"dense": 1.0}})
    made.limits = Limits(max_body_bytes=2**16)
    return made


@pytest.fixture(scope="module")
def server(gateway: Gateway) -> Iterator[tuple[str, int]]:
    app = make_app(gateway)
    app.body_within_s = app.linger_s = 0.5
    with listening(app) as found:
        yield found


@pytest.fixture
def address(gateway: Gateway, server: tuple[str, int]) -> tuple[str, int]:
    """Where the open endpoint is, for programs of this machine alone; tests change the gateway's policy."""
    gateway.keys, gateway.origins, gateway.local_only = KeyRing(None), [], True
    return server


@pytest.fixture
def http(address: tuple[str, int]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=20) as client:
        yield client


@pytest.fixture
def locked(gateway: Gateway, http: httpx.Client, tmp_path: Path) -> str:
    """The secret of the one key that opens the endpoint."""
    secret = add_key(tmp_path / "keys.json", "ours", None)
    gateway.keys, gateway.origins, gateway.local_only = KeyRing(read_keys(tmp_path / "keys.json")), ["*"], False
    return secret


def talk(address: tuple[str, int], *pieces: bytes, wait_s: float = 0.0) -> bytes:
    """Everything that the endpoint says to these bytes until it closes, or says no more for a while."""
    with socket.create_connection(address) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(wait_s)
        connection.settimeout(4)
        said = b""
        try:
            while more := connection.recv(2**16):
                said += more
        except TimeoutError:
            said += b" (still open)"
        return said


def post(*headers: str, path: str = "/v1/completions") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: localhost", *headers, "", ""]).encode()


def read_error(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"], response.text
    return error


# Models and errors


@pytest.mark.parametrize("path", ["dense", "org/name", "org%2Fname", "org%2fname", "a%20b/%C3%BC", "a%20b%2F%C3%BC"])
def test_models_are_found_by_any_spelling_of_their_names(http: httpx.Client, path: str):
    assert http.get(f"/v1/models/{path}").status_code == 200


def test_a_models_card_says_nothing_of_the_server(http: httpx.Client):
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert set(cards) == {"dense", "org/name", "a b/ü"}
    assert set(cards["dense"]) == {"id", "object", "created", "owned_by", "perplexity", "num_parameters"}
    assert cards["dense"] == http.get("/v1/models/dense").json()
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/org", 404),
        ("GET", "/v1/models/org%252Fname", 404),
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("OPTIONS", "/v1/models", 405),
    ],
)
def test_what_is_not_there_is_said_in_openais_shape(http: httpx.Client, method: str, path: str, status: int):
    response = http.request(method, path)
    assert response.status_code == status
    read_error(response)
    assert status != 405 or response.headers["allow"]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "application/json"}, b"{", 400),
        ({"content-type": "application/json"}, b"", 400),
        ({"content-type": "application/json"}, b'{"\\ud800": 1}', 400),
        ({"content-type": "application/json"}, b"[" * 60_000, 400),
        ({"content-type": "application/json"}, b'{"model": "\\ud800", "prompt": "x"}', 400),
        ({"content-type": "application/json"}, b'{"model": "gone", "prompt": "x"}', 404),
        ({"content-type": "text/plain"}, b'{"model": "gone", "prompt": "x"}', 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b'{"model": "gone", "prompt": "x"}', 415),
        ({}, b'{"model": "gone", "prompt": "x"}', 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, b"\x1f\x8b", 415),
        ({"content-type": "application/json; charset=utf-8"}, b'{"model": "gone", "prompt": "x"}', 404),
    ],
)
def test_bodies_that_cannot_be_used_leave_the_connection_usable(
    http: httpx.Client, headers: dict[str, str], body: bytes, status: int
):
    response = http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == status, response.text
    read_error(response)
    assert http.get("/health/live").status_code == 200


def test_a_mistake_of_ours_is_told_without_its_words(gateway: Gateway, http: httpx.Client):
    gateway.handles.clear()  # the KeyError would name the application
    response = http.post("/v1/completions", json={"model": "dense", "prompt": "x"})
    assert response.status_code == 500 and "dense-1" not in response.text
    assert read_error(response)["type"] == "server_error"


def test_head_says_what_get_says_but_the_body(http: httpx.Client):
    for path in ("/", "/health/live", "/v1/models"):
        response = http.head(path)
        assert (response.status_code, response.content) == (200, b"")
        assert int(response.headers["content-length"]) == len(http.get(path).content)


# Keys


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/dense", "/openapi.json", "/redoc", "/docs", "/nothing", "/tokenize"]
)
def test_all_but_page_and_health_needs_a_key(http: httpx.Client, locked: str, path: str):
    assert http.get(path).status_code == 401
    assert http.get(path, headers={"authorization": f"Bearer {locked}x"}).status_code == 401
    assert http.get(path, headers={"authorization": f"Basic {locked}"}).status_code == 401
    assert http.get(path, headers={"authorization": f"Bearer {locked}"}).status_code in (200, 404, 405)
    assert http.get("/").status_code == http.get("/health/live").status_code == 200


def test_a_stranger_is_answered_before_the_body_is_sent(address: tuple[str, int], locked: str):
    said = talk(address, post("content-type: application/json", "content-length: 60000"))
    assert said.startswith(b"HTTP/1.1 401 ") and said.endswith(b"}")
    chunked = talk(address, post("transfer-encoding: chunked"), *[b"2000\r\n" + b"x" * 8192 + b"\r\n"] * 20)
    assert chunked.startswith(b"HTTP/1.1 401 ")


def test_without_a_key_left_nobody_gets_in(gateway: Gateway, http: httpx.Client, tmp_path: Path):
    file = tmp_path / "keys.json"
    fleet = Fleet(ServeSettings(variants={"dense": VariantSettings(model="m")}, keys=file))
    with pytest.raises(ValueError, match="shoal keys add"):
        fleet.require_keys()
    secret = add_key(file, "last", None)

    def find_status() -> int:
        gateway.keys.replace([Key(**key) for key in fleet.describe()["keys"]])
        return http.get("/v1/models", headers={"authorization": f"Bearer {secret}"}).status_code

    assert find_status() == 200
    revoke_key(file, "last")
    assert find_status() == 401
    secret = add_key(file, "next", None)
    assert find_status() == 200
    for spoil in (lambda: file.write_text(file.read_text()[:20]), file.unlink):
        spoil()
        assert find_status() == 401
    secret = add_key(file, "third", None)
    assert find_status() == 200


def test_keys_added_at_once_are_all_kept(tmp_path: Path):
    file = tmp_path / "keys.json"
    threads = [threading.Thread(target=add_key, args=(file, f"k{i}", None)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(file)) == 8 and file.stat().st_mode & 0o077 == 0


def test_a_reload_gives_no_requests_back():
    key, other = Key(name="k", sha256="0" * 64, requests_per_minute=6), Key(name="o", sha256="1" * 64)
    ring = KeyRing([key])
    assert ring.take(key, now=0.0) == 0.0
    ring.replace([key, other])
    assert ring.take(key, now=0.1) > 0.0


# Sizes and times


def test_bodies_over_the_limit_are_refused_however_they_come(address: tuple[str, int], http: httpx.Client):
    response = http.post("/v1/completions", content=b"x" * 70_000, headers={"content-type": "application/json"})
    assert response.status_code == 413 and "65536 bytes" in read_error(response)["message"]
    chunk = b"2000\r\n" + b"x" * 8192 + b"\r\n"
    said = talk(address, post("transfer-encoding: chunked", "content-type: application/json"), *[chunk] * 12)
    assert said.startswith(b"HTTP/1.1 413 ") and b'"invalid_request_error"' in said
    assert talk(address, post(f"content-length: {10**30}")).startswith(b"HTTP/1.1 4")


def test_who_sends_too_slowly_is_not_waited_for(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch):
    said = talk(address, post("content-length: 9", "content-type: application/json"), *[b"x"] * 2, wait_s=0.2)
    assert said.startswith(b"HTTP/1.1 408 ") and b"still open" not in said
    monkeypatch.setattr(wire, "HEAD_WITHIN_S", 0.5)
    said = talk(address, b"GET /health HTTP/1.1\r\n", *[b"x: y\r\n"] * 2, wait_s=0.2)
    assert said.startswith(b"HTTP/1.1 408 ") and b"still open" not in said
    assert b"still open" not in talk(address), "nor one that says nothing"


def test_heads_are_limited_and_what_is_not_http_is_refused_in_words(address: tuple[str, int]):
    said = talk(address, b"GET /health HTTP/1.1\r\nx: ", b"y" * 40_000, b"y" * 40_000)
    assert said.startswith(b"HTTP/1.1 431 ")
    for wrong in (
        b"\x16\x03\x01\x02\x00\x01", b"GET", b"GET /\xff HTTP/1.1", b"CONNECT x:1 HTTP/1.1",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1", b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz",
    ):  # fmt: skip
        head, _, body = talk(address, wrong + b"\r\n\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["message"], (wrong, head, body)


def test_old_http_is_spoken_too(address: tuple[str, int], http: httpx.Client):
    said = talk(address, b"GET /v1/models HTTP/1.0\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 ") and b"still open" not in said


# Web pages

PAGE = {"origin": "https://chat.example"}
PREFLIGHT = PAGE | {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def test_with_keys_pages_of_any_origin_may_call(http: httpx.Client, locked: str):
    allowed = http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert allowed.status_code == 200, "asked without a key"
    assert allowed.headers["access-control-allow-origin"] == "*"
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    for key, status in ((locked, 200), ("wrong", 401)):
        response = http.get("/v1/models", headers=PAGE | {"authorization": f"Bearer {key}"})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, "*")


def test_only_pages_that_are_named_may_call(gateway: Gateway, http: httpx.Client):
    gateway.origins = [PAGE["origin"]]
    assert http.options("/v1/models", headers=PREFLIGHT).headers["access-control-allow-origin"] == PAGE["origin"]
    other = http.options("/v1/models", headers=PREFLIGHT | {"origin": "https://other.example"})
    assert other.status_code == 403 and "cors_origins" in read_error(other)["message"]


@pytest.mark.parametrize(
    "headers",
    [
        PAGE, PREFLIGHT, {"origin": "null"}, {"host": "rebound.example:8000"}, {"host": "192.168.0.7"}, {"host": "[::1"},
        {"host": "localhost.example"}, {"host": "127.0.0.1.example"}, {"host": "0.0.0.0"},
    ],
)  # fmt: skip
def test_without_keys_no_page_calls_this_machine(http: httpx.Client, headers: dict[str, str]):
    response = http.request("OPTIONS" if headers is PREFLIGHT else "POST", "/v1/completions", headers=headers, json={})
    assert response.status_code == 403
    assert read_error(response)["code"] in ("origin_not_allowed", "host_not_allowed")
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "127.0.0.2:80", "[::1]:8000", "shoal.localhost"])
def test_programs_and_the_playground_of_this_machine_call_it(http: httpx.Client, host: str):
    assert http.get("/v1/models", headers={"host": host}).status_code == 200
    own = http.post("/v1/completions", headers={"host": host, "origin": f"http://{host}"}, json={})
    assert own.status_code == 400


def test_who_may_call_follows_from_the_settings():
    variants = {"dense": VariantSettings(model="m")}
    plain = ServeSettings(variants=variants)
    assert (plain.local_only, plain.origins) == (True, [])
    keyed = ServeSettings(variants=variants, keys=Path("keys.json"), host="0.0.0.0")
    assert (keyed.local_only, keyed.origins) == (False, ["*"])
    assert ServeSettings(variants=variants, allow_anonymous=True).origins == []
    assert ServeSettings(variants=variants, keys=Path("k"), cors_origins=[]).origins == []
    with pytest.raises(ValueError, match="name the pages' origins"):
        ServeSettings(variants=variants, cors_origins=["*"])
    for wrong in ("chat.example", "https://chat.example/", "HTTPS://CHAT.EXAMPLE", "null", ""):
        with pytest.raises(ValueError, match="cors_origins"):
            ServeSettings(variants=variants, cors_origins=[wrong])
