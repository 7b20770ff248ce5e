"""`shoal doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_services.commands.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from shoal_services.cluster.doctor import Check


def doctor(
    storage: Annotated[Path, typer.Option(help="Where searches would be kept.")] = Path("shoal-runs"),
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow server to look for.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to look at.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, hardware, storage, Ray, tracker, packaged model.

    Examples:

        shoal doctor

        shoal doctor --address auto --storage /mnt/shared --tracking-uri http://mlflow:5000
    """
    from shoal_services.cluster.doctor import examine
    from shoal_services.console import show

    checks = examine(storage=storage, tracking_uri=tracking_uri, address=address)
    if as_json:
        print(json.dumps([check.__dict__ for check in checks], indent=2))
    else:
        show(doctor_table(checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def doctor_table(checks: Sequence[Check]) -> Table:
    """What was checked, what was found, and what to do where it is wrong."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    for check in checks:
        mark = Text("ok", "green") if check.passed else Text("no", "red")
        table.add_row(
            mark, check.name, check.finding + (f"\n→ {check.remedy}" if check.remedy and not check.passed else "")
        )
    return table
