"""Incremental training: on the new data alone. The lower bound, and the fastest."""

from __future__ import annotations

from typing import ClassVar

from ritornello.experiments.strategies.base import Strategy


class Incremental(Strategy):
    """Trains on each task's own samples, and forgets the tasks before."""

    takes_tensors: ClassVar[bool] = True
