from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
from synthetic_results import results_of, results_of_variant

from ritornello.experiments.recipes.named import RECIPES, recipe_named
from ritornello.experiments.recipes.recipe import Published, Recipe, with_changes
from ritornello.experiments.results import groups as sweep
from ritornello.experiments.results.groups import Statistic, groups_of
from ritornello.experiments.results.labels import settings_of
from ritornello.experiments.strategies import STRATEGIES
from ritornello.experiments.training.variants import folder_name, uses_buffer, variants

RECIPE = Recipe(
    name="digits",
    description="digits",
    data="digits",
    seed=7,
    capacity=200,
    published=Published(top1=85.6, spread=1.4, num_runs=10, source="Somebody, Table 2"),
)


def test_the_label_is_the_strategy_where_that_is_enough() -> None:
    made = variants(RECIPE, ["incremental", "rehearsal"])
    assert made == {
        "incremental": dataclasses.replace(RECIPE, strategy="incremental", published=None),
        "rehearsal": RECIPE,
    }


def test_labels_name_what_varies_and_seeds_come_last() -> None:
    made = variants(
        RECIPE,
        ["rehearsal"],
        capacities=[200, 0.2],
        representatives=[16],
        seeds=[0, 1],
    )
    assert list(made) == [
        "rehearsal, capacity 200, seed 0",
        "rehearsal, capacity 200, seed 1",
        "rehearsal, capacity 0.2, seed 0",
        "rehearsal, capacity 0.2, seed 1",
    ]
    last = made["rehearsal, capacity 0.2, seed 1"]
    assert (last.capacity, last.global_num_representatives, last.seed) == (0.2, 16, 1)


def test_the_product_of_everything() -> None:
    made = variants(
        RECIPE,
        ["rehearsal", "der", "from-scratch"],
        capacities=[100, 200],
        representatives=[16, 64],
        candidates=[8, 16],
        samplings=["uniform", "grasp"],
        selections=["fifo", "reservoir"],
        seeds=[0, 1, 2],
    )
    assert len(made) == (2 * 2**5 + 1) * 3
    assert len(set(made.values())) == len(made)
    assert "der, capacity 100, r 16, c 8, selection fifo, sampling grasp, seed 2" in made
    assert [label for label in made if label.startswith("from")] == [
        f"from-scratch, seed {seed}" for seed in range(3)
    ]
    assert len({folder_name(label) for label in made}) == len(made)


def test_compositions_and_what_goes_with_them() -> None:
    made = variants(
        RECIPE,
        ["incremental", "rehearsal"],
        compositions=["append", "proportional"],
        representatives=[0, 8],
    )
    assert list(made) == [
        "incremental",
        "rehearsal, append, r 8",
        "rehearsal, proportional, r 0",
        "rehearsal, proportional, r 8",
    ]
    chosen = variants(
        RECIPE, ["rehearsal"], compositions=["append", "proportional"], samplings=["uniform"]
    )
    assert list(chosen) == ["rehearsal, append", "rehearsal, proportional"]
    [alone] = variants(RECIPE, ["rehearsal"], compositions=["proportional"]).values()
    assert (alone.sampling, alone.loss_weights) == ("earlier-tasks", "by-sample")


def test_what_is_given_twice_runs_once() -> None:
    made = variants(RECIPE, ["rehearsal", "rehearsal"], seeds=[1, 1], capacities=[5, 5.0])
    assert list(made) == ["rehearsal"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_without_a_buffer_have_no_settings_of_it(strategy: str) -> None:
    made = variants(RECIPE, [strategy], capacities=[1, 2])
    assert len(made) == (2 if uses_buffer(strategy) else 1)
    bounds = ("incremental", "from-scratch", "joint", "class-means", "ridge")
    without = (*bounds, "generative", "si", "fedssi", "adapter")
    assert uses_buffer(strategy) == (strategy not in without)


def test_the_penalty_is_a_setting_of_ridge_alone() -> None:
    for strategy, num_settings in (("ridge", 2), ("rehearsal", 1)):
        found = [
            settings_of(
                {
                    "recipe": RECIPE.name,
                    "strategy": strategy,
                    "world_size": 1,
                    "seed": 0,
                    "config": {"strategy": strategy, "ridge_penalty": penalty},
                }
            )
            for penalty in (0.1, 0.2)
        ]
        assert len({str(each) for each in found}) == num_settings


def test_what_is_generated_varies_with_how_much_of_it_there_is_and_who_makes_it() -> None:
    lists: dict[str, Any] = {"capacities": [1, 2], "representatives": [8, 16]}
    strategies = ["incremental", "generative"]
    assert list(variants(RECIPE, strategies, **lists)) == [
        "incremental",
        "generative, r 8",
        "generative, r 16",
    ]
    made = [
        dataclasses.replace(RECIPE, strategy="generative", **changes)
        for changes in (
            {},
            {"prior": "dirichlet", "prior_concentration": 5.0},
            {"conditional": False, "capacity": 7, "beta": 3.0, "sampling": "grasp"},
            {"prior_concentration": 5.0},
            {"distillation": 0.5, "distance": "js"},
        )
    ]
    assert sweep.labels_of([results_of_variant(each) for each in made]) == [
        "generative, distance mse, prior gaussian, conditional on, distillation 0",
        "generative, distance mse, prior dirichlet, conditional on, distillation 0",
        "generative, distance mse, prior gaussian, conditional off, distillation 0",
        "generative, distance mse, prior gaussian, conditional on, distillation 0",
        "generative, distance js, prior gaussian, conditional on, distillation 0.5",
    ]
    plain = [dataclasses.replace(RECIPE, **changes) for changes in ({}, {"prior": "dirichlet"})]
    assert sweep.labels_of([results_of_variant(each) for each in plain]) == ["rehearsal"] * 2


def test_settings_that_do_nothing_set_no_runs_apart() -> None:
    weak = dataclasses.replace(RECIPE, si_strength=7.0, locality=0.9)
    assert sweep.labels_of([results_of_variant(RECIPE), results_of_variant(weak)]) == [
        "rehearsal",
        "rehearsal",
    ]
    importances = [dataclasses.replace(each, strategy="si") for each in (RECIPE, weak)]
    assert len(set(sweep.labels_of([results_of_variant(each) for each in importances]))) == 2
    wide = dataclasses.replace(RECIPE, adapter_width=7)
    assert len(set(sweep.labels_of([results_of_variant(each) for each in (RECIPE, wide)]))) == 1
    adapters = [dataclasses.replace(each, strategy="adapter") for each in (RECIPE, wide)]
    assert sweep.labels_of([results_of_variant(each) for each in adapters]) == [
        "adapter, adapter width 16",
        "adapter, adapter width 7",
    ]


def test_a_run_of_a_version_that_lacked_a_setting_has_what_it_is_unless_given() -> None:
    now, then = results_of_variant(RECIPE), results_of_variant(RECIPE)
    for name in ("local_steps", "loss", "draws", "stores"):
        del then["config"][name]
    assert sweep.labels_of([now, then]) == ["rehearsal", "rehearsal"]
    assert len(groups_of([now, then])) == 1


def test_strategies_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="strategy='magic': there are incremental"):
        variants(RECIPE, ["magic"])
    with pytest.raises(ValueError, match="strategies: give at least one"):
        variants(RECIPE, [])


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({}, True),
        ({"seed": 3, "device": "cpu", "data_path": "here", "amp": "bfloat16"}, True),
        ({"capacity": 200}, True),
        ({"capacity": 201}, False),
        ({"strategy": "der"}, False),
        ({"seed": 3, "epochs": 2}, False),
    ],
)
def test_the_published_figure_goes_where_it_does_not_belong(
    changes: dict[str, Any], stays: bool
) -> None:
    changed = with_changes(RECIPE, **changes)
    assert (changed.published is not None) == stays
    assert changed == dataclasses.replace(RECIPE, **changes, published=changed.published)


def test_names_of_folders() -> None:
    assert folder_name("der++, capacity 0.2, seed 1") == "der++-capacity-0.2-seed-1"
    assert folder_name("mnist: ../der") == "mnist-..-der"


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        ("buzzega-mnist-sgd", "buzzega-mnist"),
        ("buzzega-mnist-der++-5120", "buzzega-mnist"),
        ("boschini-cifar100-er-ace-500", "boschini-cifar100"),
        ("vandeven-mnist-a-gem", "vandeven-mnist"),
        ("mnist", "mnist"),
        ("cifar10", "cifar10"),
    ],
)
def test_families_of_recipes(recipe: str, family: str) -> None:
    assert recipe in RECIPES
    assert sweep.family_of(recipe) == family


def test_means_over_seeds() -> None:
    made = variants(RECIPE, ["incremental", "rehearsal"], capacities=[100, 200], seeds=range(3))
    results = {label: results_of_variant(recipe) for label, recipe in made.items()}
    groups = groups_of(results.values())
    assert [group.label for group in groups] == [
        "incremental",
        "rehearsal, capacity 100",
        "rehearsal, capacity 200",
    ]
    group = groups[1]
    assert group.runs == tuple(results[f"rehearsal, capacity 100, seed {i}"] for i in range(3))
    assert (group.num_runs, group.seeds, group.capacity) == (3, [0, 1, 2], 100)
    for name in (
        "average_top1",
        "average_top5",
        "forgetting",
        "backward_transfer",
        "forward_transfer",
        "seconds",
    ):
        values = [run[name] for run in group.runs]
        found: Statistic = getattr(group, name)
        assert found.mean == pytest.approx(sum(values) / 3)
        assert found.std == pytest.approx(statistics.stdev(values))
    assert group.step_seconds == pytest.approx({"load": 1e-4, "wait": 2e-4, "train": 2e-3})


def test_one_run_has_no_deviation() -> None:
    [group] = groups_of([results_of("rehearsal")])
    assert group.average_top1.std is None
    assert group.average_top1.in_percent() == "92.7 %"
    assert Statistic(-0.123, None).in_percent("+") == "-12.3 %"
    assert Statistic(0.5, 0.012).in_percent("+") == "+50.0 ± 1.2 %"


def test_runs_without_a_buffer_are_alike_whatever_its_settings() -> None:
    runs = [
        results_of("incremental", config={"capacity": 1, "epochs": 1}, seed=1),
        results_of("incremental", config={"capacity": 2, "epochs": 1}, seed=2),
        results_of("incremental", config={"capacity": 2, "epochs": 3}, seed=2),
        results_of("incremental", config={"capacity": 2, "epochs": 3}, seed=2, world_size=1),
    ]
    groups = groups_of(runs)
    assert [(group.label, group.num_runs) for group in groups] == [
        ("incremental, 2 ranks, epochs 1", 2),
        ("incremental, 2 ranks, epochs 3", 1),
        ("incremental, 1 rank, epochs 3", 1),
    ]


def test_groups_that_no_label_tells_apart_are_numbered() -> None:
    old, new = results_of("rehearsal"), results_of("rehearsal", config={"capacity": 100, "x": 1})
    labels = [group.label for group in groups_of([old, new])]
    assert labels == ["rehearsal", "rehearsal (2)"]


def test_labels_of_several_recipes_and_of_all_kinds_of_values() -> None:
    runs = [
        results_of("rehearsal", config={"compile": True, "global_num_candidates": None, "lr": 0.1}),
        results_of("rehearsal", config={"compile": False, "global_num_candidates": 8, "lr": None}),
        results_of("rehearsal", recipe="mnist"),
    ]
    assert sweep.labels_of(runs) == [
        "digits: rehearsal, compile on, c all, lr 0.1",
        "digits: rehearsal, compile off, c 8, lr none",
        "mnist: rehearsal",
    ]
    assert sweep.labels_of(runs, ignored=["compile", "lr"])[0] == "digits: rehearsal, c all"


def test_a_schedule_that_is_stretched_is_named_by_its_epochs() -> None:
    short, long = (recipe_named("cifar10-frontier", epochs=epochs) for epochs in (6, 20))
    assert sweep.labels_of([results_of_variant(recipe) for recipe in (short, long)]) == [
        "rehearsal, epochs 6",
        "rehearsal, epochs 20",
    ]
    longer_warm_up = dataclasses.replace(long, warmup_epochs=9.0)
    assert sweep.labels_of([results_of_variant(recipe) for recipe in (long, longer_warm_up)]) == [
        "rehearsal, warmup epochs 3.33333",
        "rehearsal, warmup epochs 9",
    ]


@pytest.mark.parametrize(
    ("changes", "capacity"),
    [
        ({"config": {"capacity": 0.1}}, 30),
        ({"config": {"capacity": 0.1}, "buffer": {"capacity": 31}}, 31),
        ({"config": {"capacity": 40}, "buffer": {}}, 40),
    ],
)
def test_the_capacity_is_counted_in_representatives(changes: dict[str, Any], capacity: int) -> None:
    [group] = groups_of([results_of("rehearsal", **changes)])
    assert group.capacity == capacity
    [group] = groups_of([results_of("from-scratch", **changes)])
    assert group.capacity is None


def test_the_published_figure() -> None:
    def group_of(published: dict[str, Any] | None) -> sweep.Group:
        config = {"capacity": 100, "published": published}
        return groups_of([results_of("rehearsal", config=config)])[0]

    assert group_of(None).published_figure is None
    top1 = {"top1": 85.0, "spread": 1.5, "num_runs": 5, "source": "a paper", "top5": None}
    assert group_of(top1).published == Published(85.0, 1.5, 5, "a paper")
    assert group_of(top1).published_figure == Statistic(0.85, 0.015)
    only_top5 = top1 | {"top1": None, "top5": 92.0}
    assert group_of(only_top5).published_figure == Statistic(0.92, None)
    assert group_of(top1 | {"top1": None}).published_figure is None


def test_runs_are_measured_by_others_of_the_same_recipe_and_machines() -> None:
    def reference(**changes: Any) -> sweep.Group | None:
        groups = groups_of([results_of("rehearsal"), results_of("incremental", **changes)])
        return sweep.reference_for(groups[0], groups, "incremental")

    found = reference(seconds=3.0)
    assert found is not None
    assert found.seconds.mean == 3.0
    assert reference(recipe="digits-sgd") is not None
    assert reference(world_size=1) is None
    assert reference(recipe="mnist") is None
    assert reference(machine={"device": "a GPU"}) is None


def test_orders_of_classes_are_one_group_with_a_worst_one() -> None:
    made = variants(RECIPE, ["incremental", "rehearsal"], class_orders=[3, 5], seeds=[0, 1])
    assert list(made)[:2] == [
        "incremental, class order 3, seed 0",
        "incremental, class order 3, seed 1",
    ]
    assert len(made) == 8
    runs = [results_of_variant(each) for each in made.values()]
    for run in runs:
        run["average_top1"] = {3: 0.6, 5: 0.4}[run["config"]["class_order"]] + 0.1 * run["seed"]
    groups = groups_of(runs)
    assert [group.label for group in groups] == ["incremental", "rehearsal"]
    [_, group] = groups
    assert (group.seeds, group.class_orders, group.num_runs) == ([0, 1], [3, 5], 4)
    assert group.average_top1.mean == pytest.approx(0.55)
    assert group.worst is not None
    assert group.worst.mean == pytest.approx(0.45)
    assert group.worst.std == pytest.approx(statistics.stdev([0.4, 0.5]))


def test_an_order_that_is_given_is_not_one_that_a_number_draws() -> None:
    recipes = [with_changes(RECIPE, class_order=order) for order in (None, 7, "by-seed")]
    groups = groups_of(results_of_variant(each) for each in recipes)
    assert [group.label for group in groups] == [
        "rehearsal, class order none",
        "rehearsal, class order drawn",
        "rehearsal, class order by-seed",
    ]
    assert [group.class_orders for group in groups] == [[], [7], []]
    assert [group.worst for group in groups] == [None] * 3


def test_what_adds_figures_alone_keeps_the_published_one() -> None:
    assert with_changes(RECIPE, averaged=0.999, probe_every=50).published == RECIPE.published
    assert with_changes(RECIPE, holdout=0.1).published is None


def test_a_figure_that_a_run_lacks() -> None:
    [group] = groups_of([results_of("rehearsal", plasticity=0.9), results_of("rehearsal", seed=1)])
    assert group.figure("plasticity") is None
    [group] = groups_of([results_of("rehearsal", plasticity=0.9)])
    assert group.figure("plasticity") == Statistic(0.9, None)
