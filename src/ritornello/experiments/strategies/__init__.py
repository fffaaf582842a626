"""Strategies: how the model learns from a stream of tasks. One file, one screen each."""

from ritornello.experiments.strategies.base import Strategy
from ritornello.experiments.strategies.from_scratch import FromScratch
from ritornello.experiments.strategies.incremental import Incremental
from ritornello.experiments.strategies.rehearsal import Rehearsal

STRATEGIES: dict[str, type[Strategy]] = {
    "incremental": Incremental,
    "rehearsal": Rehearsal,
    "from-scratch": FromScratch,
}

__all__ = ["STRATEGIES", "FromScratch", "Incremental", "Rehearsal", "Strategy", "strategy_named"]


def strategy_named(name: str) -> type[Strategy]:
    """A strategy by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy={name!r}: there are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
