"""What is in a saved buffer, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from ritornello.arrays import Bools, Ints
from ritornello.experiments.inspection.inspection import Inspection
from ritornello.records.layout import shape_elements

MOST_ROWS = 30
"""Where there are more, only the smallest and the largest classes are shown, and the last tasks."""

FEW_ROWS = 5

BAR_WIDTH = 20

AGES = "[dim](ages in rounds before the save)[/dim]"

UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def tables_of(inspection: Inspection) -> Iterator[RenderableType]:
    """Everything, part by part."""
    yield _part("Saved buffer", _overview(inspection))
    if inspection.manifest.layout is not None:
        yield _part("Fields of a sample", _fields(inspection))
    if len(inspection.slots):
        if inspection.labels is not None:
            yield _part(f"Classes[/bold] {AGES}[bold]", _classes(inspection, inspection.labels))
        yield _part(f"Tasks[/bold] {AGES}[bold]", _tasks(inspection))
    yield _part("Files", _files(inspection))
    if inspection.manifest.removals:
        yield _part("Forgotten", _removals(inspection))


def duration_text(least: float, most: float) -> str:
    """From and to, in one unit."""
    unit, name = next((each for each in UNITS if most >= 2 * each[0]), UNITS[-1])
    if most < 1:
        return "below 1 s"
    digits = 0 if most / unit >= 10 else 1
    first, last = f"{max(0.0, least) / unit:,.{digits}f}", f"{max(0.0, most) / unit:,.{digits}f}"
    return f"{last} {name}" if first == last else f"{last} to {first} {name}"


def size_text(num_bytes: int) -> str:
    """Bytes in a unit that fits."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {name}"
    return f"{num_bytes} bytes"


def shown(text: str) -> str:
    """A text from a file, which must not steer the terminal."""
    return escape("".join(letter if letter.isprintable() else "?" for letter in text))


def _part(title: str, content: RenderableType) -> RenderableType:
    return Group(f"[bold]{title}[/bold]", Padding(content, (0, 0, 1, 2)))


def _overview(inspection: Inspection) -> Table:
    manifest = inspection.manifest
    given = manifest.arguments.get
    num_bytes = sum(file.num_bytes for file in manifest.files)
    table = _grid()
    table.add_row("folder", shown(str(_as_seen_from_here(inspection.saved.folder))))
    table.add_row(
        "holds", f"{manifest.num_held:,} representatives, of a capacity of {manifest.capacity:,}"
    )
    if inspection.identities is not None:
        table.add_row("distinct", f"{len(np.unique(inspection.identities)):,} samples")
    table.add_row("shards", _shards(manifest.held_per_rank))
    table.add_row("size", f"{size_text(num_bytes)}, {manifest.record_bytes:,} bytes for each")
    table.add_row(
        "policies",
        f"selection {shown(given('selection', '?'))}, sampling {shown(given('sampling', '?'))}",
    )
    rate = given("num_representatives", "?") if manifest.rate is None else str(manifest.rate)
    table.add_row(
        "per step and rank",
        f"r = {shown(rate)}, c = {shown(given('num_candidates', '?')).replace('None', 'all')}",
    )
    table.add_row("seed", shown(given("seed", "?")))
    table.add_row("rounds", f"{manifest.num_rounds:,}")
    table.add_row("saved", shown(manifest.saved_at).replace("T", " "))
    table.add_row(
        "by", ", ".join(f"{shown(k)} {shown(each)}" for k, each in manifest.versions.items())
    )
    return table


def _shards(held_per_rank: tuple[int, ...]) -> str:
    num_ranks = len(held_per_rank)
    if num_ranks <= 8:
        return f"{num_ranks}, of {', '.join(f'{held:,}' for held in held_per_rank)}"
    return f"{num_ranks:,}, of {min(held_per_rank):,} to {max(held_per_rank):,}"


def _fields(inspection: Inspection) -> Table:
    layout = inspection.manifest.layout
    assert layout is not None
    table = _table("field", "dtype", "shape", "bytes>", "")
    for position, field in enumerate(layout.fields):
        name, _, kind = str(field).partition(": ")
        table.add_row(
            shown(name),
            str(field.dtype).removeprefix("torch."),
            escape(kind.partition(" ")[2]),
            f"{field.num_bytes if shape_elements(field.shape) else 0:,}",
            "the class label" if position == inspection.manifest.label else "",
        )
    return table


def _classes(inspection: Inspection, labels: Ints) -> RenderableType:
    classes, counts = np.unique(labels, return_counts=True)
    shown_ones = np.arange(len(classes))
    heading = ""
    if len(classes) > MOST_ROWS:
        order = counts.argsort(kind="stable")
        shown_ones = np.concatenate([order[:FEW_ROWS], order[-FEW_ROWS:]])
        parts = np.percentile(counts, [0, 10, 50, 90, 100], method="nearest").tolist()
        heading = (
            f"{len(classes):,} classes, of {parts[0]:,} to {parts[4]:,} representatives "
            f"(median {parts[2]:,}; 80 % from {parts[1]:,} to {parts[3]:,}). "
            f"The {FEW_ROWS} smallest and largest ones:"
        )
    table = _table("class", "held>", "", *_age_columns(inspection))
    for number in shown_ones.tolist():
        label, count = int(classes[number]), int(counts[number])
        table.add_row(
            shown(inspection.class_name(label)),
            f"{count:,}",
            _bar(count / int(counts.max())),
            *_ages(inspection, labels == label),
        )
    return Group(heading, table) if heading else table


def _tasks(inspection: Inspection) -> RenderableType:
    marks = inspection.manifest.tasks
    table = _table("task", "held>", "", *_age_columns(inspection))
    counts = np.bincount(inspection.tasks + 1, minlength=len(marks) + 1)
    first = max(0, len(marks) - MOST_ROWS) if len(marks) > MOST_ROWS else -1
    if marks:
        before = inspection.tasks < first if first > 0 else inspection.tasks < 0
        if before.any():
            name = f"the {first:,} before" if first > 0 else "before the first"
            table.add_row(
                f"[dim]{name}[/dim]", f"{int(before.sum()):,}", "", *_ages(inspection, before)
            )
    for number in range(max(0, first), len(marks)):
        count = int(counts[number + 1])
        table.add_row(
            shown(marks[number].name),
            f"{count:,}",
            _bar(count / int(counts.max())),
            *_ages(inspection, inspection.tasks == number),
        )
    everything = np.ones(len(inspection.tasks), dtype=np.bool_)
    table.add_row("[dim]all[/dim]", f"{len(everything):,}", "", *_ages(inspection, everything))
    return table


def _files(inspection: Inspection) -> RenderableType:
    table = _table("file", "size>", "checksum" if inspection.is_checked else "")
    whole = "[green]ok[/green]" if inspection.is_checked else "[dim]not checked[/dim]"
    for file in inspection.files:
        state = f"[red]DAMAGED: {shown(file.damage)}[/red]" if file.damage else whole
        table.add_row(shown(file.name), size_text(file.num_bytes), state)
    if not inspection.num_leftovers:
        return table
    num_files = f"{inspection.num_leftovers} file{'s' if inspection.num_leftovers > 1 else ''}"
    return Group(
        table,
        f"[yellow]{num_files} more that a crash has left behind: the next save or forget removes "
        "them[/yellow]",
    )


def _removals(inspection: Inspection) -> str:
    lines = []
    for each in inspection.manifest.removals:
        when = shown(each.removed_at).replace("T", " ")
        lines.append(f"{when}: {each.num_removed:,} removed, {each.num_left:,} left")
        for name, values in each.where.items():
            lines += [f"  {shown(name)}={shown(value)}" for value in _values(values)]
    return "\n".join(lines)


def _values(text: str) -> list[str]:
    """One by one where they are checksums, which are long."""
    return text.split(",") if text.startswith("sha256:") else [text]


def _age_columns(inspection: Inspection) -> tuple[str, ...]:
    columns = ("oldest>", "median>", "newest>")
    return columns if inspection.seconds is None else (*columns, "in time>")


def _ages(inspection: Inspection, mask: Bools) -> list[str]:
    """The ages of some: the oldest, the median and the newest, in rounds and in time."""
    seconds = inspection.seconds
    if not mask.any():
        return [""] * (3 if seconds is None else 4)
    ages = np.sort(inspection.ages[mask])[::-1]
    texts = [f"{int(ages[i]):,}" for i in (0, len(ages) // 2, -1)]
    if seconds is None:
        return texts
    known = seconds[mask & ~np.isnan(seconds)]
    return [*texts, duration_text(float(known.min()), float(known.max())) if len(known) else ""]


def _bar(part: float) -> str:
    return f"[blue]{'█' * max(1, round(part * BAR_WIDTH)) if part > 0 else ''}[/blue]"


def _grid() -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _table(*columns: str) -> Table:
    """A table without lines; columns whose names end with > are numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(
            name.removesuffix(">"),
            justify="right" if name.endswith(">") else "left",
            no_wrap=name.endswith(">"),
            overflow="fold",
        )
    return table


def _as_seen_from_here(folder: Path) -> Path:
    """A folder's path, without that of the working directory if it is inside."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
