"""Logits in, tokens out, each request by its own rules and its own random numbers."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from shoal_services.serving.engine.generation import RequestFailed, Sampling, Token

# Likely tokens looked at before all are sorted: they nearly always hold `top_p` of the probability.
NUCLEUS = 256
# Below it float32 scores would overflow; what is drawn is the likeliest token long before.
MIN_TEMPERATURE = 1e-30


class Sampler:
    """Picks one request's tokens. What it picks depends on its own logits, seed and past alone."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.counts: Counter[int] = Counter()
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed % 2**63)

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is all that is wanted."""
        s = self.sampling
        return s.temperature == 0 and s.num_logprobs is None and not (s.presence_penalty or s.frequency_penalty)

    def pick(self, logits_v: Tensor) -> Token:
        """The next token for logits [V]; log probabilities are those of the model, before temperature and cuts.

        Raises `RequestFailed` if the model's logits are no numbers.
        """
        s = self.sampling
        logits = logits_v.float()
        check_largest(float(logits.max()))
        scores = self._penalise(logits) if self.counts and (s.presence_penalty or s.frequency_penalty) else logits
        chosen = int(scores.argmax()) if s.temperature == 0 else self._draw(scores / max(s.temperature, MIN_TEMPERATURE))
        self.counts[chosen] += 1
        return describe_token(logits, chosen, s.num_logprobs)

    def _penalise(self, logits: Tensor) -> Tensor:
        seen = torch.tensor(list(self.counts), device=logits.device)
        times = torch.tensor(list(self.counts.values()), device=logits.device, dtype=logits.dtype)
        penalised = logits.clone()
        penalised[seen] -= self.sampling.presence_penalty + self.sampling.frequency_penalty * times
        return penalised

    def _draw(self, scores: Tensor) -> int:
        """A token from the softmax of scores [V], cut to `top_k` tokens and to the nucleus of mass `top_p`."""
        probabilities = scores.softmax(-1)
        vocabulary = len(probabilities)
        limit = min(self.sampling.top_k or vocabulary, vocabulary)
        if self.sampling.top_p < 1:
            values, ids = self._nucleus(probabilities, limit)
        elif limit < vocabulary:
            values, ids = probabilities.topk(limit)
        else:
            values, ids = probabilities, None
        # On the CPU, so that a seed means the same on every device.
        index = int(torch.multinomial(values.cpu(), 1, generator=self.generator))
        return index if ids is None else int(ids[index])

    def _nucleus(self, probabilities: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens, `limit` at most, up to the one with which they hold `top_p` of what the limit leaves."""
        size = min(limit, NUCLEUS)
        while True:
            values, ids = probabilities.topk(size)
            total = values.sum() if size == limit and limit < len(probabilities) else probabilities.sum()
            before = values.cumsum(0) - values
            keep = before < self.sampling.top_p * total
            keep[0] = True  # a `top_p` that float32 takes for 0 keeps the likeliest
            if not bool(keep.all()) or size == limit:
                return values[keep], ids[keep]
            size = limit


def check_largest(logit: float) -> None:
    """Raises `RequestFailed` if the largest of a token's logits is no number, as it is where one of them is none."""
    if not math.isfinite(logit):
        raise RequestFailed(f"the model's logits for this text are not finite numbers (the largest is {logit})")


def describe_token(logits_v: Tensor, chosen: int, num_logprobs: int | None) -> Token:
    """The token with its log probability under logits [V], and the `num_logprobs` likeliest beside it.

    Raises `RequestFailed` if log probabilities are wanted and the logits are no numbers.
    """
    if num_logprobs is None:
        return Token(chosen)
    check_largest(float(logits_v.max()))
    logprobs = logits_v.float().log_softmax(-1)
    top = logprobs.topk(min(num_logprobs, len(logprobs)))
    likeliest = tuple(
        Token(token, logprob=logprob) for token, logprob in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
    return Token(chosen, logprob=float(logprobs[chosen]), top=likeliest)
