"""What is served, and how: the strict schema of `serve.yaml`."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from shoal.value import Value

# What other settings say, and what nothing may switch on: code from a model's folder is never run.
FIXED_OPTIONS = {"model", "tokenizer", "dtype", "max_model_len", "max_num_seqs", "trust_remote_code"}


Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+)$")]


class Limits(Value):
    """What a variant takes on. Whatever is over a limit is refused: too long with 400, too much at once with 429."""

    max_batch_size: int = Field(default=32, ge=1, le=1024, description="requests generated at once by a replica")
    max_queued: int = Field(default=64, ge=0, description="requests that wait in a replica; few bound the latency")
    max_context: int = Field(default=2048, ge=16, description="tokens of prompt and answer")
    max_tokens: int = Field(default=512, ge=1, description="tokens of an answer that names no limit")
    max_cached_tokens: int = Field(
        default=65_536, ge=16, description="tokens of the requests generated at once; others wait until theirs fit"
    )
    max_body_bytes: int = Field(default=2**20, ge=1024)
    timeout_s: float = Field(default=120.0, gt=0, description="how long to wait for the first token, and for each next one")
    drain_s: float = Field(default=120.0, ge=0, description="how long answers may go on once the endpoint is to stop")


class VariantSettings(Value):
    """One served model. `model` is a folder, alias, Hub id, or `models:/NAME@ALIAS` of the MLflow registry.

    With `min_replicas: 0` it starts at its first request and stops after `idle_s` without any. With `shared: true` it has
    no process of its own: the model cache loads it when it is asked for, within a second or two.
    """

    model: str = Field(min_length=1)
    dtype: str | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    engine_options: dict[str, Any] = Field(default={}, description="vLLM's engine arguments, as `tensor_parallel_size: 2`")
    shared: bool = False
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    idle_s: float = Field(default=600.0, gt=0)
    cpus_per_replica: float = Field(default=0.0, ge=0, description="reserved in Ray; 0 shares what there is")
    gpus_per_replica: float = Field(default=0.0, ge=0)
    perplexity: float | None = None
    num_parameters: int | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self

    @model_validator(mode="after")
    def _shared_is_ours(self) -> Self:
        if self.shared and self.engine == "vllm":
            raise ValueError("a variant of vLLM's cannot be shared: vLLM serves one model in each process")
        return self

    @model_validator(mode="after")
    def _options_are_for_vllm(self) -> Self:
        if self.engine_options and self.engine != "vllm":
            raise ValueError(f"engine_options are vLLM's; with engine {self.engine!r} they would do nothing")
        if fixed := sorted(FIXED_OPTIONS & set(self.engine_options)):
            raise ValueError(f"engine_options cannot set {', '.join(fixed)}: other settings do, or nothing may")
        return self


class ShadowSettings(Value):
    """The variant that gets a share of another's requests too. Nobody sees its answers; they are compared."""

    variant: str
    share: float = Field(default=1.0, gt=0, le=1)


class ModelCacheSettings(Value):
    """Where shared variants live: each replica holds the `max_loaded` models that were asked for last."""

    max_loaded: int = Field(default=2, ge=1)
    replicas: int = Field(default=1, ge=1)
    cpus_per_replica: float = Field(default=0.0, ge=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)


class ServeSettings(Value):
    """Everything that `shoal serve` needs to know.

    `routes` maps a public model name to variants and their weights: `{smollm2: {dense: 90, balanced: 10}}`; `shadows` a
    variant to another that gets a share of its requests too: `{dense: {variant: balanced, share: 0.1}}`. What both show
    goes to MLflow, by way of `results`.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    variants: dict[str, VariantSettings] = Field(min_length=1)
    routes: dict[str, dict[str, float]] = Field(default={})
    shadows: dict[str, ShadowSettings] = Field(default={})
    results: Path = Field(default=Path("shoal-runs/serving"), description="folder for what routes and shadows show")
    experiment: str = Field(default="shoal-serving", description="MLflow experiment for what routes and shadows show")
    report_every_s: float = Field(default=30.0, gt=0)
    keys: Path | None = Field(default=None, description="file of hashed API keys, made by `shoal keys`")
    allow_anonymous: bool = Field(default=False, description="serve without keys whoever comes, from wherever")
    cors_origins: list[Origin] | None = Field(
        default=None, description="web pages that may call, as https://chat.example; by default all with keys, else none"
    )
    model_cache: ModelCacheSettings = ModelCacheSettings()
    gateways: int = Field(default=1, ge=1)
    limits: Limits = Limits()
    address: str | None = None
    tracking_uri: str | None = None
    watch_every_s: float = Field(default=10.0, gt=0, description="how often aliases, folders and this file are looked at")
    rollback_s: float = Field(default=600.0, ge=0, description="how long a replaced version stays ready")

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Self:
        for route, weights in self.routes.items():
            if route in self.variants:
                raise ValueError(f"route {route!r} has the name of a variant; choose another")
            unknown = sorted(set(weights) - set(self.variants))
            if unknown or not weights:
                raise ValueError(f"route {route!r} leads to unknown variants {unknown}; there are {sorted(self.variants)}")
            if min(weights.values()) < 0 or sum(weights.values()) <= 0:
                raise ValueError(f"route {route!r}: weights must be 0 or more, and not all 0")
        return self

    @model_validator(mode="after")
    def _shadows_have_variants(self) -> Self:
        for name, shadow in self.shadows.items():
            for variant in (name, shadow.variant):
                if variant not in self.variants:
                    raise ValueError(f"shadows: there is no variant {variant!r}; there are {sorted(self.variants)}")
            if name == shadow.variant:
                raise ValueError(f"shadows: variant {name!r} cannot be its own shadow")
        return self

    @model_validator(mode="after")
    def _strangers_need_keys(self) -> Self:
        if self.keys is None and not self.allow_anonymous and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached from other machines, and no API keys are set: make some with "
                "`shoal keys add NAME` and give `keys: FILE`, or say `allow_anonymous: true`"
            )
        return self

    @model_validator(mode="after")
    def _pages_need_keys(self) -> Self:
        if "*" in (self.cors_origins or ()) and self.local_only:
            raise ValueError(
                "cors_origins: '*' without keys lets every page that a browser on this machine shows use the endpoint; "
                "name the pages' origins, give `keys: FILE`, or say `allow_anonymous: true`"
            )
        return self

    @property
    def local_only(self) -> bool:
        """Whether only programs of this machine may call: there are no keys, and nobody said that all may."""
        return self.keys is None and not self.allow_anonymous

    @property
    def origins(self) -> list[str]:
        """The web pages that may call."""
        return self.cors_origins if self.cors_origins is not None else ["*"] if self.keys else []


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
