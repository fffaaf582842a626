"""Whether and how a finished run can go on with a new task: all that can be said beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from ritornello.experiments.data.scenarios import Task
from ritornello.experiments.recipes.recipe import Recipe, with_changes
from ritornello.experiments.results import reading as saved_results
from ritornello.experiments.results.run_folder import part_of
from ritornello.experiments.results.writing import Results
from ritornello.experiments.strategies import STRATEGIES, Strategy, strategy_named
from ritornello.experiments.training import run as train
from ritornello.saving.folder import SavedFolder

MAY_CHANGE = (
    *("augmentation", "dropout", "amp", "channels_last", "compile"),
    *("epochs", "iterations", "global_batch_size"),
    *("optimiser", "keeps_optimiser", "learning_rate", "momentum", "weight_decay"),
    *("warmup_epochs", "milestones", "alpha", "beta", "loss_weights"),
    *("distance", "orthogonality"),
    *("si_strength", "si_damping", "locality", "surrogate_steps"),
    *("composition", "samples_per_step", "first_share", "share_floor"),
    *("soft_targets", "soft_temperature", "local_steps"),
    *("capacity", "global_num_representatives", "global_num_candidates", "sampling", "draws"),
    *("device", "num_workers"),
    *("averaged", "probe_every"),
)
"""The settings that a task may have otherwise than those before it."""


@dataclass(frozen=True)
class Extension:
    """What is to be done; from ``plan``."""

    folder: Path
    """Where the run is."""
    before: Results
    """What the run has written down."""
    recipe: Recipe
    """With which the new task is learnt."""
    data: Path
    """What has arrived."""
    name: str
    """The new task's."""
    is_learnt: bool
    """Whether the run has learnt a task of that name already."""

    def announcement(self, num_ranks: int) -> str:
        """What is about to happen."""
        before, recipe = self.before, self.recipe
        text = (
            f"[bold]{escape(str(self.folder))}[/bold]: "
            f"{counted(len(before['tasks']), 'task', 'tasks')} so far, "
            f"{counted(len(before['class_names']), 'class', 'classes')}; now: "
            f"[bold]{escape(self.name)}[/bold]\n"
            f"{recipe.strategy} on {counted(num_ranks, 'rank', 'ranks')}, seed {recipe.seed}"
        )
        if strategy_named(recipe.strategy).rehearses:
            text += f", {recipe.capacity:,} representatives"
        return text


def plan(
    folder: Path,
    data: Path,
    *,
    name: str | None = None,
    changes: Mapping[str, Any] | None = None,
    num_ranks: int = 1,
) -> Extension:
    """Checks, before any data are loaded, whether and how a run can go on.

    Args:
        folder: the output of a run that has finished.
        data: what has arrived: see ``data.load_arrival``.
        name: of the new task; None: that of the file or folder.
        changes: of settings in ``MAY_CHANGE``.
        num_ranks: on which it shall go on.

    Raises:
        FileNotFoundError: there is no finished run, or nothing has arrived.
        ValueError: this run cannot go on like that; says why.
        CheckpointError: its buffer cannot be read.
    """
    before = results_in(folder)
    if not data.exists():
        raise FileNotFoundError(f"--data {data}: there is no such file or folder")
    recipe = _recipe(folder, before, changes or {})
    if num_ranks == 1:  # which has all samples
        recipe = replace(recipe, ranks_differ=None)
    train.check(recipe, num_ranks)
    if not part_of(folder, "model.pt").exists():
        raise FileNotFoundError(f"{folder} has no model.pt: without the model no run can go on")
    name = name or data.absolute().name.removesuffix(".npz")
    is_learnt = name in [task["name"] for task in before["tasks"]]
    return Extension(folder, before, recipe, data, name, is_learnt)


def check_classes(recipe: Recipe, tasks: Sequence[Task], new_classes: Sequence[str]) -> None:
    """Checks that the run can learn the classes of its last task.

    Raises:
        ValueError: it cannot; says which, and why.
    """
    if recipe.fixed_shares and new_classes and strategy_named(recipe.strategy).rehearses:
        raise ValueError(
            f"new classes ({', '.join(new_classes)}), but the run was made with --fixed-shares on: "
            "the whole buffer belongs to the classes that it knew; make a run without"
        )
    known = set[int]().union(*(task.classes for task in tasks[:-1]))
    if recipe.scenario == "task-incremental" and known & set(tasks[-1].classes):
        raise ValueError(
            "scenario='task-incremental': the new task has classes of earlier ones, but a class "
            "can be of one task only"
        )


def counted(number: int, one: str, several: str) -> str:
    """Such as "1 task" or "2 tasks"."""
    return f"{number:,} {one if number == 1 else several}"


def _recipe(folder: Path, before: Results, changes: Mapping[str, Any]) -> Recipe:
    """The run's recipe, changed.

    Raises:
        ValueError: the strategy cannot go on, or a setting cannot change.
        FileNotFoundError: the buffer is not there.
        CheckpointError: it cannot be read.
    """
    recipe = Recipe.from_results(before["config"])
    kind = strategy_named(recipe.strategy)
    if kind.training_tasks is not Strategy.training_tasks:
        raise ValueError(
            f"the strategy {recipe.strategy!r} trains on the data of all tasks, and those of "
            f"earlier ones are not kept; runs of {', '.join(_can_go_on())} can go on"
        )
    if not part_of(folder, "strategy.pt").exists():
        for needed, what in (
            (kind.num_draws and recipe.global_num_generated, "its generator"),
            (kind.solves, "its sums"),
            (kind.remembers_in_itself, "the importances of its weights"),
        ):
            if needed:
                raise FileNotFoundError(
                    f"{folder} has no strategy.pt: without {what} this run cannot go on"
                )
    if recipe.predicts_tensors:
        raise ValueError(
            f"the run was made with loss={recipe.loss!r}, whose targets are tensors, and only runs "
            "of classes can go on"
        )
    for each in changes:
        if each not in MAY_CHANGE:
            raise ValueError(
                f"{each}: a run goes on with its own; what may change is {', '.join(MAY_CHANGE)}"
            )
    if "capacity" in changes and changes["capacity"] < 1:
        raise ValueError(
            f"capacity={changes['capacity']}: say how many representatives; of a stream without "
            "end there are no fractions"
        )
    if recipe.soft_targets and changes.get("soft_targets") == 0:
        raise ValueError(
            "soft_targets=0: the run's buffer stores soft targets; to go on without their effect "
            "give them a small weight"
        )
    soft_targets = changes.get("soft_targets", recipe.soft_targets)
    if recipe.stores == "files" and (kind.stores_logits or (kind.rehearses and soft_targets)):
        raise ValueError(
            f"stores='files' with strategy={recipe.strategy!r}, soft_targets={soft_targets}: "
            "logits beside files cannot be widened for new classes; only runs without logits, such "
            "as those of rehearsal without soft targets, go on with files"
        )
    if kind.rehearses:
        buffer = part_of(folder, "buffer")
        if not buffer.exists():
            raise FileNotFoundError(
                f"{folder} has no buffer, and the strategy {recipe.strategy!r} cannot go on "
                "without it: the run was made with --keep-buffer off"
            )
        manifest = SavedFolder(buffer).manifest
        recipe = replace(recipe, capacity=manifest.capacity)
        if manifest.paging is not None:  # files: a larger capacity has room for more of them
            share = changes.get("capacity", manifest.capacity) / manifest.capacity
            recipe = replace(recipe, capacity_bytes=round(manifest.paging.capacity_bytes * share))
    return replace(with_changes(recipe, **changes), published=None)


def _can_go_on() -> list[str]:
    return [
        name for name, kind in STRATEGIES.items() if kind.training_tasks is Strategy.training_tasks
    ]


def results_in(folder: Path) -> Results:
    """What a finished run has written down.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be understood, or says too little.
    """
    path = part_of(folder, "results.json")
    if not path.exists():
        hint = "give the output folder of 'ritornello run'"
        if (folder / "comparison.json").exists():
            hint = "give one of the folders in it"
        elif (folder / "checkpoints").exists():
            hint = "its run was interrupted, and goes on with --resume"
        raise FileNotFoundError(f"{folder} holds no finished run: {hint}")
    [results] = saved_results.runs_in(path)
    if "data" not in results:
        raise ValueError(
            f"{path} does not say how pixels were normalised: it is of an older version; make the "
            "run again"
        )
    return dict(results)
