"""Which weights these are: of a model all or a sample, of a folder its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.large.on_disk import named_weights


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters: equal hash, equal weights."""
    digest = hashlib.sha256()
    for name, read in sorted(named_weights(model), key=lambda weight: weight[0]):
        weight = read()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample_weights(model: PreTrainedModel) -> str:
    """A hash of 64 values of every parameter: other weights, other hash, without reading gigabytes."""
    digest = hashlib.sha256()
    for _, read in named_weights(model):
        flat = read().flatten()
        digest.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def hash_folder(folder: Path) -> str:
    """SHA-256 over the weight files: what a pointer to the folder can be checked against."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(path.name.encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
