"""The same sample offered again: counted, and with ``identity=`` not held twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello import CheckpointError, RehearsalBuffer
from ritornello.records.identities import Identities
from ritornello.testing import chi_square_p_value, run_ranks
from ritornello.transports import LocalTransport, Transport

NUM_SAMPLES = 60
POLICIES = ["class-balanced", "class-balanced-reservoir", "reservoir", "fifo", "grasp"]


def epoch(seed: int, first: int = 0, of_ranks: int = 1) -> list[tuple[torch.Tensor, ...]]:
    """Mini-batches of (values, label, index): all samples in an order of their own."""
    order = np.random.default_rng(seed).permutation(NUM_SAMPLES)[first::of_ranks]
    index = torch.from_numpy(order)
    values = index[:, None] + torch.tensor([0.0, 0.25, 0.5])
    return list(zip(values.split(8), (index % 4).split(8), index.split(8), strict=True))


def buffer_of(**arguments: Any) -> RehearsalBuffer:
    return RehearsalBuffer(**{"capacity": 40, "num_representatives": 2, **arguments})


def indices(buffer: RehearsalBuffer) -> list[int]:
    return [index for batch in buffer.representatives() for index in batch[2].tolist()]


@pytest.mark.parametrize("selection", POLICIES)
def test_no_sample_is_held_twice(selection: str) -> None:
    with (
        buffer_of(selection=selection, identity=2) as buffer,
        buffer_of(selection=selection) as other,
    ):
        for number in range(20):
            for batch in epoch(number)[: 3 if number == 19 else None]:
                for each in (buffer, other):
                    each.update(batch)
        assert len(set(indices(buffer))) == 40 == buffer.stats().num_distinct
        assert len(set(indices(other))) < 38  # without it some are
        assert buffer.stats().figures()["buffer/distinct"] == 40


def test_equal_ones_of_a_mini_batch_count_once() -> None:
    with buffer_of(identity=1, label=2) as buffer:
        same = torch.zeros(6, dtype=torch.int64)
        for _ in range(3):
            buffer.update((torch.randn(6, 2), same, same))
        assert buffer.stats().num_held == 1


def test_stats_count_distinct_samples_if_asked() -> None:
    with buffer_of() as buffer:
        assert buffer.stats(distinct=True).num_distinct == 0
        for number in range(10):
            for batch in epoch(number):
                buffer.update(batch)
        assert buffer.stats().num_distinct is None
        assert "buffer/distinct" not in buffer.stats().figures()
        stats = buffer.stats(distinct=True)
        assert stats.num_held == 40
        assert stats.num_distinct == len(set(indices(buffer))) < 40


def test_what_lies_between_fields_does_not_count() -> None:
    with buffer_of(label=0) as buffer:
        for number in range(5):
            flags = torch.zeros(4, dtype=torch.uint8)
            buffer.update((flags, torch.full((4,), 7, dtype=torch.int64)))
            assert buffer.stats(distinct=True).num_distinct == 1, number


def test_every_sample_stays_as_likely_held_as_any_other() -> None:
    held = np.zeros(NUM_SAMPLES)
    for seed in range(60):
        with buffer_of(capacity=20, identity=2, seed=seed, asynchronous=False) as buffer:
            for number in range(4):
                for batch in epoch(100 * seed + number):
                    buffer.update(batch)
            held[indices(buffer)] += 1
    assert held.sum() == 60 * 20
    assert chi_square_p_value(held, held.mean()) > 0.001


def test_the_first_epoch_is_as_without_it() -> None:
    with buffer_of(identity=2) as buffer, buffer_of() as other:
        for batch in epoch(0):
            for ours, theirs in zip(buffer.update(batch), other.update(batch), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ranks_after", [1, 2, 3])
def test_saved_restored_and_dealt_out_anew(ranks_after: int, tmp_path: Path) -> None:
    def fill(end: Transport) -> list[int]:
        with buffer_of(identity=2, transport=end) as buffer:
            for number in range(5):
                for batch in epoch(number, end.rank, end.num_ranks)[:3]:
                    buffer.update(batch)
            buffer.save(tmp_path)
            own = indices(buffer)
            assert len(set(own)) == len(own)
            return own

    saved = run_ranks(LocalTransport.connect(2), fill)
    # The same sample may be on two ranks, if both were offered it.
    assert len({each for own in saved for each in own}) < sum(map(len, saved))

    def go_on(end: Transport) -> tuple[list[int], int]:
        with buffer_of(identity=2, transport=end) as buffer:
            buffer.load(tmp_path)
            before = indices(buffer)
            assert buffer.stats().num_distinct == len(set(before))
            for number in range(5, 9):
                for batch in epoch(number, end.rank, end.num_ranks)[:2]:
                    buffer.update(batch)
            after = indices(buffer)
            assert buffer.stats().num_distinct == len(set(after))
            # None is admitted twice: of what a load brought twice, both may stay.
            twice = [each for each in set(after) if after.count(each) > 1]
            assert all(before.count(each) > 1 for each in twice)
            return before, len(after)

    found = run_ranks(LocalTransport.connect(ranks_after), go_on)
    assert sorted(each for own, _ in found for each in own) == sorted(
        each for own in saved for each in own
    )


def test_a_saved_buffer_without_such_a_field_is_refused(tmp_path: Path) -> None:
    with buffer_of(capacity=8) as buffer:
        buffer.update((torch.zeros(4, 2), torch.arange(4)))
        buffer.save(tmp_path)
    with (
        buffer_of(capacity=8, identity=2) as other,
        pytest.raises(CheckpointError, match="identity=2 names no leaf of the samples"),
    ):
        other.load(tmp_path)
    # One saved without it is taken over with it, and the other way round.
    with buffer_of(capacity=8, identity=1) as other:
        other.load(tmp_path)
        other.update((torch.zeros(4, 2), torch.arange(4)))
        assert other.stats().num_held == 4


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (3, r"identity=3 names no leaf of the samples; there are .*, or identity=None$"),
        (0, r"the identity batch\[0\]: torch.float32 \[3\] per sample: it must be one integer"),
    ],
)
def test_messages(identity: int, message: str) -> None:
    with buffer_of(identity=identity) as buffer, pytest.raises(ValueError, match=message):
        buffer.update(epoch(0)[0])


def test_the_identity_is_not_rewritten() -> None:
    with buffer_of(identity=2) as buffer:
        buffer.update(epoch(0)[0])
        with pytest.raises(ValueError, match="fields=2 is the identity, by which"):
            buffer.rewrite(lambda batch: batch[2], fields=2)


def test_ranks_give_the_same_identity() -> None:
    def rank_main(end: Transport) -> None:
        buffer_of(identity=2 if end.rank else None, transport=end).close()

    with pytest.raises(ValueError, match="identity is None on rank 0, 2 on rank 1"):
        run_ranks(LocalTransport.connect(2), rank_main)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=6), max_size=8))
def test_identities_are_those_of_the_slots(rounds: list[list[tuple[int, int]]]) -> None:
    held: dict[int, int] = {}
    identities = Identities(6)
    for pairs in rounds:
        offered = [identity for _, identity in pairs]
        new = identities.new_rows(np.array(offered, dtype=np.int64)).tolist()
        firsts = [i for i, each in enumerate(offered) if each not in offered[:i]]
        assert new == [i for i in firsts if offered[i] not in held.values()]
        put = []
        for row in new:  # unused slots fill without gaps
            slot = min(pairs[row][0], len(held))
            held[slot] = offered[row]
            put.append((slot, offered[row]))
        slots, values = np.array(put, dtype=np.int64).reshape(-1, 2).T
        identities.put(slots, values)
        assert identities.num_distinct == len(set(held.values()))


def test_identities_are_told_apart_in_whatever_order_slots_fill() -> None:
    """As where bytes are bounded: some leave, some move, some come, and the last slot first."""
    for seed in range(30):
        dice, identities = np.random.default_rng(seed), Identities(12)
        held: list[int] = []
        for number in range(12):
            removed = dice.permutation(len(held))[: dice.integers(0, len(held) + 1)]
            left = sorted(set(range(len(held))) - set(removed.tolist()))
            came = 100 * number + np.arange(int(dice.integers(0, 13 - len(left))))
            size = len(left) + len(came)
            beyond = [slot for slot in left if slot >= size]
            gaps = sorted(set(range(size)) - set(left))
            moved = dict(zip(beyond, gaps, strict=False))
            after = {moved.get(slot, slot): held[slot] for slot in left}
            slots = dice.permutation(gaps[len(beyond) :])
            identities.move(np.array(beyond, int), np.array(gaps[: len(beyond)], int), removed)
            identities.put(slots, came)
            after |= dict(zip(slots.tolist(), came.tolist(), strict=True))
            held = [after[slot] for slot in range(size)]
            assert identities.num_distinct == len(held)
            both = np.array([*held, -1])
            assert identities.new_rows(both).tolist() == [len(held)]


def test_samples_of_unequal_length_are_held_once_and_counted() -> None:
    with buffer_of(capacity=100, capacity_bytes=6000, identity=2) as buffer:
        for step in range(60):
            dice = np.random.default_rng(step)
            index = torch.from_numpy(dice.integers(0, 40, 6))
            lists = [
                torch.full((int(n),), int(i))
                for n, i in zip(dice.integers(1, 200, 6), index, strict=True)
            ]
            buffer.update((lists, index % 3, index))
            found = indices(buffer)
            assert len(set(found)) == len(found) == buffer.stats().num_distinct, step
