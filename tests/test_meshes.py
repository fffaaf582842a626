"""Buffers along an axis of a device mesh, and beside models that FSDP2 shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from ritornello import RehearsalBuffer
from ritornello.testing import run_ranks, spawn_ranks
from ritornello.transports import LocalTransport, Transport

EXAMPLES = Path(__file__).parents[1] / "examples"

NUM_STEPS, NUM_LATER = 12, 4

AXES = ("data_parallel", "tensor_parallel")


def mini_batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Of a rank along the data-parallel axis."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return (
        torch.randn(4, 8, generator=generator),
        torch.randint(0, 3, (4,), generator=generator),
    )


def make_buffer(**options: Any) -> RehearsalBuffer:
    return RehearsalBuffer(21, num_representatives=3, timeout_seconds=60, **options)


def steps(buffer: RehearsalBuffer, rank: int, first: int, num_steps: int) -> list[Tensor]:
    return [buffer.update(mini_batch(rank, step))[0] for step in range(first, first + num_steps)]


# Arguments, in a world of one rank.


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
def test_a_mesh_of_several_axes_is_refused() -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=AXES)
    message = (
        "process_group: the mesh has the axes 'data_parallel' of 1, 'tensor_parallel' of 1, but a "
        "buffer's ranks lie along one: give the data-parallel one, such as mesh['data_parallel']; "
        "if several are data-parallel, make them one: "
        "mesh['data_parallel', 'tensor_parallel']._flatten('all_data_parallel')"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        make_buffer(process_group=mesh)
    with pytest.raises(ValueError, match="the mesh has 2 axes without names, .*mesh_dim_names"):
        make_buffer(process_group=init_device_mesh("cpu", (1, 1)))
    # What the messages advise.
    for axis in (mesh["data_parallel"], mesh[AXES]._flatten("all_data_parallel")):
        with make_buffer(process_group=axis) as buffer:
            assert steps(buffer, 0, 0, 3)[-1].shape == (7, 8)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("wrong", ["data_parallel", 0, [0, 1]])
def test_neither_a_group_nor_a_mesh(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=r"process_group=.*: give a .*ProcessGroup, or a DeviceMesh"
    ):
        make_buffer(process_group=wrong)


# Four processes: 2 x 2.


def _on_a_mesh(rank: int, folder: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=AXES)
    axis, column = mesh["data_parallel"], mesh["tensor_parallel"].get_local_rank()
    place = axis.get_local_rank()
    outcome: dict[str, Any] = {"place": place, "column": column}

    some = DeviceMesh("cpu", [0, 1], mesh_dim_names=("data_parallel",))
    if rank > 1:
        with pytest.raises(ValueError, match="this process is not one of the mesh's ranks"):
            make_buffer(process_group=some)

    # Every column's own buffer, all at the same time, beside a model that FSDP2 shards.
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    fully_shard(model, mesh=axis)
    with make_buffer(process_group=axis) as buffer:
        outcome["first"] = steps(buffer, place, 0, NUM_STEPS)
        model(outcome["first"][-1]).sum().backward()
        if column == 0:  # the columns are alike: one save serves all
            buffer.save(f"{folder}/buffer")
        dcp.save(
            {"model": get_model_state_dict(model), "buffer": buffer}, checkpoint_id=f"{folder}/dcp"
        )
        outcome["later"] = steps(buffer, place, NUM_STEPS, NUM_LATER)

    weight = model.weight.full_tensor().detach()
    other = nn.Linear(8, 3)
    fully_shard(other, mesh=axis)
    with make_buffer(process_group=axis) as buffer:
        state = {"model": get_model_state_dict(other), "buffer": buffer}
        dcp.load(state, checkpoint_id=f"{folder}/dcp")
        set_model_state_dict(other, state["model"])
        outcome["after dcp"] = steps(buffer, place, NUM_STEPS, NUM_LATER)
    outcome["model is restored"] = torch.equal(other.weight.full_tensor().detach(), weight)
    with make_buffer(process_group=axis) as buffer:
        buffer.load(f"{folder}/buffer")
        outcome["after load"] = steps(buffer, place, NUM_STEPS, NUM_LATER)

    # A buffer on some ranks only; groups of all ranks can still be made.
    if column == 1:
        with make_buffer(process_group=axis.get_group(), transport="collective") as buffer:
            outcome["collective"] = steps(buffer, place, 0, NUM_STEPS)
    everybody = dist.new_group(timeout=timedelta(seconds=30))
    total = torch.ones(1)
    dist.all_reduce(total, group=everybody)
    outcome["everybody"] = int(total)

    # Both axes are data-parallel, as in HSDP.
    with make_buffer(process_group=mesh[AXES]._flatten("all")) as buffer:
        outcome["all"] = steps(buffer, rank, 0, NUM_STEPS)
        outcome["held per rank"] = list(buffer.stats().held_per_rank)
    return outcome


def in_threads(num_ranks: int) -> list[list[Tensor]]:
    def rank_main(transport: Transport) -> list[Tensor]:
        with make_buffer(transport=transport) as buffer:
            return steps(buffer, transport.rank, 0, NUM_STEPS + NUM_LATER)

    return run_ranks(LocalTransport.connect(num_ranks), rank_main)


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def test_each_column_of_a_mesh_has_its_own_buffer(tmp_path: Path) -> None:
    outcomes = spawn_ranks(4, _on_a_mesh, str(tmp_path))
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
    two, four = in_threads(2), in_threads(4)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, dict)
        place = outcome["place"]
        assert (place, outcome["column"]) == divmod(rank, 2)
        # Bit for bit those of two ranks alone: so both columns get the same.
        assert equal(outcome["first"], two[place][:NUM_STEPS])
        later = two[place][NUM_STEPS:]
        for name in ("later", "after dcp", "after load"):
            assert equal(outcome[name], later), name
        assert outcome["model is restored"]
        assert outcome["column"] == 0 or equal(outcome["collective"], two[place][:NUM_STEPS])
        assert outcome["everybody"] == 4
        assert equal(outcome["all"], four[rank][:NUM_STEPS])
        assert outcome["held per rank"] == [6, 5, 5, 5]
