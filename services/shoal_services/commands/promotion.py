"""`shoal promote`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def promote(
    source: Annotated[
        str,
        typer.Argument(
            help="SEARCH_FOLDER@best (or @balanced, @smallest, @KEY of a trial), a model's folder, models:/NAME@ALIAS, "
            "models:/NAME/VERSION, or SEARCH@best of a search in the registry."
        ),
    ],
    target: Annotated[str, typer.Argument(help="NAME@ALIAS that an endpoint serves as models:/NAME@ALIAS.")],
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_TRACKING_URI",
            show_envvar=True,
            help="MLflow server; by default the database in the search's folder.",
        ),
    ] = None,
) -> None:
    """Serve other weights under a name: the only way by which what is served moves.

    The hash of the weights must be the one that was recorded when they were measured. Says what was served before, and
    how to go back. An endpoint that serves models:/NAME@ALIAS changes over without a failed request.

    Examples:

        shoal promote shoal-runs/demo@balanced smollm2-135m@balanced

        shoal promote demo@best smollm2-135m@live --tracking-uri http://mlflow:5000

        shoal promote models:/smollm2-135m/3 smollm2-135m@live --tracking-uri http://mlflow:5000   # back to version 3
    """
    from shoal_services.tracking import promote as story

    uri = tracking_uri or _find_database(source)
    done = story.promote(source, target, uri)
    name = f"{done.name}@{done.alias}"
    typer.echo(f"{name}\n  before: {_describe(done.before)}\n  now:    {_describe(done.now)}")
    if not done.is_checked:
        typer.echo("no hash was recorded for these weights before: theirs is from now on, if they are not the Hub's")
    typer.echo(f"served: shoal serve models:/{name}")
    if done.before is not None and done.before.version != done.now.version:
        typer.echo(f"back:   shoal promote models:/{done.name}/{done.before.version} {name}")
    if not tracking_uri:
        typer.echo(f"both with --tracking-uri {uri}")


def _find_database(source: str) -> str:
    """The registry in a search's folder. Raises ValueError where there is none."""
    file = Path(source.rpartition("@")[0] or source) / "mlflow.db"
    if not file.is_file():
        raise ValueError("which registry? give the MLflow server: --tracking-uri http://mlflow:5000")
    return f"sqlite:///{file.resolve()}"


def _describe(version: ModelVersion | None) -> str:
    from shoal_services.tracking.registry import BASE_TAG, HASH_TAG, PLACE_TAG

    if version is None:
        return "nothing"
    tags = version.tags
    perplexity = f"perplexity {tags['perplexity']}" if "perplexity" in tags else ""
    known = [tags.get(BASE_TAG), tags.get("kind"), tags.get("weights"), perplexity, tags.get(HASH_TAG, "")[:12]]
    return f"version {version.version}: {', '.join(filter(None, known))} in {tags.get(PLACE_TAG)}"
