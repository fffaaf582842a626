"""Averaged gradient episodic memory (A-GEM): no step may raise the loss on the past.

Source: Chaudhry et al., "Efficient Lifelong Learning with A-GEM" (ICLR 2019), eq. 11.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ritornello.experiments.strategies.base import Backward, RehearsalStrategy, bytes_of


class AGEM(RehearsalStrategy):
    """Takes out of the gradient what points against the gradient of the past.

    Both gradients are those of all ranks, as ``DistributedDataParallel`` has averaged them, so
    that every rank projects the same one in the same way.
    """

    def backward(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        backward: Backward = Tensor.backward,
    ) -> Tensor:
        """Two passes: over the representatives, then over the new samples."""
        draws = self.draw()
        self.offer(images, labels)
        reference: list[Tensor | None] = []
        if draws:
            past = draws[0]
            backward(self.mean_past(self.criterion(model(past.images), past.labels)))
            reference = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            model.zero_grad(set_to_none=True)
        loss = self.mean_new(self.criterion(model(images), labels))
        backward(loss)
        if draws:
            project([p.grad for p in model.parameters()], reference)
        return loss.detach()

    def sent_bytes_per_step(self, model: nn.Module) -> float:
        """See ``Strategy.sent_bytes_per_step``: records, and the gradients of the past ones."""
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if self.sizes is not None:
            num_ranks = self.sizes.num_ranks
        gradients = bytes_of(model.parameters()) if num_ranks > 1 else 0
        return super().sent_bytes_per_step(model) + gradients


def project(gradients: list[Tensor | None], reference: list[Tensor | None]) -> None:
    """Changes gradients in place, so that they no longer point against the reference.

    Nothing happens to those that do not: ``g - (g.ref / ref.ref) ref`` if ``g.ref < 0``.
    """
    pairs = [
        (gradient, past)
        for gradient, past in zip(gradients, reference, strict=True)
        if gradient is not None and past is not None
    ]
    if not pairs:
        return
    # Both numbers in one transfer from the device.
    along, length = (
        torch.stack([torch.stack([(g * past).sum(), past.square().sum()]) for g, past in pairs])
        .sum(dim=0)
        .tolist()
    )
    if not (math.isfinite(along) and math.isfinite(length)):
        # The past's gradient has overflowed. What cannot be projected must not be taken: this
        # has a ``GradScaler`` skip the step, and lower its scale.
        for gradient, _ in pairs:
            gradient.fill_(math.nan)
    elif along < 0 < length:  # a gradient of the past too small to be squared asks for nothing
        for gradient, past in pairs:
            gradient.sub_(past, alpha=along / length)
