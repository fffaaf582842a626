"""A buffer with the calls of Mammoth's, over the ranks of a data-parallel training.

    torchrun --nproc-per-node 2 examples/mammoth_buffer.py            # experience replay
    torchrun --nproc-per-node 2 examples/mammoth_buffer.py derpp      # DER++

A model of Mammoth's (https://github.com/aimagelab/mammoth) that draws and adds in every step, such
as its ``er`` or ``derpp``, needs one line more, and its ``observe`` stays as it is::

    model.buffer = Buffer(args.buffer_size, minibatch_size=args.minibatch_size)

where ``derpp``, which draws twice in a step, says ``num_draws=2``, too.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from digits import digits_model, digits_tasks, print_accuracies
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from ritornello import RehearsalBuffer

FIELDS = ("examples", "labels", "logits", "task_labels")


class Buffer:
    """One buffer over all ranks: ``get_data`` draws from all shards, ``add_data`` adds to this one.

    In every step: first up to ``num_draws`` times ``get_data``, then ``add_data``, on all ranks
    alike. What was not drawn by then is dropped.

    Args:
        buffer_size: representatives over all ranks.
        device: where ``get_data`` puts what it returns; None: where it was when it was added.
        minibatch_size: the ``size`` of every ``get_data``.
        num_draws: how often a step calls ``get_data``.
        **arguments: further ones of ``RehearsalBuffer``, such as ``selection="class-balanced"``.
    """

    def __init__(
        self,
        buffer_size: int,
        device: str | torch.device | None = None,
        *,
        minibatch_size: int,
        num_draws: int = 1,
        **arguments: Any,
    ) -> None:
        self.buffer_size, self.device = buffer_size, device
        self._minibatch_size, self._num_draws = minibatch_size, num_draws
        self._buffer = RehearsalBuffer(
            buffer_size,
            num_representatives=minibatch_size,
            num_draws=num_draws,
            **{"selection": "reservoir", "label": "labels", **arguments},
        )
        self._left: list[dict[str, Tensor]] | None = None  # of this step's draws, once taken
        self._is_empty = True

    def __len__(self) -> int:
        """Representatives over all ranks."""
        return len(self._buffer)

    def is_empty(self) -> bool:
        """Whether there is nothing to draw in this step."""
        self._take()
        return self._is_empty

    def get_data(
        self,
        size: int,
        transform: Callable[[Tensor], Tensor] | None = None,
        return_index: bool = False,
        device: str | torch.device | None = None,
        mask_task_out: int | None = None,
        cpt: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Representatives: examples, labels, logits, task labels, those that were added.

        ``size`` of them, or all while there are fewer. ``transform`` is applied to each example.

        Raises:
            ValueError: another size than the buffer's; or indices or a mask are asked for.
            RuntimeError: the buffer is empty, or this step has had all its draws.
        """
        if size != self._minibatch_size:
            raise ValueError(
                f"get_data({size}): the draw was made after the last add_data, of "
                f"minibatch_size={self._minibatch_size}; give the Buffer the size of every get_data"
            )
        if return_index or mask_task_out is not None:
            raise ValueError(
                "get_data: return_index and mask_task_out are of a buffer that lies on one rank; "
                "this one has neither"
            )
        left = self._take()
        if self._is_empty:
            raise RuntimeError("get_data: the buffer is empty; ask is_empty() first")
        if not left:
            raise RuntimeError(
                f"get_data: this step has had its num_draws={self._num_draws}; call add_data once "
                "in every step, and give the Buffer as many num_draws as a step calls get_data"
            )
        drawn = left.pop(0)
        if transform is not None:
            drawn["examples"] = torch.stack([transform(each) for each in drawn["examples"]])
        target = self.device if device is None else device
        return tuple(drawn[field].to(target) for field in FIELDS if field in drawn)

    def add_data(
        self,
        examples: Tensor,
        labels: Tensor | None = None,
        logits: Tensor | None = None,
        task_labels: Tensor | None = None,
    ) -> None:
        """Offers a mini-batch; the same fields each time. The next step's draws begin."""
        self._take()
        self._left = None
        given = zip(FIELDS, (examples, labels, logits, task_labels), strict=True)
        self._buffer.offer({field: value for field, value in given if value is not None})

    def close(self) -> None:
        """Closes the buffer."""
        self._buffer.close()

    def _take(self) -> list[dict[str, Tensor]]:
        """What is left of this step's draws; the step's first call takes them."""
        if self._left is None:
            drawn = self._buffer.draw()
            self._is_empty = drawn is None
            self._left = [] if drawn is None else drawn if self._num_draws > 1 else [drawn]
        return self._left


def er_loss(model: nn.Module, buffer: Buffer, images: Tensor, labels: Tensor) -> Tensor:
    """Experience replay, with the calls of a Mammoth model's ``observe``."""
    new_images, new_labels = images, labels
    if not buffer.is_empty():
        past_images, past_labels = buffer.get_data(8)
        images, labels = torch.cat((images, past_images)), torch.cat((labels, past_labels))
    loss = cross_entropy(model(images), labels)
    buffer.add_data(examples=new_images, labels=new_labels)
    return loss


def derpp_loss(model: nn.Module, buffer: Buffer, images: Tensor, labels: Tensor) -> Tensor:
    """DER++: one draw is held to the logits it once had, another to its labels."""
    logits = model(images)
    loss = cross_entropy(logits, labels)
    if not buffer.is_empty():
        past_images, _, past_logits = buffer.get_data(8)
        loss = loss + 0.2 * mse_loss(model(past_images), past_logits)
        past_images, past_labels, _ = buffer.get_data(8)
        loss = loss + 0.5 * cross_entropy(model(past_images), past_labels)
    buffer.add_data(examples=images, labels=labels, logits=logits.detach())
    return loss


def main() -> None:
    """Trains on five tasks of two digits each; rank 0 prints the accuracy on each at the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="er", choices=["er", "derpp"])
    method = parser.parse_args().model
    loss_of, num_draws = {"er": (er_loss, 1), "derpp": (derpp_loss, 2)}[method]
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    tasks = digits_tasks()
    model = DistributedDataParallel(digits_model())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    buffer = Buffer(200, minibatch_size=8, num_draws=num_draws)
    for train, _ in tasks:
        sampler = DistributedSampler(train, drop_last=True)
        loader = DataLoader(train, batch_size=8, sampler=sampler, drop_last=True)
        for epoch in range(10):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                loss = loss_of(model, buffer, images, labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    buffer.close()
    if dist.get_rank() == 0:
        print_accuracies(model.module, tasks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
