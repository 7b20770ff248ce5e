"""What a saved folder needs beside the weights that `save_pretrained` leaves out, and says of others that are not there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import cached_file

from shoal.checkpoints.packaged import ALIASES, convert_packaged
from shoal.checkpoints.readable import NEXT_TOKEN_BLOCKS
from shoal.models.structure import text_config

# How images and sounds become tokens, and a chat a text; the SentencePiece model that llama.cpp converts; terms of use.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
PATTERNS = (*PROCESSORS, "chat_template.jinja", "tokenizer.model", "LICENSE*", "NOTICE*", "USE_POLICY*")


def copy_companions(model: PreTrainedModel, source: str, revision: str | None, folder: Path) -> None:
    """Copies into `folder` what belongs to the model beside its weights from where it came, a folder or a Hub id.

    What is in `folder` already stays, and what needs code of the source's own is left out.
    """
    place = convert_packaged(source) if source in ALIASES else Path(source)
    if place.is_dir():
        files = [file for pattern in PATTERNS for file in place.glob(pattern) if file.is_file()]
    elif text_config(model) is not model.config and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = (cached_file(source, name, revision=revision, **quiet) for name in PROCESSORS)
        files = [Path(file) for file in found if file]
    else:
        files = []
    for file in files:
        own_code = file.suffix == ".json" and "auto_map" in json.loads(file.read_text(encoding="utf-8"))
        if not own_code and not (folder / file.name).exists():
            shutil.copy(file, folder)


def drop_stale_settings(folder: Path) -> None:
    """Takes out of the folder's configurations what names files or weights that it does not hold.

    Code of another folder (`auto_map`), which a stock class does without, and blocks that predict further tokens.
    """
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("auto_map", None)
        for part in (settings, settings.get("text_config") or {}):
            part |= {key: 0 for key in NEXT_TOKEN_BLOCKS if part.get(key)}
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
