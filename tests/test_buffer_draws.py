"""Several draws per step, a look at what is stored, and distances: the buffer's further calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritornello import PeerLostError, RehearsalBuffer
from ritornello.testing import chi_square_p_value, connect_collective, run_ranks
from ritornello.transports import LocalTransport, Transport


def batch_of(step: int, num_samples: int = 8, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = step * 1000 + rank * 100 + torch.arange(num_samples)
    return numbers, numbers % 10


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_two_draws_are_each_without_repetition_over_the_ranks(num_ranks: int) -> None:
    def rank_main(transport: Transport) -> list[list[list[int]]]:
        drawn = []
        with RehearsalBuffer(40, num_representatives=5, num_draws=2, transport=transport) as buffer:
            for step in range(60):
                draws = buffer.draw()
                buffer.offer(batch_of(step, rank=transport.rank))
                if draws is not None and step >= 12:
                    assert len(draws) == 2
                    for numbers, labels in draws:
                        assert torch.equal(labels, numbers % 10)
                    drawn.append([numbers.tolist() for numbers, _ in draws])
        return drawn

    everyone = run_ranks(LocalTransport.connect(num_ranks), rank_main)
    overlaps = 0
    for of_ranks in zip(*everyone, strict=True):
        first, second = ([number for draws in of_ranks for number in draws[i]] for i in range(2))
        assert len(set(first)) == len(set(second)) == 5 * num_ranks
        overlaps += len(set(first) & set(second))
    # Independent of each other: two samples of n out of 40 share n * n / 40 on average.
    expected = len(everyone[0]) * (5 * num_ranks) ** 2 / 40
    assert 0.6 * expected < overlaps < 1.5 * expected


def test_each_of_two_draws_is_uniform() -> None:
    counts = np.zeros((2, 20))
    with RehearsalBuffer(
        20, num_representatives=3, num_draws=2, label=None, selection="fifo", asynchronous=False
    ) as buffer:
        buffer.offer((torch.arange(20),))
        for _ in range(3000):
            for number, (drawn,) in enumerate(buffer.draw()):
                counts[number, drawn.numpy()] += 1
            buffer.offer((torch.arange(0),))
    for row in counts:
        assert chi_square_p_value(row, 3000 * 3 / 20) > 0.001


def test_while_the_buffer_fills_each_draw_gets_what_there_is() -> None:
    with RehearsalBuffer(20, num_representatives=4, num_draws=2) as buffer:
        assert buffer.draw() is None
        buffer.offer(batch_of(0, 3))
        first, second = buffer.draw()
        assert sorted(first[0].tolist()) == sorted(second[0].tolist()) == [0, 1, 2]
        buffer.offer(batch_of(1, 8))
        assert [len(labels) for _, labels in buffer.draw()] == [4, 4]


def test_update_joins_all_draws() -> None:
    with RehearsalBuffer(20, num_representatives=4, num_draws=3) as buffer:
        buffer.update(batch_of(0))
        numbers, labels = buffer.update(batch_of(1))
        assert len(numbers) == len(labels) == 8 + 3 * 4
        assert numbers[:8].tolist() == batch_of(1)[0].tolist()
        assert set(numbers[8:].tolist()) <= set(batch_of(0)[0].tolist())


# Steps that fail between draw and offer.


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("call", ["draw", "update"])
def test_a_step_that_failed_counts_as_one_that_offered_nothing(
    call: str, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def rank_main(transport: Transport, failing: bool) -> list[Any]:
        drawn = []
        with RehearsalBuffer(
            40, num_representatives=5, transport=transport, asynchronous=asynchronous
        ) as buffer:
            for step in range(12):
                if call == "update" and step in (4, 7):
                    drawn.append(buffer.update(batch_of(step, rank=transport.rank)))
                    continue
                drawn.append(buffer.draw())
                batch = batch_of(step, rank=transport.rank)
                if step in (3, 6) and transport.rank == 1:
                    if failing:
                        with pytest.raises(ValueError, match="label -1"):
                            buffer.offer((batch[0], batch[1] - 10))
                        continue  # the user's loop catches it, and goes on
                    batch = batch_of(step, 0)
                buffer.offer(batch)
            buffer.draw()  # the rank is not a round behind the others
            assert buffer.stats().num_rounds == 12
        return drawn

    wanted = run_ranks(LocalTransport.connect(2), lambda end: rank_main(end, False))
    assert not caplog.records
    found = run_ranks(LocalTransport.connect(2), lambda end: rank_main(end, True))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours[0] is theirs[0] is None
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            assert all(map(torch.equal, one, other))
    (record,) = caplog.records
    assert f"rank 1: {call}: no mini-batch was offered since the last draw" in record.message


def test_a_first_step_that_failed() -> None:
    with RehearsalBuffer(40, num_representatives=5) as buffer:
        assert buffer.draw() is None
        assert buffer.draw() is None  # nothing is known of the samples yet
        buffer.offer(batch_of(0))
        assert len(buffer.draw()[0]) == 5


def test_it_is_saved_and_goes_on_after_a_step_that_failed() -> None:
    with RehearsalBuffer(40, num_representatives=5) as buffer:
        buffer.offer(batch_of(0))
        buffer.draw()
        state = buffer.state_dict()
        wanted = buffer.draw()
    with RehearsalBuffer(40, num_representatives=5) as buffer:
        buffer.load_state_dict(state)
        assert all(map(torch.equal, buffer.draw(), wanted))


def test_representatives_are_the_shard() -> None:
    def rank_main(transport: Transport) -> list[int]:
        with RehearsalBuffer(31, num_representatives=2, transport=transport) as buffer:
            assert list(buffer.representatives()) == []
            for step in range(10):
                buffer.update(batch_of(step, rank=transport.rank))
            numbers: list[int] = []
            for images, labels in buffer.representatives(batch_size=4):
                assert len(images) <= 4
                assert torch.equal(labels, images % 10)
                numbers += images.tolist()
                images.zero_()  # copies: the shard does not change
            again = [n for images, _ in buffer.representatives() for n in images.tolist()]
            assert numbers == again
            assert len(numbers) == buffer.stats().held_per_rank[transport.rank]
            # One may go on afterwards.
            buffer.update(batch_of(11, rank=transport.rank))
        return numbers

    everyone = run_ranks(LocalTransport.connect(2), rank_main)
    assert sum(map(len, everyone)) == 31
    for rank, numbers in enumerate(everyone):
        assert {number // 100 % 10 for number in numbers} == {rank}


def test_representatives_of_a_buffer_that_goes_on() -> None:
    with RehearsalBuffer(20, num_representatives=2) as buffer:
        buffer.update(batch_of(0))
        batches = buffer.representatives(batch_size=3)
        next(batches)
        buffer.update(batch_of(1))
        len(buffer)
        with pytest.raises(RuntimeError, match="the buffer has changed meanwhile"):
            next(batches)


@pytest.mark.parametrize("call", ["load", "rewrite", "update"])
def test_representatives_of_before_are_refused(call: str, tmp_path: Path) -> None:
    """Also where the other contents have as many rounds, and before the first batch of them."""
    with RehearsalBuffer(20, num_representatives=2) as buffer:
        buffer.update(batch_of(0))
        buffer.save(tmp_path)
    with RehearsalBuffer(20, num_representatives=2) as buffer:
        buffer.update(batch_of(1))
        begun, fresh = buffer.representatives(batch_size=3), buffer.representatives(batch_size=3)
        next(begun)
        if call == "load":
            buffer.load(tmp_path)
        elif call == "rewrite":
            buffer.rewrite(lambda batch: batch[0] + 1, fields=0)
        else:
            buffer.update(batch_of(2))
        for batches in (begun, fresh):
            with pytest.raises(RuntimeError, match="the buffer has changed meanwhile"):
                next(batches)
        assert sum(len(labels) for _, labels in buffer.representatives()) == len(buffer)


def test_distances_steer_what_grasp_draws() -> None:
    """Half of each class is a prototype: at first, nothing else comes."""
    with RehearsalBuffer(40, num_representatives=10, sampling="grasp", seed=2) as buffer:
        buffer.update(batch_of(0, 40))
        is_prototype = lambda numbers: numbers < 20  # noqa: E731

        def embed(batch: Any) -> torch.Tensor:
            numbers, _ = batch
            angle = torch.where(is_prototype(numbers), 0.0, (numbers - 30.0) / 10)
            return torch.stack([angle.cos(), angle.sin()], dim=1)

        buffer.measure_distances(embed)
        buffer.update(batch_of(1, 0))  # these were drawn before
        numbers, _ = buffer.update(batch_of(1, 0))
        assert is_prototype(numbers).double().mean() >= 0.8


@pytest.mark.parametrize("sampling", ["uniform", "class-balanced"])
def test_distances_without_a_policy_that_looks_at_them(sampling: str) -> None:
    with (
        RehearsalBuffer(20, num_representatives=2, sampling=sampling) as buffer,
        pytest.raises(
            ValueError, match="Sampling does not look at distances; use sampling='grasp'"
        ),
    ):
        buffer.measure_distances(lambda batch: batch[0])


def test_bad_features_leave_the_buffer_usable() -> None:
    with RehearsalBuffer(20, num_representatives=2, sampling="grasp") as buffer:
        buffer.update(batch_of(0))
        with pytest.raises(ValueError, match="must be finite"):
            buffer.measure_distances(lambda batch: torch.full((len(batch[0]), 3), torch.nan))
        buffer.update(batch_of(1))


def test_a_rank_that_does_not_measure_is_an_error() -> None:
    def rank_main(transport: Transport) -> None:
        buffer = RehearsalBuffer(
            20, num_representatives=2, sampling="grasp", transport=transport, timeout_seconds=1.0
        )
        buffer.update(batch_of(0, rank=transport.rank))
        len(buffer)
        if transport.rank == 0:
            with pytest.raises(PeerLostError, match="measure_distances failed"):
                buffer.measure_distances(lambda batch: torch.ones(len(batch[0]), 2))
            with pytest.raises(PeerLostError):
                buffer.update(batch_of(1))
        buffer.close()

    run_ranks(connect_collective(2, timeout_seconds=1.0), rank_main)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="num_draws=0: it must be at least 1"):
        RehearsalBuffer(20, num_representatives=2, num_draws=0)
    with pytest.raises(ValueError, match="label=None: the policy class-balanced needs the class"):
        RehearsalBuffer(
            20, num_representatives=2, selection="fifo", sampling="class-balanced", label=None
        )
    with pytest.raises(ValueError, match="sampling='best': there are"):
        RehearsalBuffer(20, num_representatives=2, sampling="best")


def test_a_sampling_policy_that_needs_labels_has_them_checked() -> None:
    with RehearsalBuffer(
        20, num_representatives=2, selection="fifo", sampling="class-balanced"
    ) as buffer:
        with pytest.raises(ValueError, match="label -1 is out of range"):
            buffer.update((torch.arange(3), torch.tensor([0, -1, 2])))
        buffer.update((torch.arange(3), torch.tensor([0, 1, 2])))


# Local draws.


def drawn_by_steps(
    transport: Transport,
    draws: str = "local",
    *,
    save: Path | None = None,
    load: Path | None = None,
) -> list[list[int]]:
    """What each of 40 steps gets; a third rank has nothing to offer for ten of them.

    Saved after seven steps; loaded, it goes on from there.
    """
    found: list[list[int]] = []
    with RehearsalBuffer(
        60, num_representatives=4, draws=draws, seed=3, transport=transport
    ) as buffer:
        assert buffer.draws == draws
        if load is not None:
            buffer.load(load)
        for step in range(7 if load else 0, 40):
            if step == 7 and save is not None:
                buffer.save(save)
            has_nothing = transport.rank == 2 and step < 10
            numbers, labels = batch_of(step, 0 if has_nothing else 3, transport.rank)
            augmented, _ = buffer.update((numbers, labels))
            found.append(augmented[len(numbers) :].tolist())
    return found


def ranks_of(numbers: list[int]) -> set[int]:
    return {number % 1000 // 100 for number in numbers}


def test_a_rank_draws_out_of_its_own_shard(tmp_path: Path) -> None:
    everyone = run_ranks(
        LocalTransport.connect(3), lambda each: drawn_by_steps(each, save=tmp_path)
    )
    for rank, steps in enumerate(everyone):
        assert set().union(*map(ranks_of, steps)) == {rank}
        assert all(len(set(drawn)) == len(drawn) for drawn in steps)
        # All there are, while there are fewer than four.
        sizes = [len(drawn) for drawn in steps]
        assert sizes == ([0] * 11 + [3] + [4] * 28 if rank == 2 else [0, 3] + [4] * 38)
    assert run_ranks(connect_collective(3), drawn_by_steps) == everyone
    assert everyone[0] != [[number - 100 for number in drawn] for drawn in everyone[1]]
    # Saved where shards were unequally full, it goes on bit for bit.
    again = run_ranks(LocalTransport.connect(3), lambda each: drawn_by_steps(each, load=tmp_path))
    assert again == [steps[7:] for steps in everyone]
    # On other ranks, or drawn from all shards, nothing is lost.
    for num_ranks, draws in ((2, "local"), (3, "global")):
        ends = LocalTransport.connect(num_ranks)
        run_ranks(ends, lambda each, draws=draws: check_loads(each, tmp_path, draws))


def check_loads(transport: Transport, folder: Path, draws: str) -> None:
    with RehearsalBuffer(
        60, num_representatives=4, draws=draws, seed=3, transport=transport
    ) as buffer:
        buffer.load(folder)
        assert len(buffer) == 40  # two shards were full, the third one was empty
        own = {int(number) for numbers, _ in buffer.representatives() for number in numbers}
        numbers, _ = buffer.draw()
        assert len(numbers) == 4
        if draws == "local":
            assert set(numbers.tolist()) <= own
        else:
            assert bool(own) == (transport.rank < 2)


def test_local_draws_are_uniform_and_no_others_are_sent() -> None:
    def rank_main(transport: Transport) -> tuple[np.ndarray, int]:
        counts = np.zeros(12)
        with RehearsalBuffer(
            24, num_representatives=2.5, num_draws=2, draws="local", transport=transport
        ) as buffer:
            buffer.draw()
            buffer.offer((torch.arange(12), torch.zeros(12, dtype=torch.int64)))
            for _ in range(1500):
                for numbers, _ in buffer.draw():
                    counts[numbers.numpy()] += 1
                buffer.offer((torch.arange(0), torch.zeros(0, dtype=torch.int64)))
            return counts, buffer.stats().bytes_sent

    for counts, bytes_sent in run_ranks(LocalTransport.connect(2), rank_main):
        assert bytes_sent == 0
        assert abs(counts.sum() - 1500 * 5) < 4 * np.sqrt(1500)
        assert chi_square_p_value(counts, counts.sum() / 12) > 0.001


def test_local_draws_of_samples_of_unequal_length() -> None:
    def rank_main(transport: Transport) -> list[list[list[int]]]:
        found = []
        with RehearsalBuffer(
            20, num_representatives=3, capacity_bytes=4000, draws="local", transport=transport
        ) as buffer:
            for step in range(20):
                texts = [torch.full((1 + step % 5,), 2 * step + transport.rank) for _ in range(2)]
                augmented, _ = buffer.update((texts, torch.zeros(2, dtype=torch.int64)))
                found.append([text.tolist() for text in augmented[2:]])
        return found

    for rank, steps in enumerate(run_ranks(connect_collective(2), rank_main)):
        assert [len(drawn) for drawn in steps] == [0, 2] + [3] * 18
        for text in (text for drawn in steps for text in drawn):
            assert len(set(text)) == 1
            assert text[0] % 2 == rank
            assert len(text) == 1 + text[0] // 2 % 5


def test_one_rank_draws_the_same_either_way() -> None:
    assert drawn_by_steps(LocalTransport(), "local") == drawn_by_steps(LocalTransport(), "global")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": "here"}, "draws='here': there are 'global', 'local'"),
        (
            {"draws": "local", "sampling": "grasp"},
            "draws='local' with sampling=grasp: out of its own shard a rank draws uniformly; use "
            "sampling='uniform', or draws='global'",
        ),
    ],
)
def test_draws_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RehearsalBuffer(10, num_representatives=1, **arguments)
