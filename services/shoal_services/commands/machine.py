"""`shoal doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shoal_services.commands.options import AsJson


def doctor(
    storage: Annotated[Path, typer.Option(help="Where searches would be kept.")] = Path("shoal-runs"),
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow server to look for.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to look at.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, hardware, storage, Ray, tracker, packaged model.

    Examples:

        shoal doctor

        shoal doctor --address ray://head:10001 --storage /mnt/shared --tracking-uri http://mlflow:5000
    """
    from shoal_services.doctor import examine
    from shoal_services.terminal import doctor_table, output

    checks = examine(storage=storage, tracking_uri=tracking_uri, address=address)
    if as_json:
        print(json.dumps([check.__dict__ for check in checks], indent=2))
    else:
        output.print(doctor_table(checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
