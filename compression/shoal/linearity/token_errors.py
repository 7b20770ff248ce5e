"""How far each token is from its block's best affine map: quantiles, histograms, and the tokens that are farthest.

A few tokens carry most of the error (arXiv 2405.12250, §5 and Fig. 9), which a mean score hides. The paper's guess is that
single features trigger it; the tokens themselves, in context, are what there is to look at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from shoal.linearity.gram import Gram
from shoal.linearity.moments import Moments
from shoal.linearity.scores import solve_least_squares
from shoal.models.structure import Stack
from shoal.text.windows import TokenWindows

QUANTILES = (0.5, 0.9, 0.99, 1.0)
# Relative errors reach from a thousandth (middle blocks) to more than one (first blocks); equal steps of their logarithm.
EDGES = tuple(float(edge) for edge in torch.logspace(-3, 1, 33))
CONTEXT_BEFORE, CONTEXT_AFTER = 10, 4


@dataclass(frozen=True)
class NonlinearToken:
    """A token with the text around it. `times_median`: its error over the median one, mean over the blocks; `block`: where
    it is largest, with `error` there."""

    before: str
    token: str
    after: str
    position: int
    times_median: float
    block: int
    error: float


@torch.no_grad()
def measure_token_errors(stack: Stack, windows: TokenWindows, moments: Moments) -> Tensor:
    """Relative errors ‖ŷ − y‖ / ‖y‖ [L, N] of the N tokens of the windows under each block's best affine map."""
    grams = [moments.ordinary[block] + moments.sinks[block] for block in range(moments.num_blocks)]
    maps: list[nn.Linear] = [_best_map(gram) for gram in grams]
    errors: list[list[Tensor]] = [[] for _ in maps]
    previous: list[Tensor] = []

    def visit(boundary: int, stream_btd: Tensor) -> None:
        y_nd = stream_btd.flatten(0, 1).float()
        if previous:
            relative = (maps[boundary - 1](previous.pop()) - y_nd).norm(dim=1) / y_nd.norm(dim=1).clamp(min=1e-12)
            errors[boundary - 1].append(relative)
        previous.append(y_nd)

    with stack.watch(visit):
        for row in windows.ids:
            previous.clear()
            stack.read(row[None].to(stack.model.device))
    return torch.stack([torch.cat(block) for block in errors]).cpu()


def take_quantiles(errors_ln: Tensor) -> list[list[float]]:
    """The `QUANTILES` of every block's errors."""
    return torch.quantile(errors_ln, torch.tensor(QUANTILES), dim=1).T.tolist()


def count_errors(errors_ln: Tensor) -> list[list[int]]:
    """A histogram for every block: tokens in each interval between two `EDGES`, the outermost open."""
    places = torch.bucketize(errors_ln, torch.tensor(EDGES[1:-1]))
    return [torch.bincount(row, minlength=len(EDGES) - 1).tolist() for row in places]


def find_nonlinear_tokens(
    errors_ln: Tensor, windows: TokenWindows, tokenizer: PreTrainedTokenizerBase, *, count: int = 20
) -> list[NonlinearToken]:
    """The `count` tokens whose errors are the most times the median, mean over the blocks.

    The first token of a window counts as any other: that sinks lead the list is part of what it shows.
    """
    times_ln = errors_ln / errors_ln.median(dim=1, keepdim=True).values.clamp(min=1e-12)
    mean_n = times_ln.mean(dim=0)
    window = windows.ids.shape[1]
    found = []
    for index in mean_n.topk(min(count, len(mean_n))).indices.tolist():
        row, position = divmod(index, window)
        ids = windows.ids[row]
        block = int(times_ln[:, index].argmax())
        before, token, after = (
            str(tokenizer.decode(part))
            for part in (
                ids[max(0, position - CONTEXT_BEFORE) : position], ids[position : position + 1],
                ids[position + 1 : position + 1 + CONTEXT_AFTER],
            )
        )  # fmt: skip
        error = float(errors_ln[block, index])
        found.append(NonlinearToken(before, token, after, position, float(mean_n[index]), block, error))
    return found


def _best_map(gram: Gram) -> nn.Linear:
    xx, xy, _ = gram.centred()
    weight = solve_least_squares(xx, xy)
    affine = nn.Linear(weight.shape[0], weight.shape[1], device=weight.device)
    affine.weight.data = weight.T.float()
    affine.bias.data = ((gram.sum_y[0] - gram.sum_x[0] @ weight) / gram.num_tokens[0]).float()
    return affine
