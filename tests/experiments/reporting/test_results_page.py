from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from synthetic_results import results_of, results_of_variant

from ritornello.experiments.recipes.recipe import Published, Recipe
from ritornello.experiments.reporting.results_page import page_of, write_results_page
from ritornello.experiments.results import reading as saved_results
from ritornello.experiments.results.groups import groups_of
from ritornello.experiments.training.variants import variants

RECIPE = Recipe(
    name="digits",
    description="8x8 digits, 5 tasks",
    data="digits",
    capacity=100,
    global_num_representatives=16,
    published=Published(top1=80.0, spread=1.4, num_runs=10, source="Somebody 2020, Table 2"),
)
STRATEGIES = ("incremental", "rehearsal", "from-scratch")


def runs_of(*strategies: str, recipe: Recipe = RECIPE, **lists: Any) -> list[dict[str, Any]]:
    return [results_of_variant(each) for each in variants(recipe, strategies, **lists).values()]


def rows_of(page: str, heading: str) -> list[list[str]]:
    section = page.split(f" {heading}\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_figures_stand_beside_the_published_ones() -> None:
    runs = runs_of(*STRATEGIES, capacities=[100, 0.5], seeds=range(3))
    header, ruler, *rows = rows_of(page_of(runs, "ritornello results runs"), "digits")
    assert header == [
        "strategy", "buffer", "ranks", "seeds", "top-1", "published", "difference (points)",
    ]  # fmt: skip
    assert ruler == ["---", *["---:"] * 6]
    assert [row[:4] for row in rows] == [
        ["incremental", "-", "2", "3"],
        ["rehearsal", "50 % of the data, r = 16", "2", "3"],
        ["rehearsal", "100, r = 16", "2", "3"],
        ["from-scratch", "-", "2", "3"],
    ]
    assert [row[5] for row in rows] == ["-", "-", "80.0 ± 1.4 (10 runs)", "-"]
    groups = {group.label: group for group in groups_of(runs)}
    ours = groups["rehearsal, capacity 100"].average
    assert rows[2][4] == ours.in_percent().removesuffix(" %")
    assert rows[2][6] == f"{100 * ours.mean - 80:+.1f}"


def test_what_is_generated_has_no_capacity() -> None:
    runs = runs_of("incremental", "generative")
    _, _, *rows = rows_of(page_of(runs, "ritornello results runs"), "digits")
    assert [row[:2] for row in rows] == [["incremental", "-"], ["generative", "none, r = 16"]]


def test_the_first_paragraph_says_how_the_page_is_made() -> None:
    page = page_of(runs_of("rehearsal"), "ritornello results docs/results.json")
    title, paragraph = page.split("\n\n")[:2]
    assert title == "# Results"
    assert paragraph.startswith(
        "This page is generated: `ritornello results docs/results.json` writes it"
    )
    assert "## digits\n\n8x8 digits, 5 tasks.\n" in page


def test_below_each_table_stands_where_it_comes_from() -> None:
    other = results_of_variant(
        dataclasses.replace(RECIPE, seed=7),
        command="ritornello run digits --seed 7",
        date="2026-02-03T04:05:06+00:00",
        machine={"device": "a GPU"},
    )
    runs = [*runs_of("rehearsal", seeds=[0, 1, 2]), other]
    page = page_of(runs, "any")
    assert (
        "```sh\nritornello compare digits --seeds 0 1 2\nritornello run digits --seed 7\n```"
        in page
    )
    assert "- Published: Somebody 2020, Table 2\n" in page
    assert "- Seeds: 0, 1, 2, 7\n" in page
    assert "- Machine: CPU, x86_64, 2 cores; a GPU\n" in page
    assert "- Versions: ritornello 0.1.0, torch 2.6\n" in page
    assert "- Date: 2026-01-02 to 2026-02-03\n" in page
    assert "- Seeds: 0 to 3\n" in page_of(runs_of("rehearsal", seeds=range(4)), "any")


def test_old_results_make_a_page_too() -> None:
    page = page_of([results_of("rehearsal")], "any")
    assert rows_of(page, "digits")[2][:4] == ["rehearsal", "100", "2", "1"]
    assert "The commands were not written down." in page
    assert "Published:" not in page
    assert "Accuracy against runtime" not in page


def test_only_top5_was_published() -> None:
    recipe = dataclasses.replace(RECIPE, published=Published(None, None, 1, "Somebody", 91.0))
    [row] = rows_of(page_of(runs_of("rehearsal", recipe=recipe), "any"), "digits")[2:]
    assert row[4:] == ["top-5: 100.0", "top-5: 91.0 (1 run)", "+9.0"]


def test_other_settings_that_vary_stand_in_the_first_column() -> None:
    rows = rows_of(page_of(runs_of("rehearsal", selections=["fifo", "reservoir"]), "any"), "digits")
    assert [row[0] for row in rows[2:]] == [
        "rehearsal, selection fifo",
        "rehearsal, selection reservoir",
    ]


def test_accuracy_and_runtime_are_related_to_both_ends() -> None:
    rows = rows_of(
        page_of([results_of(each) for each in STRATEGIES], "any"),
        "digits: accuracy against runtime",
    )
    assert rows[0] == ["strategy", "ranks", "% of from-scratch", "times incremental", "seconds"]
    assert rows[2:] == [
        ["incremental", "2", "34.0", "1.00", "10.0"],
        ["rehearsal", "2", "96.5", "1.25", "12.5"],
        ["from-scratch", "2", "100.0", "3.50", "35.0"],
    ]
    page = page_of([*runs_of(*STRATEGIES, seeds=[0, 1])], "any")
    assert all("±" in row[2] for row in rows_of(page, "digits: accuracy against runtime")[2:])


@pytest.mark.parametrize("strategies", [STRATEGIES[:2], STRATEGIES[1:]])
def test_with_one_end_alone_there_is_nothing_to_relate_to(strategies: tuple[str, ...]) -> None:
    assert "against runtime" not in page_of([results_of(each) for each in strategies], "any")


def test_several_recipes() -> None:
    other = dataclasses.replace(RECIPE, name="mnist", description="", published=None)
    page = page_of(runs_of("rehearsal", recipe=other) + runs_of(*STRATEGIES), "any")
    assert page.index("## digits") < page.index("## mnist") < page.index("### digits: accuracy")
    assert rows_of(page, "mnist")[2][0] == "rehearsal"
    assert "### mnist: accuracy" not in page


def test_recipes_of_one_family_share_a_table() -> None:
    def recipe(strategy: str, capacity: int, **changes: Any) -> Recipe:
        name, description = f"a-{strategy}-{capacity}", f"Split data: {strategy}"
        return dataclasses.replace(
            RECIPE, name=name, description=description, strategy=strategy, capacity=capacity,
            **changes,
        )  # fmt: skip

    runs = [
        *runs_of("er-ace", recipe=recipe("er-ace", 200)),
        *runs_of("der", recipe=recipe("der", 500), seeds=[0, 1], capacities=[500, 900]),
        *runs_of("incremental", "from-scratch", recipe=recipe("der", 500)),
    ]
    page = page_of(runs, "any")
    assert "## a\n\nSplit data.\n" in page
    header, _, *rows = rows_of(page, "a")
    assert header[:2] == ["recipe", "strategy"]
    assert [row[:5] for row in rows] == [
        ["a-der-500", "incremental", "-", "2", "1"],
        ["a-der-500", "der", "500, r = 16", "2", "2"],
        ["a-der-500", "der", "900, r = 16", "2", "2"],
        ["a-er-ace-200", "er-ace", "200, r = 16", "2", "1"],
        ["a-der-500", "from-scratch", "-", "2", "1"],
    ]
    frontier = rows_of(page, "a: accuracy against runtime")
    assert frontier[0][:2] == ["recipe", "strategy"]
    assert frontier[3][:2] == ["a-der-500", "der, capacity 500"]
    assert len(frontier) == 2 + 5


def test_an_archive_gives_the_same_page(tmp_path: Path) -> None:
    runs = runs_of(*STRATEGIES, capacities=[100, 0.5], seeds=range(3))
    write_results_page(runs, tmp_path / "deep" / "one.md", "any")
    random.Random(0).shuffle(runs)
    saved_results.archive(runs, tmp_path / "results.json")
    write_results_page(
        saved_results.find_results([tmp_path / "results.json"]), tmp_path / "other.md", "any"
    )
    assert (tmp_path / "deep" / "one.md").read_text() == (tmp_path / "other.md").read_text()


def test_averaged_weights_and_worst_orders_have_columns() -> None:
    runs = runs_of("incremental", "rehearsal", class_orders=[0, 1])
    runs[-1]["average_averaged_top1"] = runs[-2]["average_averaged_top1"] = 0.9
    page = page_of(runs, "")
    header, _, first, second = rows_of(page, "digits")
    assert header[-2:] == ["averaged weights", "worst order"]
    assert first[-2] == "-"
    assert second[-2] == "90.0 ± 0.0"
    worst = groups_of(runs)[1].worst
    assert worst is not None
    assert second[-1] == f"{100 * worst.mean:.1f}"
    assert "- Class orders: 0, 1" in page


def test_a_holdout_is_named() -> None:
    runs = runs_of("rehearsal", recipe=dataclasses.replace(RECIPE, holdout=0.2, published=None))
    assert "- Tested on: 20 % of the training samples, held out" in page_of(runs, "")
    assert "Tested on" not in page_of(runs_of("rehearsal"), "")
