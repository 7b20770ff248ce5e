"""A decoder fine-tuned to classify texts or to prefer one of two: before and after, its linearity can be compared.

Fine-tuning lowered or raised linearity in the paper's Table 1 (arXiv 2405.12250, §3.3); this makes the models for such
a table. The decoder keeps its language-model head, so what comes out is a causal model like the one that went in; the
head that was trained lies beside it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from shoal.checkpoints.companions import drop_stale_settings
from shoal.distil.trainable import merge_trained, select_trained
from shoal.files import write_aside
from shoal.progress import Listener, ignore
from shoal.recipe import Distillation
from shoal.text.labelled import Labelled, Preferences
from shoal.value import Value

Examples = Labelled | Preferences


class Finetuning(Value):
    """How a decoder is fine-tuned. One epoch at these defaults suits a few thousand short texts."""

    trained: Literal["all", "lora"] = "all"
    lora_rank: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    num_epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=16, ge=1, description="texts (or pairs) per step, over all workers")
    max_length: int = Field(default=256, ge=8, description="tokens of a text; of longer ones the end is kept")
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    held_out_share: float = Field(default=0.2, gt=0, lt=1)


class ScoredDecoder(nn.Module):
    """A decoder with a linear head on the stream at a text's last token, after the final norm.

    One output and pairs as input make a reward model: rows 2i and 2i+1 are a chosen and a rejected text, and the loss is
    −log σ(r_chosen − r_rejected) (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).
    """

    def __init__(self, model: PreTrainedModel, num_outputs: int):
        super().__init__()
        self.decoder = model.base_model
        embeddings: Any = model.get_input_embeddings()
        width = int(embeddings.weight.shape[1])
        self.head = nn.Linear(width, num_outputs, device=model.device)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits [texts, classes], or differences of rewards [pairs, 1], and the loss; ids are padded on the right."""
        stream = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(1) - 1
        logits = self.head(stream[torch.arange(len(stream), device=stream.device), last].to(self.head.weight.dtype))
        if logits.shape[1] == 1:
            difference = logits[0::2] - logits[1::2]
            return {"loss": -F.logsigmoid(difference).mean(), "logits": difference}
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class FinetuningRun:
    """transformers' Trainer for (training, held-out) examples. Changes the model.

        run = FinetuningRun(model, tokenizer, examples, settings, folder=checkpoints)
        run.train()                    # goes on from the folder's last checkpoint
        accuracy = run.measure_accuracy()
        model = run.finish()           # LoRA merged
        run.save(folder)

    Raises ValueError for a batch that the workers cannot share.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: tuple[Examples, Examples],
        settings: Finetuning, *, folder: Path, seed: int = 0, world_size: int = 1, listen: Listener = ignore,
    ):  # fmt: skip
        if settings.batch_size % world_size:
            raise ValueError(f"batch_size={settings.batch_size} is no multiple of the {world_size} workers; choose one")
        self.tokenizer, self.dtype, self.folder = tokenizer, model.dtype, folder
        train, held_out = examples
        torch.manual_seed(seed)  # the head and LoRA begin at random
        self.tuned = model
        select_trained(model, Distillation(trained=settings.trained, lora_rank=settings.lora_rank))
        self.classes = train.classes if isinstance(train, Labelled) else ["reward"]
        self.scored = ScoredDecoder(model, len(self.classes))
        self.trainer = Trainer(
            self.scored, _make_arguments(settings, model, folder, seed, settings.batch_size // world_size),
            train_dataset=Rows(train), eval_dataset=Rows(held_out), data_collator=Collator(tokenizer, settings.max_length),
            callbacks=[StepCounter(listen)],
        )  # fmt: skip
        self.trainer.remove_callback(PrinterCallback)

    def train(self) -> None:
        """Trains to the end."""
        self.trainer.train(resume_from_checkpoint=get_last_checkpoint(str(self.folder)) if self.folder.is_dir() else None)

    def measure_accuracy(self) -> dict[str, float]:
        """Share of held-out texts (or pairs) that are right, its binomial standard error, and the held-out loss.

        Raises FloatingPointError if the loss is not finite.
        """
        output = self.trainer.predict(self.trainer.eval_dataset)  # type: ignore[arg-type]
        logits, labels = torch.as_tensor(output.predictions), torch.as_tensor(output.label_ids)
        right = (logits[:, 0] > 0) if logits.shape[1] == 1 else logits.argmax(1) == labels
        accuracy, loss = float(right.float().mean()), float((output.metrics or {})["test_loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"the held-out loss is {loss}: use a lower learning_rate")
        error = math.sqrt(accuracy * (1 - accuracy) / len(right))
        return {"accuracy": accuracy, "accuracy_standard_error": error, "held_out_loss": loss, "num_held_out": len(right)}

    def finish(self) -> PreTrainedModel:
        """The fine-tuned model, LoRA merged, in the dtype that it came in."""
        merge_trained(self.tuned)
        return self.tuned.to(self.dtype).requires_grad_(False).eval()  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        """What `finish` left as a causal model's folder, with the head in `head.safetensors` beside it."""
        with write_aside(folder) as aside:
            self.tuned.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)
            drop_stale_settings(aside)
            head = {name: weight.detach().cpu().contiguous() for name, weight in self.scored.head.state_dict().items()}
            save_file(head, aside / "head.safetensors", {"classes": json.dumps(self.classes)})


def _make_arguments(
    settings: Finetuning, model: PreTrainedModel, folder: Path, seed: int, per_worker: int
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=per_worker, per_device_eval_batch_size=per_worker,
        num_train_epochs=settings.num_epochs, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_fraction, lr_scheduler_type="linear", seed=seed, report_to=[],
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=1, logging_steps=10, disable_tqdm=True,
        use_cpu=model.device.type == "cpu", bf16=model.dtype == torch.bfloat16,
        # Scales the loss too; transformers has that for CUDA alone.
        fp16=model.dtype == torch.float16 and model.device.type == "cuda", remove_unused_columns=False,
        label_names=["labels"],
    )  # fmt: skip


class StepCounter(TrainerCallback):
    """Tells a listener how many steps are done."""

    def __init__(self, listen: Listener):
        self.listen = listen

    def on_step_end(self, args, state, control, **_kwargs) -> None:
        self.listen("fine-tune", state.global_step, state.max_steps)


class Rows(torch.utils.data.Dataset):
    """Examples by number: (texts, label)."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[tuple[str, ...], int]:
        if isinstance(self.examples, Labelled):
            return (self.examples.texts[index],), self.examples.labels[index]
        return (self.examples.chosen[index], self.examples.rejected[index]), 0


class Collator:
    """Rows → padded tensors. The end of a long text is kept: that is where an answer stands."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: list[tuple[tuple[str, ...], int]]) -> dict[str, Tensor]:
        texts = [text for pair, _ in rows for text in pair]
        ids = [torch.tensor(i[-self.max_length :]) for i in self.tokenizer(texts, verbose=False)["input_ids"]]
        pad = self.tokenizer.pad_token_id or 0
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(one) for one in ids])
        mask = (torch.arange(padded.shape[1])[None] < lengths[:, None]).long()
        return {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}
