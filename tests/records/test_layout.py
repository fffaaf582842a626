from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ritornello.records.layout import ROW_ALIGNMENT, Layout
from ritornello.records.nesting import leaves_of

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
]  # fmt: skip


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def random_leaf(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 100, shape).to(dtype)


def nestings() -> st.SearchStrategy[Any]:
    leaf = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3))
    return st.recursive(
        leaf.map(lambda drawn: ("leaf", drawn[0], tuple(drawn[1]))),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3),
            st.tuples(inner, inner).map(lambda pair: ("pair", *pair)),
        ),
        max_leaves=6,
    )


def build(nesting: Any, num_samples: int) -> Any:
    if isinstance(nesting, dict):
        return {key: build(value, num_samples) for key, value in nesting.items()}
    if isinstance(nesting, list):
        return [build(value, num_samples) for value in nesting]
    if nesting[0] == "pair":
        return Pair(build(nesting[1], num_samples), build(nesting[2], num_samples))
    return random_leaf(nesting[1], (num_samples, *nesting[2]))


@settings(deadline=None, max_examples=150)
@given(nestings(), st.integers(0, 6))
def test_samples_come_back_as_they_went_in(nesting: Any, num_samples: int) -> None:
    batch = build(nesting, num_samples)
    layout = Layout.of(batch)
    assert layout.record_bytes % ROW_ALIGNMENT == 0
    rows = torch.full((num_samples, layout.record_bytes), 255, dtype=torch.uint8)
    layout.pack(layout.leaves(batch), None, rows)
    back = layout.rebuild(layout.views(rows))
    originals, copies = list(leaves_of(batch)), list(leaves_of(back))
    assert [path for path, _ in originals] == [path for path, _ in copies]
    for (_, original), (_, copy) in zip(originals, copies, strict=True):
        assert original.dtype == copy.dtype
        assert original.shape == copy.shape
        assert torch.equal(original, copy)


def test_containers_keep_their_types() -> None:
    batch = {"pair": Pair(torch.zeros(2), torch.ones(2)), "list": [torch.zeros(2, 3)]}
    layout = Layout.of(batch)
    back = layout.rebuild(layout.leaves(batch))
    assert isinstance(back["pair"], Pair)
    assert isinstance(back["list"], list)


def test_fields_are_aligned_and_rows_hold_no_more_than_needed() -> None:
    layout = Layout.of((torch.zeros(1, 3, dtype=torch.uint8), torch.zeros(1, 2), torch.zeros(1)))
    assert [field.offset for field in layout.fields] == [0, 4, 12]
    assert layout.record_bytes == 16
    mnist = Layout.of((torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.zeros(1).long()))
    assert mnist.record_bytes == 784 + 16


def test_pack_takes_the_indexed_samples_of_any_memory_format() -> None:
    images = torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last)
    layout = Layout.of(images)
    rows = torch.zeros(2, layout.record_bytes, dtype=torch.uint8)
    layout.pack([images.requires_grad_()], np.array([4, 1]), rows)
    assert torch.equal(layout.views(rows)[0], images[[4, 1]])


def test_pack_of_a_conjugated_view() -> None:
    values = torch.randn(4, 3, dtype=torch.complex64).conj()
    layout = Layout.of(values)
    rows = torch.zeros(4, layout.record_bytes, dtype=torch.uint8)
    layout.pack([values], None, rows)
    assert torch.equal(layout.views(rows)[0], values)


def test_pack_of_large_samples() -> None:
    images = torch.randn(5, 3, 80, 80).to(memory_format=torch.channels_last)
    layout = Layout.of((images, torch.arange(5)))
    rows = torch.zeros(2, layout.record_bytes, dtype=torch.uint8)
    layout.pack([images.requires_grad_(), torch.arange(5)], np.array([4, 1]), rows)
    assert torch.equal(layout.views(rows)[0], images[[4, 1]])
    assert layout.views(rows)[1].tolist() == [4, 1]


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.zeros(2), 3), TypeError, r"batch\[1\] is a int; .*torch.as_tensor"),
        ({"x": torch.zeros(())}, ValueError, r"batch\['x'\] has no dimensions"),
        ((torch.zeros(2).to_sparse(),), TypeError, r"batch\[0\] is torch.sparse_coo"),
        ((), ValueError, "holds no tensor"),
    ],
)
def test_what_cannot_be_a_sample(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layout.of(batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(2, 4), "y": torch.zeros(2)}, r"batch\['x'\] is torch.float32 \[4\] per"),
        ({"x": torch.zeros(2, 3).int(), "y": torch.zeros(2)}, r"torch.int32 .*float32 \[3\]"),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(3)}, r"batch\['y'\] has 3 samples.* has 2"),
        ({"x": torch.zeros(2, 3)}, r"batch has \['x'\], but .* keys \['x', 'y'\]"),
        ((torch.zeros(2, 3), torch.zeros(2)), "batch has tuple, but"),
        ({"x": [torch.zeros(2, 3)], "y": torch.zeros(2)}, r"batch\['x'\]"),
    ],
)
def test_a_later_batch_must_be_like_the_first(batch: Any, message: str) -> None:
    layout = Layout.of({"x": torch.zeros(5, 3), "y": torch.zeros(5)})
    with pytest.raises((ValueError, TypeError), match=message):
        layout.leaves(batch)


def test_another_number_of_parts() -> None:
    layout = Layout.of((torch.zeros(5, 3), torch.zeros(5)))
    with pytest.raises(ValueError, match="batch has 3 parts, but the buffer's samples have 2"):
        layout.leaves((torch.zeros(5, 3), torch.zeros(5), torch.zeros(5)))


def test_digests_tell_layouts_apart() -> None:
    first = Layout.of((torch.zeros(2, 3), torch.zeros(2)))
    same = Layout.of((torch.zeros(9, 3), torch.zeros(9)))
    other = Layout.of((torch.zeros(2, 3), torch.zeros(2).double()))
    assert first.digest == same.digest != other.digest
