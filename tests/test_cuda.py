"""The path over a GPU; skipped where there is none."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ritornello
from ritornello import RehearsalBuffer, RoundError
from ritornello.testing import spawn_ranks

pytestmark = pytest.mark.cuda


def batches(device: str, num_steps: int = 40) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randint(256, (16, 3, 8, 8), generator=generator, dtype=torch.uint8).to(device),
            torch.randint(10, (16,), generator=generator).to(device),
        )
        for _ in range(num_steps)
    ]


def augmented(device: str, **arguments: Any) -> list[torch.Tensor]:
    out = []
    with RehearsalBuffer(60, num_representatives=7, num_candidates=5, **arguments) as buffer:
        for images, labels in batches(device):
            joined = buffer.update((images, labels))
            assert all(leaf.device.type == torch.device(device).type for leaf in joined)
            out += [leaf.cpu() for leaf in joined]
            images.zero_()  # must not reach the buffer
            torch.cuda._sleep(1_000_000)  # the trainer's stream lags behind its thread
    return out


@pytest.mark.parametrize("storage", ["cpu", "pinned", "shared", "cuda"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_same_results_as_on_the_cpu(storage: str, asynchronous: bool) -> None:
    expected = augmented("cpu")
    got = augmented("cuda", storage=storage, asynchronous=asynchronous)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("storage", ["cpu", "cuda"])
@pytest.mark.parametrize("sampling", ["class-balanced", "grasp"])
def test_policies_that_look_at_labels(storage: str, sampling: str) -> None:
    expected = augmented("cpu", sampling=sampling)
    got = augmented("cuda", sampling=sampling, storage=storage)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("storage", ["cpu", "cuda"])
def test_several_draws_and_what_is_stored(storage: str) -> None:
    def embed(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if batch[0].is_cuda:
            torch.cuda._sleep(3_000_000)  # the trainer's stream lags behind its thread
        return batch[0].flatten(1).float()

    seen = []
    for device in ("cpu", "cuda"):
        out = []
        with RehearsalBuffer(
            60,
            num_representatives=7,
            num_draws=2,
            sampling="grasp",
            storage=storage if device == "cuda" else "cpu",
        ) as buffer:
            for step, batch in enumerate(batches(device)):
                draws = buffer.draw()
                buffer.offer(batch)
                if draws is not None:
                    out += [leaf.cpu() for draw in draws for leaf in draw]
                if step % 10 == 9:
                    buffer.measure_distances(embed, batch_size=8)
            for images, labels in buffer.representatives(batch_size=16):
                assert images.device.type == torch.device(device).type
                out += [images.cpu(), labels.cpu()]
        seen.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_mini_batches_on_the_cpu_and_a_shard_on_the_gpu() -> None:
    expected = augmented("cpu")
    got = augmented("cpu", storage="cuda")
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("storage", ["cpu", "cuda"])
def test_one_exchange_for_several_steps(storage: str) -> None:
    expected = augmented("cpu", rounds_per_exchange=4)
    got = augmented("cuda", storage=storage, rounds_per_exchange=4)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_loader_on_the_cpu_and_a_model_on_the_gpu() -> None:
    expected = augmented("cpu")
    got = []
    with RehearsalBuffer(60, num_representatives=7, num_candidates=5) as buffer:
        loader = [tuple(leaf.pin_memory() for leaf in batch) for batch in batches("cpu")]
        for joined in ritornello.rehearse(loader, buffer, device="cuda"):
            assert all(leaf.is_cuda for leaf in joined)
            torch.cuda._sleep(1_000_000)
            got += [leaf.cpu() for leaf in joined]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("storage", ["cpu", "pinned", "cuda"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_saving_and_loading(storage: str, device: str, tmp_path: Path) -> None:
    def make(**arguments: Any) -> RehearsalBuffer:
        return RehearsalBuffer(60, num_representatives=7, num_candidates=5, **arguments)

    stream, expected = batches(device), augmented("cpu", rounds_per_exchange=2)
    with make(storage=storage, rounds_per_exchange=2) as buffer:
        for number, batch in enumerate(stream[:25]):
            if number == 21:
                buffer.save(tmp_path / "at once")
                state = buffer.state_dict()
                buffer.save(tmp_path / "beside", background=True)
            buffer.update(batch)
        buffer.wait_until_saved()
    for source in ("at once", "beside", "state"):
        with make(storage=storage, rounds_per_exchange=2) as buffer:
            if source == "state":
                buffer.load_state_dict(state)
            else:
                buffer.load(tmp_path / source)
            got = [leaf.cpu() for batch in stream[21:] for leaf in buffer.update(batch)]
            assert all(torch.equal(a, b) for a, b in zip(expected[42:], got, strict=True))
    with make(num_draws=2) as buffer:  # on the CPU, with other arguments
        buffer.load(tmp_path / "at once")
        assert len(buffer.update(batches("cpu", 1)[0])[0]) == 16 + 14


def test_labels_on_the_gpu_are_checked_by_the_worker() -> None:
    images, labels = batches("cuda", 1)[0]
    with RehearsalBuffer(60, num_representatives=7) as buffer:
        buffer.update((images, labels - 100))
        with pytest.raises(RoundError, match="is out of range: labels must be at least 0"):
            buffer.update((images, labels))


def test_leaves_on_different_devices_come_back_where_they_were() -> None:
    with RehearsalBuffer(20, num_representatives=4) as buffer:
        for images, labels in batches("cuda", 5):
            joined_images, joined_labels = buffer.update((images, labels.cpu()))
            assert joined_images.is_cuda
            assert not joined_labels.is_cuda


def test_draw_gives_the_callers_own_tensors() -> None:
    with RehearsalBuffer(20, num_representatives=4) as buffer:
        kept = []
        for batch in batches("cuda", 6):
            past = buffer.draw()
            if past is not None:
                kept.append((past[0], past[0].clone()))
            buffer.offer(batch)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in kept)


def _on_one_gpu(rank: int) -> list[torch.Tensor]:
    return augmented("cuda")


def test_two_ranks_on_one_gpu_over_gloo() -> None:
    outcomes = spawn_ranks(2, _on_one_gpu)
    assert all(isinstance(outcome, list) for outcome in outcomes), outcomes


def test_nccl_with_one_rank() -> None:
    from ritornello.transports import CollectiveTransport

    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(os.path.join(folder, "store"), 1)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60)
        )
        try:
            device = torch.device("cuda", torch.cuda.current_device())
            transport = CollectiveTransport.beside(None, 60.0, device)
            expected = augmented("cpu")
            got = augmented("cuda", storage="cuda", transport=transport)
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        finally:
            dist.destroy_process_group()
