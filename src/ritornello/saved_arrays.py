"""The arrays in a shard's file beside its representatives: their names, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ritornello.arrays import Bytes, Ints

POLICY, CONTENTS = "policy.", "contents."
"""Whose arrays they are, by the beginnings of their names."""

DISTANCES = "distances"
"""The only ones that are no integers."""

Arrays = Mapping[str, NDArray[Any]]
"""By their names."""


def part_of(arrays: Arrays, prefix: str) -> dict[str, Any]:
    """Those arrays whose names begin with ``prefix``, without it.

    Raises:
        ValueError: one is no list of integers (nor, of the contents, of distances).
    """
    part = {name: each for name, each in arrays.items() if name.startswith(prefix)}
    for name, array in part.items():
        dtype = np.float64 if name == CONTENTS + DISTANCES else np.int64
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(
                f"{name} is {array.dtype} {list(array.shape)}: it must be {np.dtype(dtype)} [n]"
            )
    return {name.removeprefix(prefix): each for name, each in part.items()}


def integers(arrays: Arrays, name: str, num: int) -> Ints:
    """The array of that name.

    Raises:
        ValueError, KeyError: there is none of ``num`` integers.
    """
    array = arrays[name]
    if array.dtype != np.int64 or array.shape != (num,):
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}: it must be int64 [{num}]")
    return array


def records_of(arrays: Arrays, name: str, record_bytes: int) -> Bytes:
    """The array of that name.

    Raises:
        ValueError, KeyError: there is none of records.
    """
    array = arrays[name]
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != record_bytes:
        raise ValueError(f"{name} holds no records")
    return array
