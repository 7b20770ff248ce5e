"""`shoal serve` in the foreground: up, watch, down."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from shoal_services.commands.terminal import show_progress
from shoal_services.console import output, say
from shoal_services.serving.endpoint import Endpoint
from shoal_services.serving.settings import ServeSettings


def run_endpoint(read_settings: Callable[[], ServeSettings]) -> None:
    """Serves until interrupted; looks at its settings, the registry and the models' folders again and again.

    Raises ValueError or OSError for what cannot be served, before anything is up.
    """
    endpoint = Endpoint(read_settings())
    _raise_on_signals()
    try:
        with show_progress() as show:

            def listen(stage: str, done: int, total: int) -> None:
                _raise_on_signals()  # Ray puts its own handlers there, which abort
                show(stage, done, total)

            endpoint.start(listen)
        names = [*endpoint.settings.variants, *endpoint.settings.routes]
        output.print(f"{endpoint.url}/v1  OpenAI's interfaces; models: {', '.join(names)}", soft_wrap=True)
        output.print(f"{endpoint.url}/    playground", soft_wrap=True)
        while True:
            time.sleep(endpoint.settings.watch_every_s)
            _watch(endpoint, read_settings)
    except KeyboardInterrupt:
        say("stopping: running requests finish first; once more stops at once")
    finally:
        endpoint.stop()


def _watch(endpoint: Endpoint, read_settings: Callable[[], ServeSettings]) -> None:
    try:
        settings = read_settings()
    except ValueError as error:
        say(f"the settings stay as they were: {error}")
        settings = endpoint.settings
    try:
        lines = endpoint.reconcile(settings)
    except ValueError as error:
        lines = [f"the settings stay as they were: {error}"]
    for line in lines:
        say(line)


def _raise_on_signals() -> None:
    """Ctrl-C and a supervisor's SIGTERM raise KeyboardInterrupt, also where a shell started us in the background."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
