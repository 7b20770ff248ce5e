"""What Ray's own actors unpickle to run a trial: so light that only the worker that trains loads torch and transformers."""

from __future__ import annotations

import pkgutil
from typing import Any


def run_loop(job: dict[str, Any]) -> None:
    """Calls the function that `job["loop"]` names ("package.module:function") with the job, imported where it runs."""
    pkgutil.resolve_name(job["loop"])(job)
