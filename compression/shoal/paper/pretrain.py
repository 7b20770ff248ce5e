"""A decoder learns a language from nothing, with or without a penalty on what its blocks change.

    corpus, tokenizer = load_pretrain_corpus(recipe)
    run = PretrainingRun(make_model(recipe, tokenizer), corpus, recipe)
    for metrics in run: ...        # one dict per optimiser step

The loss is the language model's plus the regulariser of arXiv 2405.12250 §4. Like `shoal.distil.run`, an iterator of
metrics that does not know who listens; its steps are `shoal.distil.descent`'s: several ranks learn what one does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from shoal.checkpoints.device import DTYPES, choose_dtype
from shoal.distil.descent import Descent
from shoal.distil.trainable import autocast, checkpoint_gradients
from shoal.files import write_aside
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.scores import BlockLinearity, score_blocks
from shoal.measure.divergence import pick_log_probs
from shoal.measure.perplexity import mean_and_error
from shoal.measure.targets import measure_targets
from shoal.paper.pretrain_corpus import PretrainCorpus
from shoal.paper.pretrain_recipe import PretrainRecipe
from shoal.paper.regularize import Penalty
from shoal.paper.splice import Splice, measure_splices
from shoal.text.windows import find_end

MEANS = ("score", "score_without_residual", "held_out", "held_out_without_residual", "cosine", "norm_ratio")
"""The fields of `BlockLinearity` whose means over the blocks are recorded, as `mean_<field>`."""
WORTHS = ("removed", "mapped")
"""The fields of `Splice` whose means over the middle blocks are recorded at the end."""


def make_model(
    recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase, *, device: torch.device | None = None
) -> MistralForCausalLM:
    """A model of the recipe's architecture in float32; its random weights depend on the recipe's seed alone."""
    config = MistralConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=find_end(tokenizer),
        pad_token_id=tokenizer.pad_token_id, **recipe.architecture.model_dump(exclude={"rope_theta"}),
        rope_parameters={"rope_type": "default", "rope_theta": recipe.architecture.rope_theta},
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.seed)
        model = MistralForCausalLM(config)
    return model.to(device or torch.device("cpu"))  # type: ignore[arg-type]


class PretrainingRun:
    """Iterating trains; each step yields {step, num_tokens, loss, lm_loss, penalty, learning_rate, gradient_norm}.

    Before the first step, `num_checks` times and after the last, it also yields `validation_perplexity` with its
    standard error over windows, and the mean linearity of the blocks on text that is not trained on (`MEANS`); `checks`
    keeps these. The last check also has `mean_removed` and `mean_mapped`: what a middle block is worth (`splice`).
    Raises `Diverged` on a loss that is not finite, ValueError for too few tokens to measure linearity on.
    """

    def __init__(self, model: PreTrainedModel, corpus: PretrainCorpus, recipe: PretrainRecipe):
        self.model, self.corpus, self.settings = model, corpus, recipe.training
        self.penalty = Penalty(recipe.regularizer)
        if recipe.training.gradient_checkpointing:
            checkpoint_gradients(model)
        chosen = DTYPES[recipe.dtype] if recipe.dtype else choose_dtype(model.device)
        # Gradients in float16 would need a scaled loss.
        self.dtype = torch.float32 if chosen == torch.float16 else chosen
        self.descent = Descent(
            list(model.parameters()), recipe.training, num_windows=len(corpus.training), seed=recipe.seed
        )
        self.checks: list[dict[str, float]] = []
        self.blocks: list[BlockLinearity] = []

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.descent.step

    def __iter__(self) -> Iterator[dict[str, float]]:
        if not self.checks:
            yield {"step": 0, "num_tokens": 0, **self._check({"step": 0, "num_tokens": 0})}
        while not self.descent.is_done:
            metrics = self._take_step()
            if self.step % self.settings.check_every == 0 or self.descent.is_done:
                metrics |= self._check(metrics)
            yield metrics

    def state_dict(self) -> dict:
        """Everything that a later run needs to go on from here."""
        blocks = [dataclasses.asdict(block) for block in self.blocks]
        return self.descent.state_dict() | {"checks": self.checks, "blocks": blocks}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict()` of a run of the same recipe."""
        self.checks = list(state["checks"])
        self.blocks = [BlockLinearity(**block) for block in state["blocks"]]
        self.descent.load_state_dict(state)

    def _take_step(self) -> dict[str, float]:
        self.model.train()
        losses, metrics = self.descent.take_step(self._find_losses, num_losses=2)
        lm_loss, penalty = losses.tolist()
        return {**metrics, "loss": lm_loss + penalty, "lm_loss": lm_loss, "penalty": penalty}

    def _find_losses(self, rows: Tensor) -> Tensor:
        """The language model's loss in nats per token, and λ times the regulariser."""
        ids = self.corpus.training.ids[rows].to(self.model.device)
        with autocast(self.model.device, self.dtype), self.penalty.watch(self.model):
            logits = self.model(input_ids=ids, use_cache=False).logits
        lm_loss = -pick_log_probs(logits[:, :-1], ids[:, 1:, None]).mean()
        return torch.stack([lm_loss, lm_loss.new_zeros(()) + self.penalty.take()])

    def _check(self, metrics: dict[str, float]) -> dict[str, float]:
        """Validation perplexity and linearity of the model as it is now."""
        self.model.eval()
        splices: list[Splice] = []
        with autocast(self.model.device, self.dtype):
            targets = measure_targets(self.model, self.corpus.validation, num_top=1)
            moments = measure_moments(self.model, self.corpus.linearity)
            self.blocks = score_blocks(moments)
            if self.descent.is_done:
                splices = measure_splices(self.model, moments, self.corpus.validation, targets)
        mean, error = mean_and_error(targets.nll.double().mean(1))
        perplexity = math.exp(min(mean, 700))
        found = {"validation_perplexity": perplexity, "validation_standard_error": perplexity * error}
        found |= {f"mean_{field}": statistics.fmean(getattr(one, field) for one in self.blocks) for field in MEANS}
        if splices:  # the first and the last block always stay, so what they are worth would only hide the others
            middle = splices[1:-1] or splices
            found |= {f"mean_{cost}": statistics.fmean(getattr(one, cost) for one in middle) for cost in WORTHS}
        self.checks.append({"step": metrics["step"], "num_tokens": metrics["num_tokens"], **found})
        return found


def save_model(folder: Path, run: PretrainingRun, tokenizer: PreTrainedTokenizerBase, recipe: PretrainRecipe) -> None:
    """Writes the model as it is now: a stock checkpoint, with its recipe and checks in `pretraining.json`. Atomic."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(folder) as aside:
        run.model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        told = {"recipe": recipe.model_dump(mode="json"), "checks": run.checks}
        (aside / "pretraining.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
