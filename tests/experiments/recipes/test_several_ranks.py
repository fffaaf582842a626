"""What makes no sense, or not on one rank, is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.training import run as train


@pytest.mark.parametrize(
    ("changes", "num_ranks", "message"),
    [
        (
            {"ranks_differ": 0.0},
            2,
            "ranks_differ=0.0: it must be above 0 (each class on one rank) and at most 1e+06 (all "
            "ranks alike)",
        ),
        ({"ranks_differ": float("nan")}, 2, "ranks_differ=nan: it must be a finite number"),
        ({"draws": "near"}, 2, "draws='near': there are global, local"),
        ({"local_steps": -1}, 2, "local_steps=-1: it must be 0 (off) or more steps"),
        (
            {"ranks_differ": 0.1},
            1,
            "ranks_differ=0.1 on 1 rank: there is no rank to differ from; take several (--ranks), "
            "or leave it out",
        ),
        ({"draws": "local"}, 1, "draws='local' on 1 rank: its shard is the whole buffer; take"),
        ({"local_steps": 3}, 1, "local_steps=3 on 1 rank: there are no other weights to average"),
        (
            {"ranks_differ": 0.1, "composition": "proportional", "sampling": "earlier-tasks"},
            2,
            "ranks_differ=0.1 with composition='proportional': its new samples are dealt evenly "
            "over the ranks, so that each is visited equally often; use composition='append'",
        ),
        (
            {"ranks_differ": 0.1, "remembers": "random"},
            2,
            "ranks_differ=0.1 with remembers='random': exemplars are dealt evenly over the ranks; "
            "use remembers='stream' or 'last-epoch'",
        ),
        (
            {"draws": "local", "sampling": "grasp"},
            2,
            "draws='local' with sampling='grasp': out of its own shard a rank draws uniformly; use "
            "sampling='uniform' (and composition='append'), or draws='global'",
        ),
        (
            {"draws": "local", "strategy": "a-gem"},
            2,
            "draws='local' with strategy='a-gem': it averages the gradients of representatives "
            "over the ranks, also where a shard is still empty; use draws='global', or local_steps",
        ),
        (
            {"draws": "local", "strategy": "gdumb", "ranks_differ": 0.1},
            2,
            "draws='local' with strategy='gdumb' and ranks_differ=0.1: it trains on the buffer "
            "alone, and a rank may have nothing of a task; use draws='global'",
        ),
        (
            {"draws": "local", "composition": "proportional", "sampling": "uniform"},
            2,
            "draws='local' with composition='proportional': a step's past samples are those of all "
            "ranks; use composition='append', or draws='global'",
        ),
        (
            {"local_steps": 3, "strategy": "generative"},
            2,
            "local_steps=3 with strategy='generative': all ranks have one generator, and average "
            "its gradients in every step; use local_steps=0",
        ),
        (
            {"local_steps": 3, "generated_share": 0.5},
            2,
            "local_steps=3 with generated_share=0.5: all ranks have one generator",
        ),
        (
            {"strategy": "fedssi"},
            2,
            "local_steps=0 with strategy='fedssi': it is made for ranks that go their own ways; "
            "give local_steps, or use strategy='si'",
        ),
        ({"strategy": "fedssi", "local_steps": 5}, 1, "local_steps=5 on 1 rank"),
        (
            {"strategy": "fedssi", "local_steps": 5, "locality": 1.0},
            2,
            "locality=1.0: it must be above 0 and below 1",
        ),
        (
            {"strategy": "fedssi", "local_steps": 5, "locality": 0.01, "learning_rate": 0.05},
            2,
            "locality=0.01 with learning_rate=0.05: a step of the surrogate model would go 2.48 "
            "times the way to the averaged weights; take a larger locality",
        ),
        (
            {"strategy": "fedssi", "local_steps": 5, "surrogate_steps": 0},
            2,
            "surrogate_steps=0: it must be at least 1",
        ),
        ({"strategy": "si", "si_damping": 0.0}, 1, "si_damping=0.0: it must be above 0"),
        ({"strategy": "si", "si_strength": -1.0}, 1, "si_strength=-1.0: it must not be negative"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], num_ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train.check(recipe_named("digits", **changes), num_ranks)


def test_without_a_buffer_its_settings_do_not_matter() -> None:
    for changes in (
        {"draws": "local"},
        {"ranks_differ": 0.1, "composition": "proportional"},
        {"draws": "local", "sampling": "grasp"},
    ):
        num_ranks = 2 if "ranks_differ" in changes else 1
        train.check(recipe_named("digits", strategy="incremental", **changes), num_ranks)
