"""What the tests of DeepSpeed run under torchrun, on two ranks, in one go.

python -m torch.distributed.run --nproc-per-node 2 deepspeed_ranks.py FOLDER

``FOLDER`` gets the checkpoints, for the test to go on with on one rank.
"""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ritornello import CheckpointError, RehearsalBuffer

EXAMPLES = Path(__file__).parents[2] / "examples"


def engine_of(model: nn.Module, stage: int, num_parts: int) -> Any:
    """DeepSpeed's, around a model, whose steps are made of some mini-batches each."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": num_parts,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return deepspeed.initialize(model=model, optimizer=optimiser, config=config)[0]


def buffer_beside(engine: Any) -> RehearsalBuffer:
    group = engine.data_parallel_group
    return RehearsalBuffer(24, num_representatives=3, process_group=group)


def mini_batches() -> list[list[Tensor]]:
    """This rank's twelve, of samples each of which is known by its first number."""
    images = torch.arange(96.0).repeat(4, 1).T / 96
    data = TensorDataset(images.contiguous(), torch.arange(96) % 3)
    return list(DataLoader(data, batch_size=4, sampler=DistributedSampler(data)))


def weights_of(model: nn.Module) -> Tensor:
    with deepspeed.zero.GatheredParameters([*model.parameters()]):  # of stage 3
        return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def trained(engine: Any, buffer: RehearsalBuffer, batches: list[list[Tensor]]) -> list[Any]:
    """What the model was given."""
    given = []
    for batch in batches:
        images, labels = buffer.update(batch)
        given.append((images.clone(), labels.clone()))
        engine.backward(nn.functional.cross_entropy(engine(images), labels))
        engine.step()
    return given


def trained_by_hand(model: nn.Module, given: list[Any], num_parts: int) -> None:
    """On the same samples: the mean of each mini-batch, of the parts of a step, of the ranks."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for number, (images, labels) in enumerate(given, 1):
        (nn.functional.cross_entropy(model(images), labels) / num_parts).backward()
        if number % num_parts == 0:
            for each in model.parameters():
                assert each.grad is not None
                dist.all_reduce(each.grad)
                each.grad /= dist.get_world_size()
            optimiser.step()
            optimiser.zero_grad()


def gradients_are_those_of_a_loop_by_hand() -> None:
    for stage, num_parts in ((0, 1), (1, 1), (1, 2), (2, 3), (3, 2)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        ours = copy.deepcopy(model)
        before = weights_of(model)
        engine = engine_of(model, stage, num_parts)
        with buffer_beside(engine) as buffer:
            given = trained(engine, buffer, mini_batches())
        assert [len(images) for images, _ in given] == [4] + [7] * 11
        trained_by_hand(ours, given, num_parts)
        assert not torch.allclose(weights_of(ours), before, rtol=1e-2)
        torch.testing.assert_close(weights_of(model), weights_of(ours), rtol=1e-5, atol=1e-6)


def goes_on_bit_for_bit(folder: Path) -> None:
    """With the buffer beside DeepSpeed's files, or in its own state."""
    for stage in (1, 2):
        place = folder / str(stage)
        torch.manual_seed(0)
        engine, batches = engine_of(nn.Linear(4, 3), stage, 1), mini_batches()
        with buffer_beside(engine) as buffer:
            trained(engine, buffer, batches[:6])
            buffer.save(place / "six" / "buffer")
            engine.save_checkpoint(str(place), "six", {"buffer": buffer.state_dict(whole=True)})
            expected = trained(engine, buffer, batches[6:])
        for beside in (True, False):
            again = engine_of(nn.Linear(4, 3), stage, 1)
            path, state = again.load_checkpoint(str(place))
            with buffer_beside(again) as buffer:
                if beside:
                    buffer.load(Path(path).parent / "buffer")
                else:
                    buffer.load_state_dict(state["buffer"])
                found = trained(again, buffer, batches[6:])
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours[0], theirs[0])
            assert torch.equal(weights_of(again.module), weights_of(engine.module))


def a_part_is_refused(folder: Path) -> None:
    """DeepSpeed keeps the first rank's state alone."""
    engine = engine_of(nn.Linear(4, 3), 2, 1)
    with buffer_beside(engine) as buffer:
        trained(engine, buffer, mini_batches()[:2])
        engine.save_checkpoint(str(folder / "part"), "two", {"buffer": buffer.state_dict()})
        _, state = engine.load_checkpoint(str(folder / "part"))
        said = (r"failed on rank\(s\) \[1\]", r"only the rank\(s\) \[0\] of 2")[dist.get_rank()]
        with pytest.raises(CheckpointError, match=said):
            buffer.load_state_dict(state["buffer"])


def main(folder: Path) -> None:
    # Sums over the ranks of one host, which DeepSpeed would compile for a minute or more.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    gradients_are_those_of_a_loop_by_hand()
    goes_on_bit_for_bit(folder)
    a_part_is_refused(folder)
    print("all is well on rank", dist.get_rank())
    sys.path.insert(0, str(EXAMPLES))
    # Ends the process group, too.
    runpy.run_path(str(EXAMPLES / "train_deepspeed_rehearsal.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
