"""Byte-level BPE tokenizers, learned from texts: any text in, the same text out."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens (fewer where the texts have fewer pairs): the end, bytes, merges.

    Raises ValueError if `vocab_size` leaves no room for merges.
    """
    alphabet = byte_alphabet()
    if vocab_size <= len(alphabet) + 1:
        raise ValueError(f"vocab_size={vocab_size} leaves no merges beside {len(alphabet)} bytes and the end; choose more")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return as_pretrained(bpe)


def as_pretrained(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """A BPE over bytes as transformers uses it; `<|end|>` ends and pads, and nothing is put before a text."""
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
