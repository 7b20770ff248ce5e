"""Where trials run and with how much: the part of a configuration that all stories share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from shoal.files import require_path
from shoal.value import Value

V = TypeVar("V", bound=Value)


class Workers(Value):
    """Where it is run and with how much: none of this changes what comes out.

    `num_workers: [1, 8]` takes as many as there is room for when a trial's workers start, and as nodes come and go.

    `max_concurrent_trials` is what the cluster's CPUs and GPUs hold, if not given. `storage` must be shared if the
    cluster has several nodes; if relative, it lies in the folder where the command is given, as models and texts do.
    """

    num_workers: int = Field(default=1, ge=1, description="Ray Train workers per trial")
    max_workers: int | None = Field(default=None, ge=1, description="what num_workers may grow to, if not given as a pair")
    cpus_per_worker: float = Field(default=1, gt=0, description="reserved in Ray")
    gpus_per_worker: float = Field(default=0, ge=0, description="reserved in Ray; below 1, workers share a GPU")
    max_concurrent_trials: int | None = Field(default=None, ge=1, description="None: what the cluster holds")
    max_failures: int = Field(default=2, ge=0, description="restarts of a trial whose workers die")
    storage: Path = Field(default=Path("shoal-runs"), description="folder of all runs; a run's own bears its name")
    tracking_uri: str | None = Field(default=None, description="MLflow server; None: a database in the run's folder")
    address: str | None = Field(default=None, description="a Ray cluster that this machine is in; None: its own Ray")

    @field_validator("storage")
    @classmethod
    def _a_folder(cls, storage: Path) -> Path:
        require_path(storage, "storage")
        return storage

    @field_validator("address")
    @classmethod
    def _inside(cls, address: str | None) -> str | None:
        return require_inside(address) if address else None

    @model_validator(mode="before")
    @classmethod
    def _pair_of_workers(cls, data: Any) -> Any:
        match data:
            case {"num_workers": [low, high]}:
                return {**data, "num_workers": low, "max_workers": high}
        return data

    @model_validator(mode="after")
    def _grow_or_stay(self) -> Self:
        if self.most_workers < self.num_workers:
            raise ValueError(
                f"num_workers: [{self.num_workers}, {self.max_workers}] shrinks; give the smaller number first"
            )
        return self

    @property
    def most_workers(self) -> int:
        """A trial's workers where there is room for all."""
        return self.max_workers or self.num_workers

    def given(self, **options: Any) -> Self:
        """These, but with the options that are not None. Raises ValueError as the file's values would."""
        return self.model_validate(
            self.model_dump() | {name: value for name, value in options.items() if value is not None}
        )


def require_inside(address: str) -> str:
    """The address. Raises ValueError for that of a Ray client or a dashboard: trials are driven from within the cluster."""
    url = urlsplit(address)
    if "://" in address:
        port = url.port if url.scheme.startswith("http") and url.port else 8265
        raise ValueError(
            f"{address!r} is an address for clients outside the cluster, and from there Ray cannot drive trials; "
            f"send the search with `shoal submit FILE --address http://{url.hostname or 'HEAD'}:{port}`, or run this on a "
            "machine of the cluster with `--address auto`"
        )
    return address


def resolve(value: V, *fields: str) -> V:
    """The same value, but files and folders that these fields name by their absolute paths: workers stand elsewhere."""
    places = {name: getattr(value, name) for name in fields}
    return value.model_copy(
        update={
            name: tuple(map(_make_absolute, place)) if isinstance(place, tuple) else _make_absolute(place)
            for name, place in places.items()
            if place is not None
        }
    )


def _make_absolute(place: str) -> str:
    """The path of a file or folder that is there; other names, as those of the Hub, as they are."""
    from shoal.checkpoints.packaged import ALIASES

    path = Path(place).expanduser()
    return str(path.resolve()) if place not in ALIASES and path.exists() else place
