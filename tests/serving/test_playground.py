"""The playground in a real browser: against the real endpoint, and against a fake one that misbehaves on purpose."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

SHOAL = Path(sys.executable).with_name("shoal")
LIMIT_S = 120
SECRET = "sk-shoal-secret"
MODELS = [
    {"id": "smallest", "perplexity": 40.0, "num_parameters": 95_200_000},
    {"id": "balanced", "perplexity": 25.0, "num_parameters": 113_300_000},
    {"id": "dense", "perplexity": 20.0, "num_parameters": 134_500_000},
    {"id": "torn", "perplexity": None, "num_parameters": None},
    {"id": "mixed", "route": {"dense": 90.0, "balanced": 10.0}},
]  # fmt: skip


def wait_until(happened: Callable[[], Any], limit_s: float = LIMIT_S, what: Callable[[], str] = lambda: "") -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := happened()):
        assert time.monotonic() < deadline, f"it did not happen in time; {what()}"
        time.sleep(0.05)
    return found


class Page:
    """The playground in a browser, with names for what is on it."""

    def __init__(self, browser: Any, url: str):
        self.browser = browser
        self.resize(1280)
        browser.get(url)

    def resize(self, width: int) -> None:
        """Windows of a headless browser cannot be narrow; its pages can."""
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def find(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Of both columns."""
        return [element.text for element in self.browser.find_elements(By.CSS_SELECTOR, f".column {selector}")]

    def chosen(self) -> list[str]:
        return [select.get_attribute("value") for select in self.browser.find_elements(By.CSS_SELECTOR, ".column select")]

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def focused(self) -> str:
        active = self.browser.switch_to.active_element
        return active.get_attribute("id") or active.get_attribute("data-model") or active.tag_name

    def set(self, name: str, value: str) -> None:
        field = self.find(f"#{name}")
        field.clear()
        field.send_keys(value)

    @property
    def is_running(self) -> bool:
        return self.find("#run").get_attribute("aria-disabled") == "true"

    def wait_for_models(self) -> None:
        wait_until(lambda: all(self.chosen()), what=lambda: self.find("#status").text)

    def wait_for_end(self) -> None:
        wait_until(lambda: not self.is_running, what=lambda: str(self.texts(".note")))

    def overflows(self) -> bool:
        return self.browser.execute_script(
            "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    # Containers have a small /dev/shm, and often run as root, whom Chromium's sandbox refuses.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class FakeEndpoint(BaseHTTPRequestHandler):
    """OpenAI's interface as a bad network delivers it: byte by byte, with either line ending, broken off, refused."""

    protocol_version = "HTTP/1.0"
    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        if self.path == "/":
            page = files("shoal_services.serving").joinpath("playground.html").read_bytes()
            self._send(200, page, "text/html; charset=utf-8")
        elif self.headers.get("authorization") != f"Bearer {SECRET}":
            self._send_json(401, {"error": {"message": "give a valid API key"}})
        else:
            self._send_json(200, {"object": "list", "data": MODELS})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        if "messages" in body:
            self._send_json(400, {"error": {"message": "this model has no chat template; use /v1/completions"}})
            return
        model = "balanced" if body["model"] == "mixed" else body["model"]
        chunks = [
            {"model": model, "choices": [{"text": text, "finish_reason": None}]} for text in ("<b>Über</b> ", "", "魚 🐟")
        ]
        chunks[-1]["choices"][0]["finish_reason"] = "length"
        end = "\r\n\r\n" if body["model"] == "dense" else "\n\n"
        events = [f"data: {json.dumps(chunk, ensure_ascii=False)}{end}" for chunk in chunks]
        if body["model"] != "torn":
            usage = {"model": model, "choices": [], "usage": {"completion_tokens": 7}}
            events += [f": a comment{end}", f"data: {json.dumps(usage)}{end}", f"data: [DONE]{end}"]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for byte in "".join(events).encode():
            self.wfile.write(bytes([byte]))
            time.sleep(0.0003)  # so that the browser reads in the middle of characters and lines

    def _send_json(self, status: int, payload: dict[str, Any]) -> None:
        self._send(status, json.dumps(payload).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def fake_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeEndpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fake(browser: Any, fake_url: str) -> Page:
    """The page of the fake endpoint, past its question for a key."""
    page = Page(browser, fake_url)
    wait_until(lambda: page.find("#key").is_displayed())
    page.set("secret", SECRET + Keys.ENTER)
    page.wait_for_models()
    return page


def test_a_wrong_key_is_refused_in_words_and_the_right_one_is_not_kept(browser, fake_url):
    page = Page(browser, fake_url)
    wait_until(lambda: page.find("#key").is_displayed())
    page.set("secret", "wrong" + Keys.ENTER)
    wait_until(lambda: "give a valid API key" in page.find("#status").text)
    page.set("secret", SECRET + Keys.ENTER)
    page.wait_for_models()
    assert not page.find("#key").is_displayed()
    assert page.chosen() == ["dense", "balanced"]
    browser.refresh()
    wait_until(lambda: page.find("#key").is_displayed())


def test_text_that_comes_in_pieces_of_bytes_is_whole_and_stays_text(fake):
    fake.set("prompt", "The sea")
    fake.set("max-tokens", "7")
    fake.set("temperature", "0.5")
    FakeEndpoint.bodies.clear()
    fake.find("#run").click()
    wait_until(lambda: fake.texts(".note") == ["Reached the token limit"] * 2)
    fake.wait_for_end()
    assert fake.texts(".answer") == ["<b>Über</b> 魚 🐟"] * 2
    assert fake.texts(".tokens") == ["7", "7"]
    assert all(float(speed) > 0 for speed in fake.texts(".speed"))
    assert all(wait.endswith(" ms") for wait in fake.texts(".wait"))
    assert fake.texts(".parameters") == ["134.5 M", "113.3 M"]
    assert fake.texts(".perplexity") == ["20.00", "25.00"]
    ratios = [ratio for ratio in fake.texts(".ratio") if ratio]
    assert ratios[0].endswith(" speed") and ratios[1:] == ["×0.84 size", "×1.25"]
    assert fake.find("#status").text == "Left: Reached the token limit. Right: Reached the token limit."
    wanted = {"prompt": "The sea", "max_tokens": 7, "temperature": 0.5, "stream": True}
    assert {body["model"] for body in FakeEndpoint.bodies} == {"dense", "balanced"}
    assert all(body | wanted == body for body in FakeEndpoint.bodies)


def test_errors_and_routes_are_told_in_their_columns(fake):
    for select, name in zip(fake.browser.find_elements(By.CSS_SELECTOR, ".column select"), ("torn", "mixed"), strict=True):
        select.send_keys(name)
    assert fake.texts(".parameters") == ["–", "–"]
    fake.set("prompt", "The sea")
    fake.press(Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: fake.texts(".note") == ["The answer broke off.", "Reached the token limit; answered by balanced"])
    fake.wait_for_end()
    assert fake.texts(".parameters") == ["–", "113.3 M"]
    fake.find("#mode").send_keys("Chat")
    fake.press(Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: fake.texts(".error") == ["this model has no chat template; use /v1/completions"] * 2)


def test_the_chart_is_operated_by_keys(fake):
    points = fake.browser.find_elements(By.CSS_SELECTOR, ".point")
    assert [point.get_attribute("aria-label") for point in points] == [
        "smallest: 95.2 M parameters, perplexity 40.00",
        "balanced: 113.3 M parameters, perplexity 25.00, right",
        "dense: 134.5 M parameters, perplexity 20.00, left",
    ]
    for _ in range(20):
        fake.press(Keys.TAB)
        if fake.focused() == "smallest":
            break
    fake.press(Keys.ENTER)
    assert fake.chosen() == ["smallest", "balanced"]
    assert fake.focused() == "smallest"
    fake.press(Keys.TAB, Keys.TAB)
    fake.press(Keys.SHIFT, Keys.ENTER)
    assert fake.chosen() == ["smallest", "dense"]
    assert fake.find(".point.right").get_attribute("data-model") == "dense"
    fake.find("[data-model=balanced]").click()
    assert fake.chosen() == ["balanced", "dense"]


def test_narrow_windows_do_not_scroll_sideways(fake):
    fake.resize(360)
    # Asked of the page at once: the chart is drawn anew while the window changes.
    wait_until(lambda: fake.browser.execute_script("return document.querySelector('svg').clientWidth") < 360)
    assert not fake.overflows()
    left, right = fake.browser.find_elements(By.CSS_SELECTOR, ".column")
    assert right.location["y"] >= left.location["y"] + left.size["height"]


@pytest.fixture(scope="module")
def url(browser: Any, tiny_random: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real endpoint, by the real command."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}/", tmp_path_factory.mktemp("endpoint") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(SHOAL), "serve", tiny_random, "--port", str(port)],
            env=dict(os.environ), stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}v1/models", timeout=10) as response:
                return response.status == 200
        except OSError:
            return False

    try:
        wait_until(answers, what=log.read_text)
        yield url
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            finally:
                for member in [process, *family]:
                    if member.is_running() if isinstance(member, psutil.Process) else member.poll() is None:
                        member.kill()
                process.wait()
                psutil.wait_procs(family, timeout=10)


@pytest.fixture
def page(browser: Any, url: str) -> Page:
    page = Page(browser, url)
    page.wait_for_models()
    return page


@pytest.mark.slow
def test_two_answers_stream_side_by_side(page):
    """From the keyboard alone; with one variant, it stands on both sides."""
    assert page.chosen() == ["tiny-random", "tiny-random"]
    page.browser.execute_script("document.getElementById('prompt').focus()")
    page.press("The sea")
    page.set("max-tokens", "24")
    page.set("temperature", "0")
    page.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait_until(
        lambda: all(page.texts(".answer")) and "–" not in page.texts(".speed"), what=lambda: str(page.texts(".note"))
    )
    page.wait_for_end()
    left, right = page.texts(".answer")
    assert left == right, "at temperature 0, one model says one thing"
    assert page.texts(".note") == ["Reached the token limit"] * 2
    assert page.texts(".tokens") == ["24", "24"]
    assert all(float(speed) > 0 for speed in page.texts(".speed"))
    assert not page.find("#frontier").is_displayed()
    page.resize(360)
    assert not page.overflows()


@pytest.mark.slow
def test_stop_ends_both_answers(page):
    page.set("prompt", "The sea")
    page.set("max-tokens", "480")
    page.set("temperature", "0")
    page.press(Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: all(page.texts(".answer")))
    page.find("#stop").click()
    page.wait_for_end()
    assert page.texts(".note") == ["Stopped", "Stopped"]
    counts = page.texts(".tokens")
    assert all(count.startswith("≈ ") and 0 < int(count[2:]) < 480 for count in counts)
    assert page.find("#status").text == "Left: Stopped. Right: Stopped."


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_is_explained(page):
    page.set("prompt", "The sea")
    page.set("max-tokens", "4000")
    page.find("#run").click()
    wait_until(lambda: len(page.texts(".error")) == 2)
    assert all("shorten the prompt or lower max_tokens" in text for text in page.texts(".error"))
    severe = [entry for entry in page.browser.get_log("browser") if "status of 400" not in entry["message"]]
    assert severe == [], "no script errors"
