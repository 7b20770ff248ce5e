"""How far a student's next-token distribution is from its teacher's, over the teacher's top tokens.

V vocabulary, K top tokens of the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A log probability is a difference of float32 numbers of up to 40, right to 4e-6: of a smaller rest, nothing is known.
MIN_REST = 1e-4


class TopTokens(NamedTuple):
    """The teacher's distribution at one temperature over its K top tokens; what is left is one bucket.

    `ids` [..., K] token ids, `log_probs` [..., K] in nats.
    """

    ids: Tensor
    log_probs: Tensor


def find_divergence(log_probs: Tensor, teacher: TopTokens) -> Tensor:
    """KL(teacher ‖ student) in nats per token [...] for the student's log probabilities [..., K] of the same tokens.

    Over the teacher's top tokens and one bucket for all others: a lower bound of the divergence over the whole
    vocabulary, and close to it because the bucket holds little.
    """
    log_p = teacher.log_probs
    kl = (log_p.exp() * (log_p - log_probs)).sum(-1)
    rest_p = _log_rest(log_p)
    return kl + rest_p.exp() * (rest_p - _log_rest(log_probs))


def pick_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log probabilities [..., K] of tokens `ids` [..., K] under logits [..., V] at a temperature; differentiable."""
    picked = _PickLogProbs.apply(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1]), temperature)
    return picked.view(ids.shape)


class _PickLogProbs(torch.autograd.Function):
    """z_ids/τ − log Σ exp(z/τ), both ways in strips of rows: no float32 copy of all logits is made.

    On a CPU a step of distillation spends a third less time than with `logsumexp` (SmolLM2-135M, 49,152 tokens).
    """

    @staticmethod
    def forward(ctx, logits_nv: Tensor, ids_nk: Tensor, temperature: float) -> Tensor:
        normalizer_n, _ = find_normalizer(logits_nv, temperature)
        ctx.save_for_backward(logits_nv, ids_nk, normalizer_n)
        ctx.temperature = temperature
        return logits_nv.gather(-1, ids_nk).float() / temperature - normalizer_n[:, None]

    @staticmethod
    def backward(ctx, gradient_nk: Tensor) -> tuple[Tensor, None, None]:
        logits_nv, ids_nk, normalizer_n = ctx.saved_tensors
        result = torch.empty_like(logits_nv)
        for rows in split_rows(logits_nv):
            probabilities = (logits_nv[rows].float() / ctx.temperature).sub_(normalizer_n[rows, None]).exp_()
            scaled = gradient_nk[rows] / ctx.temperature
            result[rows] = probabilities.mul_(-scaled.sum(-1, keepdim=True)).scatter_add_(-1, ids_nk[rows], scaled)
        return result, None, None


@torch.no_grad()
def find_normalizer(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log Σ exp(logits / temperature) in float32, and the top token's id, both [...] for logits [..., V].

    In strips that stay in the processor's cache: on a CPU seven times faster than `logsumexp` and `argmax`.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    normalizers, top_ids = [], []
    for rows in split_rows(flat):
        scaled = flat[rows].to(torch.float32, copy=True).div_(temperature)
        highest, index = scaled.max(-1, keepdim=True)
        normalizers.append(scaled.sub_(highest).exp_().sum(-1).log_() + highest[:, 0])
        top_ids.append(index[:, 0])
    return torch.cat(normalizers).view(logits.shape[:-1]), torch.cat(top_ids).view(logits.shape[:-1])


def split_rows(logits_nv: Tensor) -> list[slice]:
    """Strips of rows: small ones on a CPU, where the cache counts; large ones on an accelerator."""
    step = 64 if logits_nv.device.type == "cpu" else 4096
    return [slice(start, start + step) for start in range(0, len(logits_nv), step)]


def _log_rest(log_probs: Tensor) -> Tensor:
    """log(1 − Σ p), at least that of `MIN_REST`."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - MIN_REST))
