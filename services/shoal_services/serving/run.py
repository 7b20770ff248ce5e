"""`shoal serve` in the foreground: up, watch, down."""

from __future__ import annotations

import signal
import time

from shoal_services.serving.deploy import Endpoint
from shoal_services.serving.settings import ServeSettings
from shoal_services.terminal import console, output, show_progress


def run_endpoint(settings: ServeSettings) -> None:
    """Serves until interrupted. Raises ValueError or OSError for what cannot be served, before anything is up."""
    endpoint = Endpoint(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what supervisors send
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with show_progress() as listen:
            endpoint.start(listen)
        output.print(f"[bold]{endpoint.url}/v1[/bold]  OpenAI's interfaces; models: {', '.join(settings.variants)}")
        output.print(f"[bold]{endpoint.url}/[/bold]    playground")
        while True:
            time.sleep(settings.watch_every_s)
    except KeyboardInterrupt:
        console.print("stopping: running requests finish first")
    finally:
        endpoint.stop()
