"""Removing samples from the saved buffers of a run, on request."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from ritornello.experiments.inspection.inspection import find_buffers
from ritornello.experiments.inspection.tables import shown
from ritornello.experiments.results.run_folder import COMPLETE, IN_WORK, locked
from ritornello.saving.conditions import Values, Where
from ritornello.saving.files import PARTIAL
from ritornello.saving.folder import SavedFolder, remove_leftovers
from ritornello.saving.forgetting import Forgotten, forget
from ritornello.saving.manifest import Manifest


def conditions_of(texts: Sequence[str]) -> dict[str, str]:
    """``["label=3", "id=1,2"]`` as a dict.

    Raises:
        ValueError: none at all, one that is no condition, or a name that comes twice.
    """
    conditions: dict[str, str] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not name or not sign or not value:
            raise ValueError(f"--where {text}: it must be NAME=VALUE, such as label=3")
        if name in conditions:
            raise ValueError(
                f"--where {name} comes twice, but all conditions must hold; several values are one "
                f"condition: --where {name}={conditions[name]},{value}"
            )
        conditions[name] = value
    if not conditions:
        raise ValueError("forget: say with --where what; without a condition all would go")
    return conditions


def forget_everywhere(
    folder: Path, conditions: dict[str, str], dry_run: bool
) -> dict[Path, Forgotten]:
    """Removes samples from all buffers in a folder: one, or those of a run and its checkpoints.

    Raises:
        ValueError: a condition that some buffer's samples cannot meet; nothing is changed.
        CheckpointError: see ``ritornello.forget``; the buffers before are done.
    """
    manifests = {each: SavedFolder(each).manifest for each in find_buffers(folder)}
    meant = _of_each_buffer(conditions, manifests)
    for each, own in meant.items():
        Where(own, manifests[each])
    if dry_run or folder in manifests:
        return {each: forget(each, own, dry_run=dry_run) for each, own in meant.items()}
    with locked(folder):  # a run that goes on would bring them back
        _remove_unfinished(folder)
        return {each: forget(each, own) for each, own in meant.items()}


def outcome_text(path: Path, forgotten: Forgotten, dry_run: bool) -> str:
    """What happened to one buffer."""
    where = f"[bold]{shown(str(path))}[/bold]:"
    if not forgotten.num_removed:
        return f"{where} nothing matches, of {forgotten.num_left:,} representatives"
    verb = "would be forgotten" if dry_run else "forgotten"
    num = forgotten.num_removed
    lines = [
        f"{where} {num:,} sample{'s' if num > 1 else ''} {verb}, "
        f"{forgotten.num_left:,} representatives left"
    ]
    parts = {
        "class": {str(label): count for label, count in forgotten.removed_per_class.items()},
        "task": {name or "(none)": n for name, n in forgotten.removed_per_task.items()},
    }
    for what, counts in parts.items():
        if counts:
            several = ", ".join(f"{shown(name)} ({n:,})" for name, n in counts.items())
            lines.append(f"  {what}: {several}")
    if forgotten.receipt:
        lines.append(f"  receipt: {forgotten.receipt}")
    return "\n".join(lines)


def _remove_unfinished(folder: Path) -> None:
    """Removes what a killed job has left half written: no run goes on from it."""
    for place in (folder, folder / IN_WORK, folder / COMPLETE):
        for each in place.glob(f"checkpoints/*{PARTIAL}"):
            shutil.rmtree(each)
        if (place / "buffer").is_dir():
            remove_leftovers(place / "buffer")


def _of_each_buffer(
    conditions: dict[str, str], manifests: Mapping[Path, Manifest]
) -> dict[Path, dict[str, Values]]:
    """The conditions for each buffer that can have such samples.

    A checkpoint knows only the tasks that had begun: of those that are meant, each gets its own.
    """
    if "task" not in conditions:
        return {each: {**conditions} for each in manifests}
    names = {each: [task.name for task in own.tasks] for each, own in manifests.items()}
    text, everywhere = conditions["task"], set(chain.from_iterable(names.values()))
    wanted = [text] if text in everywhere else [part.strip() for part in text.split(",")]
    if not everywhere.issuperset(wanted):
        return {each: {**conditions} for each in manifests}  # which is refused by name
    owns = {each: [name for name in wanted if name in names[each]] for each in manifests}
    return {each: {**conditions, "task": own} for each, own in owns.items() if own}
