"""The commands on a saved buffer: to look into it, and to remove samples from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ritornello.experiments.cli.output import say_where

SavedBufferFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]


def inspect(
    folder: SavedBufferFolder,
    /,
    picture: str | None = None,
    export: str | None = None,
    check: Literal["on", "off"] = "on",
) -> None:
    """Show what is in a saved buffer, and whether its files are whole.

    Args:
        folder: Of a saved buffer, or the output of a run.
        picture: A picture to draw of it, such as FILE.png: a row of images for each class.
        export: Where to write all samples: FILE.npz, or a folder for CLASS/NNN.png.
        check: Whether to compare checksums.
    """
    from ritornello.experiments.inspection.inspection import find_buffers, inspect_buffer
    from ritornello.experiments.inspection.tables import tables_of

    console = Console()
    if export is not None:
        from ritornello.experiments.inspection import export as exporting

        exporting.check_is_free(Path(export))
    with console.status("reading"):
        inspection = inspect_buffer(find_buffers(Path(folder))[0], check == "on")
    for part in tables_of(inspection):
        console.print(part, highlight=False)
    if picture is not None:
        from ritornello.experiments.inspection.contact_sheet import draw_contact_sheet

        draw_contact_sheet(inspection, Path(picture))
        say_where(console, "Picture:", Path(picture))
    if export is not None:
        num_samples = exporting.export(inspection, Path(export))
        say_where(console, f"{num_samples:,} samples:", Path(export))
    if not inspection.is_whole:
        sys.exit(1)


def forget(
    folder: SavedBufferFolder,
    /,
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    dry_run: bool = False,
) -> None:
    """Remove samples from a saved buffer for good, as when a person's data must be forgotten.

    Args:
        folder: Of a saved buffer; or the output of a run, for its buffer and all its checkpoints.
        where: NAME=VALUE, such as label=3, task=2024-05-01 or id=12,13; all given ones must hold.
        dry_run: Only say what would go.
    """
    from ritornello.experiments.inspection.forget import (
        conditions_of,
        forget_everywhere,
        outcome_text,
    )

    conditions = conditions_of(where)
    console = Console()
    with console.status("reading and writing"):
        outcomes = forget_everywhere(Path(folder), conditions, dry_run)
    for path, outcome in outcomes.items():
        console.print(outcome_text(path, outcome, dry_run), highlight=False, soft_wrap=True)
    if dry_run:
        console.print("Nothing was changed.")
