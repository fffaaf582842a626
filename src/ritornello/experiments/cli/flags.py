"""The flags that change a recipe: its settings, its buffer, and what a comparison varies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe, with_changes

Switch = Literal["on", "off"]


@dataclass
class TaskChanges:
    """Settings to change that each task may have otherwise; what is not given stays as it is.

    Sizes are of all ranks together; in recipes that scale with the ranks, of one.
    """

    # How it learns.
    epochs: int | None = None
    """Passes over each task."""
    iterations: int | None = None
    """Steps per task, in place of epochs."""
    batch_size: int | None = None
    """New samples per step."""
    optimiser: str | None = None
    """sgd or adam."""
    keeps_optimiser: Switch | None = None
    """Whether momentum and the like go on from task to task."""
    learning_rate: float | None = None
    """At its highest: warm-up and milestones are the recipe's."""
    momentum: float | None = None
    """Of sgd."""
    weight_decay: float | None = None
    """Of all weights."""
    local_steps: int | None = None
    """Steps that each rank makes by itself before weights are averaged over the ranks; 0: gradients
    are averaged in every step."""
    alpha: float | None = None
    """DER, DER++: weight of the distance to the logits that the buffer remembers."""
    distance: str | None = None
    """Of logits, for --alpha and --distillation: mse, or js (Jensen-Shannon divergence of their
    softmaxes)."""
    beta: float | None = None
    """DER++: weight of the labels of a second draw."""
    orthogonality: float | None = None
    """adapter, adapter-rehearsal: weight of the loss that keeps the newest adapters orthogonal to
    those before."""
    loss_weights: str | None = None
    """by-sample, or by-task: in task k new samples count 1/k, past ones 1 - 1/k, together."""

    # What a step is made of.
    samples_per_step: int | None = None
    """With --composition proportional: new and past samples per step; if not given, the batch
    size and the representatives together."""
    first_share: float | None = None
    """With --composition proportional: the share of the new samples in a task's first step, from
    where it falls to the task's share of all samples so far."""
    share_floor: float | None = None
    """With --composition proportional: the least share of the new samples."""
    soft_targets: float | None = None
    """rehearsal: weight of what the model said of stored samples when the last task had ended."""
    soft_temperature: float | None = None
    """rehearsal: what logits are divided by for --soft-targets."""

    # The pixels and the arithmetic.
    augmentation: str | None = None
    """Of training images, representatives too: none, crop, crop-flip or resized-crop-flip."""
    dropout: float | None = None
    """The share of features that each step leaves out, for models that can."""
    amp: str | None = None
    """Mixed precision: off, bfloat16 or float16."""
    compile: Switch | None = None
    """Whether torch.compile compiles the model: a slow start, then faster steps."""
    channels_last: Switch | None = None
    """Memory format of images: faster convolutions on GPUs, above all in mixed precision."""

    # The machine.
    device: str | None = None
    """auto, cpu or an accelerator such as cuda."""
    workers: int | None = None
    """Loader processes per rank."""

    # What is measured beside.
    averaged: float | None = None
    """Decay of a running average of the weights, such as 0.999, which is tested too; 0: off."""
    probe_every: int | None = None
    """Steps from one probe of the test samples to the next, for curves over the steps; 0: off."""

    def as_changes(self) -> dict[str, Any]:
        """What is given, under the names that a recipe's fields have.

        Raises:
            ValueError: two settings contradict each other.
        """
        if self.epochs is not None and self.iterations is not None:
            raise ValueError("--epochs and --iterations: a task has one of the two; leave one out")
        fields = {
            "data": "data_path",
            "tasks": "num_tasks",
            "batch_size": "global_batch_size",
            "workers": "num_workers",
        }
        changes = {
            fields.get(name, name): value for name, value in vars(self).items() if value is not None
        }
        for each in ("compile", "channels_last", "keeps_optimiser", "fixed_shares", "conditional"):
            if each in changes:
                changes[each] = changes[each] == "on"
        if changes.get("class_order") == "ascending":
            changes["class_order"] = None
        if self.epochs is not None:
            changes["iterations"] = None
        return changes


@dataclass
class Changes(TaskChanges):
    """Settings to change; what is not given is as in the recipe. See ``TaskChanges``."""

    # The stream.
    data: str | None = None
    """An npz file, a folder of images, or where torchvision keeps the data set."""
    image_size: int | None = None
    """What images of a folder are resized to and cropped at the centre, in pixels; of images in
    arrays, what the model sees of them; with recipes for diffraction patterns, their size, a
    multiple of 16."""
    scenario: str | None = None
    """How the data become a stream of tasks: class-incremental, task-incremental,
    domain-incremental-permuted, domain-incremental-rotated, instance-incremental, blurry,
    arrivals, or group-incremental where targets are tensors."""
    tasks: int | None = None
    """How many tasks there are."""
    class_order: Literal["ascending", "by-seed"] | int | None = None
    """How classes arrive: ascending, in an order that the seed draws, or in one that a number
    draws, the same with every seed."""
    blur: float | None = None
    """With --scenario blurry: the share of a task's samples that are of other tasks' classes."""
    holdout: float | None = None
    """The share of the training samples that stands in for the test samples, such as 0.1, while
    settings are chosen."""
    ranks_differ: float | None = None
    """How unlike the ranks' data are: each has training samples of its own, with Dirichlet shares
    of each class: 0.1 (most of a class on one rank), 1, 100 (nearly alike)."""

    # The model.
    crop_size: int | None = None
    """What the model sees, in pixels, where crops are smaller than the images."""
    model: str | None = None
    """mlp, mlp-400, small-cnn, strided-cnn, halving-cnn, cifar-resnet18, or a model of timm; for
    diffraction patterns ptychonn, or with more channels than 8 ptychonn-32."""
    weights: str | None = None
    """What a model of timm begins with: a file of tensors (.safetensors, .pth, .pt or .bin), or
    timm: what timm downloads for it."""
    backbone_rate: float | None = None
    """The learning rate of all but the last layer, in multiples of the learning rate, from 0 (they
    are frozen) to 1."""
    tuned_stages: int | None = None
    """With --backbone-rate 0: how many of the last stages (of a transformer: blocks) learn all the
    same, with the last layer."""
    loss: str | None = None
    """Where targets are tensors: mae or mse, which is also the error in the results."""

    si_strength: float | None = None
    """si, si-rehearsal, fedssi: weight of what holds important weights back."""
    si_damping: float | None = None
    """si, si-rehearsal, fedssi: what keeps weights that hardly move from a large importance."""
    locality: float | None = None
    """fedssi: how far a rank's surrogate model goes its own way, above 0 and below 1."""
    surrogate_steps: int | None = None
    """fedssi: steps of the surrogate model at each task's end, at most as many as the task has."""
    ridge_penalty: float | None = None
    """ridge: of squared weights, in multiples of a feature's mean square over all samples."""

    adapted_stages: int | None = None
    """adapter, adapter-rehearsal: how many of the model's last stages (of a transformer: blocks)
    have adapters."""
    adapter_width: int | None = None
    """adapter, adapter-rehearsal: hidden units that each adapter has for each task."""
    adapter_scale: float | None = None
    """adapter, adapter-rehearsal: what the adapters' outputs are multiplied by."""

    # What is generated.
    generated_share: float | None = None
    """rehearsal: the share of the past samples that a generator makes, instead of the buffer."""
    prior: str | None = None
    """generative: of the generator's latents: gaussian or dirichlet."""
    prior_concentration: float | None = None
    """With --prior dirichlet: the lower, the fewer latents a sample has."""
    latents: int | None = None
    """generative: how many latents the generator has."""
    generator_units: int | None = None
    """generative: of the generator's hidden layers."""
    generator_learning_rate: float | None = None
    """generative: of the generator's own Adam."""
    conditional: Switch | None = None
    """generative: whether the generator is told classes, and asked for each equally often. The
    model labels what it makes, as it was when the last task had ended."""
    distillation: float | None = None
    """generative: weight of the distance to the logits of the model as it was then."""

    # What it remembers.
    logits_dtype: str | None = None
    """DER, DER++: of the logits that the buffer remembers: float32 or float16."""
    stores: str | None = None
    """What the buffer stores of images: pixels; files, what they are decoded from, of folders of
    images; or features, what a frozen backbone makes of them, once for the whole run."""
    features_dtype: str | None = None
    """With --stores features: of them, float32 or float16."""
    capacity_bytes: int | None = None
    """Bytes of the whole buffer, which bound it beside the capacity; if not given and files are
    stored, what as many take."""
    remembers: str | None = None
    """What the buffer gets: candidates of every step (stream), or of a task's last epoch alone
    (last-epoch); or a task's exemplars at its end: random, herding, closest-to-mean (the last two
    with --selection first-offered)."""
    fixed_shares: Switch | None = None
    """Equal shares of the buffer for all classes that will ever come, instead of those so far."""

    def applied_to(self, name: str, **further: Any) -> Recipe:
        """The recipe with that name and these changes.

        Args:
            name: of the recipe.
            further: changes of fields of the recipe; None: not changed.

        Raises:
            ValueError: there is no such recipe, or two settings contradict each other.
        """
        given = {name: value for name, value in further.items() if value is not None}
        return with_changes(recipe_named(name), **self.as_changes() | given)


@dataclass
class RehearsalChanges:
    """The buffer of a run, as far as it may change on the way."""

    composition: str | None = None
    """append (past samples are added to new ones) or proportional (of as many samples as both
    together the newest task gets its share of all that came so far)."""
    capacity: int | float | None = None
    """Representatives in the whole buffer; below 1: a fraction of the training samples, as 0.2."""
    representatives: int | None = None
    """Past samples added per step, on all ranks together."""
    candidates: int | None = None
    """Samples offered to the buffer per step, on all ranks together, expected."""
    sampling: str | None = None
    """Who is drawn: uniform, class-balanced, grasp or earlier-tasks."""
    draws: str | None = None
    """Where a rank draws from: global (the shards of all ranks) or local (its own alone)."""

    def as_changes(self) -> dict[str, Any]:
        """What is given, under the names that a recipe's fields have."""
        fields = {
            "representatives": "global_num_representatives",
            "candidates": "global_num_candidates",
        }
        return {
            fields.get(name, name): value for name, value in vars(self).items() if value is not None
        }


@dataclass
class BufferChanges(RehearsalChanges):
    """The buffer of one run."""

    selection: str | None = None
    """Who is admitted, and who is replaced: class-balanced, per-class-random,
    class-balanced-reservoir, grasp, greedy-balanced, first-offered, reservoir or fifo."""


def check_kept(arguments: Sequence[str]) -> None:
    """Checks that a command line of ``extend`` changes nothing that a finished run keeps.

    Raises:
        ValueError: names the flag.
    """
    of_runs = {each.name for each in (*fields(Changes), *fields(BufferChanges))} - {"data"}
    may_change = {each.name for each in (*fields(TaskChanges), *fields(RehearsalChanges))}
    kept = {"strategy", "seed", "seeds", *of_runs} - may_change
    for each in arguments:
        flag = each.partition("=")[0]
        if flag.startswith("--") and flag.removeprefix("--").replace("-", "_") in kept:
            raise ValueError(
                f"extend {flag}: a finished run goes on with its own; another one makes another "
                "run, for 'ritornello run'. 'ritornello extend --help' lists what may change"
            )


@dataclass
class Sweep:
    """What to compare: every combination runs. What is not given is as in the recipe."""

    strategies: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--strategy",))] = ()
    """If not given: incremental, the recipe's own, from-scratch."""
    compositions: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--composition",))] = ()
    """append (past samples are added to new ones) or proportional (of as many samples as both
    together the newest task gets its share of all that came so far)."""
    capacities: Annotated[tuple[int | float, ...], tyro.conf.arg(aliases=("--capacity",))] = ()
    """Representatives in the whole buffer; below 1: a fraction of the training samples, as 0.2."""
    representatives: tuple[int, ...] = ()
    """Past samples added per step, on all ranks together."""
    candidates: tuple[int, ...] = ()
    """Samples offered to the buffer per step, on all ranks together, expected."""
    selections: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--selection",))] = ()
    """Who is admitted, and who is replaced: class-balanced, per-class-random,
    class-balanced-reservoir, grasp, greedy-balanced, first-offered, reservoir or fifo."""
    draws: tuple[str, ...] = ()
    """Where a rank draws from: global (the shards of all ranks), local (its own alone)."""
    samplings: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--sampling",))] = ()
    """Who is drawn: uniform, class-balanced, grasp or earlier-tasks."""
