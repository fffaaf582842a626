"""The path over a GPU; skipped where there is none."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ritornello
from ritornello import RehearsalBuffer, RoundError
from ritornello.testing import spawn_ranks
from ritornello.transports import CollectiveTransport

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
    """The augmented mini-batches of the plain loop, field by field, in CPU memory."""
    out = []
    with RehearsalBuffer(60, num_representatives=7, num_candidates=5, **arguments) as buffer:
        for images, labels in batches(device):
            joined = buffer.update((images, labels))
            assert all(leaf.device.type == torch.device(device).type for leaf in joined)
            # Clones: while the buffer is empty, it gives the mini-batch itself.
            out += [leaf.cpu().clone() for leaf in joined]
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


@pytest.mark.parametrize("storage", ["cpu", "pinned", "shared", "cuda"])
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_loader_on_the_cpu_and_a_model_on_the_gpu(storage: str, own_stream: bool) -> None:
    expected = augmented("cpu")
    got = []
    with (
        torch.cuda.stream(torch.cuda.Stream() if own_stream else None),
        RehearsalBuffer(60, num_representatives=7, num_candidates=5, storage=storage) as buffer,
    ):
        loader = [tuple(leaf.pin_memory() for leaf in batch) for batch in batches("cpu")]
        for joined in ritornello.rehearse(loader, buffer, device="cuda"):
            assert all(leaf.is_cuda for leaf in joined)
            torch.cuda._sleep(1_000_000)
            got += [leaf.cpu() for leaf in joined]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("storage", ["cpu", "cuda"])
def test_a_trainer_on_a_stream_of_its_own(storage: str) -> None:
    expected = augmented("cpu")
    with torch.cuda.stream(torch.cuda.Stream()):
        got = augmented("cuda", storage=storage)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("storage", ["cpu", "cuda"])
def test_training_under_autocast_changes_nothing(storage: str) -> None:
    """Mixed precision is the model's: records keep their dtypes, also those that it gives."""
    model = torch.nn.Linear(192, 10, device="cuda")
    scaler = torch.amp.GradScaler("cuda")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    offered: dict[bytes, torch.Tensor] = {}
    with RehearsalBuffer(60, num_representatives=7, storage=storage) as buffer:
        for images, labels in batches("cuda"):
            past = buffer.draw()
            with torch.autocast("cuda", torch.float16):
                logits = model(images.flatten(1) / 255)
            assert logits.dtype == torch.float16
            buffer.offer((images, labels, logits.detach()))
            offered |= {
                image.numpy().tobytes(): each
                for image, each in zip(images.cpu(), logits.detach().cpu(), strict=True)
            }
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            if past is not None:
                assert [leaf.dtype for leaf in past] == [torch.uint8, torch.int64, torch.float16]
                for image, stored in zip(past[0].cpu(), past[2].cpu(), strict=True):
                    assert torch.equal(offered[image.numpy().tobytes()], stored)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()


@pytest.mark.parametrize("trainer", ["cpu", "cuda"])
@pytest.mark.parametrize("storage", ["cpu", "cuda"])
def test_a_gpu_that_is_busy_when_the_buffer_begins(
    trainer: str, storage: str, tmp_path: Path
) -> None:
    """What the trainer's stream has not done yet must not undo what the worker's does."""
    expected, stream = augmented("cpu"), batches(trainer)
    busy_cycles = 500_000_000  # some tenths of a second
    arguments = {"num_representatives": 7, "num_candidates": 5, "storage": storage}
    with RehearsalBuffer(60, **arguments) as buffer:
        torch.cuda._sleep(busy_cycles)
        got = [leaf for batch in stream[:20] for leaf in buffer.update(batch)]
        buffer.save(tmp_path)
    with RehearsalBuffer(60, **arguments) as buffer:
        torch.cuda._sleep(busy_cycles)
        buffer.load(tmp_path)
        got += [leaf for batch in stream[20:] for leaf in buffer.update(batch)]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("storage", ["cpu", "pinned", "cuda"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_saving_and_loading(storage: str, device: str, tmp_path: Path) -> None:
    def make(**arguments: Any) -> RehearsalBuffer:
        return RehearsalBuffer(60, num_representatives=7, num_candidates=5, **arguments)

    stream, expected = batches(device), augmented("cpu")
    with make(storage=storage) as buffer:
        for number, batch in enumerate(stream[:25]):
            if number == 21:
                buffer.save(tmp_path / "at once")
                state = buffer.state_dict()
                buffer.save(tmp_path / "beside", background=True)
            buffer.update(batch)
        buffer.wait_until_saved()
    for source in ("at once", "beside", "state"):
        with make(storage=storage) as buffer:
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


def _on_one_gpu(rank: int, transport: str) -> None:
    expected = augmented("cpu")
    got = augmented("cuda", transport=transport)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
def test_two_ranks_on_one_gpu(transport: str) -> None:
    """Over shared memory, and over gloo."""
    assert spawn_ranks(2, _on_one_gpu, transport) == [None, None]


def nccl_alone(folder: Path) -> CollectiveTransport:
    """A transport over NCCL for this process alone; ends with the default process group."""
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    device = torch.device("cuda", torch.cuda.current_device())
    return CollectiveTransport.beside(None, 60.0, device)


@pytest.mark.parametrize("trainer", ["cpu", "cuda"])
def test_nccl_with_one_rank(trainer: str, tmp_path: Path) -> None:
    expected = augmented("cpu")
    try:
        transport = nccl_alone(tmp_path)
        got = augmented(trainer, storage="cuda", transport=transport)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def _on_own_gpu(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    expected, stream = augmented("cpu"), batches("cuda")
    got = augmented("cuda", storage="cuda")
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    arguments = {"num_representatives": 7, "num_candidates": 5, "storage": "cuda"}
    with RehearsalBuffer(60, **arguments) as buffer:
        for batch in stream[:20]:
            buffer.update(batch)
        buffer.save(folder)
    with RehearsalBuffer(60, **arguments) as buffer:
        buffer.load(folder)
        got = [leaf.cpu() for batch in stream[20:] for leaf in buffer.update(batch)]
    assert all(torch.equal(a, b) for a, b in zip(expected[40:], got, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl_between_two_gpus(tmp_path: Path) -> None:
    assert spawn_ranks(2, _on_own_gpu, str(tmp_path)) == [None, None]
