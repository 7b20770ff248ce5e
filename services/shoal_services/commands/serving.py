"""`shoal serve`, `shoal bench-serve` and `shoal keys`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

KeyFile = Annotated[Path, typer.Option(help="File of hashed keys: `keys:` in serve.yaml.")]

keys = typer.Typer(
    no_args_is_help=True,
    help="API keys of an endpoint, hashed at rest.\n\nExamples:\n\n    shoal keys add alice\n\n    shoal keys list",
)


def serve(
    sources: Annotated[
        list[str], typer.Argument(help="A search's folder, models:/NAME@ALIAS, model folders, or serve.yaml.")
    ],
    host: Annotated[str | None, typer.Option(help="Address to listen on; others than this machine need API keys.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to serve from; by default a local one is started.")
    ] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow server whose registry models:/ names.")] = None,
) -> None:
    """Serve the dense model and its compressed variants behind one OpenAI-compatible endpoint.

    Examples:

        shoal serve shoal-runs/demo

        shoal serve smollm2-135m models:/shoal-smollm2-135m@balanced --tracking-uri http://mlflow:5000

        shoal serve serve.yaml --port 9000
    """
    from shoal_services.serving.settings import ServeSettings
    from shoal_services.serving.sources import read_sources

    given = {"host": host, "port": port, "address": address, "tracking_uri": tracking_uri}
    given = {name: value for name, value in given.items() if value is not None}

    def read_settings() -> ServeSettings:
        return ServeSettings.model_validate(read_sources(sources).model_dump() | given)

    read_settings()  # what is wrong is said before Ray and torch are loaded

    from shoal_services.commands.endpoint import run_endpoint

    run_endpoint(read_settings)


def bench_serve(
    models: Annotated[list[str], typer.Argument(help="Models to send requests to, as /v1/models names them.")],
    url: Annotated[str, typer.Option(help="Base URL of any OpenAI-compatible endpoint.")] = "http://127.0.0.1:8000/v1",
    concurrency: Annotated[list[int], typer.Option(help="Requests at once (closed loop). Repeatable.")] = [1, 8, 32],  # noqa: B006
    rate: Annotated[list[float], typer.Option(help="Requests a second (open loop), instead. Repeatable.")] = [],  # noqa: B006
    num_requests: Annotated[
        int | None, typer.Option(help="Requests a row; by default 2 × concurrency, at least 6.")
    ] = None,
    num_new: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    prompt_chars: Annotated[int, typer.Option(help="Characters of each prompt.")] = 600,
    text: Annotated[str, typer.Option(help="Text that prompts are cut from.")] = "wikipedia-sample",
    key: Annotated[str | None, typer.Option(envvar="SHOAL_API_KEY", help="API key.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Generate past the end of the text (Shoal, vLLM).")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")] = False,
) -> None:
    """Load an endpoint and print throughput, time to first token and inter-token latency.

    Every model gets the same prompts, greedy, streamed. Rows of one run compare; another run is another day.

    Examples:

        shoal bench-serve dense balanced

        shoal bench-serve dense --rate 2 --rate 4 --num-requests 100

        shoal bench-serve my-model --url http://vllm:8000/v1 --json
    """
    from shoal_services.commands.terminal import show_progress
    from shoal_services.console import show
    from shoal_services.serving.bench import Bench, load_table, run_bench

    loads = tuple(concurrency), tuple(rate), num_requests
    bench = Bench(url, tuple(models), *loads, num_new, prompt_chars, text, key, ignore_eos)
    with show_progress() as listen:
        rows = run_bench(bench, listen)
    if as_json:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        show(load_table(url, rows))
    if any(row.num_failed for row in rows):
        raise typer.Exit(1)


@keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: KeyFile = Path("keys.json"),
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Rate limit, for each gateway.")] = None,
) -> None:
    """Make a key and print it, once: the file keeps its hash alone.

    Examples:

        shoal keys add alice --requests-per-minute 600
    """
    from shoal_services.serving.http import keys

    print(keys.add_key(file, name, requests_per_minute))


@keys.command("revoke")
def revoke_key(name: Annotated[str, typer.Argument(help="Whose key.")], file: KeyFile = Path("keys.json")) -> None:
    """Take a key out of the file; a running endpoint notices at its next look. Without any left, nobody gets in.

    Examples:

        shoal keys revoke alice
    """
    from shoal_services.serving.http import keys

    keys.revoke_key(file, name)


@keys.command("list")
def list_keys(file: KeyFile = Path("keys.json")) -> None:
    """Show the keys' names and rate limits.

    Examples:

        shoal keys list
    """
    from shoal_services.serving.http.keys import read_keys

    for key in read_keys(file):
        print(key.name, f"{key.requests_per_minute} requests a minute" if key.requests_per_minute else "no limit", sep="\t")
