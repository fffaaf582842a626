"""Runs of recipes: one or several, from the beginning or from a checkpoint, to their results.

Every rank calls ``run``; with a default process group the model is trained data-parallel. The
training loop is in ``trainer``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ritornello.errors import CheckpointError
from ritornello.experiments.data.data_set import DataSet
from ritornello.experiments.data.holdout import held_out
from ritornello.experiments.data.load import load
from ritornello.experiments.data.scenarios import IN_CLASS_ORDER, SCENARIOS
from ritornello.experiments.models.augmentation import AUGMENTATIONS
from ritornello.experiments.models.embedding import Embeddings
from ritornello.experiments.models.pretrained import check_pretrained, warn_of_untrained
from ritornello.experiments.ranks.group import Ranks
from ritornello.experiments.ranks.interruption import NotedSignals, RunInterruptedError
from ritornello.experiments.ranks.launch import restarted
from ritornello.experiments.ranks.place import Place, accelerator_named, device_named
from ritornello.experiments.ranks.progress import say
from ritornello.experiments.recipes.recipe import DESCRIPTIONS, Recipe
from ritornello.experiments.recipes.several_ranks import check_several_ranks
from ritornello.experiments.recipes.split_sizes import check_split
from ritornello.experiments.recipes.targets import check_targets
from ritornello.experiments.results.reading import runs_in
from ritornello.experiments.results.run_folder import locked, write_json
from ritornello.experiments.results.writing import Results
from ritornello.experiments.strategies import Rehearsal, strategy_named
from ritornello.experiments.strategies.without_samples import adapter, generative
from ritornello.experiments.training import exemplars
from ritornello.experiments.training.checkpoints import Checkpoints
from ritornello.experiments.training.saver import CheckpointSettings, Saver
from ritornello.experiments.training.stored_files import check_stores, data_of
from ritornello.experiments.training.tracking import Tracking, telling
from ritornello.experiments.training.trainer import Trainer
from ritornello.experiments.training.variants import folder_name
from ritornello.policies.names import SAMPLING_POLICIES, SELECTION_POLICIES
from ritornello.records import accelerators
from ritornello.saving.files import new_file

OFF = CheckpointSettings()
"""No checkpoints."""

UNTRACKED = Tracking()
"""No trackers."""

MAY_CHANGE = ("data_path", "device", "num_workers", "channels_last", "compile", *DESCRIPTIONS)
"""Settings that a run need not go on with."""


def compare(
    variants: Mapping[str, Recipe],
    output: str | None,
    command: str = "",
    saving: CheckpointSettings = OFF,
    tracking: Tracking = UNTRACKED,
) -> dict[str, Results]:
    """Runs several recipes, one after another; data sets that they share are loaded once.

    Args:
        variants: label to recipe.
        output: where a folder for each is written, and ``comparison.json``.
        command: what was typed, for the results.
        saving: see ``run``; runs that have finished are not run again.
        tracking: see ``run``; each run has files of its own.

    Returns:
        Label to results.
    """
    for recipe in variants.values():
        check(recipe, _num_ranks())
    saving.check()
    tracking.check()
    return _compare(variants, output, command, saving, tracking)


def _compare(
    variants: Mapping[str, Recipe],
    output: str | None,
    command: str,
    saving: CheckpointSettings,
    tracking: Tracking,
) -> dict[str, Results]:
    """See ``compare``; all is checked."""
    loaded: dict[tuple[Any, ...], DataSet] = {}
    embeddings = Embeddings()
    comparison = {}
    signals = NotedSignals() if saving.is_on else None
    output = None if output is None else str(Path(output).absolute())
    for label, recipe in variants.items():
        key = (recipe.data, recipe.data_path, recipe.image_size)

        def data(key: tuple[Any, ...] = key) -> DataSet:
            if key not in loaded:
                loaded.clear()  # two at a time might not fit
                loaded[key] = load(*key)
            return loaded[key]

        folder = None if output is None else f"{output}/{folder_name(label)}"
        comparison[label] = _run(
            recipe, folder, data, command, saving, tracking, signals, embeddings
        )
        if output is not None and _rank() == 0:
            write_json(Path(output) / "comparison.json", comparison)
    return comparison


def run(
    recipe: Recipe,
    output: str | None = None,
    data: DataSet | Callable[[], DataSet] | None = None,
    command: str = "",
    saving: CheckpointSettings = OFF,
    tracking: Tracking = UNTRACKED,
) -> Results:
    """Runs a recipe, or goes on with a run.

    Args:
        recipe: what to run.
        output: the folder for ``results.json``, ``model.pt``, ``averaged.pt``, ``strategy.pt``,
            ``buffer`` and ``checkpoints``, by the first rank's word; None: nothing is written. All
            ranks must see the folder.
        data: the data set, or what loads it, if it is not the recipe's own.
        command: what was typed, for the results.
        saving: whether and when there are checkpoints, and whether to go on from one. A rank that
            an elastic launcher has started again always goes on.
        tracking: which trackers get figures on the way; their files are in the output folder.

    Returns:
        The results, the same on every rank but for times and the buffer's statistics. Those that
        are there, if the run has finished before.

    Raises:
        ValueError: a setting breaks its rule; or the run to go on with is another one.
        CheckpointError: no checkpoint can be read, or one could not be written, or another job
            writes into the folder, or a tracker could not be made.
        RunInterruptedError: SIGTERM or SIGUSR1 came; the run is saved.
    """
    check(recipe, _num_ranks())
    saving.check()
    tracking.check()
    return _run(recipe, output, data, command, saving, tracking)


def _run(
    recipe: Recipe,
    output: str | None,
    data: DataSet | Callable[[], DataSet] | None,
    command: str,
    saving: CheckpointSettings,
    tracking: Tracking,
    signals: NotedSignals | None = None,
    embeddings: Embeddings | None = None,
) -> Results:
    """See ``run``; all is checked.

    The runs before have noted their signals in ``signals``, and left their ``embeddings``.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks())
        output = ranks.tell(None if output is None else str(Path(output).absolute()))
        if output is None and saving.is_on:
            raise ValueError("checkpoints need an output folder")
        if output is None and tracking.track:
            raise ValueError("trackers need an output folder")
        folder = None if output is None else Path(output)
        if folder is not None:
            with ranks.together("cannot begin"):
                if ranks.rank == 0:
                    stack.enter_context(locked(folder, wait_seconds=30.0 * restarted()))
        resumes = folder is not None and saving.is_on and (saving.resume or restarted())
        if folder is not None and resumes:
            done: Results | None = ranks.tell(finished(recipe, folder, ranks.num_ranks))
            if done is not None:
                return done
        is_one_of_several = signals is not None
        signals = stack.enter_context(signals or NotedSignals()) if saving.is_on else None
        # One that came in the last evaluation of the run before, or while its buffer was saved.
        if number := ranks.start_maximum([signals.number if signals else 0])()[0]:
            raise RunInterruptedError(number, "between two runs; goes on with --resume")
        device = device_named(recipe.device)
        stack.enter_context(accelerators.forked_random_state(device))
        data = data() if callable(data) else data
        data = data or load(recipe.data, recipe.data_path, recipe.image_size)
        data = data_of(recipe, held_out(data, recipe.holdout))
        if ranks.rank == 0:
            warn_of_untrained(recipe, not strategy_named(recipe.strategy).solves)
        trainer = stack.enter_context(
            Trainer(recipe, data, Place(ranks.rank, ranks.num_ranks, device), embeddings=embeddings)
        )
        trainer.schedule.warn_of_room()
        saver = checkpoints = None
        if folder is not None and signals is not None:
            checkpoints = Checkpoints(folder / "checkpoints", saving.keep, ranks)
            flags = "--resume" if is_one_of_several else f"--resume --output {folder}"
            saver = Saver(saving, checkpoints, ranks, signals, flags)
            if resumes:
                go_on(trainer, checkpoints)
        figures = stack.enter_context(telling(tracking, folder, trainer, ranks))
        # As JSON would give it back: what is returned is what is written.
        results: Results = json.loads(
            json.dumps({**trainer.train(saver, figures), "command": command})
        )
        if folder is not None:
            write_outcome(folder, results, trainer, ranks, saving.keep_buffer == "on")
        if checkpoints is not None:
            checkpoints.remove()
    return results


def run_checked(
    recipes: Mapping[str, Recipe],
    output: str | None,
    command: str,
    saving: CheckpointSettings,
    tracking: Tracking,
) -> Results | dict[str, Results]:
    """``run`` of one recipe, or ``compare`` of several, where all was checked before the launch."""
    if len(recipes) > 1:
        return _compare(recipes, output, command, saving, tracking)
    [recipe] = recipes.values()
    return _run(recipe, output, None, command, saving, tracking)


def finished(recipe: Recipe, folder: Path, num_ranks: int) -> Results | None:
    """The results of a run that has finished; None if there are none.

    Raises:
        ValueError: they are those of another recipe.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    [results] = runs_in(path)
    _check_same(recipe.on(num_ranks), results["config"], folder, results["world_size"])
    return dict(results)


def all_finished(recipes: Mapping[str, Recipe], folder: Path, num_ranks: int) -> bool:
    """Whether ``run`` (of one recipe) or ``compare`` (of several) into a folder has finished."""
    several = len(recipes) > 1
    if several and not (folder / "comparison.json").exists():
        return False
    folders = [folder / folder_name(label) if several else folder for label in recipes]
    return all(
        finished(recipe, folder, num_ranks) is not None
        for recipe, folder in zip(recipes.values(), folders, strict=True)
    )


def check(recipe: Recipe, num_ranks: int) -> None:
    """Checks what can be checked of a recipe before anything is loaded.

    Raises:
        ValueError: names the setting, its value and the rule.
    """
    kind = strategy_named(recipe.strategy)
    recipe.check()
    check_split(recipe, num_ranks)
    check_several_ranks(recipe, num_ranks, kind.rehearses)
    check_targets(recipe, kind.takes_tensors, kind.rehearses)
    check_pretrained(recipe, not kind.solves)
    if recipe.device not in ("auto", "cpu"):
        accelerator_named(recipe.device)
    for name, allowed in (
        ("scenario", SCENARIOS),
        ("augmentation", AUGMENTATIONS),
        ("selection", SELECTION_POLICIES),
        ("sampling", SAMPLING_POLICIES),
    ):
        if getattr(recipe, name) not in allowed:
            raise ValueError(f"{name}={getattr(recipe, name)!r}: there are {', '.join(allowed)}")
    if kind.rehearses and not recipe.is_proportional:
        for name in ("samples_per_step", "first_share"):
            if getattr(recipe, name) is not None:
                raise ValueError(
                    f"{name}={getattr(recipe, name)} with composition={recipe.composition!r}: only "
                    "composition='proportional' has it; leave it out"
                )
    for name, is_set in (
        ("composition", recipe.is_proportional),
        ("soft_targets", recipe.soft_targets > 0),
        ("generated_share", recipe.generated_share > 0),
    ):
        if is_set and kind.num_draws and kind is not Rehearsal:
            without = "append" if name == "composition" else 0
            raise ValueError(
                f"{name}={getattr(recipe, name)!r} with strategy={recipe.strategy!r}: it weighs "
                f"new and past samples in its own way; use 'rehearsal', or {name}={without!r}"
            )
    generative.check(recipe)
    adapter.check(recipe)
    if isinstance(recipe.class_order, int):
        if recipe.class_order < 0:
            raise ValueError(f"class_order={recipe.class_order}: it must not be negative")
        if recipe.scenario not in IN_CLASS_ORDER:
            raise ValueError(
                f"class_order={recipe.class_order} with scenario={recipe.scenario!r}: classes come "
                f"one after another in {', '.join(IN_CLASS_ORDER)} alone"
            )
    check_stores(recipe)
    if kind.remembers_in_itself and not recipe.si_damping > 0:
        raise ValueError(f"si_damping={recipe.si_damping}: it must be above 0")
    if recipe.remembers == "last-epoch" and kind.observes:
        raise ValueError(
            f"remembers='last-epoch' with strategy={recipe.strategy!r}: it sees a task's samples "
            "once, before it trains; use remembers='stream'"
        )
    if recipe.offers_stream:
        return
    if recipe.remembers not in exemplars.CHOICES:
        raise ValueError(
            f"remembers={recipe.remembers!r}: there are stream, last-epoch, "
            f"{', '.join(exemplars.CHOICES)}"
        )
    if recipe.soft_targets and kind is Rehearsal:
        raise ValueError(
            f"remembers={recipe.remembers!r} with soft_targets={recipe.soft_targets}: exemplars "
            "are stored without logits; use remembers='stream'"
        )
    if kind.stores_logits or kind.observes:
        raise ValueError(
            f"remembers={recipe.remembers!r}: the strategy {recipe.strategy!r} fills its buffer "
            "from the stream; use remembers='stream'"
        )
    if recipe.remembers != "random" and recipe.selection != "first-offered":
        raise ValueError(
            f"remembers={recipe.remembers!r} with selection={recipe.selection!r}: exemplars come "
            "in the order of their importance, which only selection='first-offered' keeps"
        )


def go_on(trainer: Trainer, checkpoints: Checkpoints, fix: str = "give another --output") -> bool:
    """Goes on from the newest checkpoint that can be read, if there is any.

    Args:
        trainer: of the run.
        checkpoints: of the run.
        fix: what to do about checkpoints of another run.

    Returns:
        Whether there was one.

    Raises:
        ValueError: it is of another run.
        CheckpointError: none can be read.
    """
    while (found := checkpoints.newest()) is not None:
        saved = found.description
        _check_same(trainer.recipe, saved["recipe"], found.path, saved["num_ranks"], fix)
        names = [task.name for task in trainer.tasks]
        for what, then, now in (
            ("were", saved["task_names"], names),
            ("had (training, test) samples", saved["data_sizes"], trainer.data_sizes),
        ):
            if then != now:
                raise ValueError(
                    f"{found.path} is of a run on other data: its tasks {what} {then}, now {now}; "
                    f"{fix}"
                )
        try:
            trainer.go_on(found)
        except CheckpointError as error:
            checkpoints.reject(found, error)
            continue
        if trainer.place.rank == 0:
            say(f"resumed at {trainer.where}")
        return True
    return False


def _check_same(
    recipe: Recipe,
    saved: Mapping[str, Any],
    path: Path,
    num_ranks: int,
    fix: str = "give another --output",
) -> None:
    """Checks that a run that was saved is the one that is asked for.

    Raises:
        ValueError: names the settings that differ.
    """
    now = json.loads(json.dumps(asdict(recipe)))
    differing = [
        f"{name} was {saved[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in saved and name not in MAY_CHANGE and saved[name] != value
    ]
    if differing:
        raise ValueError(
            f"{path} is of another run ({num_ranks} rank{'s' if num_ranks > 1 else ''}): "
            f"{', '.join(differing)}; give the same settings, or {fix}"
        )


def write_outcome(
    folder: Path, results: Results, trainer: Trainer, ranks: Ranks, keep_buffer: bool
) -> None:
    """Writes what a finished run leaves; the results last, as they say that all is there."""
    buffer, network = trainer.strategy.buffer, trainer.network
    left = trainer.strategy.left(ranks.gather)
    with ranks.together(f"cannot write into {folder}"):
        if ranks.rank == 0:
            with new_file(folder / "model.pt") as file:
                torch.save(network.whole.state_dict(), file)
            if network.average is not None:
                with new_file(folder / "averaged.pt") as file:
                    torch.save(network.state_of(network.average.module), file)
            if left:
                with new_file(folder / "strategy.pt") as file:
                    torch.save(left, file)
        if keep_buffer and buffer is not None:
            buffer.save(folder / "buffer")
    with ranks.together(f"cannot write into {folder}"):
        if ranks.rank == 0:
            write_json(folder / "results.json", results)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
