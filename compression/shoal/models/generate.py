"""Text from a model: the likeliest continuation, or samples."""

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


@torch.no_grad()
def sample_continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, num_samples: int = 1, num_new: int = 200,
    temperature: float = 1.0, seed: int = 0,
) -> list[str]:  # fmt: skip
    """Continuations of `prompt` drawn from the model's own distribution, each at most `num_new` tokens long.

    Raises ValueError for a prompt without tokens.
    """
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise ValueError("the prompt is empty; give it some words")
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        rows = model.generate(  # type: ignore[operator]
            **encoded, max_new_tokens=num_new, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            num_return_sequences=num_samples,
        )  # fmt: skip
    return [str(text) for text in tokenizer.batch_decode(rows[:, length:], skip_special_tokens=True)]
