from __future__ import annotations

import random

import numpy as np
import torch

from ritornello import RehearsalBuffer
from ritornello.rounds.random_streams import SHARED, Purpose, stream


def test_a_stream_is_a_function_of_its_key() -> None:
    first = stream(3, Purpose.SAMPLING, step=5).random(8)
    again = stream(3, Purpose.SAMPLING, step=5, rank=SHARED).random(8)
    assert np.array_equal(first, again)


def test_no_two_keys_share_a_stream() -> None:
    # seed + rank would make (0, 1) and (1, 0) the same.
    drawn = {
        tuple(stream(seed, purpose, step, rank).integers(2**60, size=2))
        for seed in (0, 1, 2, 2**64 - 1)
        for purpose in Purpose
        for step in (0, 1, 2)
        for rank in (0, 1, 2, SHARED)
    }
    assert len(drawn) == 4 * len(Purpose) * 3 * 4


def test_the_global_random_state_is_untouched() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    with RehearsalBuffer(20, num_representatives=3, num_candidates=2) as buffer:
        for _ in range(10):
            buffer.update((torch.zeros(5, 2), torch.arange(5)))
    after = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    assert before == after
