"""The buffer over several ranks: threads where that suffices, processes where it does not."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ritornello import PeerLostError, RehearsalBuffer, RoundError
from ritornello.testing import (
    chi_square_p_value,
    connect_collective,
    connect_shared_memory,
    run_ranks,
    spawn_ranks,
)
from ritornello.transports import (
    LocalTransport,
    SharedMemoryTransport,
    Transport,
    collective,
)

Connect = Callable[[int], list[Any]]


def labelled(rank: int, step: int, num_samples: int, num_classes: int) -> tuple[torch.Tensor, ...]:
    """A mini-batch that depends on rank and step only."""
    generator = np.random.default_rng([rank, step])
    labels = generator.integers(num_classes, size=num_samples)
    numbers = (step * 100 + rank) * 1000 + np.arange(num_samples)
    return torch.from_numpy(numbers), torch.from_numpy(labels)


def augmented_batches(
    transport: Transport, *, asynchronous: bool, sleeps: bool = False, num_steps: int = 150
) -> list[torch.Tensor]:
    """Runs a buffer for some steps; classes appear over time, batches vary in length."""
    dice = np.random.default_rng()  # timing, deliberately not seeded
    if sleeps:
        exchange = transport.exchange

        def slow_exchange(*arguments: Any) -> None:
            time.sleep(dice.random() * 0.003)
            exchange(*arguments)

        transport.exchange = slow_exchange  # type: ignore[method-assign]
    out = []
    with RehearsalBuffer(
        50,
        num_representatives=5,
        num_candidates=4,
        seed=11,
        transport=transport,
        asynchronous=asynchronous,
    ) as buffer:
        for step in range(num_steps):
            size = (7, 9, 3, 0, 12)[(step + transport.rank) % 5]
            out += buffer.update(labelled(transport.rank, step, size, 2 + step // 30))
            if sleeps:
                time.sleep(dice.random() * 0.003)
    return out


def test_the_result_depends_on_the_seed_alone() -> None:
    reference = run_ranks(
        LocalTransport.connect(2), lambda end: augmented_batches(end, asynchronous=True)
    )
    for connect, asynchronous, sleeps in [
        (LocalTransport.connect, False, False),
        (LocalTransport.connect, True, True),
        (connect_collective, True, False),
        (connect_collective, False, False),
        (connect_collective, True, True),
        (connect_shared_memory, True, False),
        (connect_shared_memory, True, True),
        (connect_shared_memory, False, True),
    ]:
        again = run_ranks(
            connect(2),
            lambda end, a=asynchronous, s=sleeps: augmented_batches(end, asynchronous=a, sleeps=s),
        )
        for first, second in zip(reference, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_several_hosts_give_what_one_process_gives() -> None:
    def rank_main(end: Transport) -> list[torch.Tensor]:
        return augmented_batches(end, asynchronous=True, num_steps=60)

    reference = run_ranks(LocalTransport.connect(4), rank_main)
    for hosts in ([0, 0, 2, 2], [0, 1, 0, 1], [0, 1, 1, 3]):
        again = run_ranks(connect_shared_memory(4, hosts=hosts), rank_main)
        for first, second in zip(reference, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_ranks_draw_from_all_shards_without_repetition() -> None:
    num_ranks, num_representatives = 3, 4

    def rank_main(transport: Transport) -> list[list[int]]:
        with RehearsalBuffer(
            30, num_representatives=num_representatives, transport=transport
        ) as buffer:
            drawn = []
            for step in range(60):
                numbers, _ = buffer.update(labelled(transport.rank, step, 6, 3))
                drawn.append(numbers[6:].tolist())
            return drawn

    everyone = run_ranks(connect_collective(num_ranks), rank_main)
    origins = set()
    for joint in zip(*[drawn[3:] for drawn in everyone], strict=True):
        flat = [number for drawn in joint for number in drawn]
        assert len(set(flat)) == num_ranks * num_representatives
        origins |= {number // 1000 % 100 for number in flat}
    assert origins == {0, 1, 2}


def test_every_stored_representative_is_equally_likely_to_be_drawn() -> None:
    """30 / 6 / 12 records on 3 ranks, 4,000 rounds, through the whole buffer."""
    sizes, num_rounds = (30, 6, 12), 4000

    def rank_main(transport: Transport) -> np.ndarray:
        size = sizes[transport.rank]
        start = sum(sizes[: transport.rank])
        counts = np.zeros((1, sum(sizes)))
        with RehearsalBuffer(
            90, num_representatives=4, transport=transport, asynchronous=False, seed=5
        ) as buffer:
            # Once, every rank offers what it is to hold; then nothing but draws.
            buffer.update((torch.arange(start, start + size), torch.zeros(size).long()))
            nothing = (torch.zeros(0).long(), torch.zeros(0).long())
            for _ in range(num_rounds):
                counts[0, buffer.update(nothing)[0].numpy()] += 1
            assert buffer.stats().held_per_rank == list(sizes)
        return counts

    counts = np.concatenate(run_ranks(LocalTransport.connect(3), rank_main))
    expected = num_rounds * 4 / sum(sizes)
    for row in counts:
        assert chi_square_p_value(row, expected) > 0.001
    assert chi_square_p_value(counts.sum(axis=0), 3 * expected) > 0.001


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_the_capacity_counts_the_whole_buffer(num_ranks: int) -> None:
    def rank_main(transport: Transport) -> tuple[list[int], dict[int, int], int, int]:
        with RehearsalBuffer(11, num_representatives=2, transport=transport) as buffer:
            for step in range(60):
                buffer.update(labelled(transport.rank, step, 8, 10))
            stats = buffer.stats()
            return stats.held_per_rank, stats.held_per_class, len(buffer), stats.shard_bytes

    results = run_ranks(LocalTransport.connect(num_ranks), rank_main)
    per_class = np.zeros(10, dtype=int)
    for held_per_rank, held_per_class, num_held, _ in results:
        assert num_held == sum(held_per_rank) == 11
        assert max(held_per_rank) - min(held_per_rank) <= 1
        per_class[list(held_per_class)] += list(held_per_class.values())
    assert per_class.sum() == 11
    assert per_class.min() >= 1
    assert sum(shard_bytes for *_, shard_bytes in results) == 11 * 16


def test_sizes_are_gathered_only_while_a_shard_is_filling() -> None:
    def rank_main(transport: Transport) -> list[int]:
        calls = []
        gather = transport.all_gather
        with RehearsalBuffer(20, num_representatives=2, transport=transport) as buffer:
            transport.all_gather = lambda values: (calls.append(1), gather(values))[1]  # type: ignore[method-assign]
            history = []
            for step in range(12):
                buffer.update(labelled(transport.rank, step, 2 + 3 * transport.rank, 3))
                len(buffer)
                history.append(len(calls))
        return history

    # Three times for the layout and what else is compared first; rank 0 then fills its 10 rows in
    # 5 steps, and nobody asks any more.
    assert run_ranks(LocalTransport.connect(2), rank_main) == [[4, 5, 6, 7, 8] + [8] * 7] * 2


def test_different_arguments_are_an_error_on_every_rank() -> None:
    def rank_main(transport: Transport) -> str:
        with pytest.raises(ValueError, match="different arguments") as caught:
            RehearsalBuffer(
                20 + transport.rank, num_representatives=2, transport=transport, seed=transport.rank
            )
        return str(caught.value)

    for rank, message in enumerate(run_ranks(connect_collective(2), rank_main)):
        assert message.startswith(f"rank {rank}: ")
        assert "capacity is 20 on rank 0, 21 on rank 1" in message
        assert "seed is 0 on rank 0, 1 on rank 1" in message
        assert "num_representatives" not in message


def test_a_capacity_smaller_than_the_ranks() -> None:
    def rank_main(transport: Transport) -> None:
        with pytest.raises(ValueError, match=r"capacity=2: .* number of ranks \(3\)"):
            RehearsalBuffer(2, num_representatives=1, transport=transport)

    run_ranks(LocalTransport.connect(3), rank_main)


def test_errors_say_the_rank() -> None:
    def rank_main(transport: Transport) -> None:
        with (
            RehearsalBuffer(9, num_representatives=1, transport=transport) as buffer,
            pytest.raises(ValueError, match=f"^rank {transport.rank}: .*label -3 is out of range"),
        ):
            buffer.update((torch.zeros(1), torch.tensor([-3])))

    run_ranks(LocalTransport.connect(2), rank_main)


def test_samples_of_another_layout_on_another_rank() -> None:
    def rank_main(transport: Transport) -> None:
        with RehearsalBuffer(9, num_representatives=1, transport=transport) as buffer:
            dtype = torch.float32 if transport.rank else torch.float64
            batch = (torch.zeros(2, 3, dtype=dtype), torch.arange(2))
            buffer.update(batch)
            other = 1 - transport.rank
            with pytest.raises(RoundError, match=rf"rank\(s\) \[{other}\] have another layout"):
                buffer.update(batch)

    run_ranks(connect_collective(2), rank_main)


def test_a_rank_that_calls_update_less_often() -> None:
    """The rank that goes on gets an error that names the one that closed."""

    def rank_main(transport: Transport) -> None:
        with RehearsalBuffer(9, num_representatives=3, transport=transport) as buffer:
            for step in range(5):
                buffer.update(labelled(transport.rank, step, 4, 2))
            if transport.rank == 0:
                with pytest.raises(
                    PeerLostError, match="rank 0: .*call it equally often"
                ) as caught:
                    for step in range(5, 20):
                        buffer.update(labelled(0, step, 4, 2))
                assert caught.value.peers == (1,)

    run_ranks(LocalTransport.connect(2, timeout_seconds=5.0), rank_main)


def test_a_rank_that_pauses_for_longer_than_the_timeout() -> None:
    def rank_main(transport: Transport) -> None:
        with RehearsalBuffer(
            9, num_representatives=3, transport=transport, timeout_seconds=1.0
        ) as buffer:
            for step in range(5):
                buffer.update(labelled(transport.rank, step, 4, 2))
            len(buffer)
            if transport.rank == 1:
                time.sleep(2.5)
                return
            began = time.monotonic()
            with pytest.raises(PeerLostError, match=r"rank 1 sent nothing for 1 s \(timeout_sec"):
                for step in range(5, 20):
                    buffer.update(labelled(0, step, 4, 2))
            assert time.monotonic() - began < 2.4

    run_ranks(connect_collective(2, timeout_seconds=1.0), rank_main)


def _train_in_a_process(rank: int, num_steps: int, victim: int | None, transport: str) -> Any:
    """What a user's training script does; one rank may be killed on the way."""
    buffer = RehearsalBuffer(40, num_representatives=6, timeout_seconds=20.0, transport=transport)
    out = []
    for step in range(num_steps):
        if rank == victim and step == num_steps // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            numbers, _ = buffer.update(labelled(rank, step, 4, 3))
        except PeerLostError as error:
            return str(error), error.peers, time.monotonic() - began
        out.append(numbers)
        time.sleep(0.01)
    buffer.close()
    return out


@pytest.mark.parametrize("transport", ["auto", "collective"])
def test_processes_of_a_default_group(transport: str) -> None:
    num_steps = 30
    processes = spawn_ranks(2, _train_in_a_process, num_steps, None, transport)

    def rank_main(transport: Transport) -> list[torch.Tensor]:
        with RehearsalBuffer(40, num_representatives=6, transport=transport) as buffer:
            return [
                buffer.update(labelled(transport.rank, step, 4, 3))[0] for step in range(num_steps)
            ]

    threads = run_ranks(LocalTransport.connect(2), rank_main)
    for ours, theirs in zip(threads, processes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
@pytest.mark.parametrize("num_steps", [10, 80], ids=["while filling", "when full"])
def test_a_killed_peer_is_named_at_once(num_steps: int, transport: str) -> None:
    first, killed, third = spawn_ranks(3, _train_in_a_process, num_steps, 1, transport)
    assert killed == -signal.SIGKILL
    for rank, outcome in ((0, first), (2, third)):
        message, peers, seconds = outcome
        assert message.startswith(f"rank {rank}: round ")
        assert 1 in peers or peers == (2 - rank,), message
        assert seconds < 20.0
    assert 1 in first[1] or 1 in third[1]


def _subgroup_in_a_process(rank: int) -> tuple[int, int] | str:
    group = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match="process_group: this process is not one of its ranks"):
            RehearsalBuffer(8, num_representatives=2, process_group=group)
        return "outside"
    with pytest.raises(ValueError, match="transport='local' serves a single process"):
        RehearsalBuffer(8, num_representatives=2, process_group=group, transport="local")
    with RehearsalBuffer(8, num_representatives=2, process_group=group) as buffer:
        for step in range(6):
            # The trainer uses the group at the same time, on its own thread.
            total = torch.ones(1)
            dist.all_reduce(total, group=group)
            assert total.item() == 2.0
            buffer.update(labelled(rank, step, 4, 3))
        stats = buffer.stats()
    return len(stats.held_per_rank), stats.num_held


def test_the_ranks_of_a_subgroup_share_a_buffer() -> None:
    assert spawn_ranks(3, _subgroup_in_a_process) == [(2, 8), "outside", (2, 8)]


def _absent_peer_in_a_process(rank: int) -> str:
    if rank == 1:
        time.sleep(3.0)
        return "absent"
    with pytest.raises(PeerLostError) as caught:
        RehearsalBuffer(8, num_representatives=2, timeout_seconds=1.5)
    return str(caught.value)


def test_a_peer_that_never_makes_its_buffer() -> None:
    message, other = spawn_ranks(2, _absent_peer_in_a_process)
    assert other == "absent"
    assert "rank(s) [1] did not come within 1.5 s (timeout_seconds), while making" in str(message)
    assert "all ranks must make a RehearsalBuffer" in str(message)


KILLED_IN = [
    (collective, "_connect"),
    (SharedMemoryTransport, "_open_control"),
]


def _killed_while_making(rank: int) -> tuple[str, tuple[int, ...], float] | None:
    groups = [dist.new_group([2 * i, 2 * i + 1]) for i in range(len(KILLED_IN))]
    pair, is_victim = divmod(rank, 2)
    if is_victim:
        owner, name = KILLED_IN[pair]
        setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    began = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        RehearsalBuffer(8, num_representatives=2, timeout_seconds=3.0, process_group=groups[pair])
    return str(caught.value), caught.value.peers, time.monotonic() - began


def test_a_peer_that_dies_while_the_buffer_is_made_is_named() -> None:
    outcomes = spawn_ranks(2 * len(KILLED_IN), _killed_while_making)
    assert outcomes[1::2] == [-signal.SIGKILL] * len(KILLED_IN)
    for outcome in outcomes[::2]:
        assert isinstance(outcome, tuple), outcome
        message, peers, seconds = outcome
        assert re.search(r"rank(\(s\) \[| )1", message), message
        assert peers == (1,), outcome
        assert seconds < 8.0, outcome


@pytest.mark.parametrize(
    "connect", [LocalTransport.connect, connect_collective, connect_shared_memory]
)
def test_an_error_in_the_trainer_ends_a_worker_that_waits(connect: Connect) -> None:
    """A thread that were left inside torch would abort the process at its end."""
    has_left = threading.Event()

    def rank_main(end: Transport) -> None:
        buffer = RehearsalBuffer(9, num_representatives=2, transport=end)
        if end.rank == 1:  # comes to no round
            assert has_left.wait(60.0)
            buffer.close()
            return
        with pytest.raises(KeyError), buffer:
            buffer.update(labelled(0, 0, 4, 2))
            time.sleep(0.2)
            raise KeyError
        assert "ritornello-rank-0" not in [thread.name for thread in threading.enumerate()]
        has_left.set()

    run_ranks(connect(2), rank_main)


def _second_try_in_a_process(rank: int) -> int:
    sizes = {"capacity": 8, "num_representatives": 2, "transport": "collective"}
    if rank == 0:
        with pytest.raises(PeerLostError, match="making the buffer's private process group"):
            RehearsalBuffer(**sizes, timeout_seconds=1.0)
    dist.barrier()
    with RehearsalBuffer(**sizes) as buffer:
        buffer.update(labelled(rank, 0, 4, 2))
        return len(buffer)


def test_ranks_that_have_missed_each_other_meet_at_the_next_try() -> None:
    assert spawn_ranks(2, _second_try_in_a_process) == [8, 8]
