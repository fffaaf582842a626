"""What all ranks know of the whole buffer, held against a plain dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello.policies.contents import Contents

ROWS = np.array([5, 0, 3, 4])

Admissions = list[tuple[int, list[tuple[int, int]]]]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 2, 3]),
            st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=6),
        ),
        max_size=12,
    )
)
def test_labels_members_and_indices(admissions: Admissions) -> None:
    contents = Contents(np.zeros(4, dtype=np.int64), ROWS)
    held: list[dict[int, int]] = [{} for _ in ROWS]
    for rank, admitted in admissions:
        # Unused slots fill without gaps, as selection policies promise.
        slots = []
        for slot, label in admitted:
            slots.append(min(slot, len(held[rank]), int(ROWS[rank]) - 1))
            held[rank][slots[-1]] = label
        labels = np.array([label for _, label in admitted], dtype=np.int64)
        contents.admit(rank, np.array(slots, dtype=np.int64), labels)
        contents.resize(np.array([len(each) for each in held]))
    expected = [each[slot] for each in held for slot in range(len(each))]
    assert contents.num_held == len(expected)
    assert contents.labels.tolist() == expected
    assert contents.class_labels == sorted(set(expected))
    for label in contents.class_labels:
        indices = contents.indices(contents.places(label))
        assert sorted(indices.tolist()) == [i for i, each in enumerate(expected) if each == label]


def test_places_that_are_in_use() -> None:
    contents = Contents(np.array([2, 0, 1, 0]), ROWS)
    for rank, slots in ((0, [0, 1]), (2, [0])):
        places = contents.admit(rank, np.array(slots), np.full(len(slots), rank))
        assert places.tolist() == contents.places_of_slots(rank, np.array(slots)).tolist()
    assert np.arange(12)[contents.used_places].tolist() == [0, 1, 5]
    full = Contents(ROWS, ROWS)
    assert np.arange(12)[full.used_places].tolist() == list(range(12))


def test_places_of_contents_without_labels() -> None:
    contents = Contents(np.array([2, 1]), np.array([3, 3]), with_labels=False)
    contents.admit(1, np.arange(1), np.zeros(1, dtype=np.int64))
    assert contents.places_of_slots(1, np.arange(1)).tolist() == [3]
    assert np.arange(6)[contents.used_places].tolist() == [0, 1, 3]
    for ask in (lambda: contents.labels, lambda: contents.class_labels):
        with pytest.raises(TypeError, match="give the class needs_labels = True"):
            ask()


def test_places_of_contents_that_know_sizes_alone() -> None:
    contents = Contents(np.array([2, 1]))
    for ask, needed in (
        (lambda: contents.used_places, "needs_places"),
        (lambda: contents.places_of_slots(0, np.arange(2)), "needs_places"),
        (lambda: contents.labels, "needs_labels"),
    ):
        with pytest.raises(TypeError, match=f"give the class {needed} = True"):
            ask()
