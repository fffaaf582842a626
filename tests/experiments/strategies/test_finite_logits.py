"""Logits that are not finite never come back out of the buffer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ritornello import RehearsalBuffer
from ritornello.experiments.ranks.launch import LaunchError, launch
from ritornello.experiments.strategies import DER, DERPlusPlus

pytestmark = pytest.mark.usefixtures("forked_ranks")

MESSAGE = r"task 3, step 2 of this run: the logits of 3 new sample\(s\) are not finite, .*learning"


class Model(nn.Module):
    """A linear model, some of whose logits are made wrong."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6, device=device)
        self.wrong = torch.zeros(8, device=device)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.linear(images)
        return logits + nn.functional.pad(self.wrong, (0, len(logits) - 8))[:, None]


def train(kind: type[DER], value: float, device: str = "cpu", num_steps: int = 4) -> None:
    model = Model(device)
    with (
        RehearsalBuffer(40, num_representatives=4, num_draws=kind.num_draws) as buffer,
        kind(buffer, alpha=0.1, logits_dtype=torch.float16, **kind_options(kind)) as strategy,
    ):
        strategy.begin_task(2)
        for step in range(num_steps):
            if step == 1 and (not dist.is_initialized() or dist.get_rank() == 1):
                model.wrong[2:5] = value
            images = torch.randn(8, 4, device=device)
            strategy.backward(model, images, torch.arange(8, device=device) % 6)


def kind_options(kind: type[DER]) -> dict[str, float]:
    return {"beta": 0.1} if kind is DERPlusPlus else {}


@pytest.mark.parametrize("kind", [DER, DERPlusPlus])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5], ids=["nan", "inf", "float16"])
def test_the_step_and_the_causes_are_named(kind: type[DER], value: float) -> None:
    with pytest.raises(FloatingPointError, match=MESSAGE):
        train(kind, value)


def _train_on_a_rank() -> None:
    train(DER, float("nan"), num_steps=200)


def test_all_ranks_end_and_the_launcher_says_why() -> None:
    with pytest.raises(LaunchError, match=f"rank 1 failed: FloatingPointError: {MESSAGE}"):
        launch(2, _train_on_a_rank)


@pytest.mark.accelerator
@pytest.mark.parametrize("kind", [DER, DERPlusPlus])
@pytest.mark.parametrize("accelerator", ["eager"], indirect=True)
def test_on_a_device_it_is_noticed_soon(accelerator: str, kind: type[DER]) -> None:
    with pytest.raises(FloatingPointError, match=r"task 3, step [2-9] of this run: the logits of"):
        train(kind, float("nan"), accelerator, num_steps=10)


@pytest.mark.accelerator
def test_on_a_device_nothing_wrong_is_saved(accelerator: str) -> None:
    with RehearsalBuffer(40, num_representatives=4) as buffer:
        strategy = DER(buffer, alpha=0.1)
        images, labels = torch.randn(8, 4, device=accelerator), torch.arange(8, device=accelerator)
        logits = torch.full((8, 6), torch.nan, device=accelerator)
        strategy.offer_with_logits(images, labels, logits)
        with pytest.raises(FloatingPointError):
            strategy.state_dict()
