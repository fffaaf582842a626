from __future__ import annotations

import base64
import dataclasses
import io
import re
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from synthetic_results import probed, results_of, results_of_variant

from ritornello.experiments.recipes.recipe import Published, Recipe
from ritornello.experiments.reporting import (
    colours,
    figures,
    generated,
    report,
    stream,
    summaries,
    trade_offs,
)
from ritornello.experiments.results.groups import Group, groups_of
from ritornello.experiments.results.writing import Results
from ritornello.experiments.training.variants import variants

COMPARISON = ("incremental", "rehearsal", "from-scratch")
RECIPE = Recipe(
    name="digits",
    description="digits",
    data="digits",
    capacity=100,
    published=Published(top1=85.6, spread=1.4, num_runs=10, source="Somebody <et al.>, Table 2"),
)


@pytest.fixture
def comparison() -> list[Group]:
    return groups_of(results_of(name) for name in COMPARISON)


def sweep(*strategies: str, **lists: Any) -> list[Group]:
    made = variants(RECIPE, strategies, **lists)
    return groups_of(map(results_of_variant, made.values()))


def page_of(groups: Sequence[Group], folder: Path) -> str:
    path = folder / "deep" / "report.html"
    report.write_report(groups, path)
    return path.read_text()


def lines_of(groups: Sequence[Group], width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report.table_of(groups, width))
    return console.export_text().splitlines()


def drawn(drawing: figures.Drawing | None) -> Any:
    assert drawing is not None
    axes = Figure(figsize=drawing[0], layout="constrained").add_subplot()
    drawing[1](axes)
    return axes


def names_in_legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.figure.legends[0].get_texts()]


def cells_of(page: str, label: str, number: int = 0) -> list[str]:
    """Of a row of the report's first table, or of the second one."""
    rows = re.findall(r"<tr[^>]*>(?:(?!</tr>).)*</tr>", page.replace("\u00a0", " "))
    found = [row for row in rows if f">{label}</th>" in row]
    return re.findall(r"<td>([^<]*)</td>", found[number])


def test_the_page_is_complete_and_self_contained(comparison: list[Group], tmp_path: Path) -> None:
    page = page_of(comparison, tmp_path)
    assert page.count("<svg ") == 2 + 2 * 3
    assert page.count('<svg role="img" aria-label=') == 8
    assert not re.search(r"<script|<link|@import|<img", page)
    assert "32.7 %" in page  # incremental: (0 + 0 + 98) / 3
    assert "&lt;0&gt;" in page
    assert "<0>" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {each[1:] for each in re.findall(r'href="(#[^"]+)"', page)} <= set(ids)
    assert "seeds</th>" not in page
    assert "published</th>" not in page
    assert "size of the buffer" not in page
    assert len(page) < 200_000


def test_the_summary_says_what_happened(comparison: list[Group]) -> None:
    summary = summaries.summary_of(comparison)
    assert "ends at 32.7 % over all tasks: it has lost 98.0 points on the earlier" in summary
    assert "rehearsal from 100 representatives (33.3 % of the data) it ends at 92.7 %" in summary
    assert "in 1.2 times the time" in summary
    assert "at every task reaches 96.0 %, in 3.5 times the time." in summary


def test_the_summary_of_several_seeds_and_settings() -> None:
    found = sweep("incremental", "rehearsal", "joint", capacities=[30, 0.5], seeds=[0, 1])
    summary, groups = summaries.summary_of(found), {group.label: group for group in found}
    best = groups["rehearsal, capacity 0.5"]
    assert best.average.mean > groups["rehearsal, capacity 30"].average.mean
    assert (
        f"With rehearsal from 150 representatives (50.0 % of the data) it ends at "
        f"{best.average.in_percent()}, the best of 2 settings (rehearsal, capacity 0.5), in "
        in summary
    )
    assert f"at once reaches {groups['joint'].average.in_percent()}" in summary
    assert summary.endswith(". (Means of 2 seeds, ± the sample standard deviation.)")


def test_a_buffer_larger_than_the_data_and_a_run_without_time(tmp_path: Path) -> None:
    large = {"config": {"capacity": 500}}
    groups = groups_of([results_of("incremental", seconds=0.0), results_of("rehearsal", **large)])
    summary = summaries.summary_of(groups)
    assert "from 500 representatives (room for all the data) it ends at" in summary
    assert "training time (s)" in page_of(groups, tmp_path)


def test_the_summary_of_several_recipes() -> None:
    groups = groups_of([results_of("rehearsal"), results_of("rehearsal", recipe="mnist")])
    text = (
        "With rehearsal from 100 representatives (33.3 % of the data) the model ends at 92.7 % over "
        "all tasks."
    )
    assert summaries.summary_of(groups) == f"digits: {text} mnist: {text}"


def test_the_finding_is_one_sentence() -> None:
    def finding(groups: Sequence[Group]) -> str:
        [text] = summaries.findings_of(groups).values()
        return text

    def finding_of(*runs: Results) -> str:
        return finding(groups_of(runs))

    incremental, rehearsal = results_of("incremental"), results_of("rehearsal")
    start = "With rehearsal from 100 representatives (33.3 % of the data) the model ends at 92.7 %"
    assert finding_of(incremental, rehearsal, results_of("from-scratch")) == (
        f"{start} over all tasks; trained on new data alone it ends at 32.7 %, retrained on "
        "everything at 96.0 %."
    )
    assert finding_of(rehearsal, incremental, results_of("joint")).endswith(
        "at 32.7 %, trained once on everything at 99.3 %."
    )
    assert finding_of(rehearsal) == f"{start} over all tasks."
    assert finding_of(incremental).startswith("Trained on new data alone, the model ends at 32.7 %")
    several = finding(sweep("incremental", "rehearsal", "der", capacities=[30, 0.5], seeds=[0, 1]))
    assert re.match(
        r"With \w+ \(capacity 0.5\) from 150 .*, the best of 4 with a buffer, ", several
    )
    assert several.endswith("(Means of 2 seeds, ± the sample standard deviation.)")


def test_no_line_ends_within_a_figure(tmp_path: Path) -> None:
    page = page_of(sweep("incremental", "rehearsal", seeds=[0, 1]), tmp_path)
    [lead] = re.findall(r'<p class="lead">(.*?)</p>', page)
    assert re.search(r"\d\.\d\u00a0±\u00a0\d\.\d\u00a0% over all", lead)
    assert "(33.3\u00a0% of the data)" in lead


def test_the_last_of_one_task_has_forgotten_nothing(tmp_path: Path) -> None:
    one = {"top1": [[0.98]], "top5": [[1.0]], "forgetting": 0.0, "average_top1": 0.98}
    groups = groups_of(results_of(name, **one) for name in ("incremental", "rehearsal"))
    assert "ends at 98.0 % over all tasks. With rehearsal" in summaries.summary_of(groups)
    page = page_of(groups, tmp_path)
    assert cells_of(page, "rehearsal")[1] == "-"
    assert page.count("<svg ") == 1  # Accuracy against training time.
    assert "Accuracy matrix" not in page


def test_what_was_learnt_at_the_end_cannot_be_forgotten(tmp_path: Path) -> None:
    page = page_of(groups_of([results_of("joint", steps_per_task=[0, 0, 9])]), tmp_path)
    assert cells_of(page, "joint") == ["99.3 %", "-", "11.0 s", "100.0 %", "-", "-"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.94, "8.9 s"), (99.9, "99.9 s"), (750, "12.5 min"), (136_235, "37.8 h"), (4e6, "1,111.1 h")],
)
def test_durations_are_in_the_unit_that_a_reader_would_choose(seconds: float, text: str) -> None:
    assert summaries.duration(seconds) == text


def test_the_table(comparison: list[Group]) -> None:
    lines = lines_of(comparison)
    assert len(lines) == 4
    assert "12.5 s (1.2x)" in lines[2]
    assert "0.10/0.20/2.00 ms" in lines[2]


def test_the_table_of_several_seeds_has_means_and_deviations() -> None:
    groups = sweep("incremental", "rehearsal", seeds=range(3))
    [_, group] = groups
    header, _, row = lines_of(groups, 100)
    assert header.split()[:2] == ["strategy", "seeds"]
    assert row.split()[:2] == ["rehearsal", "3"]
    assert re.search(r" \d\d\.\d ± \d\.\d % ", row)
    assert group.average.in_percent() in row
    assert row.rstrip().endswith("85.6 ± 1.4 %")


def test_long_labels_fit_the_terminal() -> None:
    groups = sweep(
        "rehearsal", capacities=[10, 20], representatives=[1, 2], selections=["fifo", "reservoir"],
        samplings=["uniform", "grasp"], seeds=[0, 1],
    )  # fmt: skip
    for width in (60, 80, 120):
        lines = lines_of(groups, width)
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines)


def test_a_narrow_terminal_does_without_some_columns() -> None:
    groups = sweep("incremental", "rehearsal", seeds=[0, 1], capacities=[100, 200])
    headers = {width: lines_of(groups, width)[0] for width in (70, 80, 100, 140)}
    assert "step" in headers[140]
    assert "top-5" in headers[100]
    assert "step" not in headers[100]
    assert "seeds" in headers[100]
    assert "top-5" not in headers[80]
    for header in headers.values():
        assert re.search("avg top-1 .*forgetting .*runtime .*published", header)


def test_the_published_figure_stands_in_the_row_that_reproduces_it(tmp_path: Path) -> None:
    groups = sweep("incremental", "rehearsal", capacities=[100, 200])
    page = page_of(groups, tmp_path)
    assert page.count(">85.6 ± 1.4 %</td>") == 1
    assert "85.6 ± 1.4 %" in cells_of(page, "rehearsal, capacity 100")
    assert "<dt>Published</dt><dd>Somebody &lt;et al.&gt;, Table 2</dd>" in page
    assert "seeds</th>" not in page


def test_only_top5_was_published(tmp_path: Path) -> None:
    top5 = dataclasses.replace(RECIPE, published=Published(None, None, None, "Somebody", 91.0))
    assert ">top-5 91.0 %</td>" in page_of(groups_of([results_of_variant(top5)]), tmp_path)


def test_a_page_of_many_groups_folds_their_plots(tmp_path: Path) -> None:
    groups = sweep(*COMPARISON, capacities=[10, 20, 40, 80], representatives=[8, 16], seeds=[0, 1])
    page = page_of(groups, tmp_path)
    assert page.count("<svg ") == 4 + 2 * 10  # Per group, not per run.
    assert page.count("<summary>10 plots</summary>") == 2
    assert "seeds</th>" in page
    assert "2 ranks, 2 seeds" in page
    assert "ritornello compare digits --seeds 0 1 2" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_results_of_before_there_were_commands_make_a_page(tmp_path: Path) -> None:
    page = page_of(groups_of([results_of("rehearsal")]), tmp_path)
    assert page.count("<svg ") == 1 + 2
    assert "2 ranks, seed 0" in page
    assert "<dt>Command</dt><dd>not written down</dd>" in page


def test_lines_have_bands_of_one_deviation() -> None:
    groups = sweep("rehearsal", seeds=range(4))
    axes = drawn(figures.average_over_time(groups))
    ends = 100 * np.array([run["average_top1"] for run in groups[0].runs])
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(ends.mean())
    band = axes.collections[0].get_paths()[0].vertices
    at_the_end = band[np.isclose(band[:, 0], 3), 1]
    assert at_the_end.max() == pytest.approx(ends.mean() + ends.std(ddof=1))
    assert at_the_end.min() == pytest.approx(ends.mean() - ends.std(ddof=1))


def test_tasks_have_their_names_where_all_seeds_agree() -> None:
    def names(*runs: dict[str, Any]) -> list[str]:
        [group] = groups_of(runs)
        return names_in_legend(drawn(figures.tasks_over_time(group)))

    other = results_of("rehearsal", seed=1)
    other["tasks"] = other["tasks"][::-1]
    assert names(results_of("rehearsal")) == ["<0>", "<1>", "<2>"]
    assert names(results_of("rehearsal"), other) == ["task 1", "task 2", "task 3"]
    other["tasks"][0]["name"] = "_background_"  # matplotlib would leave it out
    assert names(other) == [" _background_", "<1>", "<0>"]


def test_bars_of_step_times_are_means(tmp_path: Path) -> None:
    waits = [2e-4, 6e-4]
    runs = [
        results_of("rehearsal", seed=seed, step_seconds={"load": 1e-4, "wait": wait, "train": 2e-3})
        for seed, wait in enumerate(waits)
    ]
    runs.append(results_of("incremental", step_seconds={"load": 0.0, "wait": 0.0, "train": 5e-3}))
    page = page_of(groups_of(runs), tmp_path)
    assert cells_of(page, "rehearsal", 1) == ["0.10", "0.40", "2.00", "2.50"]
    widths = re.findall(r'<i class="(\w+)" style="width:([\d.]+)%">', page)
    assert widths == [
        ("load", "2.0"), ("wait", "8.0"), ("train", "40.0"),
        ("load", "0.0"), ("wait", "0.0"), ("train", "100.0"),
    ]  # fmt: skip


def test_long_names_in_a_legend_take_several_lines() -> None:
    def names(length: int, count: int) -> list[str]:
        return ["n" * length + f" {number}" for number in range(count)]

    one_row = figures.legend_inches(names(3, 5))
    assert figures.legend_inches(names(3, 3)) == one_row
    assert figures.legend_inches(names(3, 10)) > one_row
    assert figures.legend_inches(names(40, 5)) > figures.legend_inches(names(20, 5)) > one_row
    assert figures.legend_inches(["word " * 40]) > figures.legend_inches(["word"])


def test_more_tasks_than_numbers_have_room_make_a_scale() -> None:
    def axes_of(num_tasks: int) -> Any:
        matrix = np.tril(np.ones((num_tasks, num_tasks))).tolist()
        [group] = groups_of([results_of("rehearsal", top1=matrix)])
        return drawn(figures.heat_map(group))

    assert len(axes_of(12).texts) == 144
    axes = axes_of(13)
    assert not axes.texts
    assert [each.get_ylabel() for each in axes.figure.axes] == ["after task", "%"]


def test_accuracy_against_the_size_of_the_buffer() -> None:
    groups = sweep(*COMPARISON, capacities=[0.1, 60, 200], representatives=[8, 16], seeds=[0, 1])
    axes = drawn(trade_offs.accuracy_by_capacity(groups))
    assert axes.get_xscale() == "log"
    lines = [container for container in axes.containers if container.get_label()]
    assert [line.get_label() for line in lines] == ["rehearsal, r 8", "rehearsal, r 16"]
    assert list(lines[0].lines[0].get_xdata()) == [30, 60, 200]
    accuracies = {group.label: 100 * group.average.mean for group in groups}
    assert list(lines[0].lines[0].get_ydata()) == pytest.approx(
        [accuracies[f"rehearsal, capacity {size}, r 8"] for size in ("0.1", "60", "200")]
    )
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    for strategy in ("incremental", "from-scratch"):
        assert levels[strategy] == pytest.approx(accuracies[strategy])


def test_recipes_of_one_family_make_lines_of_their_strategies() -> None:
    def of(strategy: str, capacity: int, **changes: Any) -> Results:
        name = f"a-{strategy}-{capacity}"
        recipe = dataclasses.replace(
            RECIPE, name=name, strategy=strategy, capacity=capacity, **changes
        )
        return results_of_variant(recipe)

    groups = groups_of(
        [
            of("der", 200, learning_rate=0.1),
            of("der", 500, learning_rate=0.2),
            of("er-ace", 500),
        ]
    )
    axes = drawn(trade_offs.accuracy_by_capacity(groups))
    assert [line.get_label() for line in axes.containers] == ["der", "er-ace"]
    assert list(axes.containers[0].lines[0].get_xdata()) == [200, 500]
    assert summaries.summary_of(groups).count("With ") == 2


@pytest.mark.parametrize(
    "lists", [{"representatives": [8, 16]}, {"capacities": [100]}, {"seeds": [0, 1]}]
)
def test_one_size_of_the_buffer_makes_no_picture(lists: dict[str, Any]) -> None:
    assert trade_offs.accuracy_by_capacity(sweep(*COMPARISON, **lists)) is None


def test_sizes_that_are_close_have_no_texts_over_each_other() -> None:
    groups = sweep("rehearsal", capacities=[10, 11, 100, 1000])
    axes = drawn(trade_offs.accuracy_by_capacity(groups))
    assert list(axes.get_xticks()) == [10, 100, 1000]
    assert axes.xaxis.get_major_formatter()(1000) == "1,000"


def test_accuracy_against_runtime(comparison: list[Group]) -> None:
    axes = drawn(trade_offs.accuracy_by_runtime(comparison))
    assert axes.get_xlabel() == "training time (multiples of incremental training)"
    points = [container.lines[0] for container in axes.containers]
    assert [point.get_xdata()[0] for point in points] == pytest.approx([1.0, 1.25, 3.5])
    assert [point.get_ydata()[0] for point in points] == pytest.approx([32.67, 92.67, 96], abs=0.01)
    assert [text.get_text() for text in axes.texts] == list(COMPARISON)


def test_without_incremental_training_runtimes_are_in_seconds() -> None:
    groups = groups_of([results_of("rehearsal"), results_of("from-scratch")])
    axes = drawn(trade_offs.accuracy_by_runtime(groups))
    assert axes.get_xlabel() == "training time (s)"
    assert axes.containers[1].lines[0].get_xdata()[0] == 35.0
    assert trade_offs.accuracy_by_runtime(groups[:1]) is None


def test_closeness_against_runtime() -> None:
    groups = sweep(*COMPARISON, compositions=["append", "proportional"], representatives=[0, 8, 32])
    axes = drawn(trade_offs.closeness_by_runtime(groups))
    assert axes.get_ylabel() == "average top-1 (% of from scratch)"
    lines = {line.get_label(): line for line in axes.lines[:-1]}
    assert list(lines) == [
        "incremental", "rehearsal, append", "rehearsal, proportional", "from-scratch",
    ]  # fmt: skip
    assert list(lines["incremental"].get_xdata()) == [1.0]
    assert list(lines["from-scratch"].get_ydata()) == [100.0]
    assert len(lines["rehearsal, append"].get_xdata()) == 2
    best = next(each for each in groups if each.strategy == "from-scratch").average.mean
    of = {group.label: group.average.mean for group in groups}
    assert list(lines["rehearsal, proportional"].get_ydata()) == pytest.approx(
        [100 * of[f"rehearsal, proportional, r {r}"] / best for r in (0, 8, 32)]
    )
    b = groups[0].first["config"]["global_batch_size"]
    assert [text.get_text() for text in axes.texts] == [
        str(Fraction(r, b)) for r in (8, 32, 0, 8, 32)
    ]


@pytest.mark.parametrize(
    ("strategies", "lists"),
    [
        (("incremental", "rehearsal"), {"representatives": [8, 16]}),
        (("rehearsal", "from-scratch"), {"representatives": [8, 16]}),
        (COMPARISON, {"capacities": [100, 200]}),
    ],
)
def test_closeness_needs_both_ends_and_several_prices(
    strategies: Sequence[str], lists: dict[str, Any]
) -> None:
    assert trade_offs.closeness_by_runtime(sweep(*strategies, **lists)) is None


def test_names_of_points_do_not_overlap() -> None:
    groups = sweep(*COMPARISON, capacities=[100, 102, 104, 106])
    axes = drawn(trade_offs.accuracy_by_runtime(groups))
    axes.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 6
    for number, box in enumerate(boxes):
        assert not any(box.shrunk(0.95, 0.8).overlaps(other) for other in boxes[:number])


def test_many_points_are_named_in_a_legend() -> None:
    groups = sweep(*COMPARISON, capacities=range(10, 20))
    axes = drawn(trade_offs.accuracy_by_runtime(groups))
    assert not axes.texts
    assert len(names_in_legend(axes)) == 12


def test_a_strategy_has_its_colour_where_it_appears_once() -> None:
    groups = sweep(*COMPARISON, capacities=range(10, 14))
    found = figures.colours_of(groups)
    assert found[0] == colours.COLOURS["incremental"]
    assert found[-1] == colours.COLOURS["from-scratch"]
    assert len(set(found)) == 6


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    matrix = [[0.98, None, None], [0.9, 0.98, None], [None, 0.9, 0.98]]
    [group] = groups_of(results_of("rehearsal", top1=matrix, seed=seed) for seed in range(2))
    page_of([group], tmp_path)
    texts = [text.get_text() for text in drawn(figures.heat_map(group)).texts]
    assert texts == ["98", "-", "-", "90", "98", "-", "-", "90", "98"]
    [line, *_] = drawn(figures.tasks_over_time(group)).lines
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True]
    [average] = drawn(figures.average_over_time([group])).lines
    assert average.get_ydata() == pytest.approx([98, 94, 94])


def test_the_table_of_tasks() -> None:
    matrix = [[0.98, None, None], [0.9, 0.98, 0.1], [None, 0.9, 0.98]]
    table = report.table_of_tasks(results_of("rehearsal", top1=matrix), num_tasks=2)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines == [
        ["task", "test", "images", "before", "after"],
        ["<1>", "10", "98.0", "%", "90.0", "%"],
        ["<2>", "10", "10.0", "%", "98.0", "%"],
    ]


def test_what_probes_have_seen_is_told_and_drawn(tmp_path: Path) -> None:
    groups = groups_of([probed(results_of(name)) for name in COMPARISON])
    page = page_of(groups, tmp_path)
    assert page.count("<svg ") == 3 + 3 * 3
    assert "During the stream" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    cells = cells_of(page, "rehearsal", 2)
    gap = 0.5 * (0.98 + 0.9) / 2  # from .98 to .45, from .94 to .45, and back to .9
    assert cells[1] == f"{100 * groups[1].first['stability_gap']:.1f} %"
    assert groups[1].first["stability_gap"] == pytest.approx(0.45, abs=gap)
    assert cells[4:] == ["91.0 %", "98.0 %"]
    header, *_ = lines_of(groups, 120)
    assert header.split()[-5:-1] == ["anytime", "gap", "runtime", "step:"]


def test_the_curves_of_probes() -> None:
    [group] = groups_of([probed(results_of("rehearsal"))])
    axes = drawn(stream.average_over_stream([group]))
    x, y = axes.lines[0].get_data()
    assert x.tolist() == pytest.approx([each / 3 for each in range(1, 10)])
    assert y.tolist()[:3] == pytest.approx([49.0, 73.5, 98.0])
    axes = drawn(stream.tasks_over_steps(group))
    assert names_in_legend(axes) == list(stream.LINES)
    average, lowest, newest = (line.get_data() for line in axes.lines[:3])
    assert average[0].tolist() == [3.0 * each for each in range(1, 10)]
    assert np.isnan(lowest[1][:3]).all()
    assert lowest[1][-1] == pytest.approx(90.0)
    assert np.isnan(newest[1][[3, 7]]).all()  # where the newest task becomes another one


def test_runs_with_other_numbers_of_steps_are_drawn_together() -> None:
    runs = [probed(results_of("rehearsal", seed=seed)) for seed in (0, 1)]
    runs[1]["steps_per_task"] = [18] * 3
    runs[1]["probes"] = [{**each, "step": 2 * each["step"]} for each in runs[1]["probes"]]
    [group] = groups_of(runs)
    axes = drawn(stream.average_over_stream([group]))
    assert axes.lines[0].get_data()[1].tolist()[:3] == pytest.approx([49.0, 73.5, 98.0])


def test_nothing_is_drawn_where_nothing_was_probed(comparison: list[Group]) -> None:
    assert stream.average_over_stream(comparison) is None


def test_averaged_weights_stand_beside_the_raw_ones(tmp_path: Path) -> None:
    groups = groups_of(
        [results_of("incremental"), results_of("rehearsal", average_averaged_top1=0.95)]
    )
    assert cells_of(page_of(groups, tmp_path), "rehearsal")[:2] == ["92.7 %", "95.0 %"]
    header, first, second = lines_of(groups)[:1] + lines_of(groups)[-2:]
    assert "averaged" in header
    assert first.split()[3] == "-"
    assert "95.0 %" in second


def test_losses_stand_beside_accuracies(tmp_path: Path) -> None:
    measured = {"average_loss": 0.25, "forgetting_in_loss": 0.125}
    runs = [results_of("rehearsal", seed=seed, **measured) for seed in (0, 1)]
    groups = groups_of([results_of("incremental"), *runs])  # of an earlier release; of now
    page = page_of(groups, tmp_path)
    assert "forgetting in loss</th>" in page
    assert cells_of(page, "rehearsal")[-3:-1] == ["0.250 ± 0.000", "0.125 ± 0.000"]
    assert cells_of(page, "incremental")[-3:-1] == ["-", "-"]
    (one,) = groups_of([results_of("rehearsal", **measured)])
    assert cells_of(page_of([one], tmp_path), "rehearsal")[-2:] == ["0.250", "0.125"]
    assert "forgetting in loss" not in page_of(groups_of([results_of("incremental")]), tmp_path)


def test_orders_of_classes_have_a_mean_and_a_worst(tmp_path: Path) -> None:
    groups = sweep("incremental", "rehearsal", class_orders=[0, 1, 2], seeds=[0, 1])
    page = page_of(groups, tmp_path)
    assert groups[1].worst is not None
    cells = cells_of(page, "rehearsal")
    assert cells[1] == groups[1].worst.in_percent()
    assert cells[-2:] == ["2", "3"]
    assert "over the seeds and the orders of classes" in page
    assert "worst order" in lines_of(groups, 120)[0]
    assert summaries.summary_of(groups).endswith(
        "(Means of 6 runs, over orders of classes, ± the sample standard deviation.)"
    )


def test_it_is_said_what_was_tested_on_and_what_settings_were_chosen_by(tmp_path: Path) -> None:
    assert "on the test samples." in page_of(sweep("rehearsal"), tmp_path)
    recipe = dataclasses.replace(RECIPE, holdout=0.1, tuned_on="a holdout", published=None)
    groups = groups_of([results_of_variant(recipe)])
    page = page_of(groups, tmp_path).replace("\u00a0", " ")
    assert "on 10 % of the training samples, held out." in page
    assert "<dt>Tested on</dt><dd>10 % of the training samples, held out</dd>" in page
    assert "<dt>Settings chosen by</dt><dd>a holdout</dd>" in page


def generating(labels: list[int] | None, seed: int = 0) -> Results:
    """A run whose generator makes six images, number i of brightness 40 i."""
    images = np.repeat(np.arange(0, 240, 40, dtype=np.uint8), 9).reshape(6, 1, 3, 3)
    return results_of(
        "generative",
        0.7,
        seed=seed,
        class_names=["a", "<b>", "c"],
        generated={
            "shape": list(images.shape),
            "labels": labels,
            "pixels": base64.b64encode(zlib.compress(images.tobytes())).decode(),
        },
    )


def test_what_a_generator_makes_is_shown_class_by_class(tmp_path: Path) -> None:
    runs = [generating([0, 0, 1, 1, 2, 2], seed) for seed in (0, 1)]
    groups = groups_of([results_of("incremental"), *runs])
    [(label, strips)] = generated.strips_of(groups)
    assert label == "generative"
    assert [name for name, _ in strips] == ["a", "<b>", "c"]
    text = page_of(groups, tmp_path)
    assert 'id="generated"' in text
    assert text.count('alt="generated images') == 3
    assert 'alt="generated images of &lt;b&gt;"' in text
    source = re.findall(r"base64,([^\"]+)", str(strips[1][1]))[0]
    pixels = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source))))
    assert pixels.shape[:2] == (3, 7)
    assert pixels[:, :, 0].tolist() == [[80, 80, 80, 0, 120, 120, 120]] * 3
    assert 'id="generated"' not in page_of(groups_of([results_of("incremental")]), tmp_path)


def test_what_a_generator_makes_that_knows_no_class(tmp_path: Path) -> None:
    [(_, strips)] = generated.strips_of(groups_of([generating(None)]))
    assert [name for name, _ in strips] == [""] * 5
    assert "generated images" in page_of(groups_of([generating(None)]), tmp_path)


def test_a_strategy_that_generates_is_in_the_summary() -> None:
    groups = groups_of([results_of("incremental"), generating(None)])
    text = summaries.summary_of(groups)
    assert "With generative it ends at 79.3 %, in 1.2 times the time." in text
    assert "representatives" not in text
