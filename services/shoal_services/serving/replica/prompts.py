"""Prompts of every form → token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from shoal_services.serving.engine.generation import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Token ids of a prompt, in whichever form it came.

    Raises ValueError for ids that there are not, and for a chat without a template or one that its template refuses.
    """
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
    messages = [part for part in prompt if isinstance(part, dict)]
    if messages:
        return _apply_template(tokenizer, messages)
    ids = cast(tuple[int, ...], prompt)
    if outside := [token for token in ids if not 0 <= token < len(tokenizer)]:
        raise ValueError(f"token ids {outside[:5]} are outside the vocabulary of {len(tokenizer)} tokens")
    return ids


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[int, ...]:
    if tokenizer.chat_template is None:
        raise ValueError("this model has no chat template; use /v1/completions")
    try:
        templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates are programs of others, and raise what they like
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
    return tuple(cast(list[int], templated))
