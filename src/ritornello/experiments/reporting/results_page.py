"""The page of results: what recipes reach here, beside what was published."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from ritornello.experiments.recipes.published import family_of
from ritornello.experiments.reporting.provenance import commands_of, origin_of
from ritornello.experiments.reporting.summaries import families_of, times_incremental
from ritornello.experiments.results.groups import (
    Group,
    Statistic,
    groups_of,
    parts_of,
    reference_for,
)
from ritornello.experiments.results.labels import WITHOUT_BUFFER, WITHOUT_PAST, labels_of
from ritornello.experiments.results.measures import common_measure
from ritornello.experiments.results.writing import Results

HAVE_COLUMNS = ("seed", "capacity", "global_num_representatives", "world_size")
"""Settings with a column of their own: the first column does not name them."""

NOTHING = "-"


def write_results_page(runs: Sequence[Results], path: Path, command: str) -> None:
    """Writes the page, in Markdown.

    Args:
        runs: of any recipes, from ``reading.find_results``.
        path: of the file; its folder is made if need be.
        command: what writes the page, as its first paragraph says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_of(runs, command))


def page_of(runs: Sequence[Results], command: str) -> str:
    """The page's text. It depends on the runs alone, not on their order or the time of day."""
    families = families_of(groups_of(_sorted(runs)))
    parts = [
        "# Results",
        f"This page is generated: `{command}` writes it from saved results. Accuracies are means "
        "over all tasks after the last one, in percent, ± the sample standard deviation over the "
        "seeds; errors are the same, as they are, and of them lower is better.",
    ]
    for family, groups in families.items():
        parts += [f"## {family}", *_section(groups)]
    frontiers = {family: _frontier(groups) for family, groups in families.items()}
    if any(frontiers.values()):
        parts += [
            "## Accuracy against runtime",
            "Accuracy (or error) in percent of what training from scratch reaches, and training "
            "time in multiples of what incremental training takes on the same machine. Where "
            "something else ran beside some of the runs, these took longer.",
        ]
    for family, table in frontiers.items():
        if table:
            noun = families[family][0].measure.noun
            parts += [f"### {family}: {noun} against runtime", table]
    return "\n\n".join(parts) + "\n"


def _sorted(runs: Iterable[Results]) -> list[Results]:
    """The runs by family; within it by what a reader looks for first."""

    def place(run: Results) -> tuple[Any, ...]:
        config, strategy = run["config"], run["strategy"]
        return (
            family_of(run["recipe"]),
            {"incremental": 0, "from-scratch": 2, "joint": 3}.get(strategy, 1),
            strategy,
            run["world_size"],
            config.get("capacity", 0),
            run["recipe"],
            config.get("global_num_representatives", 0),
            run["seed"],
            run["date"],
        )

    return sorted(runs, key=place)


def _section(groups: Sequence[Group]) -> list[str]:
    """The description, the table, and where its figures come from."""
    several_recipes = len({group.recipe for group in groups}) > 1
    measure = common_measure(group.first for group in groups)
    header = ["strategy", "buffer", "ranks", "seeds", measure.header]
    further: dict[str, list[Statistic | None]] = {}
    if measure.lower_is_better:
        further |= {
            f"{part} error": [group.average_of_part(part) for group in groups]
            for part in parts_of(groups)
        }
        further["forgetting"] = [
            group.forgetting if _learns_in_time(group) else None for group in groups
        ]
    else:
        header += ["published", "difference (points)"]
    averaged = f"average_averaged_{measure.name}"
    further |= {
        header: figures
        for header, figures in (
            ("averaged weights", [group.figure(averaged) for group in groups]),
            ("worst order", [group.worst for group in groups]),
        )
        if any(figures)
    }
    header += further
    if several_recipes:
        header.insert(0, "recipe")
    rows = []
    for number, (label, group) in enumerate(
        zip(_labels(groups, HAVE_COLUMNS), groups, strict=True)
    ):
        ours, theirs = _ours(group), group.published_figure
        rows.append(
            [
                *([group.recipe] if several_recipes else []),
                label,
                _buffer(group),
                str(group.first["world_size"]),
                str(group.num_runs),
                _percent(group, ours),
                *([] if measure.lower_is_better else _beside_published(group, ours, theirs)),
                *(_cell(group, figures[number]) for figures in further.values()),
            ]
        )
    description = str(groups[0].first["config"].get("description", ""))
    if several_recipes:
        description = description.partition(":")[0]  # What follows is the strategy's.
    return [
        *([_sentence(description)] if description else []),
        _table(header, rows, num_left=2 if several_recipes else 1),
        _commands(groups),
        _origin(groups),
    ]


def _beside_published(group: Group, ours: Statistic, theirs: Statistic | None) -> list[str]:
    """The published figure, and how far ours is above it."""
    if theirs is None:
        return [NOTHING, NOTHING]
    published = _percent(group, theirs) + _num_published(group)
    return [published, f"{100 * (ours.mean - theirs.mean):+.1f}"]


def _learns_in_time(group: Group) -> bool:
    """Whether tasks were learnt when they came, so that they can be forgotten.

    An archive does not tell the steps of each task, but leaves out what then has no meaning.
    """
    return group.figure("error_when_learnt") is not None


def _labels(groups: Sequence[Group], ignored: Collection[str]) -> list[str]:
    """What tells the groups of one recipe apart; recipes have a column of their own."""
    labels: dict[str, str] = {}
    for recipe in {group.recipe for group in groups}:
        alike = [group for group in groups if group.recipe == recipe]
        found = labels_of([group.in_common for group in alike], ignored)
        labels |= {group.label: label for group, label in zip(alike, found, strict=True)}
    return [labels[group.label] for group in groups]


def _ours(group: Group) -> Statistic:
    """What there is to compare with the published figure."""
    published = group.published
    only_top5 = published is not None and published.top1 is None
    return group.average_top5 if only_top5 else group.average


def _percent(group: Group, figure: Statistic) -> str:
    published = group.published
    only_top5 = published is not None and published.top1 is None
    return ("top-5: " if only_top5 else "") + _cell(group, figure)


def _cell(group: Group, figure: Statistic | None) -> str:
    return group.text(figure).removesuffix(" %")


def _num_published(group: Group) -> str:
    published = group.published
    if published is None or published.num_runs is None:
        return ""
    return f" ({published.num_runs} run{'s' if published.num_runs > 1 else ''})"


def _buffer(group: Group) -> str:
    """The capacity and the representatives per step, of all ranks together."""
    if group.strategy in WITHOUT_PAST:
        return NOTHING
    config = group.first["config"]
    capacity = config["capacity"]
    text = f"{100 * capacity:g} % of the data" if capacity < 1 else f"{capacity:,}"
    if group.strategy in WITHOUT_BUFFER:
        text = "none"
    drawn = config.get("global_num_representatives")
    return text if drawn is None else f"{text}, r = {drawn}"


def _commands(groups: Sequence[Group]) -> str:
    commands = commands_of(groups)
    if not commands:
        return "The commands were not written down."
    return "\n".join(["```sh", *commands, "```"])


def _origin(groups: Sequence[Group]) -> str:
    """Seeds, versions, machines, dates, and the source of the published figures."""
    return "\n".join(f"- {name}: {'; '.join(texts)}" for name, texts in origin_of(groups).items())


def _frontier(groups: Sequence[Group]) -> str | None:
    """The table of accuracy against runtime, of groups that have both ends to compare with."""
    several_recipes = len({group.recipe for group in groups}) > 1
    rows = []
    for label, group in zip(_labels(groups, ["seed", "world_size"]), groups, strict=True):
        multiple = times_incremental(group, groups)
        best = reference_for(group, groups, "from-scratch")
        if multiple is None or best is None:
            continue
        scratch, ours = best.average.mean or math.nan, group.average
        relative = Statistic(ours.mean / scratch, None if ours.std is None else ours.std / scratch)
        rows.append(
            [
                *([group.recipe] if several_recipes else []),
                label,
                str(group.first["world_size"]),
                relative.in_percent().removesuffix(" %"),
                f"{multiple:.2f}",
                f"{group.seconds.mean:.1f}",
            ]
        )
    if not rows:
        return None
    header = ["strategy", "ranks", "% of from-scratch", "times incremental", "seconds"]
    if several_recipes:
        header.insert(0, "recipe")
    return _table(header, rows, num_left=2 if several_recipes else 1)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> str:
    """The first columns to the left, figures to the right."""
    ruler = ["---"] * num_left + ["---:"] * (len(header) - num_left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
