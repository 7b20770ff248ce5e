"""Tiny random encoders and encoder-decoders, and their folders."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from shoal.checkpoints.load import load_tokenizer

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
BOTH = {
    "d_model": 32, "encoder_layers": 4, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 257, "eos_token_id": 258, "decoder_start_token_id": 258}

ENCODERS = {
    "bert": ("Bert", {**WIDTHS, "max_position_embeddings": 128}),
    "roberta": ("Roberta", {**WIDTHS, "max_position_embeddings": 130, "pad_token_id": 0}),
    "distilbert": (
        "DistilBert",
        {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 128},
    ),
    "modernbert": (
        "ModernBert",
        {**WIDTHS, "max_position_embeddings": 128, "cls_token_id": 257, "sep_token_id": 258, **SPECIAL},
    ),
}
ENCODER_DECODERS = {
    "t5": (
        "T5",
        {"d_model": 32, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 48, **SPECIAL},
    ),
    "bart": ("Bart", {**BOTH, **SPECIAL}),
    "mbart": ("MBart", {**BOTH, **SPECIAL}),
}


def make_encoder(family: str, *, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model of 4 encoder blocks (and 3 decoder blocks) and 32 dimensions with its language-model head."""
    prefix, arguments = (ENCODERS | ENCODER_DECODERS)[family]
    config = getattr(transformers, f"{prefix}Config")(vocab_size=260, **arguments)
    torch.manual_seed(seed)
    auto = transformers.AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else transformers.AutoModelForMaskedLM
    model = auto.from_config(config)
    if family != "t5":  # whose own random weights are large enough to matter
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "embed" not in name and "shared" not in name:
                    parameter.mul_(6)
    return model.eval()


def save_with_tokenizer(model: transformers.PreTrainedModel, folder: Path, tiny_random: str) -> Path:
    """The model's folder with a byte tokenizer that puts [CLS] before and [SEP] after a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny_random)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 257), ("[SEP]", 258)]
    )
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
