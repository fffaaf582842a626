"""What results say, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ritornello.experiments.recipes.published import family_of
from ritornello.experiments.results.groups import Group, num_train_samples, reference_for
from ritornello.experiments.results.labels import WITHOUT_BUFFER, WITHOUT_PAST


def summary_of(groups: Sequence[Group]) -> str:
    """A few sentences that say what happened, for each recipe or family of recipes."""
    summaries = {family: _summary(alike) for family, alike in families_of(groups).items()}
    if len(summaries) == 1:
        return next(iter(summaries.values()))
    return " ".join(f"{family}: {text}" for family, text in summaries.items() if text)


def findings_of(groups: Sequence[Group]) -> dict[str, str]:
    """For each recipe or family of recipes one sentence: the best rehearsal beside both ends.

    Where it was not run beside incremental training it is the summary.
    """
    findings = {family: _finding(alike) for family, alike in families_of(groups).items()}
    return {family: text for family, text in findings.items() if text}


def families_of(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups by the family of their recipe."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        families.setdefault(family_of(group.recipe), []).append(group)
    return families


def buffer_of(group: Group) -> str:
    """Such as "200 (14.8 %)": representatives in the whole buffer, of the training samples."""
    if group.capacity is None:
        return "-"
    return f"{group.capacity:,} ({100 * group.capacity / num_train_samples(group.first):.1f} %)"


def duration(seconds: float) -> str:
    """A time in the unit that a reader would choose: "8.9 s", "12.5 min", "37.8 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"


def times_incremental(group: Group, groups: Sequence[Group]) -> float | None:
    """Training time in multiples of incremental training's; None without that to compare with."""
    reference = reference_for(group, groups, "incremental")
    if reference is None or not reference.seconds.mean:
        return None
    return group.seconds.mean / reference.seconds.mean


def _finding(groups: Sequence[Group]) -> str:
    rehearsing = [group for group in groups if group.strategy not in WITHOUT_BUFFER]
    if not rehearsing:
        return _summary(groups)
    best = max(rehearsing, key=lambda group: group.goodness)
    incremental = reference_for(best, groups, "incremental")
    if incremental is None:
        return _summary(groups)
    name, settings = best.strategy, ""
    if len(rehearsing) > 1:
        settings = f", the best of {len(rehearsing)} with a buffer,"
        _, _, what_varies = best.label.partition(f"{best.strategy}, ")
        name += f" ({what_varies})" if what_varies else ""
    text = (
        f"With {name}{_share(best)}{settings} the model ends at {_end(best)} over all tasks; "
        f"trained on new data alone it ends at {_end(incremental)}"
    )
    for strategy, how in (("from-scratch", "retrained"), ("joint", "trained once")):
        if reference := reference_for(best, groups, strategy):
            text += f", {how} on everything at {_end(reference)}"
            break
    return text + "." + _direction(groups) + _seeds(groups)


def _summary(groups: Sequence[Group]) -> str:
    by_strategy: dict[str, list[Group]] = {}
    for group in groups:
        by_strategy.setdefault(group.strategy, []).append(group)
    parts = []
    if incremental := by_strategy.get("incremental"):
        group = incremental[0]
        text = "Trained on new data alone, the model ends at "
        text += f"{_end(group)} over all tasks"
        if group.num_tasks > 1:
            lost = group.text(group.forgetting).removesuffix(" %")
            if group.measure.lower_is_better:
                text += f": on the earlier ones it has risen by {lost}"
            else:
                text += f": it has lost {lost} points on the earlier ones"
        parts.append(text + ".")
    for strategy, alike in by_strategy.items():
        if strategy in WITHOUT_PAST:
            continue
        best = max(alike, key=lambda group: group.goodness)
        ends = "it ends at" if parts else "the model ends at"
        text = f"With {strategy}{_share(best)} {ends} {_end(best)}"
        text += "" if parts else " over all tasks"
        if len(alike) > 1:
            text += f", the best of {len(alike)} settings ({best.label})"
        parts.append(text + _relative_time(best, groups) + ".")
    for strategy, text in (
        ("from-scratch", "Retraining on everything at every task reaches"),
        ("joint", "Training on everything at once reaches"),
    ):
        if reference := by_strategy.get(strategy):
            group = reference[0]
            parts.append(f"{text} {_end(group)}{_relative_time(group, groups)}.")
    return " ".join(parts) + (_direction(groups) + _seeds(groups)) * bool(parts)


def _end(group: Group) -> str:
    """What the models of a group can do at the end, such as "85.3 ± 0.9 %"."""
    text = group.text(group.average)
    return f"an error of {text}" if group.measure.lower_is_better else text


def _direction(groups: Sequence[Group]) -> str:
    """What is not said of accuracies, as everybody knows it."""
    return " Of errors lower is better." * groups[0].measure.lower_is_better


def _seeds(groups: Sequence[Group]) -> str:
    numbers = sorted({group.num_runs for group in groups})
    if numbers == [1]:
        return ""
    text = f"up to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    if any(len(group.class_orders) > 1 for group in groups):
        return f" (Means of {text} runs, over orders of classes, ± the sample standard deviation.)"
    return f" (Means of {text} seeds, ± the sample standard deviation.)"


def _relative_time(group: Group, groups: Sequence[Group]) -> str:
    multiple = times_incremental(group, groups)
    return "" if multiple is None else f", in {multiple:.1f} times the time"


def _share(group: Group) -> str:
    if group.strategy in WITHOUT_BUFFER:
        return ""
    capacity = group.capacity or 0
    num_samples = num_train_samples(group.first)
    if capacity >= num_samples:
        return f" from {capacity:,} representatives (room for all the data)"
    return f" from {capacity:,} representatives ({100 * capacity / num_samples:.1f} % of the data)"
