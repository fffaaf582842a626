"""The data of an example: made languages, each with its own order of the same twenty letters."""

import torch
from torch import Tensor, nn

NUM_LANGUAGES, NUM_LETTERS, LENGTH = 5, 20, 16

Sample = dict[str, Tensor]


def language_tasks() -> list[tuple[list[Sample], list[Sample]]]:
    """The training and test samples of each language: token ids of words, in blocks of one length.

    A block begins with the token of its language. Behind each letter comes the one that follows it
    in the language's own order, or, now and then, any other.
    """
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for language in range(NUM_LANGUAGES):
        order = torch.randperm(NUM_LETTERS, generator=generator)
        follower = torch.empty_like(order)
        follower[order] = order.roll(-1)
        tokens = torch.full((240, LENGTH), NUM_LETTERS + language)
        tokens[:, 1] = torch.randint(NUM_LETTERS, (240,), generator=generator)
        for place in range(2, LENGTH):
            other = torch.randint(NUM_LETTERS, (240,), generator=generator)
            is_other = torch.rand(240, generator=generator) < 0.05
            tokens[:, place] = torch.where(is_other, other, follower[tokens[:, place - 1]])
        samples = [{"input_ids": each, "labels": each} for each in tokens]
        tasks.append((samples[:200], samples[200:]))
    return tasks


@torch.no_grad()
def print_accuracies(model: nn.Module, tasks: list[tuple[list[Sample], list[Sample]]]) -> None:
    """Prints the share of test letters that the model foresees, language by language."""
    model.eval()
    accuracies = []
    for _, test in tasks:
        tokens = torch.stack([each["input_ids"] for each in test])
        foreseen = model(tokens).logits.argmax(dim=-1)[:, 1:-1]
        accuracies.append((foreseen == tokens[:, 2:]).double().mean().item())
    print("accuracy per language:", " ".join(f"{100 * each:.1f} %" for each in accuracies))
    print(f"average: {100 * sum(accuracies) / len(accuracies):.1f} %")
