from __future__ import annotations

from typing import Any

import pytest

from ritornello.experiments.recipes import recipe_named


def test_the_schedule_of_the_learning_rate() -> None:
    recipe = recipe_named("folder")
    factors = [recipe.learning_rate_factor(epoch) for epoch in (0.5, 5, 20, 21, 26.5, 29)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.05, 0.01])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amp": "int8"}, "amp='int8': there are off"),
        ({"epochs": 0}, "epochs=0: it must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: it must be above 0"),
        (
            {"global_batch_size": 10},
            "global_batch_size=10 does not divide evenly over 4 ranks; take 8",
        ),
        ({"global_num_candidates": 2}, "global_num_candidates=2 does not .*; take 4, or another"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_named("digits", **changes).check(4)
