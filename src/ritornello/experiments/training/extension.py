"""Going on with a finished run: one more task, which nobody knew of when the run began.

::

    what the run has left: model, buffer, results
      + a folder or file of new data, perhaps with new classes
      -> a run of one task with rehearsal -> model, buffer, results

Every rank calls ``extend``. There may be other ranks each time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.holdout import held_out
from ritornello.experiments.data.load import load_arrival
from ritornello.experiments.data.scenarios import Task
from ritornello.experiments.ranks.group import Ranks
from ritornello.experiments.ranks.interruption import NotedSignals
from ritornello.experiments.ranks.launch import restarted
from ritornello.experiments.ranks.place import Place, device_named
from ritornello.experiments.ranks.progress import say
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results import run_folder as living_folder
from ritornello.experiments.results.run_folder import IN_WORK, locked, part_of
from ritornello.experiments.results.writing import Results, TaskLog
from ritornello.experiments.strategies import strategy_named
from ritornello.experiments.training import run as train
from ritornello.experiments.training.checkpoints import Checkpoints
from ritornello.experiments.training.extended_data import (
    EarlierTasks,
    earlier_tasks,
    image_shape_of,
    with_new_task,
)
from ritornello.experiments.training.extension_plan import (
    Extension,
    check_classes,
    counted,
    plan,
    results_in,
)
from ritornello.experiments.training.saver import CheckpointSettings, Saver
from ritornello.experiments.training.stored_files import data_of
from ritornello.experiments.training.tracking import PLACES, Tracking, telling
from ritornello.experiments.training.trainer import Trainer
from ritornello.records import accelerators
from ritornello.saving.files import LOCK


def extend(
    folder: str | Path,
    data: str | Path,
    *,
    name: str | None = None,
    tests: Sequence[str | Path] = (),
    output: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    command: str = "",
    saving: CheckpointSettings = train.OFF,
    tracking: Tracking = train.UNTRACKED,
) -> Results:
    """Goes on with a finished run: it learns what has arrived, rehearsing from its buffer.

    Classes are matched by their names; new ones become further outputs of the model. The model,
    the buffer and the results in the folder are replaced when all is done, at once: whatever ends
    the job before, they are as they were.

    Args:
        folder: the output of the run, visible to all ranks.
        data: what has arrived: an npz file, or a folder with ``train/CLASS`` and ``val/CLASS`` or
            ``test/CLASS``, or with ``CLASS`` alone (every tenth image is then for testing).
        name: of the new task; None: that of the file or folder.
        tests: where data of earlier tasks lie now, if they were moved.
        output: another folder to write to, by the first rank's word; the run then stays as it is.
        changes: of settings in ``MAY_CHANGE``; they hold for the tasks to come, too.
        command: what was typed, for the results.
        saving: see ``train.run``. To go on with an extension that was interrupted, give the same
            arguments, and ``resume``.
        tracking: see ``train.run``; curves go on where those of the run end.

    Returns:
        The results of the run with its new task. If that was learnt before, and ``saving`` says to
        resume, those that are there.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: see ``plan``; or the data do not fit.
        FileExistsError: another job is writing, or the output holds something else.
        RunInterruptedError: SIGTERM or SIGUSR1 came; the extension is saved.
    """
    saving.check()
    tracking.check()
    if saving.keep_buffer == "off":
        raise ValueError("--keep-buffer off: without its buffer the run could not go on next time")
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks())
        told = ranks.tell([str(Path(each).absolute()) for each in (folder, output or folder)])
        folder, place = map(Path, told)
        results_in(folder)  # so that nothing is locked that is no run
        with ranks.together("cannot begin"):
            if ranks.rank == 0:
                for each in dict.fromkeys((folder, place)):
                    stack.enter_context(locked(each, wait_seconds=30.0 * restarted()))
                    living_folder.finish(each)
        # Only now: another job may have gone on with the run before it gave the lock back.
        extension = plan(folder, Path(data), name=name, changes=changes, num_ranks=ranks.num_ranks)
        resumes = saving.is_on and (saving.resume or restarted())
        done: Results | None = ranks.tell(_done_before(extension, folder, place, resumes))
        if done is not None:
            if ranks.rank == 0:
                say(f"{extension.name} has been learnt before; nothing is run")
            return done
        work = place / IN_WORK
        ranks.gather(None)  # all have looked before the first one begins to write
        if ranks.rank == 0:
            stack.enter_context(_made(work))
        signals = stack.enter_context(NotedSignals()) if saving.is_on else None
        device = device_named(extension.recipe.device)
        stack.enter_context(accelerators.forked_random_state(device))
        arrived, tasks = _stream(extension, [Path(each) for each in tests], ranks)
        arrived = data_of(extension.recipe, arrived)
        trainer = stack.enter_context(
            Trainer(
                extension.recipe,
                arrived,
                Place(ranks.rank, ranks.num_ranks, device),
                tasks,
                begins_with=_frozen_in(extension),
            )
        )
        checkpoints = Checkpoints(work / "checkpoints", saving.keep, ranks)
        saver = None if signals is None else Saver(saving, checkpoints, ranks, signals)
        fix = (
            "go on first with the extension that was interrupted (its --data and flags, --resume), "
            f"or remove {work}"
        )
        if not (resumes and train.go_on(trainer, checkpoints, fix)):
            _follow(trainer, extension, ranks)
        figures = stack.enter_context(telling(tracking, place, trainer, ranks))
        results = _results(extension.before, trainer.train(saver, figures), command)
        train.write_outcome(work, results, trainer, ranks, keep_buffer=True)
        with ranks.together(f"cannot write into {place}"):
            if ranks.rank == 0:
                living_folder.replace(place)
                if trainer.network.average is None:  # one that is not gone on with
                    (place / "averaged.pt").unlink(missing_ok=True)
    return results


def _stream(
    extension: Extension, moved: Sequence[Path], ranks: Ranks
) -> tuple[DataSet, list[Task]]:
    """The new task behind the earlier ones, the same on every rank."""
    before = extension.before
    earlier = earlier_tasks(before, moved, extension.data)
    if any(each != earlier.not_read for each in ranks.gather(earlier.not_read)):
        raise ValueError("the ranks do not see the same data of earlier tasks: check their paths")
    new = load_arrival(extension.data, image_shape_of(before))
    new = held_out(new, extension.recipe.holdout)
    data, tasks = with_new_task(before, new, extension.name, extension.data, earlier)
    new_classes = data.class_names[len(before["class_names"]) :]
    check_classes(extension.recipe, tasks, new_classes)
    if ranks.rank == 0:
        _say_what_comes(extension, tasks, new_classes, earlier)
    return data, tasks


def _say_what_comes(
    extension: Extension, tasks: Sequence[Task], new_classes: Sequence[str], earlier: EarlierTasks
) -> None:
    """Tells the user what has been found."""
    task = tasks[-1]
    text = (
        f"{task.name}: {len(task.train_indices):,} training and {len(task.test_indices):,} test "
        f"images of {counted(len(task.classes), 'class', 'classes')}"
    )
    say(text + (f", new: {', '.join(new_classes)}" if new_classes else ", none of them new"))
    if earlier.not_read:
        number, reason = next(iter(earlier.not_read.items()))
        say(
            f"{counted(len(earlier.not_read), 'earlier task', 'earlier tasks')} cannot be tested "
            f"(--test says where data lie now); {tasks[number].name}: {reason}",
            style="yellow",
        )
    if extension.recipe.keeps_optimiser:
        say("the optimiser begins anew: its state is not kept between runs", style="yellow")


def _frozen_in(extension: Extension) -> Path | None:
    """Where frozen layers are that the run began with, or all that it would have to get again.

    What is trained anew begins as it did, and takes no more than what is frozen.
    """
    recipe = extension.recipe
    begins_anew = recipe.weights is None or strategy_named(recipe.strategy).restarts
    if begins_anew and not recipe.freezes_trunk:
        return None
    return part_of(extension.folder, "model.pt")


def _follow(trainer: Trainer, extension: Extension, ranks: Ranks) -> None:
    """Begins where the run has ended, and measures what it could do where that is not known."""
    names = ("model.pt", "averaged.pt", "strategy.pt")
    model, average, left = (part_of(extension.folder, name) for name in names)
    weights = averaged = strategy = None
    with ranks.together(f"cannot read {model}"):
        weights = torch.load(model, map_location="cpu", weights_only=True)
    if extension.recipe.averaged and extension.before["config"].get("averaged"):
        with ranks.together(f"cannot read {average}"):
            averaged = torch.load(average, map_location="cpu", weights_only=True)
    if left.exists():
        with ranks.together(f"cannot read {left}"):
            strategy = torch.load(left, map_location="cpu", weights_only=True)
    log = _log_of(extension.before, extension.recipe)
    buffer = part_of(extension.folder, "buffer")
    trainer.follow(log, weights, buffer, averaged, strategy)
    accuracies = trainer.evaluation.accuracies(trainer.network)
    pairs_of = [(getattr(log, name), measured) for name, measured in vars(accuracies).items()]
    if trainer.network.average is not None:
        with trainer.network.averaged():
            accuracies = trainer.evaluation.accuracies(trainer.network)
        pairs_of += [(log.averaged_top1, accuracies.top1), (log.averaged_top5, accuracies.top5)]
    for matrix, measured in pairs_of:
        pairs = zip(matrix[-1], measured, strict=True)
        matrix[-1] = [now if known is None else known for known, now in pairs]


def _results(before: Results, newest: Results, command: str) -> Results:
    """Those of the run with its new task, as JSON would give them back."""
    about = {"date": newest["date"], "command": command, "world_size": newest["world_size"]}
    per_rank = "train_samples_per_rank"  # of the new task alone; those before are gone
    if per_rank in before:  # unlike ranks; a task that one rank alone has learnt had no others
        own = newest.get(per_rank, [[newest["tasks"][-1]["train_samples"]]])[-1]
        config = {**newest["config"], "ranks_differ": before["config"]["ranks_differ"]}
        newest = {**newest, per_rank: [*before[per_rank], own], "config": config}
    results: Results = json.loads(
        json.dumps(
            {
                **newest,
                "command": command,
                "data": before["data"],
                "train_samples": before["train_samples"] + newest["train_samples"],
                "tasks": [*before["tasks"], newest["tasks"][-1] | about],
            }
        )
    )
    return results


def _log_of(before: Results, recipe: Recipe) -> TaskLog:
    """What the run has written down, with a column for the new task.

    Where the weights are averaged only from now on, it is not known how good the average was.
    """
    unknown = [[None] * len(row) for row in before["top1"]]
    averaged = [before.get(name, unknown) for name in ("averaged_top1", "averaged_top5")]
    if not recipe.averaged:
        averaged = [[], []]
    known = (before["top1"], before["top5"], before.get("loss", unknown))
    matrices = [[[*row, None] for row in matrix] for matrix in (*known, *averaged)]
    return TaskLog(
        at_start=([*before["top1_at_start"], None], [*before["top5_at_start"], None]),
        top1=matrices[0],
        top5=matrices[1],
        loss=matrices[2],
        averaged_top1=matrices[3],
        averaged_top5=matrices[4],
        seconds=list(before["seconds_per_task"]),
        steps=list(before["steps_per_task"]),
        probes=list(before.get("probes", [])),
    )


def _done_before(extension: Extension, folder: Path, place: Path, resumes: bool) -> Results | None:
    """The results, if the task has been learnt before and that is no mistake.

    Raises:
        ValueError: the task has been learnt, or an interrupted extension is in the way.
        FileExistsError: the output holds something else.
    """
    if place != folder and (place / "results.json").exists():
        found: Results = json.loads((place / "results.json").read_text())
        if resumes and found["tasks"][-1]["name"] == extension.name:
            return found
    if extension.is_learnt:
        if resumes and place == folder:
            return extension.before
        raise ValueError(
            f"the run in {folder} has learnt {extension.name!r} already; if these are other data, "
            "give them another --name"
        )
    if place != folder and {each.name for each in place.iterdir()} - {LOCK, IN_WORK, *PLACES}:
        raise FileExistsError(f"--output {place}: it exists and is not empty; give another folder")
    if any((place / IN_WORK).glob("checkpoints/step-*[0-9]")) and not resumes:
        raise FileExistsError(
            f"{place / IN_WORK} holds an extension that was interrupted: go on with it (--resume), "
            "or remove that folder"
        )
    return None


@contextmanager
def _made(work: Path) -> Iterator[None]:
    """A folder for work in progress; after an error it stays only if it can be gone on with."""

    def remove_unless_saved() -> None:
        if not any(work.glob("checkpoints/step-*[0-9]")):
            shutil.rmtree(work, ignore_errors=True)

    remove_unless_saved()
    work.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        remove_unless_saved()
        raise
