"""Text from a model, greedily."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, num_new: int = 32) -> str:
    """The most likely continuation of `prompt`, at most `num_new` tokens long.

    Raises ValueError for a prompt without tokens.
    """
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    if encoded["input_ids"].numel() == 0:
        raise ValueError("the prompt is empty; give it some words")
    tokens = model.generate(**encoded, max_new_tokens=num_new, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
