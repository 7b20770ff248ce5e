"""The texts of a pretraining run as token windows, and the tokenizer that made them.

Of a source that serves for both training and validation, `selection` and `evaluation` are the documents that
`shoal.text.corpus` gives these roles: what `shoal compress` later evaluates on, the model was not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from transformers import PreTrainedTokenizerBase

from shoal.checkpoints.load import load_tokenizer
from shoal.linearity.scores import MIN_TOKENS_PER_DIMENSION
from shoal.paper.pretrain_recipe import PretrainRecipe
from shoal.text.corpus import gather_windows, load_windows, save_windows
from shoal.text.leakage import check_overlap
from shoal.text.sources import Documents, load_documents
from shoal.text.tokenizer import train_tokenizer
from shoal.text.windows import TokenWindows, deal_documents

# Half of the windows are fitted and half are scored, and the first token of each does not count.
MIN_LINEARITY_TOKENS = 4 * MIN_TOKENS_PER_DIMENSION


@dataclass(frozen=True)
class PretrainCorpus:
    """Windows to train on, to measure perplexity on, and to measure linearity on; no document is in two of them."""

    training: TokenWindows
    validation: TokenWindows
    linearity: TokenWindows

    def save(self, path: Path) -> None:
        """Writes one safetensors file, aside and renamed."""
        save_windows(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError if the file is not whole."""
        return cls(**load_windows(path, ("training", "validation", "linearity")))


def load_pretrain_corpus(recipe: PretrainRecipe) -> tuple[PretrainCorpus, PreTrainedTokenizerBase]:
    """The windows of every role, and the tokenizer: the named one, or one made of the training text.

    Raises ValueError for a text that is missing, empty or too short, or that is in training and validation.
    """
    texts, window = recipe.texts, recipe.training.window
    given = None if texts.tokenizer is None else load_tokenizer(texts.tokenizer)
    dealt = {
        source: deal_documents(load_documents(source, given), _roles_of(source, recipe))
        for source in dict.fromkeys((*texts.train, *texts.validation))
    }

    def documents(role: str, names: tuple[str, ...]) -> list[Documents]:
        return [dealt[name][role] for name in names]

    to_learn = documents("pretraining", texts.train)
    tokenizer = given or train_tokenizer((text for one in to_learn for text in one.texts), texts.vocab_size)
    corpus = PretrainCorpus(
        training=gather_windows(to_learn, tokenizer, window=window, num_tokens=None),
        validation=gather_windows(
            documents("evaluation", texts.validation), tokenizer, window=window, num_tokens=texts.validation_tokens
        ),
        linearity=gather_windows(
            documents("selection", texts.train), tokenizer, window=window, num_tokens=texts.linearity_tokens
        ),
    )
    _require_enough(corpus, recipe)
    check_overlap([corpus.training], [corpus.validation])
    return corpus, tokenizer


def _roles_of(source: str, recipe: PretrainRecipe) -> list[str]:
    roles = ["pretraining", "selection"] if source in recipe.texts.train else []
    return [*roles, "evaluation"] if source in recipe.texts.validation else roles


def _require_enough(corpus: PretrainCorpus, recipe: PretrainRecipe) -> None:
    per_step, width = recipe.training.windows_per_step, recipe.architecture.hidden_size
    if len(corpus.training) < per_step:
        raise ValueError(
            f"text {corpus.training.name!r} has {len(corpus.training)} windows of {recipe.training.window} tokens to train "
            f"on, fewer than training.windows_per_step={per_step}; give more text, or lower windows_per_step or window"
        )
    if len(corpus.validation) < 2:
        raise ValueError(
            f"text {corpus.validation.name!r} fills {len(corpus.validation)} window for validation; a standard error "
            "needs 2 or more: give more text, or raise texts.validation_tokens"
        )
    if corpus.linearity.num_tokens < MIN_LINEARITY_TOKENS * width:
        raise ValueError(
            f"{corpus.linearity.num_tokens:,} tokens to measure linearity on are too few for hidden_size={width}: a map "
            f"has that many columns to fit; give texts.linearity_tokens of {MIN_LINEARITY_TOKENS * width:,} or more, and "
            "text that holds them"
        )
