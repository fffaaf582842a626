from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello.policies.classes.members import ClassMembers
from ritornello.testing import chi_square_p_value


def contents(members: ClassMembers) -> list[list[int]]:
    return [
        members.slots(np.full(count, number), np.arange(count)).tolist()
        for number, count in enumerate(members.counts.tolist())
    ]


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_it_behaves_like_a_list_per_class(seed: int, num_classes: int) -> None:
    generator = np.random.default_rng(seed)
    members, model, next_slot = ClassMembers(), [], 0
    for _ in range(12):
        if len(model) < num_classes:
            members.add_classes(1)
            model.append(set())
        classes = np.sort(generator.integers(len(model), size=generator.integers(12)))
        slots = np.arange(next_slot, next_slot + len(classes))
        next_slot += len(classes)
        members.append(classes, slots)
        for number, slot in zip(classes.tolist(), slots.tolist(), strict=True):
            model[number].add(slot)
        losing = np.flatnonzero(generator.random(len(model)) < 0.5)
        wanted = np.array([generator.integers(len(model[n]) + 1) for n in losing], dtype=np.int64)
        dropped = members.drop(losing, wanted, generator).tolist()
        for number, count in zip(losing.tolist(), wanted.tolist(), strict=True):
            gone = model[number] & set(dropped)
            assert len(gone) == count
            model[number] -= gone
        held = contents(members)
        assert [set(each) for each in held] == model
        assert all(len(set(each)) == len(each) for each in held)


def test_every_entry_is_equally_likely_to_be_dropped() -> None:
    generator = np.random.default_rng(1)
    survived = np.zeros(12)
    for _ in range(3000):
        members = ClassMembers()
        members.add_classes(2)
        members.append(np.repeat([0, 1], 12), np.arange(24))
        members.drop(np.array([0, 1]), np.array([5, 1]), generator)
        members.drop(np.array([0]), np.array([2]), generator)
        survived[contents(members)[0]] += 1
    assert survived.sum() == 3000 * 5
    # The counts of one draw are negatively correlated, so the test errs on the safe side.
    assert chi_square_p_value(survived, 3000 * 5 / 12) > 0.001


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_dropping_the_last_keeps_the_order(seed: int, num_classes: int) -> None:
    generator = np.random.default_rng(seed)
    members, next_slot = ClassMembers(), 0
    members.add_classes(num_classes)
    model: list[list[int]] = [[] for _ in range(num_classes)]
    for _ in range(12):
        classes = np.sort(generator.integers(num_classes, size=generator.integers(12)))
        slots = np.arange(next_slot, next_slot + len(classes))
        next_slot += len(classes)
        members.append(classes, slots)
        for number, slot in zip(classes.tolist(), slots.tolist(), strict=True):
            model[number].append(slot)
        losing = np.flatnonzero(generator.random(num_classes) < 0.5)
        wanted = np.array([generator.integers(len(model[n]) + 1) for n in losing], dtype=np.int64)
        expected = []
        for number, count in zip(losing.tolist(), wanted.tolist(), strict=True):
            expected += model[number][len(model[number]) - count :]
            del model[number][len(model[number]) - count :]
        assert members.drop_last(losing, wanted).tolist() == expected
        assert contents(members) == model
