"""ER-ACE: new samples compete among new classes only, so that they do not push the old ones away.

Source: Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual
Learning" (ICLR 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ritornello.experiments.strategies.base import RehearsalStrategy


class ERACE(RehearsalStrategy):
    """Experience replay with an asymmetric cross-entropy.

    From the second task on, the loss of new samples leaves out the logits of the classes that
    came with earlier tasks; that of representatives compares all. The authors leave out all but
    the classes of the current mini-batch; here it is those of the current task (``begin_task``),
    which are the same on every rank. A sample's own class always takes part.
    """

    _earlier: frozenset[int] = frozenset()
    _seen: frozenset[int] = frozenset()

    def begin_task(self, number: int, classes: tuple[int, ...] = ()) -> None:  # type: ignore[override]
        """See ``Strategy.begin_task``; here the classes must be given."""
        super().begin_task(number, classes)
        if not classes:
            raise ValueError("ER-ACE: begin_task needs the classes that the task brings")
        self._earlier = self._seen - set(classes)
        self._seen |= set(classes)
        self._outputs = torch.tensor(sorted(self._earlier), dtype=torch.int64)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of new samples among new classes, and of past ones among all."""
        num_new = len(labels)
        images, labels = self.augment(images, labels)
        logits = model(images)
        new, past = logits.split([num_new, len(labels) - num_new])
        if self._earlier:
            # Once per task: a copy to a GPU makes the trainer wait for it.
            self._outputs = self._outputs.to(new.device)
            own = labels[:num_new, None]
            lowest = torch.finfo(new.dtype).min
            new = new.index_fill(1, self._outputs, lowest).scatter(1, own, new.gather(1, own))
        loss = self.mean_new(self.criterion(new, labels[:num_new]))
        if len(past):
            loss = loss + self.mean_past(self.criterion(past, labels[num_new:]))
        return loss
