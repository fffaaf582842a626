"""What all ranks know of the whole buffer, held against a plain dictionary."""

from __future__ import annotations

import numpy as np
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


def test_what_is_admitted_anew_has_no_distance() -> None:
    contents = Contents(np.array([2, 0, 1, 0]), ROWS)
    for rank, slots in ((0, [0, 1]), (2, [0])):
        contents.admit(rank, np.array(slots), np.zeros(len(slots), dtype=np.int64))
    assert np.isnan(contents.distances).all()
    contents.set_rank_distances(0, np.array([0.25, 0.5]))
    contents.set_rank_distances(2, np.array([0.75]))
    assert contents.distances.tolist() == [0.25, 0.5, 0.75]
    contents.admit(0, np.array([1]), np.zeros(1, dtype=np.int64))  # the same class again
    assert np.isnan(contents.distances).tolist() == [False, True, False]
