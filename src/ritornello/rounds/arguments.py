"""The rules for the arguments of a ``RehearsalBuffer``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ritornello.policies.names import (
    SAMPLING_POLICIES,
    SELECTION_POLICIES,
    sampling_policy,
    selection_policy,
)
from ritornello.policies.sampling import SamplingPolicy, UniformSampling
from ritornello.policies.selection import SelectionPolicy
from ritornello.version import __version__

MOST_SECONDS = 366 * 24 * 3600
"""The longest time to wait; clocks cannot add much longer ones."""

DRAWS = ("global", "local")
"""Where a rank's representatives are drawn from: all shards, or its own."""

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""Where something is in memory, as Python prints it."""


@dataclass(frozen=True)
class Arguments:
    """What all ranks must give alike, unchecked as given."""

    capacity: int
    num_representatives: float
    most_representatives: int | None
    num_candidates: int | None
    selection: str | SelectionPolicy
    label: Any
    seed: int
    sampling: str | SamplingPolicy
    storage: str
    num_draws: int
    identity: Any = None
    capacity_bytes: int | None = None
    draws: str = "global"

    @property
    def identity_path(self) -> tuple[Any, ...] | None:
        """Where in a sample it is said which one it is; None: nowhere."""
        if self.identity is None:
            return None
        return _path(self.identity)

    @property
    def label_path(self) -> tuple[Any, ...]:
        """Where the class label is in a sample."""
        return _path(self.label)

    @property
    def rate_may_change(self) -> bool:
        """Whether ``num_representatives`` may be set between two steps."""
        return self.most_representatives is not None

    @property
    def most_per_draw(self) -> int:
        """The most representatives that a rank gets in one draw."""
        if self.most_representatives is not None:
            return int(self.most_representatives)
        return math.ceil(self.num_representatives)

    def as_text(self) -> dict[str, str]:
        """Argument to text, equal for arguments that mean the same, to compare over ranks.

        Ranks of other versions would draw other numbers, so the versions are part of it.
        """
        given = {name: _text(plain(value)) for name, value in vars(self).items()}
        for name, path in (("label", self.label_path), ("identity", self.identity_path)):
            given[name] = _text(path and tuple(map(plain, path)))
        given = {name: meant(name, text) for name, text in given.items()}
        return given | {"ritornello's version": __version__, "NumPy's version": np.__version__}

    def check(self, num_ranks: int) -> None:
        """Checks every rule.

        Raises:
            ValueError, TypeError: names the argument, its value and the rule.
        """
        check_count("capacity", self.capacity, minimum=1)
        if self.capacity < num_ranks:
            raise ValueError(
                f"capacity={self.capacity}: it must be at least the number of ranks "
                f"({num_ranks}), so that every rank holds a representative"
            )
        if self.capacity_bytes is not None:
            check_count("capacity_bytes", self.capacity_bytes, minimum=1)
        _check_rate(self.num_representatives)
        if self.most_representatives is not None:
            check_count("most_representatives", self.most_representatives, minimum=1)
            self._check_most(self.num_representatives)
            if self.most_representatives > self.capacity:
                raise ValueError(
                    f"most_representatives={self.most_representatives}: it must be at most the "
                    f"capacity ({self.capacity}), as num_representatives is"
                )
        if self.num_representatives > self.capacity:
            raise ValueError(
                f"num_representatives={self.num_representatives}: it must be at most the "
                f"capacity ({self.capacity}), as no rank draws a representative twice in a step"
            )
        if self.num_candidates is not None:
            check_count("num_candidates", self.num_candidates, minimum=1)
        check_count("num_draws", self.num_draws, minimum=1)
        check_count("seed", self.seed, minimum=0)
        if self.seed >= 2**64:
            raise ValueError(f"seed={self.seed}: it must be below 2**64")
        self._check_draws()
        if self.label is None:
            self._check_policies_without_labels()

    def changed_rate(self, rate: Any) -> float:
        """What ``num_representatives`` is when it is set to ``rate``.

        Raises:
            ValueError, TypeError: it cannot be; says why.
        """
        if self.most_representatives is None:
            raise ValueError(
                f"num_representatives={rate}: it is {self.num_representatives} once and for all, "
                "as the buffer was made without most_representatives, the most that it may become"
            )
        _check_rate(rate)
        self._check_most(rate)
        changed: float = plain(rate)
        return changed

    def _check_most(self, rate: float) -> None:
        assert self.most_representatives is not None
        if rate > self.most_representatives:
            raise ValueError(
                f"num_representatives={rate}: it must be at most most_representatives "
                f"({self.most_representatives}), for which the buffer has memory"
            )

    def _check_draws(self) -> None:
        if self.draws not in DRAWS:
            raise ValueError(f"draws={self.draws!r}: there are {', '.join(map(repr, DRAWS))}")
        sampling = sampling_policy(self.sampling)
        if self.draws == "local" and type(sampling) is not UniformSampling:
            raise ValueError(
                f"draws='local' with sampling={_text(self.sampling)}: out of its own shard a rank "
                "draws uniformly; use sampling='uniform', or draws='global'"
            )

    def _check_policies_without_labels(self) -> None:
        for policy, given, others in (
            (selection_policy(self.selection), self.selection, "selection='reservoir' or 'fifo'"),
            (sampling_policy(self.sampling), self.sampling, "sampling='uniform'"),
        ):
            if policy.needs_labels:
                raise ValueError(
                    f"label=None: the policy {_text(given)} needs the class labels; say which "
                    f"leaf they are, or use {others}"
                )


def check_count(name: str, value: Any, *, minimum: int) -> None:
    """Checks an integer, one of NumPy's too.

    Raises:
        ValueError, TypeError: names it, its value and the rule.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: it must be an integer")
    if value < minimum:
        raise ValueError(f"{name}={value}: it must be at least {minimum}")


def check_share(name: str, value: Any) -> float:
    """A part of a whole, more than nothing.

    Raises:
        ValueError, TypeError: names it, its value and the rule.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}={value!r}: it must be a number")
    if not 0 < value <= 1:  # which NaN is not either
        raise ValueError(f"{name}={value}: it must be above 0, and at most 1")
    return float(value)


def check_seconds(name: str, value: Any) -> None:
    """Checks a time in seconds.

    Raises:
        ValueError, TypeError: names it, its value and the rule.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}={value!r}: it must be a number of seconds")
    if not 0 < value <= MOST_SECONDS:  # which NaN is not either
        raise ValueError(
            f"{name}={value}: it must be above 0, and at most {MOST_SECONDS:,} (a year)"
        )


def _check_rate(rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.integer, np.floating)):
        raise TypeError(f"num_representatives={rate!r}: it must be a number")
    if not 0 <= rate < math.inf:  # which NaN is not either
        raise ValueError(f"num_representatives={rate}: it must be a finite number of at least 0")


def _path(name: Any) -> tuple[Any, ...]:
    """Where a leaf is that is named by an index, a key, or several of them."""
    return tuple(name) if isinstance(name, (tuple, list)) else (name,)


def plain(value: Any) -> Any:
    """A number as one of Python's own, whole ones as integers; all else as it is."""
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return int(value) if float(value).is_integer() else float(value)
    return value


def meant(argument: str, text: str) -> str:
    """An argument's text, as it is written today, whatever was given or an earlier release wrote.

    A policy without settings has its name, a label that is not nested no brackets, and nothing that
    Python prints with its address has one.
    """
    text = ADDRESS.sub("", text)
    if argument in ("label", "identity") and text.endswith(",)"):
        return text[1:-2].strip("'\"")
    return _names_of_policies().get((argument, text), text)


@cache
def _names_of_policies() -> dict[tuple[str, str], str]:
    """By the argument, and the text of a policy that was made without settings."""
    names = {("selection", _text(kind())): name for name, kind in SELECTION_POLICIES.items()}
    return names | {("sampling", _text(kind())): name for name, kind in SAMPLING_POLICIES.items()}


def _text(value: object) -> str:
    """A value as text; of a policy its type and settings, as its repr has an address."""
    if isinstance(value, (SelectionPolicy, SamplingPolicy)):
        settings = (
            f"{k}={_in_order(v)!r}"
            for k, v in vars(value).items()
            if not k.startswith("_") and k not in SelectionPolicy.SET_BY_THE_BUFFER
        )
        return f"{type(value).__qualname__}({', '.join(settings)})"
    return str(value)


def _in_order(value: object) -> object:
    """A set as a list: processes have its elements in orders of their own."""
    return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
