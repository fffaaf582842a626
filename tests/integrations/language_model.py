"""What the tests of Hugging Face's Trainer train, on one rank and on several: a model made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from ritornello import RehearsalBuffer

NUM_TOKENS, LENGTH = 32, 8

Sample = dict[str, Tensor]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double()
    model.loss_function = loss_of  # the usual one computes in float32
    return model


def loss_of(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor, **_: Any
) -> Tensor:
    targets = labels[:, 1:].flatten()
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    return losses / num_items_in_batch


def sequences(num_samples: int = 44) -> list[Sample]:
    """Of one length, with unequally many tokens that count."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, NUM_TOKENS, (num_samples, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (num_samples, 1), generator=generator)
    is_token = torch.arange(LENGTH) < lengths
    return [
        {
            "input_ids": ids.where(mask, 0),
            "attention_mask": mask.long(),
            "labels": ids.where(mask, -100),
        }
        for ids, mask in zip(tokens, is_token, strict=True)
    ]


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> Any:
    given: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return kind(str(folder), **(given | more))


def make_buffer(**more: Any) -> RehearsalBuffer:
    given: dict[str, Any] = {"num_representatives": 4, "selection": "reservoir", "label": None}
    return RehearsalBuffer(20, **(given | more))


class Recorder:
    """A mixin that keeps what the trainer trains on, between it and ``Rehearsal``."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.trained: list[list[Sample]] = []  # of each optimiser's step
        self.masks: list[Tensor] = []
        super().__init__(*arguments, **keywords)

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        self.trained.append([])
        return super().get_batch_samples(*arguments, **keywords)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: Sample, *rest: Any) -> Any:
        self.trained[-1].append({name: each.clone() for name, each in inputs.items()})
        return super().training_step(model, inputs, *rest)  # type: ignore[misc]

    def compute_loss(self, model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        if model.training:
            self.masks.append(self.past_mask)  # type: ignore[attr-defined]
        return super().compute_loss(model, *arguments, **keywords)  # type: ignore[misc]


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimiser's step."""

    def __init__(self) -> None:
        self.found: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        gradients = [each.grad for each in model.parameters()]
        self.found.append([each.clone() for each in gradients if each is not None])


def by_hand(
    steps: list[list[Sample]], learning_rate: float
) -> tuple[list[float], list[list[Tensor]]]:
    """Losses and gradients of a plain loop: the mean over all tokens of all mini-batches."""
    model = tiny_model().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses, gradients = [], []
    for step in steps:
        optimiser.zero_grad()
        sums, num_tokens = torch.zeros(()).double(), 0
        for batch in step:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            targets = batch["labels"][:, 1:]
            sums = sums + nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
            )
            num_tokens += int((targets != -100).sum())
        (sums / num_tokens).backward()
        losses.append(float(sums.detach() / num_tokens))
        gradients.append(
            [each.grad.clone() for each in model.parameters() if each.grad is not None]
        )
        optimiser.step()
    return losses, gradients
