"""How far the formulas of `shoal.cost` are off: `python tests/fit_cost.py` measures random small models.

One thread, float32, seconds of the process and not of the clock, so that other load on the machine counts little.
Seconds a token are fitted as operations / rate + bytes of activations / bandwidth on every other model, and predicted for
the rest. Activations are the bytes that autograd keeps.
"""

from __future__ import annotations

import statistics
import time

import numpy
import torch
from shoal.cost import ModelShape
from shoal.distil.trainable import select_trained
from shoal.measure.divergence import TopTokens, find_divergence, pick_log_probs
from shoal.recipe import Distillation
from transformers import LlamaConfig, LlamaForCausalLM

WINDOW, WINDOWS, ROUNDS = 128, 4, 5
# (width, MLP width, blocks, vocabulary): every other one is fitted on, the rest are predicted.
MODELS = [
    (128, 352, 4, 2048), (192, 512, 6, 4096), (256, 704, 4, 2048), (256, 704, 10, 8192), (384, 1024, 6, 4096),
    (512, 1408, 6, 8192), (640, 1728, 4, 8192), (768, 2048, 4, 16384),
]  # fmt: skip


def make(width: int, mlp: int, blocks: int, vocabulary: int) -> tuple[LlamaForCausalLM, ModelShape]:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=blocks, vocab_size=vocabulary,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), ModelShape.from_config(config.to_dict())


def cpu_seconds(work) -> float:
    taken = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


def measure(sizes: tuple[int, int, int, int]) -> dict[str, float]:
    """Seconds a token, forward and distillation step; bytes kept; and what the formulas have for them."""
    model, shape = make(*sizes)
    ids = torch.randint(0, shape.vocabulary, (WINDOWS, WINDOW))
    tokens = ids.numel()
    assert shape.num_parameters == sum(p.numel() for p in model.parameters()), "the formula for parameters is wrong"
    with torch.no_grad():
        forward = cpu_seconds(lambda: model(input_ids=ids, use_cache=False))
        top = model(input_ids=ids).logits.log_softmax(-1).topk(64)
    teacher = TopTokens(top.indices, top.values)
    student = model.train()
    select_trained(student, Distillation(trained="lora", lora_rank=8))
    held: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> None:
        logits = student(input_ids=ids, use_cache=False).logits
        find_divergence(pick_log_probs(logits, teacher.ids), teacher).mean().backward()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    activations = shape.activation_bytes(tokens, 4)
    return {
        "forward": forward / tokens, "step": cpu_seconds(step) / tokens, "kept": float(sum(held.values())),
        "forward_operations": shape.forward_operations(WINDOW), "step_operations": shape.step_operations(WINDOW, "lora", 8),
        "activations": activations, "bytes": activations / tokens,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    square = torch.randn(1024, 1024)
    peak = 2 * 1024**3 / cpu_seconds(lambda: square @ square)
    rows = [measure(sizes) for sizes in MODELS]
    print(f"peak of a 1024³ product, one thread, float32: {peak / 1e9:.1f} GFLOP/s")
    for what in ("forward", "step"):
        seconds = numpy.array([row[what] for row in rows])
        terms = numpy.array([[row[f"{what}_operations"], row["bytes"]] for row in rows])
        fitted = slice(0, None, 2)
        weighted = terms[fitted] / seconds[fitted, None]  # relative errors
        solution = numpy.linalg.lstsq(weighted, numpy.ones(len(weighted)), rcond=None)[0].clip(min=0)
        errors = terms @ solution / seconds - 1
        rate, bandwidth = 1 / solution.clip(min=1e-30) / 1e9
        print(f"{what}: {rate:.1f} GFLOP/s, {bandwidth:.2f} GB/s of kept bytes")
        for index, (sizes, error) in enumerate(zip(MODELS, errors, strict=True)):
            role = "fitted" if index % 2 == 0 else "predicted"
            print(f"  {sizes!s:24} {role:9} measured {seconds[index] * 1e6:8.1f} µs/token, predicted {error:+.1%}")
        print(f"  largest error of the predicted: {max(abs(errors[1::2])):.1%}")
    for sizes, row in zip(MODELS, rows, strict=True):
        print(f"  {sizes!s:24} kept {row['kept'] / 1e6:8.1f} MB, formula {row['activations'] / row['kept'] - 1:+.1%}")


if __name__ == "__main__":
    main()
