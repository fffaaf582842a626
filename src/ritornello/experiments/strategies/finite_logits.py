"""Refuses logits that are not finite, before they are stored and come back in every later step."""

from __future__ import annotations

import torch
from torch import Tensor

from ritornello.records import accelerators


class FiniteLogits:
    """Looks at what shall be stored as logits.

    On an accelerator nothing waits for it: what was found is read when it is there, about a step
    later.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_wrong: Tensor | None = None  # on the device, of all steps
        self._copy: Tensor | None = None
        self._copied: torch.Event | None = None

    def look(self, logits: Tensor, task: int) -> None:
        """Looks at the logits ``[b, num_classes]`` of one step.

        Args:
            logits: as they are to be stored; or what a model says otherwise, ``[b, ...]``.
            task: its number, for the error.

        Raises:
            FloatingPointError: those of some sample are not finite.
        """
        self._num_steps += 1
        num_wrong = logits.isfinite().flatten(1).all(dim=1).logical_not().sum()
        if not accelerators.has_streams(logits.device):
            self._judge(int(num_wrong), task)
            return
        if self._num_wrong is None or self._copy is None:
            self._num_wrong = torch.zeros_like(num_wrong)
            self._copy = torch.zeros(num_wrong.shape, dtype=num_wrong.dtype, pin_memory=True)
        self._num_wrong += num_wrong
        if self._copied is None or self._copied.query():
            self._copy.copy_(self._num_wrong, non_blocking=True)
            self._copied = accelerators.mark(logits.device)

    def check(self, task: int, wait: bool = False) -> None:
        """Reads what ``look`` has found on an accelerator.

        Args:
            task: its number, for the error.
            wait: until that of the last step is there.

        Raises:
            FloatingPointError: see ``look``.
        """
        if wait and self._num_wrong is not None:
            self._judge(int(self._num_wrong), task)
        elif self._copied is not None and self._copied.query():
            assert self._copy is not None
            self._judge(int(self._copy), task)

    def _judge(self, num_wrong: int, task: int) -> None:
        if num_wrong:
            raise FloatingPointError(
                f"task {task + 1}, step {self._num_steps} of this run: the logits of {num_wrong} "
                "new sample(s) are not finite, and would come back from the buffer in later steps. "
                "The learning rate may be too high, or float16 too narrow (logits_dtype, or mixed "
                "precision: take bfloat16)"
            )
