"""The texts of a run, dealt into roles that never overlap: calibration, distillation, selection, evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shoal.files import write_aside
from shoal.recipe import Texts
from shoal.text import TokenWindows, check_overlap, deal_documents, load_documents, make_windows

TRAINING_ROLES = ("calibration", "distillation", "selection")


@dataclass(frozen=True)
class Corpus:
    """Token windows by role. `distillation` is None where nothing is distilled."""

    calibration: TokenWindows
    selection: TokenWindows
    evaluation: tuple[TokenWindows, ...]
    distillation: TokenWindows | None = None

    def save(self, path: Path) -> None:
        """Writes all windows to one safetensors file, aside and renamed."""
        roles = {"calibration": self.calibration, "selection": self.selection, "distillation": self.distillation}
        roles |= {f"evaluation.{index}": windows for index, windows in enumerate(self.evaluation)}
        given = {role: windows for role, windows in roles.items() if windows is not None}
        names = {role: windows.name for role, windows in given.items()}
        with write_aside(path) as aside:
            save_file({role: windows.ids.contiguous() for role, windows in given.items()}, aside, names)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError if the file is not whole."""
        try:
            with safe_open(path, "pt") as file:
                names = file.metadata()
                roles = {role: TokenWindows(file.get_tensor(role), names[role]) for role in file.keys()}  # noqa: SIM118
            num_evaluations = sum(role.startswith("evaluation.") for role in roles)
            evaluation = [roles.pop(f"evaluation.{index}") for index in range(num_evaluations)]
            return cls(evaluation=tuple(evaluation), **roles)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"token windows {str(path)!r} are damaged ({error}); delete the file and start again"
            ) from error


def load_corpus(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    distillation_tokens: int = 0,
    distillation_window: int = 512,
) -> Corpus:
    """The windows of every role, checked: they fit the model's context, and evaluation text was not trained on.

    Raises ValueError for a missing, empty or too short text, too long windows, or overlap.
    """
    if not distillation_tokens:
        distillation_window = min(distillation_window, texts.window)
    context = getattr(config, "max_position_embeddings", None)
    for window in (texts.window, distillation_window):
        if context and window > context:
            raise ValueError(
                f"window={window} is longer than the model's context of {context} tokens; choose {context} or less"
            )
    documents = {source: load_documents(source) for source in dict.fromkeys((*texts.train, *texts.evaluation))}
    dealt = {source: deal_documents(documents[source], _roles_of(source, texts)) for source in documents}

    def gather(role: str, sources: tuple[str, ...], window: int, num_tokens: int) -> TokenWindows:
        per_source = max(window, num_tokens // len(sources))
        parts = [
            make_windows(dealt[s][role], tokenizer, name=documents[s].name, window=window, num_tokens=per_source)
            for s in sources
        ]
        return _interleave(parts)

    distillation = None
    if distillation_tokens:
        distillation = gather("distillation", texts.train, distillation_window, distillation_tokens)
    corpus = Corpus(
        calibration=gather("calibration", texts.train, texts.window, texts.calibration_tokens),
        selection=gather("selection", texts.train, distillation_window, texts.selection_tokens),
        evaluation=tuple(gather("evaluation", (name,), texts.window, texts.evaluation_tokens) for name in texts.evaluation),
        distillation=distillation,
    )
    seen = [corpus.calibration, corpus.selection, *([distillation] if distillation else [])]
    check_overlap(seen, list(corpus.evaluation))
    return corpus


def load_evaluation(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, trained_on: Collection[str]
) -> tuple[TokenWindows, ...]:
    """The evaluation windows alone: those that `load_corpus` gave to a model trained on texts named `trained_on`.

    Raises ValueError for a missing, empty or too short text.
    """
    windows = []
    for source in texts.evaluation:
        documents = load_documents(source)
        roles = [*(TRAINING_ROLES if documents.name in trained_on else ()), "evaluation"]
        dealt = deal_documents(documents, roles)["evaluation"]
        num_tokens = max(texts.window, texts.evaluation_tokens)
        windows.append(make_windows(dealt, tokenizer, name=documents.name, window=texts.window, num_tokens=num_tokens))
    return tuple(windows)


def _roles_of(source: str, texts: Texts) -> list[str]:
    roles = list(TRAINING_ROLES) if source in texts.train else []
    return [*roles, "evaluation"] if source in texts.evaluation else roles


def _interleave(parts: list[TokenWindows]) -> TokenWindows:
    """Windows of several sources in turn, so that every stretch of them holds all sources."""
    if len(parts) == 1:
        return parts[0]
    turns = itertools.zip_longest(*(part.ids for part in parts))
    rows = torch.stack([row for turn in turns for row in turn if row is not None])
    return TokenWindows(rows, " + ".join(part.name for part in parts))
