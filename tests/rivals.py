"""What other methods make of the same model, beside Shoal's: `python tests/rivals.py 4 6 --model smollm2-135m`.

Each method is made from the formula of its paper, not from its code, in one harness: the same calibration, selection and
evaluation text; with --distil-tokens, all are healed alike too. ± is one standard error of the paired difference from the
dense model.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from scipy.linalg import hadamard
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.distil.run import DistillationRun
from shoal.distil.teacher import Lesson
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.moments import Moments
from shoal.linearity.scores import score_blocks
from shoal.measure.perplexity import evaluate
from shoal.measure.targets import TeacherTargets, measure_targets
from shoal.models.calls import embed, record_calls
from shoal.models.projections import find_down_proj, weight_of
from shoal.models.structure import find_blocks, text_config
from shoal.recipe import Distillation, Recipe
from shoal.replace.choose import choose_blocks, protected_blocks
from shoal.replace.in_order import fit_in_order, split_evenly
from shoal.replace.judge import Judge
from shoal.replace.look_ahead import list_moves
from shoal.replace.maps import AffineMap, Replacement, apply_replacement
from shoal.text.corpus import Corpus, load_corpus
from shoal.texts import Texts
from shoal.units import Unit, find_runs, whole_blocks
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ground:
    """What all methods start from."""

    model: PreTrainedModel
    corpus: Corpus
    moments: Moments
    selection: TeacherTargets
    evaluation: tuple[TeacherTargets, ...]
    distillation: TeacherTargets | None

    def choose(self, num_replaced: int, selection: str, **recipe: object) -> tuple[Unit, ...]:
        """The units that a rule of Shoal chooses."""
        wanted = Recipe.model_validate(
            {"base_model": "dense", "num_replaced": num_replaced, "selection": selection, **recipe}
        )
        return choose_blocks(wanted, self.moments, judge=lambda: self.judge(wanted))

    def judge(self, recipe: Recipe) -> Judge:
        return Judge(self.model, self.corpus.calibration, self.corpus.selection, self.selection, recipe)

    @torch.no_grad()
    def streams(self, boundaries: set[int]) -> dict[int, Tensor]:
        """The dense model's streams [N, d] of the calibration text at these boundaries."""
        batches = split_evenly(self.corpus.calibration, self.model.device)
        calls, blocks = record_calls(self.model, batches[0]), find_blocks(self.model)
        stream, kept = [embed(self.model, ids) for ids in batches], {}
        for boundary in range(max(boundaries) + 1):
            if boundary in boundaries:
                kept[boundary] = torch.cat(stream).flatten(0, 1).float()
            if boundary < max(boundaries):
                stream = [calls[boundary].run(blocks[boundary], batch) for batch in stream]
        return kept


def drop_alike(ground: Ground, number: int) -> Replacement:
    """ShortGPT (arXiv 2403.03853): blocks whose input and output have the highest cosine go."""
    return Replacement(ground.choose(number, "cosine"))


def compensate(ground: Ground, number: int) -> Replacement:
    """Prune&Comp (arXiv 2507.18212), ranked once: ShortGPT's blocks, and a factor for each gap in magnitude."""
    units = ground.choose(number, "cosine")
    runs = find_runs(whole_blocks(units))
    streams = ground.streams({boundary for run in runs for boundary in (run.start, run.stop)})
    width = text_config(ground.model).hidden_size
    maps = {}
    for run in runs:
        factor = (streams[run.stop].norm(dim=1) / streams[run.start].norm(dim=1)).mean()
        eye = torch.eye(width, device=factor.device)
        maps[run.start] = AffineMap((factor - 1) * eye, torch.zeros(width, device=factor.device))
    return Replacement(units, maps)


def drop_window(ground: Ground, number: int) -> Replacement:
    """UIDL (arXiv 2403.17887): the run of blocks with the smallest angular distance across it goes."""
    return Replacement(ground.choose(number, "window"))


def drop_greedily(ground: Ground, number: int) -> Replacement:
    """SLEB (arXiv 2402.09025): one after the other, the block goes without which the model's output changes least."""
    scores = score_blocks(ground.moments)
    free = [score.block for score in scores if score.block not in protected_blocks(scores)]
    judge = ground.judge(Recipe(base_model="dense", num_replaced=number, kind="dropped"))
    gone: frozenset[int] = frozenset()
    for _ in range(number):
        gone = min((gone | move for move in list_moves(free, ()) if not move <= gone), key=judge.cost)
    return Replacement(tuple(sorted({place // 2 for place in gone})))


def fold_window(ground: Ground, number: int) -> Replacement:
    """ReplaceMe (arXiv 2505.02819), least squares: T* = (MᵀM)⁻¹Mᵀ(L − R) on the MLP's output M, folded into `down_proj`."""
    units = ground.choose(number, "window")
    first = whole_blocks(units)[0]
    streams, block = ground.streams({first - 1, first, first + number}), find_blocks(ground.model)[first - 1]
    projection = find_down_proj(block, text_config(ground.model).hidden_size)
    assert projection is not None
    outputs: list[Tensor] = []
    hook = projection.register_forward_hook(lambda _module, _args, output: outputs.append(output.flatten(0, 1).float()))
    ground.streams({first})
    hook.remove()
    m = torch.cat(outputs).double()
    residual = streams[first].double() - m
    turn = torch.linalg.lstsq(m, streams[first + number].double() - residual).solution
    name = next(name for name, module in block.named_modules() if module is projection)
    weight = (turn.T @ weight_of(projection).double()).to(ground.model.dtype)
    return Replacement(units, weights={first - 1: {f"{name}.weight": weight}})


def map_window(ground: Ground, number: int) -> Replacement:
    """Ghosted Layers (arXiv 2605.15491): where a run was, one linear map of the stream, (XᵀX + εI) M = Xᵀ(Y − X)."""
    units = ground.choose(number, "window")
    first = whole_blocks(units)[0]
    streams = ground.streams({first, first + number})
    x, y = streams[first].double(), streams[first + number].double()
    update = torch.linalg.solve(x.T @ x + 1e-6 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device), x.T @ (y - x))
    return Replacement(units, {first: AffineMap(update.T.float().contiguous(), torch.zeros(x.shape[1], device=x.device))})


def patch(ground: Ground, number: int) -> Replacement:
    """LinearPatch (arXiv 2505.24680), untrained: where a run was, a scale for each channel in Hadamard space."""
    units = ground.choose(number, "window")
    first = whole_blocks(units)[0]
    streams = ground.streams({first, first + number})
    width = text_config(ground.model).hidden_size
    turn = _hadamard(width).to(streams[first])
    ratio = (streams[first + number] @ turn).abs().mean(0) / (streams[first] @ turn).abs().mean(0)
    update = turn @ torch.diag(ratio) @ turn.T - torch.eye(width, device=turn.device)
    return Replacement(units, {first: AffineMap(update.contiguous(), torch.zeros(width, device=turn.device))})


def _hadamard(width: int) -> Tensor:
    """An orthogonal matrix of ±1 in blocks, each as large as the width's power of two allows."""
    side = width & -width
    block = torch.from_numpy(hadamard(side)).float() / math.sqrt(side)
    return torch.block_diag(*[block] * (width // side))


def in_order(kind: str, selection: str) -> Callable[[Ground, int], Replacement]:
    """Shoal's own, with a rule that chooses."""

    def make(ground: Ground, number: int) -> Replacement:
        units = ground.choose(number, selection, kind=kind)
        return fit_in_order(ground.model, units, ground.corpus.calibration, kind=kind)  # type: ignore[arg-type]

    return make


def parts_in_order(ground: Ground, number: int) -> Replacement:
    """Shoal's own with attention and MLP apart, down to the parameters that whole blocks leave."""
    depth_share = number * sum(p.numel() for p in find_blocks(ground.model)[0].parameters())
    share = 1 - depth_share / ground.model.num_parameters()
    units = ground.choose(0, "kl", parameters=share, parts=True)
    return fit_in_order(ground.model, units, ground.corpus.calibration)


METHODS: dict[str, Callable[[Ground, int], Replacement]] = {
    "ShortGPT": drop_alike,
    "Prune&Comp": compensate,
    "UIDL": drop_window,
    "SLEB, by KL": drop_greedily,
    "LinearPatch": patch,
    "ReplaceMe, least squares": fold_window,
    "Ghosted": map_window,
    "Shoal, dropped, by KL": in_order("dropped", "kl"),
    "Shoal, folded, by KL": in_order("folded", "kl"),
    "Shoal, linear, by linearity": in_order("linear", "linearity"),
    "Shoal, linear, by KL": in_order("linear", "kl"),
    "Shoal, linear, parts by KL": parts_in_order,
}


def prepare(name: str, texts: Texts, dtype: str | None, distil_tokens: int) -> Ground:
    model, tokenizer = load_model(name, dtype=dtype), load_tokenizer(name)
    corpus = load_corpus(texts, tokenizer, model.config, distillation_tokens=distil_tokens)
    return Ground(
        model, corpus, measure_moments(model, corpus.calibration), measure_targets(model, corpus.selection),
        tuple(measure_targets(model, windows) for windows in corpus.evaluation),
        measure_targets(model, corpus.distillation) if corpus.distillation else None,
    )  # fmt: skip


def measure(ground: Ground, replacement: Replacement, distil_tokens: int) -> list[str]:
    """Parameters saved, what went, and perplexity over the dense model's on each text, healed too if that is wanted."""
    student = copy.deepcopy(ground.model)
    apply_replacement(student, replacement)
    saved = ground.model.num_parameters() - student.num_parameters()
    cells = [f"{saved / 1e6:.1f} M", ", ".join(map(str, replacement.units)), *rate(ground, student)]
    return [*cells, *rate(ground, heal(ground, student, replacement, distil_tokens))] if distil_tokens else cells


def rate(ground: Ground, student: PreTrainedModel) -> list[str]:
    cells = []
    for windows, dense in zip(ground.corpus.evaluation, ground.evaluation, strict=True):
        found = evaluate(student, windows, dense)
        ratio = math.exp(found.log_ratio)
        cells.append(f"{found.perplexity:.2f}, ×{ratio:.3f} ± {ratio * found.log_ratio_standard_error:.3f}")
    return cells


def heal(ground: Ground, student: PreTrainedModel, replacement: Replacement, num_tokens: int) -> PreTrainedModel:
    assert ground.corpus.distillation is not None
    lesson = Lesson(ground.corpus.distillation, ground.distillation, ground.corpus.selection, ground.selection)
    run = DistillationRun(student, ground.model, lesson, Distillation(num_tokens=num_tokens), replaced=replacement.blocks)
    for _ in run:
        pass
    return run.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, default=[4, 6, 8], help="how many blocks go")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--text", action="append", help="to fit and choose on; repeatable")
    parser.add_argument("--evaluation-text", action="append", help="to report on; repeatable")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--evaluation-tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--distil-tokens", type=int, default=0, help="to heal every method's model on, all alike")
    parser.add_argument("--only", action="append", help="methods whose names hold this; repeatable")
    given = parser.parse_args()
    texts = Texts(
        train=tuple(given.text or ["wikipedia-sample"]), window=given.window, calibration_tokens=given.calibration_tokens,
        evaluation=tuple(given.evaluation_text or given.text or ["wikipedia-sample"]),
        evaluation_tokens=given.evaluation_tokens,
    )  # fmt: skip
    ground = prepare(given.model, texts, given.dtype, given.distil_tokens)
    console = Console(width=None if sys.stdout.isatty() else 240)
    dense = ", ".join(f"{float(one.nll.mean().exp()):.2f}" for one in ground.evaluation)
    for number in given.numbers:
        table = Table(title=f"{given.model} without {number} blocks; dense {dense}")
        names = [windows.name for windows in ground.corpus.evaluation]
        healed = [f"{name}, healed" for name in names] if given.distil_tokens else []
        for column in ("method", "saved", "gone", *names, *healed):
            table.add_column(column)
        for name, make in METHODS.items():
            if not given.only or any(part.lower() in name.lower() for part in given.only):
                table.add_row(name, *measure(ground, make(ground, number), given.distil_tokens))
        console.print(table)


if __name__ == "__main__":
    main()
