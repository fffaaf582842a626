"""Continual pre-training of a small language model: prose, then code, with a share of replay.

    torchrun --nproc-per-node 1 examples/train_text.py

A causal transformer over bytes learns English prose, the texts of Python's `help`, and then code in
another language: sources of Python's library, each letter moved on by 13. All of it comes with
Python. Code is learnt once for each share of replay, always from the model that has learnt prose:
so many of the blocks of a step are past ones, and the fewer are new. Rank 0 prints the losses. It
takes two minutes or so on one core; several ranks share the blocks of a step.
"""

import argparse
import codecs
import copy
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from ritornello import ComposedSteps, RehearsalBuffer

BLOCK_BYTES = 128
BLOCKS_PER_STEP = 16  # of all ranks together
PEAK, LOWEST = 5e-3, 5e-4  # learning rates
MODULES = "argparse doctest inspect mailbox pickletools pydoc subprocess tarfile turtle typing"


def main() -> None:
    """Learns prose, then code with each share of replay; rank 0 prints the losses."""
    options = parsed()
    dist.init_process_group("gloo")
    if BLOCKS_PER_STEP % dist.get_world_size():
        raise SystemExit(f"the number of ranks must divide the {BLOCKS_PER_STEP} blocks of a step")
    torch.manual_seed(options.seed)
    sources = [Path(os.__file__).with_name(f"{name}.py").read_text() for name in MODULES.split()]
    prose, test_prose = blocks("\n".join(topics.values()), options.kilobytes)
    code, test_code = blocks(codecs.encode("\n".join(sources), "rot13"), options.kilobytes)
    model = DistributedDataParallel(ByteTransformer())
    blocks_per_rank = BLOCKS_PER_STEP // dist.get_world_size()
    buffer = RehearsalBuffer(
        1000,
        num_representatives=0,
        most_representatives=blocks_per_rank,
        selection="reservoir",
        label=None,
        sampling="earlier-tasks",
        seed=options.seed,
    )

    def learn(new: Tensor, num_before: int, replay: float, peak: float) -> tuple[float, float]:
        """As many steps, of as many blocks, whatever the share of replay; the losses after them."""
        steps = ComposedSteps(
            len(new),
            num_before,
            samples_per_step=blocks_per_rank,
            num_epochs=options.epochs,
            floor=1 - replay,
            seed=options.seed,
        )
        train(model, buffer, DataLoader(TensorDataset(new), batch_sampler=steps), steps, peak)
        return loss_on(model, test_prose), loss_on(model, test_code)

    buffer.begin_task("prose")
    before = learn(prose, num_before=0, replay=0, peak=PEAK)
    show("nats per byte", "prose", "code", "forgotten")
    show("after prose", *before)
    knows_prose, holds_prose = copy.deepcopy(model.state_dict()), buffer.state_dict()
    for replay in options.replay:
        model.load_state_dict(knows_prose)
        buffer.load_state_dict(holds_prose)
        buffer.begin_task("code")
        after = learn(code, num_before=len(prose), replay=replay, peak=options.peak)
        show(f"after code, {replay:.0%} replay", *after, after[0] - before[0])
    buffer.close()
    dist.destroy_process_group()


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--replay", type=float, nargs="+", default=[0, 0.01, 0.05, 0.25])
    parser.add_argument("--peak", type=float, default=PEAK, help="learning rate for code")
    parser.add_argument("--kilobytes", type=int, default=320, help="of each text")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def show(what: str, *columns: str | float) -> None:
    """Prints a line of the table, on rank 0."""
    if dist.get_rank() == 0:
        texts = [each if isinstance(each, str) else f"{each:.3f}" for each in columns]
        print(f"{what:24}" + "".join(f"{text:>10}" for text in texts), flush=True)


def blocks(text: str, kilobytes: int) -> tuple[Tensor, Tensor]:
    """Text as blocks of bytes, uint8 [n, BLOCK_BYTES]: nine tenths to train on, one for tests."""
    num_blocks = kilobytes * 1000 // BLOCK_BYTES
    tokens = bytearray(text.encode())[: num_blocks * BLOCK_BYTES]
    if len(tokens) < num_blocks * BLOCK_BYTES:
        raise SystemExit(f"--kilobytes {kilobytes}: a text has only {len(tokens) // 1000}")
    found = torch.frombuffer(tokens, dtype=torch.uint8).view(num_blocks, BLOCK_BYTES)
    is_test = torch.arange(num_blocks) % 10 == 0
    return found[~is_test], found[is_test]


class ByteTransformer(nn.Module):
    """From blocks [b, BLOCK_BYTES] to the mean loss of their bytes, in nats."""

    def __init__(self, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(BLOCK_BYTES, width)
        for embedding in (self.bytes, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, dropout=0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, blocks: Tensor) -> Tensor:
        """Each byte is predicted from those before it."""
        given, wanted = blocks[:, :-1].long(), blocks[:, 1:].long()
        places = torch.arange(given.shape[1])
        mask = nn.Transformer.generate_square_subsequent_mask(len(places))
        seen = self.layers(self.bytes(given) + self.places(places), mask, is_causal=True)
        return nn.functional.cross_entropy(self.last(seen).transpose(1, 2), wanted)


def train(
    model: nn.Module, buffer: RehearsalBuffer, loader: DataLoader, steps: ComposedSteps, peak: float
) -> None:
    """Trains on new blocks and the past ones that join them; the learning rate rises and falls."""
    optimiser = torch.optim.AdamW(model.parameters())
    rate = OneCycleLR(
        optimiser,
        peak,
        total_steps=steps.num_epochs * len(steps),
        pct_start=0.1,
        div_factor=peak / LOWEST,
        final_div_factor=1,
        cycle_momentum=False,
    )
    model.train()
    for _ in range(steps.num_epochs):
        for step, new in enumerate(loader):
            buffer.num_representatives = steps.num_past(step + 1)
            (new_and_past,) = buffer.update(new)
            optimiser.zero_grad()
            model(new_and_past).backward()
            optimiser.step()
            rate.step()


@torch.no_grad()
def loss_on(model: nn.Module, test: Tensor) -> float:
    """The mean loss over test blocks."""
    model.eval()
    return model(test).item()


if __name__ == "__main__":
    main()
