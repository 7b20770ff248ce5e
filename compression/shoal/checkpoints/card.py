"""The model card of a compressed model: what was done, the numbers beside the dense model's, how to load it."""

from __future__ import annotations

from shoal.point import Point
from shoal.recipe import Recipe


def write_card(point: Point) -> str:
    """The card as Markdown."""
    recipe = point.recipe
    load = "" if recipe.is_stock else ", trust_remote_code=True"
    saved = 1 - point.size.num_parameters / point.dense_size.num_parameters
    return f"""---
base_model: {recipe.base_model}
tags: [shoal, depth-compression]
---

# {recipe.base_model}, {_title(recipe)}

{_describe_changes(recipe)}
{saved:.1%} fewer parameters. Made by Shoal; `recipe.json` says how, `point.json` holds every number.

## Numbers

| | dense | this model |
|---|---|---|
{chr(10).join([*_evaluation_rows(point), *_task_rows(point)])}
| parameters | {point.dense_size.num_parameters:,} | {point.size.num_parameters:,} |
| weights, bytes | {point.dense_size.num_bytes:,} | {point.size.num_bytes:,} |
{chr(10).join(_bitmask_rows(point))}
| KV cache, bytes per token | {point.dense_size.kv_bytes_per_token:,} | {point.size.kv_bytes_per_token:,} |
{chr(10).join(_speed_rows(point))}

± is one standard error over windows (of tasks: over examples). Measured on {point.device} in {recipe.dtype},
seed {recipe.seed}.

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder{load})
tokenizer = AutoTokenizer.from_pretrained(folder{load})
```

With Shoal installed, `shoal.load(folder)` loads it and never runs code from the folder.
"""


def _title(recipe: Recipe) -> str:
    replaced = [f"{recipe.count_units()} {_describe_kind(recipe.kind)}"] if recipe.replaces_blocks else []
    return ", ".join([*replaced, *recipe.weight_changes]) or "nothing changed"


def _describe_changes(recipe: Recipe) -> str:
    """A sentence for each change."""
    sentences = []
    if recipe.replaces_blocks:
        kind = _describe_kind(recipe.kind)
        units = ", ".join(map(str, recipe.blocks or ()))
        sentences.append(f"Blocks {units} of the dense model were {kind} (arXiv 2405.12250).")
    if recipe.weight_share is not None:
        sentences.append(
            f"Projections of the blocks that stay are products of two factors with at most {recipe.weight_share:.0%} of "
            "their parameters (activation-aware SVD, arXiv 2403.07378)."
        )
    if recipe.sparsity is not None:
        share = f"of every group, {recipe.sparsity} stay" if isinstance(recipe.sparsity, str) else f"{recipe.sparsity:.0%}"
        sentences.append(
            f"Weights of the projections of the blocks that stay are zero ({share}; Wanda, arXiv 2306.11695). Zeros are "
            "not counted as parameters. They are stored like other values, so that the folder loads everywhere: they "
            "save no bytes and, without hardware for them, no time."
        )
    if recipe.distillation is not None:
        what = {"maps": "The maps", "lora": "Low-rank updates", "blocks": "The blocks", "all": "All weights"}
        learner = what[recipe.distillation.trained]
        sentences.append(f"{learner} then learned what the dense model says, on {recipe.lesson}.")
    return "\n".join(sentences)


def _bitmask_rows(point: Point) -> list[str]:
    packed = point.size.num_bitmask_bytes
    return [] if packed is None else [f"| bytes, if zeros were a bit each | {point.dense_size.num_bytes:,} | {packed:,} |"]


def _describe_kind(kind: str) -> str:
    return {
        "linear": "replaced by affine maps",
        "low_rank": "replaced by low-rank affine maps",
        "folded": "folded into the blocks before them",
        "dropped": "dropped",
    }[kind]


def _evaluation_rows(point: Point) -> list[str]:
    rows = []
    for e in point.evaluations:
        name = f"{e.text.name} ({e.text.num_tokens:,} tokens, sha256 {(e.text.sha256 or '')[:8]})"
        dense = f"{e.dense_perplexity:.2f} ± {e.dense_standard_error:.2f}"
        rows.append(f"| perplexity, {name} | {dense} | {e.perplexity:.2f} ± {e.standard_error:.2f} |")
        rows.append(f"| perplexity ratio (log ± paired) | 1 | {_ratio(e.log_ratio, e.log_ratio_standard_error)} |")
        rows.append(f"| KL to dense, nats per token | 0 | {e.kl:.4f} ± {e.kl_standard_error:.4f} |")
        rows.append(f"| same top token as dense | 100 % | {e.top1_agreement:.1%} |")
    return rows


def _task_rows(point: Point) -> list[str]:
    def write(score: float | None, error: float | None) -> str:
        return "" if score is None else f"{score:.3f}" + ("" if error is None else f" ± {error:.3f}")

    return [
        f"| {s.task}, {s.metric} ({s.num_examples:,} examples) | {write(s.dense_score, s.dense_standard_error)} "
        f"| {write(s.score, s.standard_error)} |"
        for s in point.tasks
    ]


def _ratio(log_ratio: float, error: float) -> str:
    from math import exp

    return f"{exp(log_ratio):.3f} (log {log_ratio:.4f} ± {error:.4f})"


def _speed_rows(point: Point) -> list[str]:
    if point.speed is None or point.dense_speed is None:
        return []
    dense, speed = point.dense_speed, point.speed
    return [
        f"| prefill, tokens/s | {dense.prefill_tokens_per_s:,.0f} | {speed.prefill_tokens_per_s:,.0f} |",
        f"| decode, tokens/s | {dense.decode_tokens_per_s:,.1f} | {speed.decode_tokens_per_s:,.1f} |",
    ]
