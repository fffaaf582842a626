"""Local steps: ranks train by themselves, and now and then all take the mean of their weights.

Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(AISTATS 2017); Stich, "Local SGD Converges Fast and Communicates Little" (ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def average_over_ranks(
    models: Sequence[nn.Module], num_samples: int, only: Collection[str] | None = None
) -> None:
    """Gives all ranks the mean of their parameters and running statistics.

    Each rank counts by the samples that it has trained on; if none has, all count the same. So with
    one local step, and an optimiser without a memory, weights move as with averaged gradients.
    Blocks until all ranks have called it.

    Args:
        models: alike on all ranks.
        num_samples: that this rank has trained on since the last time.
        only: the names of what is averaged, where the rest is frozen; None: all. What no rank has
            changed then stays the same bit by bit, such as the outputs of classes that are left out
            (for ranks of less than 2 ** 29 samples together).
    """
    parts = [
        part
        for model in models
        for name, part in model.state_dict().items()
        if is_averaged(part) and (only is None or name in only)
    ]
    own = torch.cat([part.reshape(-1).float() for part in parts])
    if only is not None:  # where a float32 times a count is exact, and so is the sum of equal ones
        own = own.double()
    total = torch.cat([own * num_samples, own.new_tensor([num_samples])])
    dist.all_reduce(total)
    if not total[-1]:
        average_over_ranks(models, 1, only)
        return
    means = (total[:-1] / total[-1]).split([part.numel() for part in parts])
    for part, mean in zip(parts, means, strict=True):
        part.copy_(mean.view_as(part))


def mean_of(states: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """The mean of what ``state_dict`` gave on several ranks; as ``average_over_ranks``.

    Args:
        states: of one model each; what is no weight is as in the first one.
        counts: samples that each rank has trained on.
    """
    if not any(counts):
        counts = [1] * len(counts)
    shares = [count / sum(counts) for count in counts]
    mean = dict(states[0])
    for name, part in mean.items():
        if isinstance(part, Tensor) and is_averaged(part):
            pairs = zip(shares, states, strict=True)
            parts = [share * each[name].double() for share, each in pairs]
            mean[name] = torch.stack(parts).sum(0).to(part.dtype)
    return mean


def is_averaged(part: Tensor) -> bool:
    """Whether a part of a model's state is a weight or a statistic; else it is a count."""
    return part.is_floating_point()
