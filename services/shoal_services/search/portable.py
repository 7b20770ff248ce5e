"""What a search's file may say where it runs elsewhere: no paths of this machine, no passwords."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from shoal.checkpoints.packaged import ALIASES
from shoal.texts import text_format

from shoal_services.search.config import SearchConfig

MAX_TEXT_BYTES = 16 * 2**20
# Names of variables in their place ($(PASSWORD), ${TOKEN}) are no secrets.
IN_URL = re.compile(r"(?P<before>[a-z][\w+.\-]*://)(?![^/\s@]*\$[({])[^/\s@'\"<>]+@", re.IGNORECASE)
IN_QUERY = re.compile(
    r"(?P<before>[?&][\w.\-]*(?:token|sig|signature|secret|password|credential|access_?key(?:id)?|api_?key)=)(?!\$[({])[^\s&'\"]+",
    re.IGNORECASE,
)
TOKENS = re.compile(r"(?P<before>)\b(?:hf_\w{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_\w{30,}|sk-\w{20,})\b")
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


def find_secrets(text: str) -> list[str]:
    """Passwords and tokens in a text, each as what stands around it with stars in its place."""
    found = []
    for pattern in (IN_URL, IN_QUERY, TOKENS):
        for match in pattern.finditer(text):
            host = re.match(r"@?[\w.\-:]*", text[match.end() - 1 :]) if pattern is IN_URL else None
            found.append(f"{match['before']}***{host[0] if host else ''}")
    return found


def refuse_secrets(text: str, where: str, advice: str) -> None:
    """Raises ValueError if a password or token stands in a text that others will read."""
    if found := find_secrets(text):
        raise ValueError(
            f"{where} holds a password or token ({found[0]}), which everyone who sees the job would read; {advice}"
        )


def require_portable(config: SearchConfig, text: str) -> list[Path]:
    """The text files that travel with a search, whose file says `text`.

    Raises ValueError for paths that mean this machine alone, and for passwords that the job's page would show.
    """
    advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (HF_TOKEN for the Hub) on the cluster"
    storage, tracking_uri = config.run.storage, config.run.tracking_uri or ""
    for where, said in {"run.tracking_uri": tracking_uri, "run.storage": str(storage), "the search's file": text}.items():
        refuse_secrets(said, where, advice)
    if not storage.is_absolute():
        raise ValueError(
            f"run.storage {str(storage)!r} is relative, and a cluster has no folder of yours to begin from; give the "
            "absolute path of a folder that all its nodes share (NFS, a mounted bucket): --storage /mnt/shared/shoal-runs"
        )
    if tracking_uri.startswith("sqlite:") and not tracking_uri.startswith("sqlite:////"):
        raise ValueError(f"run.tracking_uri {tracking_uri!r} is a file of this machine; give a server, or leave it out")
    for key, place in list_places(text):
        if key != "texts" and not Path(place).is_absolute():
            raise ValueError(
                f"{key} {place!r} is a folder or file of this machine; put it where all nodes of the cluster see it and "
                f"give its absolute path{', or give a Hub id' if key == 'model' else ''}"
            )
    return _list_relative_texts({Path(place) for key, place in list_places(text) if key == "texts"})


def require_mounted(text: str, mount: str) -> None:
    """Raises ValueError for what the search's file names and a pod would not find: anything that is not below `mount`."""
    for key, place in list_places(text):
        if not Path(place).is_absolute() or ".." in Path(place).parts or not Path(place).is_relative_to(mount):
            hub = " or give a Hub id" if key == "model" else " or name a data set of the Hub" if key == "texts" else ""
            raise ValueError(
                f"{key}: {place!r} is not below {mount}, where pods have their shared storage: put it there "
                f"({mount}/{Path(place).name}) and give that path,{hub or ' or leave it out'}"
            )


def require_reachable(tracking_uri: str, mount: str) -> None:
    """Raises ValueError for a tracking server that no pod reaches: this machine's, or a file that is not below `mount`."""
    url = urlsplit(tracking_uri)
    if url.scheme in ("http", "https") and url.hostname in LOOPBACK:
        raise ValueError(
            f"tracking_uri {tracking_uri!r}: in a pod {url.hostname} is the pod; name the service: http://mlflow:5000"
        )
    is_file = url.scheme in ("", "file", "sqlite")
    if is_file and not Path(url.path.removeprefix("/") if url.scheme == "sqlite" else url.path).is_relative_to(mount):
        raise ValueError(f"tracking_uri {tracking_uri!r} is a file that pods do not see; name a server: http://mlflow:5000")


def list_places(text: str) -> Iterator[tuple[str, str]]:
    """Every path that a search's file names, with its key: `model`, `texts` or `tasks`. Hub ids and aliases are none."""
    data: dict[str, Any] = yaml.safe_load(text)
    texts, tasks = data.get("texts") or {}, data.get("tasks") or {}
    named = [
        ("model", data["model"]),
        *(("texts", name) for part in ("train", "evaluation") for name in _as_list(texts.get(part))),
        *(("tasks", name) for name in _as_list(tasks.get("names"))),
    ]
    return ((key, name) for key, name in named if _is_place(name))


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _is_place(name: str) -> bool:
    if name in ALIASES or "://" in name:
        return False
    is_file = name.endswith(".gguf") or text_format(name) is not None
    return name.startswith(("/", ".", "~")) or is_file or name.count("/") > 1 or Path(name).exists()


def _list_relative_texts(named: set[Path]) -> list[Path]:
    """Raises ValueError for those that are not here, not below this folder, or too large."""
    texts = sorted(path for path in named if not path.is_absolute())
    for path in texts:
        if not path.is_file():
            raise ValueError(f"text file {str(path)!r} does not exist; check the path")
        if ".." in path.parts:
            raise ValueError(
                f"text {str(path)!r} lies outside this folder; put it below, or on storage that all nodes share"
            )
    size = sum(path.stat().st_size for path in texts)
    if size > MAX_TEXT_BYTES:
        raise ValueError(
            f"the search's text files {', '.join(map(repr, map(str, texts)))} have {size / 2**20:.0f} MiB, and a job "
            f"carries {MAX_TEXT_BYTES >> 20} MiB at most; put them on storage that all nodes share and give absolute paths"
        )
    return texts
