"""The texts of a run, dealt into roles that never overlap: calibration, distillation, selection, evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shoal.files import write_aside
from shoal.models.structure import is_causal
from shoal.text.leakage import check_overlap
from shoal.text.sources import Documents, load_documents
from shoal.text.windows import TokenWindows, close_windows, deal_documents, make_windows, require_embeddings
from shoal.texts import Texts

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
        save_windows(path, {role: windows for role, windows in roles.items() if windows is not None})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError if the file is not whole."""
        roles = load_windows(path, ("calibration", "selection"))
        num_evaluations = sum(role.startswith("evaluation.") for role in roles)
        evaluation = [roles.pop(f"evaluation.{index}") for index in range(num_evaluations)]
        return cls(evaluation=tuple(evaluation), **roles)


def save_windows(path: Path, roles: dict[str, TokenWindows]) -> None:
    """Writes the windows of every role to one safetensors file, aside and renamed."""
    names = {role: windows.name for role, windows in roles.items()}
    with write_aside(path) as aside:
        save_file({role: windows.ids.contiguous() for role, windows in roles.items()}, aside, names)


def load_windows(path: Path, needed: Collection[str]) -> dict[str, TokenWindows]:
    """The windows by role. Raises ValueError if the file is not whole or lacks a role that is needed."""
    try:
        with safe_open(path, "pt") as file:
            names = file.metadata()
            roles = {role: TokenWindows(file.get_tensor(role), names[role]) for role in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"token windows {str(path)!r} are damaged ({error}); delete the file and start again") from error
    if missing := sorted(set(needed) - set(roles)):
        raise ValueError(f"token windows {str(path)!r} are damaged (no {missing}); delete the file and start again")
    return roles


def load_corpus(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    distillation_tokens: int = 0,
    distillation_window: int = 512,
) -> Corpus:
    """The windows of every role, checked: they fit the model's context, and evaluation text was not trained on.

    Raises ValueError for a missing, empty or too short text, too long windows, tokens that the model does not know, or
    overlap.
    """
    if not distillation_tokens:
        distillation_window = min(distillation_window, texts.window)
    for window in (texts.window, distillation_window):
        _require_context(window, config, tokenizer)
    dealt = {
        source: deal_documents(load_documents(source, tokenizer), _roles_of(source, texts))
        for source in dict.fromkeys((*texts.train, *texts.evaluation))
    }

    def gather(role: str, sources: tuple[str, ...], window: int, num_tokens: int) -> TokenWindows:
        given = [dealt[source][role] for source in sources]
        windows = gather_windows(given, tokenizer, window=window, num_tokens=num_tokens)
        require_embeddings(windows.ids, config, tokenizer)
        return windows if is_causal(config) else close_windows(windows, tokenizer)

    distillation, width = None, getattr(config.get_text_config(decoder=True), "hidden_size", 0)
    if distillation_tokens:
        distillation = gather("distillation", texts.train, distillation_window, distillation_tokens)
    corpus = Corpus(
        calibration=gather("calibration", texts.train, texts.window, texts.find_calibration_tokens(width)),
        selection=gather("selection", texts.train, distillation_window, texts.selection_tokens),
        evaluation=tuple(gather("evaluation", (name,), texts.window, texts.evaluation_tokens) for name in texts.evaluation),
        distillation=distillation,
    )
    seen = [corpus.calibration, corpus.selection, *([distillation] if distillation else [])]
    check_overlap(seen, list(corpus.evaluation))
    return corpus


def _require_context(window: int, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    context = find_context(config, tokenizer)
    if context and window > context:
        raise ValueError(
            f"window={window} is longer than the model's context of {context} tokens; choose {context} or less"
        )


def find_context(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that a model takes at once, None if it does not say.

    Of encoders the tokenizer says it too: RoBERTa has two positions more than it can use.
    """
    limits = [getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)]
    if not is_causal(config):
        limits.append(tokenizer.model_max_length)
    return min((limit for limit in limits if limit), default=None)


def gather_windows(
    sources: Sequence[Documents], tokenizer: PreTrainedTokenizerBase, *, window: int, num_tokens: int | None
) -> TokenWindows:
    """Windows of several sources in turn, an equal number of tokens of each; all of them if None.

    Raises ValueError for a source that does not fill a window.
    """
    per_source = None if num_tokens is None else max(window, num_tokens // len(sources))
    return _interleave([make_windows(one, tokenizer, window=window, num_tokens=per_source) for one in sources])


def load_evaluation(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, trained_on: Collection[str]
) -> tuple[TokenWindows, ...]:
    """The evaluation windows alone: those that `load_corpus` gave to a model trained on texts named `trained_on`.

    Raises ValueError for a missing, empty or too short text, a too long window, or tokens that the model does not know.
    """
    _require_context(texts.window, config, tokenizer)
    num_tokens = max(texts.window, texts.evaluation_tokens)
    found = []
    for source in texts.evaluation:
        documents = load_unseen(source, trained_on, tokenizer)
        found.append(make_windows(documents, tokenizer, window=texts.window, num_tokens=num_tokens))
        require_embeddings(found[-1].ids, config, tokenizer)
    return tuple(found)


def load_unseen(source: str, trained_on: Collection[str], tokenizer: PreTrainedTokenizerBase) -> Documents:
    """The part of a text that a model trained on texts named `trained_on` has not seen. Raises ValueError as above."""
    documents = load_documents(source, tokenizer)
    roles = [*(TRAINING_ROLES if documents.name in trained_on else ()), "evaluation"]
    return deal_documents(documents, roles)["evaluation"]


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
