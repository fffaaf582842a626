"""Who is kept where bytes are bounded: as many as fit, and no length is favoured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ritornello.policies.class_shares import ClassBalanced
from ritornello.policies.names import SELECTION_POLICIES
from ritornello.policies.reservoir import Reservoir
from ritornello.policies.saved_within_bytes import NO_END, PROTECTED
from ritornello.policies.selection import SavedShards
from ritornello.policies.within_bytes import WithinBytes, within_bytes
from ritornello.records.shard import rows_per_rank
from ritornello.testing import chi_square_p_value

Stream = Sequence[tuple[int, int]]


class Played:
    """A shard that holds (label, number in the stream, pages) instead of samples."""

    def __init__(self, policy: WithinBytes, num_slots: int, seed: int = 0) -> None:
        policy.bind(num_slots, 0, 1)
        self.policy, self.generator = policy, np.random.default_rng(seed)
        self.content: list[tuple[int, int, int]] = []
        self.num_offered = 0

    @classmethod
    def of(cls, policy: WithinBytes, content: list[tuple[int, int, int]]) -> Played:
        """One that holds something already."""
        played = cls.__new__(cls)
        played.policy, played.generator = policy, np.random.default_rng(0)
        played.content, played.num_offered = content, 1000
        return played

    def offer(self, labels: np.ndarray, pages: np.ndarray) -> None:
        turnover = self.policy.turn_over(labels, pages, self.generator)
        before = dict(enumerate(self.content))
        for slot in turnover.removed.tolist():
            del before[slot]
        moved = {
            to: before.pop(slot)
            for slot, to in zip(
                turnover.moved_from.tolist(), turnover.moved_to.tolist(), strict=True
            )
        }
        assert not moved.keys() & before.keys()
        before |= moved
        for row, slot in zip(turnover.rows.tolist(), turnover.slots.tolist(), strict=True):
            assert slot not in before
            before[slot] = int(labels[row]), self.num_offered + row, int(pages[row])
        assert sorted(before) == list(range(turnover.size))
        self.content = [before[slot] for slot in range(turnover.size)]
        self.num_offered += len(labels)
        assert turnover.size <= self.policy.num_slots
        assert sum(pages for *_, pages in self.content) <= self.policy.num_pages

    def check(self) -> None:
        """What the policy knows is what is there."""
        state = self.policy.state()
        labels = np.repeat(state.get("labels", 0 * state["counts"]), state["counts"])
        known = dict(
            zip(
                state["slots"].tolist(),
                zip(labels.tolist(), state["pages"].tolist(), strict=True),
                strict=True,
            )
        )
        expected = {slot: (label, pages) for slot, (label, _, pages) in enumerate(self.content)}
        if "labels" not in state:
            expected = {slot: (0, pages) for slot, (_, pages) in expected.items()}
        assert known == expected


@pytest.mark.parametrize("seed", range(4))
def test_slots_and_pages_hold(seed: int) -> None:
    dice = np.random.default_rng(seed)
    for by_class, newest in ((True, False), (False, False), (False, True)):
        shard = Played(WithinBytes(50, by_class, newest), 12, seed)
        for _ in range(60):
            num = int(dice.integers(0, 9))
            shard.offer(dice.integers(0, 4, num), dice.integers(0, 20, num))
            shard.check()


def test_the_newest_stay() -> None:
    shard = Played(WithinBytes(10, by_class=False, newest=True), 100)
    for number in range(20):
        shard.offer(np.zeros(1, np.int64), np.array([1 + number % 3]))
    numbers = sorted(number for _, number, _ in shard.content)
    assert numbers == list(range(20 - len(numbers), 20))
    assert (
        1 + (19 - len(numbers)) % 3 + sum(p for *_, p in shard.content) > 10
    )  # one more does not fit


def test_classes_share_equally_and_small_ones_are_stored_whole() -> None:
    shard = Played(WithinBytes(90, by_class=True), 1000)
    for _ in range(40):
        shard.offer(np.array([0, 0, 0, 1, 1]), np.full(5, 1))
    shard.offer(np.full(7, 2), np.full(7, 2))
    counts = np.bincount([label for label, *_ in shard.content])
    assert counts[2] == 7
    assert abs(int(counts[0]) - int(counts[1])) <= 1
    assert counts @ [1, 1, 2] in (89, 90)


def kept_by_group(policy: str, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
    """How often samples are kept: by length (two of them), and by age (ten parts of the stream)."""
    by_length, by_age = np.zeros(2), np.zeros(10)
    for seed in range(num_runs):
        shard = Played(WithinBytes(400, policy == "class-balanced"), 10_000, seed)
        # Long ones come first: length and age are confounded on purpose, half of either late.
        lengths = np.concatenate([np.tile([9, 9, 1], 60), np.tile([1, 1, 9], 60)])
        for first in range(0, 360, 12):
            shard.offer(np.zeros(12, np.int64), lengths[first : first + 12])
        for _, number, pages in shard.content:
            by_length[pages > 1] += 1
            by_age[number // 36] += 1
    return by_length, by_age


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced"])
def test_no_length_and_no_age_is_favoured(policy: str) -> None:
    by_length, by_age = kept_by_group(policy, 120)
    # As many long ones as short ones were offered; about 80 are kept of them in a run.
    long_share = by_length[1] / by_length.sum()
    assert abs(long_share - 0.5) < 0.012
    assert chi_square_p_value(by_age, by_age.mean()) > 1e-4


def test_that_the_test_of_lengths_can_fail() -> None:
    """Of a policy that admits what fits into the free pages, long ones are found far too rarely."""
    short = long = 0
    for seed in range(20):
        dice, free = np.random.default_rng(seed), 400
        held: list[int] = []
        for pages in np.concatenate([np.tile([9, 9, 1], 60), np.tile([1, 1, 9], 60)]).tolist():
            if pages > free and held and dice.random() < 0.5:
                free += held.pop(int(dice.integers(len(held))))
            if pages <= free:
                held.append(pages)
                free -= pages
        long += sum(each > 1 for each in held)
        short += sum(each == 1 for each in held)
    assert abs(long / (long + short) - 0.5) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_as_many_are_held_as_fit(seed: int) -> None:
    """The lowest keys of the whole past, up to the first one that does not fit beside them."""
    dice, again = np.random.default_rng(100 + seed), np.random.default_rng(seed)
    shard = Played(WithinBytes(300, by_class=False), 10_000, seed)
    keys, pages = list[int](), list[int]()
    for _ in range(60):
        lengths = 1 + (19 * dice.beta(1, 1.6, 4)).astype(np.int64)
        shard.offer(np.zeros(4, np.int64), lengths)
        keys += again.integers(0, NO_END, 4).tolist()
        pages += lengths.tolist()
        order = np.argsort(keys)
        num_fit = int((np.array(pages)[order].cumsum() <= 300).sum())
        assert ids(shard.content) == set(order[:num_fit].tolist())


def test_what_comes_later_and_is_short_fills_the_pages_again() -> None:
    shard = Played(WithinBytes(200, by_class=False), 10_000)
    for _ in range(40):
        shard.offer(np.zeros(10, np.int64), np.full(10, 10))
    assert len(shard.content) == 20
    for _ in range(4000):
        shard.offer(np.zeros(10, np.int64), np.full(10, 1))
    assert len(shard.content) > 150  # of 40,400 offered, 400 were long: about 190 fit
    assert sum(pages for *_, pages in shard.content) > 180


def test_saved_and_restored_it_goes_on_alike() -> None:
    shard = Played(WithinBytes(60, by_class=True), 30)
    for _ in range(20):
        shard.offer(shard.generator.integers(0, 5, 6), shard.generator.integers(0, 9, 6))
    again = WithinBytes(60, by_class=True)
    again.bind(30, 0, 1)
    again.restore(shard.policy.state(), len(shard.content))
    labels, pages = np.arange(40) % 6, np.arange(40) % 7
    one = shard.policy.turn_over(labels, pages, np.random.default_rng(1))
    other = again.turn_over(labels, pages, np.random.default_rng(1))
    for name in vars(one):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_dealt_out_anew_nothing_is_lost_where_there_is_room(num_ranks: int) -> None:
    shards = []
    for seed in range(2):
        shard = Played(WithinBytes(60, by_class=True), 30, seed)
        for _ in range(20):
            shard.offer(shard.generator.integers(0, 4, 6), shard.generator.integers(0, 9, 6))
        shards.append(shard)
    sizes = np.array([len(each.content) for each in shards])
    saved = SavedShards([each.policy.state() for each in shards], sizes, 60)
    found = set()
    for rank in range(num_ranks):
        policy = WithinBytes(-(-130 // num_ranks), by_class=True)
        policy.bind(60, rank, num_ranks)
        owners, slots = policy.adopt(saved, 60, np.random.default_rng(0))
        state = policy.state()
        held = [shards[o].content[s] for o, s in zip(owners.tolist(), slots.tolist(), strict=True)]
        assert state["pages"].sum() == sum(pages for *_, pages in held)
        found |= set(zip(owners.tolist(), slots.tolist(), strict=True))
        small = WithinBytes(10, by_class=True)
        small.bind(60, rank, num_ranks)
        small.adopt(saved, 60, np.random.default_rng(0))
        assert small.state()["pages"].sum() <= 10
    assert len(found) == sizes.sum()


def played(num_slots: int, num_pages: int, stream: Stream, **arguments: Any) -> Played:
    """A shard that was offered some (label, pages), five at a time."""
    shard = Played(WithinBytes(num_pages, **{"by_class": False, **arguments}), num_slots)
    labels, pages = np.array(stream, dtype=np.int64).reshape(-1, 2).T
    for first in range(0, len(stream), 5):
        shard.offer(labels[first : first + 5], pages[first : first + 5])
    return shard


def dealt_out(
    shards: list[Played], capacity: int, num_pages: int, num_ranks: int, **arguments: Any
) -> list[Played]:
    """The same on other ranks, which have their parts of both."""
    sizes = np.array([len(each.content) for each in shards])
    saved = SavedShards([each.policy.state() for each in shards], sizes, int(sizes.sum()))
    pages_per_rank = rows_per_rank(num_pages, num_ranks).tolist()
    found = []
    for rank in range(num_ranks):
        policy = WithinBytes(
            pages_per_rank[rank],
            **{"by_class": False, **arguments},
            pages_per_rank=pages_per_rank,
        )
        policy.bind(int(rows_per_rank(capacity, num_ranks)[rank]), rank, num_ranks)
        owners, slots = policy.adopt(saved, capacity, np.random.default_rng(0))
        shard = Played.of(
            policy, [shards[o].content[s] for o, s in zip(owners, slots, strict=True)]
        )
        shard.check()
        found.append(shard)
    return found


@pytest.mark.parametrize(
    ("capacity", "num_pages", "num_ranks", "stream"),
    [
        (5, 300, 2, [(0, 140), (0, 1), (0, 1), (0, 1), (0, 1)]),  # to the last slot of each rank
        (7, 600, 4, [(0, 140), (1, 100), (1, 1), (2, 1), (2, 1), (2, 1), (2, 1)]),
        (40, 301, 2, [(0, 151), *((0, 5),) * 20]),  # a rank is full of one
        (199, 200, 2, [*((0, 1),) * 80, (1, 90), (1, 30)]),  # the last class is long
    ],
)
def test_dealt_to_more_ranks_all_stay_that_fit(
    capacity: int, num_pages: int, num_ranks: int, stream: Stream
) -> None:
    shard = played(capacity, num_pages, stream, by_class=True)
    assert len(shard.content) == len(stream)
    found = dealt_out([shard], capacity, num_pages, num_ranks, by_class=True)
    assert sum(len(each.content) for each in found) == len(stream)


def test_one_that_fits_into_no_shard_moves_nobody() -> None:
    shard = played(20, 100, [(0, 60), *((0, 2),) * 8])
    assert len(shard.content) == 9
    for _ in range(2):
        found = dealt_out([shard], 20, 100, 2)
        assert sorted(each[2] for of_rank in found for each in of_rank.content) == [2] * 8
        # Nor is it protected where the part for these has no room for it.
        assert shard.policy.protect(20, 16, np.random.default_rng(0)) == 8


def test_joined_from_ranks_that_were_offered_few_each_it_is_saved_again() -> None:
    for newest in (False, True):
        shards = [played(10, 100, [(0, 1)] * 10, newest=newest) for _ in range(4)]
        (joined,) = dealt_out(shards, 40, 400, 1, newest=newest)
        assert len(joined.content) == 40
        again = WithinBytes(400, by_class=False, newest=newest)
        again.bind(40, 0, 1)
        again.restore(joined.policy.state(), 40)
        _, kept = again.forget(again.state(), 40, np.array([3]))
        assert len(kept) == 39


def test_dealt_out_anew_no_class_comes_back_farther_than_it_may() -> None:
    """Beside ranks that have lost much, others hold what is above that: with more of the past."""
    num_new = num_old = 0
    for seed in range(60):
        shards = [Played(WithinBytes(20, False), 20, 10 * seed + rank) for rank in range(2)]
        for shard, num_offered in zip(shards, (400, 40), strict=True):
            for _ in range(num_offered // 20):
                shard.offer(np.zeros(20, np.int64), np.ones(20, np.int64))
        (joined,) = dealt_out(shards, 40, 40, 1)
        joined.generator = np.random.default_rng(seed)
        end = joined.policy.state()["ends"][0]
        for _ in range(5):
            joined.offer(np.zeros(20, np.int64), np.ones(20, np.int64))
            assert joined.policy.state()["ends"][0] <= end
        num_new += sum(number >= 400 for _, number, _ in joined.content)
        num_old += 40
    assert 0.09 * num_old < num_new < 0.17 * num_old  # 5 of 40; it was 13


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_of_the_newest_of_several_ranks_the_oldest_go_first_of_all_alike(num_ranks: int) -> None:
    for both in ((40, 5), (20, 20), (4, 9)):
        shards = [Played(WithinBytes(60, False, True), 12) for _ in range(2)]
        for shard, num_rounds in zip(shards, both, strict=True):
            for _ in range(num_rounds):
                shard.offer(np.zeros(3, np.int64), np.ones(3, np.int64))
        for each in dealt_out(shards, 24, 120, num_ranks, newest=True):
            assert len(set(each.policy.state()["keys"].tolist())) == len(each.content)
            for step in range(6):
                again = Played(
                    WithinBytes(each.policy.num_pages, False, True), each.policy.num_slots
                )
                again.policy.restore(each.policy.state(), len(each.content))
                again.content = list(each.content)
                labels, pages = np.zeros(2, np.int64), np.array([2, 1 + step])
                for shard in (each, again):
                    shard.num_offered, shard.generator = 1000 + step, np.random.default_rng(0)
                    shard.offer(labels, pages)
                assert again.content == each.content
            if num_ranks == 1:  # as many of both ranks, the newest of either
                left = sorted(number for _, number, _ in each.content if number < 1000)
                newest = [3 * num - 1 - age for age in range(len(left) // 2) for num in both]
                oldest = 3 * both[1] - 1 - len(left) // 2  # of the second, if they are odd
                assert left == sorted(newest + [oldest] * (len(left) % 2))


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_more_labels_than_slots_are_told_of(num_ranks: int) -> None:
    def shard_of(labels: np.ndarray, num_slots: int, pages: int, num_pages: int) -> WithinBytes:
        policy = WithinBytes(num_pages, by_class=True)
        policy.bind(num_slots, 0, num_ranks)
        for first in range(0, len(labels), 10):
            part = labels[first : first + 10]
            policy.turn_over(part, np.full_like(part, pages), np.random.default_rng(first))
        return policy

    classes = np.tile(np.arange(20), 50)
    assert shard_of(classes, 20, 1, 1000).excess_labels == 0
    assert shard_of(np.zeros(900, np.int64), 1, 1, 1).excess_labels == 0
    # Bytes do not suffice for each class, but there are slots.
    assert shard_of(classes, 20, 9, 100).excess_labels == 0
    few = 21 if num_ranks == 1 else 160
    assert shard_of(np.arange(900), 20, 1, 1000).excess_labels >= few
    assert 50 < shard_of(np.arange(2000), 20, 9, 100).excess_labels < 4000
    assert shard_of(np.arange(20), 20, 1, 1000).excess_labels == 0


def test_of_classes_that_are_refused_nothing_is_remembered() -> None:
    for protects in (False, True):
        shard = played(10, 100, [(0, 9)] * 11, by_class=True)
        if protects:
            assert shard.policy.protect(10, 90, shard.generator) == 10
        for first in range(0, 1000, 50):
            shard.offer(np.arange(first, first + 50), np.full(50, 11 if protects else 101))
            assert shard.policy.excess_labels == 0
        assert len(shard.policy.state()["counts"]) <= 2


def test_joined_from_many_ranks_no_more_is_remembered_than_there_are_slots() -> None:
    streams = [[(1000 * rank + label, 1) for label in range(300)] for rank in range(3)]
    shards = [played(10, 100, stream, by_class=True) for stream in streams]
    assert [len(each.policy.state()["counts"]) for each in shards] == [10] * 3
    for shard in dealt_out(shards, 30, 300, 3, by_class=True):
        assert len(shard.policy.state()["counts"]) == 10


def ids(content: list[tuple[int, int, int]]) -> set[int]:
    return {number for _, number, _ in content}


def num_protected_in(policy: WithinBytes) -> int:
    state = policy.state()
    return int(state["counts"][state["kinds"] == PROTECTED].sum())


def full_shard(seed: int = 0, by_class: bool = True, newest: bool = False) -> Played:
    shard = Played(WithinBytes(100, by_class, newest), 40, seed)
    for _ in range(30):
        shard.offer(shard.generator.integers(0, 3, 6), shard.generator.integers(1, 9, 6))
    return shard


@pytest.mark.parametrize("by_class", [True, False])
def test_what_is_protected_stays_and_what_was_there_gives_way_first(by_class: bool) -> None:
    for newest in (False, not by_class):
        shard = full_shard(by_class=by_class, newest=newest)
        before = ids(shard.content)
        num_protected = shard.policy.protect(40, 50, np.random.default_rng(1))
        shard.check()
        assert 3 <= num_protected < len(before)
        left_before = before
        for _ in range(80):
            shard.offer(shard.generator.integers(3, 6, 6), shard.generator.integers(1, 9, 6))
            shard.check()
            left = ids(shard.content) & before
            assert left <= left_before  # and those that are not protected leave for good
            left_before = left
        assert len(left) == num_protected
        pages = [pages for _, number, pages in shard.content if number in left]
        assert 40 < sum(pages) <= 50
        if by_class:
            of_class = np.bincount([label for label, *_ in shard.content], minlength=6)
            assert of_class[:3].max() - of_class[:3].min() <= 1
            assert of_class[3:].max() - of_class[3:].min() <= 1


def test_protected_again_nothing_loses_its_protection() -> None:
    shard = full_shard()
    first = shard.policy.protect(4, 100, np.random.default_rng(1))
    assert first == 4
    for _ in range(40):
        shard.offer(np.full(6, 4), np.ones(6, np.int64))
    kept = {number for _, number, _ in shard.content if number < 180}
    assert len(kept) == 4
    assert shard.policy.protect(2, 100, np.random.default_rng(2)) == 4
    assert shard.policy.protect(10, 100, np.random.default_rng(2)) == 10
    for _ in range(40):
        shard.offer(np.full(6, 5), np.ones(6, np.int64))
    assert kept < ids(shard.content)
    assert len([number for _, number, _ in shard.content if number < 420]) == 10


def test_a_sample_that_does_not_fit_beside_what_is_protected_moves_nobody() -> None:
    shard = full_shard()
    shard.policy.protect(40, 95, np.random.default_rng(1))
    for _ in range(9):
        shard.offer(np.full(3, 4), np.full(3, 1))
    before = list(shard.content)
    assert any(label == 4 for label, *_ in before)
    shard.offer(np.full(40, 4), np.full(40, 60))
    assert shard.content == before


def test_who_is_protected_is_a_fair_sample() -> None:
    """Of each class, whatever the lengths; with a false alarm in 10,000 seeds."""
    long = total = 0
    for seed in range(150):
        shard = Played(WithinBytes(400, by_class=True), 1000, seed)
        shard.offer(np.zeros(60, np.int64), np.tile([9, 1], 30))
        num_protected = shard.policy.protect(1000, 100, shard.generator)
        shard.offer(np.ones(500, np.int64), np.ones(500, np.int64))
        held = [pages for label, _, pages in shard.content if label == 0]
        assert len(held) == num_protected
        long, total = long + sum(pages > 1 for pages in held), total + len(held)
    assert total > 2000
    assert abs(long / total - 0.5) < 3.9 * (0.25 / total) ** 0.5 + 0.005


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_dealt_out_anew_what_is_protected_stays(num_ranks: int) -> None:
    shards = [full_shard(seed) for seed in range(2)]
    for shard in shards:
        shard.policy.protect(40, 50, shard.generator)
        shard.offer(np.full(4, 5), np.full(4, 3))
    sizes = np.array([len(each.content) for each in shards])
    saved = SavedShards([each.policy.state() for each in shards], sizes, 80)
    expected = sum(num_protected_in(each.policy) for each in shards)
    for pages_of_all, all_stay in ((240, True), (135, False)):
        protected, held = 0, 0
        for rank in range(num_ranks):
            policy = WithinBytes(-(-pages_of_all // num_ranks), by_class=True)
            policy.bind(80, rank, num_ranks)
            owners, slots = policy.adopt(saved, 80 * num_ranks, np.random.default_rng(0))
            again = WithinBytes(policy.num_pages, by_class=True)
            again.bind(80, rank, num_ranks)
            again.restore(policy.state(), len(owners))
            assert len(owners) == len(slots)
            protected, held = protected + num_protected_in(again), held + len(owners)
        assert protected == expected
        assert (held == sizes.sum()) == all_stay


def test_protected_ones_are_forgotten_and_their_room_goes_to_the_rest() -> None:
    shard = full_shard()
    shard.policy.protect(40, 50, shard.generator)
    state = shard.policy.state()
    protected = state["slots"][np.repeat(state["kinds"] == PROTECTED, state["counts"])]
    left, kept = shard.policy.forget(state, len(shard.content), protected[:2])
    again = WithinBytes(100, by_class=True)
    again.bind(40, 0, 1)
    again.restore(left, len(kept))
    assert num_protected_in(again) == len(protected) - 2
    again.turn_over(np.full(9, 4), np.full(9, 3), shard.generator)
    assert num_protected_in(again) == len(protected) - 2


def test_what_is_forgotten_leaves_room() -> None:
    shard = Played(WithinBytes(60, by_class=True), 30)
    for _ in range(20):
        shard.offer(shard.generator.integers(0, 4, 6), shard.generator.integers(0, 9, 6))
    removed = np.array([0, 3, 4])
    state, kept = shard.policy.forget(shard.policy.state(), len(shard.content), removed)
    assert not set(removed.tolist()) & set(kept.tolist())
    again = WithinBytes(60, by_class=True)
    again.bind(30, 0, 1)
    again.restore(state, len(kept))
    assert state["counts"].sum() == len(shard.content) - 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("counts", np.array([1])),
        ("slots", np.array([0, 0, 1])),
        ("keys", np.array([-1, 0, 0])),
        ("pages", np.array([100, 100, 100])),
        ("offered", np.array([1])),
        ("kinds", np.array([7])),
        ("kinds", np.array([1, 1])),
    ],
)
def test_a_state_that_contradicts_itself_is_refused(name: str, value: np.ndarray) -> None:
    shard = Played(WithinBytes(60, by_class=False), 30)
    shard.offer(np.zeros(3, np.int64), np.array([1, 2, 3]))
    again = WithinBytes(60, by_class=False)
    again.bind(30, 0, 1)
    with pytest.raises(ValueError, match="must|pages|offered=1, but 3 are stored"):
        again.restore(shard.policy.state() | {name: value}, 3)


def test_policies_whose_law_it_keeps() -> None:
    for name, kind in SELECTION_POLICIES.items():
        if name in ("class-balanced", "class-balanced-reservoir", "reservoir", "fifo"):
            within_bytes(kind(), 10)
            continue
        with pytest.raises(ValueError, match=f"{kind.__name__} does not say who gives way"):
            within_bytes(kind(), 10)
    with pytest.raises(ValueError, match="ClassBalanced does not say"):
        within_bytes(ClassBalanced(num_classes=3, shares="fixed"), 10)
    assert within_bytes(ClassBalanced(num_classes=3), 10).num_classes == 3
    assert not within_bytes(Reservoir(), 10).needs_labels


def test_without_pages_it_is_a_selection_policy_like_others() -> None:
    policy = WithinBytes(0, by_class=True)
    policy.bind(6, 0, 1)
    for seed in range(20):
        assignment = policy.admit(np.arange(9) % 3, np.random.default_rng(seed))
        assert set(assignment.slots.tolist()) <= set(range(6))
    assert policy.state()["counts"].tolist() == [2, 2, 2]
