"""What runs have written down: reading it again, and putting many runs into one small file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ritornello.experiments.results.labels import labels_of
from ritornello.experiments.results.run_folder import COMPLETE, IN_WORK
from ritornello.experiments.results.writing import Results

FORMAT = 1

ARCHIVED = (
    "format",
    "recipe",
    "strategy",
    "seed",
    "world_size",
    "config",
    "versions",
    "machine",
    "date",
    "command",
    "top1",
    "top5",
    "loss",
    "error",
    "error_of_parts",
    "average_top1",
    "average_top5",
    "average_loss",
    "average_error",
    "average_error_of_parts",
    "averaged_top1",
    "averaged_top5",
    "average_averaged_top1",
    "average_averaged_top5",
    "averaged_error",
    "average_averaged_error",
    "average_incremental_top1",
    "plasticity",
    "average_incremental_error",
    "error_when_learnt",
    "average_anytime_top1",
    "average_anytime_error",
    "stability_gap",
    "min_accuracy",
    "worst_case_accuracy",
    "max_error",
    "worst_case_error",
    "forgetting",
    "forgetting_in_loss",
    "backward_transfer",
    "forward_transfer",
    "seconds",
    "seconds_embedding",
    "step_seconds",
    "train_samples",
    "train_samples_per_rank",
    "samples_per_step",
    "buffer",
    "costs",
)
"""What an archive keeps of a run."""


def load_results(folders: Sequence[str | Path]) -> dict[str, Results]:
    """Reads what ``ritornello run`` and ``compare`` have written.

    Returns:
        A label for each run to its results; the label is the strategy where that is enough.

    Raises:
        FileNotFoundError: a folder holds no results.
        ValueError: a file that is no results of this format.
    """
    found: list[tuple[Path, Results]] = []
    for folder in map(Path, folders):
        paths = [folder / "comparison.json", folder / "results.json"]
        path = next((each for each in paths if each.exists()), None)
        if path is None:
            raise FileNotFoundError(
                f"{folder} holds neither results.json nor comparison.json: give the output "
                "folder of 'ritornello run' or 'ritornello compare'"
            )
        found += [(folder, run) for run in runs_in(path)]
    labels = labels_of([run for _, run in found])
    results: dict[str, Results] = {}
    for label, (folder, run) in zip(labels, found, strict=True):
        if labels.count(label) > 1:
            label = f"{label} ({folder})"
        while label in results:
            label += " again"
        results[label] = run
    return results


def find_results(sources: Sequence[str | Path]) -> list[Results]:
    """Reads every run that lies anywhere below some folders, or in archives.

    Args:
        sources: folders and files. ``comparison.json`` is read only where no ``results.json``
            lies below it: it holds the same runs.

    Returns:
        The runs, each once, in the order of the sources and of the names of their files.

    Raises:
        FileNotFoundError: a source is not there, or holds no results.
        ValueError: a file that is no results of this format.
    """
    runs: dict[str, Results] = {}
    for source in map(Path, sources):
        paths = [source] if source.is_file() else _result_files(source)
        if not paths:
            raise FileNotFoundError(
                f"{source}: neither a file, nor a folder with a results.json or comparison.json "
                "anywhere below it; give output folders of 'ritornello run' or 'compare', or an "
                "archive"
            )
        for path in paths:
            for run in runs_in(path):
                identity = [run[name] for name in ("config", "strategy", "world_size", "date")]
                runs.setdefault(json.dumps(identity, sort_keys=True), run)
    return list(runs.values())


def archive(runs: Iterable[Results], path: Path) -> None:
    """Writes runs into one file that is small enough to be committed, one line per run.

    What is bulky is left out: the tasks, the classes in the buffer, times and steps per task.
    The accuracy matrices are rounded to 4 digits, those of errors to 6 significant ones.

    Args:
        runs: of any recipes.
        path: of the file; its folder is made if need be.
    """
    lines = ",\n".join(json.dumps(_compact(run)) for run in runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"format": {FORMAT}, "runs": [\n{lines}\n]}}\n')


def runs_in(path: Path) -> Iterator[Results]:
    """The runs of a ``results.json``, a ``comparison.json`` or an archive.

    Raises:
        ValueError: the file is none of them.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    runs: list[Any] = [content]
    if isinstance(content, dict) and "strategy" not in content:
        if isinstance(content.get("runs"), list):
            runs = content["runs"]
        elif "format" not in content:
            runs = list(content.values()) or runs
    for run in runs:
        if not (isinstance(run, dict) and run.get("format") == FORMAT and "strategy" in run):
            raise ValueError(
                f"{path} holds no results of format {FORMAT}, as 'ritornello run' writes them"
            )
        yield run


def _compact(run: Results) -> dict[str, Any]:
    compact = {name: run[name] for name in ARCHIVED if name in run}
    for name in {"top1", "top5", "loss", "averaged_top1", "averaged_top5"} & set(compact):
        compact[name] = [
            [None if each is None else round(each, 4) for each in row] for row in run[name]
        ]
    for name in {"error", "averaged_error"} & set(compact):
        compact[name] = _significant(run[name])
    if "error_of_parts" in compact:
        compact["error_of_parts"] = {
            part: _significant(matrix) for part, matrix in run["error_of_parts"].items()
        }
    if compact.get("buffer"):
        compact["buffer"] = {k: v for k, v in run["buffer"].items() if k != "held_per_class"}
    return compact


def _significant(matrix: list[list[float | None]]) -> list[list[float | None]]:
    """Errors, which may be of any size, with 6 significant digits."""
    return [[None if each is None else float(f"{each:.6g}") for each in row] for row in matrix]


def _result_files(folder: Path) -> list[Path]:
    singles = sorted(each for each in folder.rglob("results.json") if not _is_in_work(each))
    comparisons = [
        each
        for each in sorted(folder.rglob("comparison.json"))
        if not any(single.is_relative_to(each.parent) for single in singles)
    ]
    return sorted(singles + comparisons)


def _is_in_work(path: Path) -> bool:
    """Whether results are those of an extension that has not ended: see ``run_folder``."""
    folder = path.parent
    return folder.name in (IN_WORK, COMPLETE) and (folder.parent / "results.json").exists()
