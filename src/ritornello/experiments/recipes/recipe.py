"""The configuration of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

AMP_MODES = ("off", "bfloat16", "float16")

OPTIMISERS = ("sgd", "adam")

DISTANCES = ("mse", "js")

PRIORS = ("gaussian", "dirichlet")
LOSSES = ("cross-entropy", "mae", "mse")

COMPOSITIONS: dict[str, dict[str, Any]] = {
    "append": {"sampling": "uniform", "loss_weights": "by-task"},
    "proportional": {"sampling": "earlier-tasks", "loss_weights": "by-sample"},
}
"""How a step is composed, and what a recipe takes with it that was composed otherwise."""

CHANGED_IMAGES = ("domain-incremental-permuted", "domain-incremental-rotated")
"""Scenarios whose tasks show the same images otherwise."""

WITH_ADAPTERS = ("adapter", "adapter-rehearsal")
"""Strategies that have them."""

MAX_RATE_SCALE = 64
"""Where recipes scale with the ranks: the learning rate grows with them up to here."""

MACHINE_SETTINGS = ("data_path", "device", "num_workers", "channels_last", "compile", "amp")
"""Settings that a published figure should not depend on; nor should it on the seed."""

OBSERVATIONS = ("averaged", "probe_every")
"""Settings that add figures to the results, and change nothing of what is there without them."""

DESCRIPTIONS = ("name", "description", "published", "tuned_on")
"""Fields of a recipe that are not settings."""


@dataclass(frozen=True)
class Published:
    """A figure of others that a recipe reproduces."""

    top1: float | None
    """Average top-1 at the end, in percent; None where only ``top5`` was published."""
    spread: float | None
    """Its standard deviation over ``num_runs`` (or what ``source`` says), in percent."""
    num_runs: int | None
    source: str
    top5: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but the number of ranks.

    Sizes are those of all ranks together, so that 1, 2 or 128 ranks are comparable; see
    ``scales_with_ranks`` for recipes whose authors gave those of one rank.
    """

    name: str
    description: str

    # The stream.
    data: str
    """See ``data.load``."""
    data_path: str | None = None
    image_size: int | None = None
    """Images that are decoded from files are resized to it and cropped at the centre; diffraction
    patterns have this height and width. Of images in arrays what the model sees is resized to it,
    behind the augmentation."""
    scenario: str = "class-incremental"
    """See ``scenarios.SCENARIOS``."""
    num_tasks: int = 5
    class_order: tuple[int, ...] | str | int | None = None
    """The classes as they arrive; "by-seed": in an order that the seed decides; a number: in an
    order that this number draws, whatever the seed; None: ascending."""
    blur: float = 0.1
    """With scenario="blurry": the share of a task's samples that are of other tasks' classes."""
    holdout: float = 0.0
    """The share of the training samples that stands in for the test samples; 0: these are tested
    with. See ``data.holdout``."""
    ranks_differ: float | None = None
    """Each rank has training samples of its own, with shares of each class from the Dirichlet
    distribution of this parameter; None: all ranks draw on the same. See ``data.unlike_ranks``."""

    # The pixels that the model sees. What the buffer stores is neither normalised nor augmented.
    pixels: str = "standardised"
    """"standardised": mean 0, deviation 1 per channel; with ``weights`` as the model was trained;
    "unit": from 0 to 1."""
    augmentation: str = "none"
    """See ``augmentation.AUGMENTATIONS``."""
    crop_size: int | None = None
    """What augmentations crop to, if it is another size than the image's."""

    # The model.
    model: str = "mlp"
    """See ``models.build``."""
    weights: str | None = None
    """What a model of timm begins with: a file of tensors; or "timm", what timm downloads; None:
    it is untrained. See ``models.weights``."""
    backbone_rate: float = 1.0
    """The learning rate of all but the last layer, in multiples of ``learning_rate``; 0: they are
    frozen, with their running statistics."""
    tuned_stages: int = 0
    """With a frozen backbone, how many of its last stages learn all the same (of a transformer:
    blocks); with adapters see ``adapted_stages``."""
    dropout: float = 0.0
    channels_last: bool = False
    compile: bool = False
    """Whether ``torch.compile`` compiles the model."""
    amp: str = "off"
    """Mixed precision: "off", "bfloat16" or "float16"."""

    # How it learns.
    loss: str = "cross-entropy"
    """"cross-entropy" of classes; of targets that are tensors "mae", the mean absolute error, or
    "mse", the mean squared one; of targets in parts, the sum of the parts' errors."""
    strategy: str = "rehearsal"
    """See ``strategies``."""
    alpha: float = 0.5
    """Weight of the distance to stored logits (DER, DER++)."""
    distance: str = "mse"
    """Of logits: "mse", squared; or "js", the Jensen-Shannon divergence of their softmaxes."""
    beta: float = 0.5
    """Weight of the second draw's labels (DER++)."""
    si_strength: float = 0.1
    """Weight of the surrogate loss (si, si-rehearsal, fedssi)."""
    si_damping: float = 0.1
    """What keeps weights that hardly move from a large importance (si, si-rehearsal, fedssi)."""
    locality: float = 0.5
    """How far a rank's surrogate model goes its own way: above 0, and below 1 (fedssi)."""
    surrogate_steps: int = 100
    """Steps of the surrogate model at each task's end (fedssi)."""
    adapted_stages: int = 2
    """How many of a model's last stages have adapters (adapter, adapter-rehearsal). See
    ``models.adapters``."""
    adapter_width: int = 16
    """Hidden units that each adapter has for each task."""
    adapter_scale: float = 0.1
    """What the adapters' outputs are multiplied by."""
    orthogonality: float = 1.0
    """Weight of the loss that keeps the newest adapters orthogonal to those before."""
    ridge_penalty: float = 0.03
    """Of squared weights, in multiples of a feature's mean square over all samples (ridge)."""
    loss_weights: str = "by-sample"
    """How rehearsal weighs samples. "by-sample": all of the augmented mini-batch count the same;
    "by-task": in task k the new ones count 1/k, the past ones 1 - 1/k, together."""
    optimiser: str = "sgd"
    keeps_optimiser: bool = False
    """Whether the optimiser goes on from task to task; else each task has a new one."""
    epochs: int = 1
    """Passes over each task."""
    iterations: int | None = None
    """Steps per task, in place of epochs: its samples are passed over until there were as many."""
    global_batch_size: int = 64
    """``N * b``."""
    learning_rate: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    """How long the learning rate rises linearly, at the beginning of each task."""
    milestones: tuple[tuple[float, float], ...] = ()
    """(epoch, factor): from that epoch of a task on, the learning rate is multiplied by it."""
    stretches_schedule: bool = False
    """Whether another number of epochs moves warm-up and milestones in proportion."""
    local_steps: int = 0
    """Steps that each rank makes by itself, before weights are averaged over the ranks; 0:
    gradients are, in every step. See ``models.local_steps``."""

    # What a step is made of, where it rehearses.
    composition: str = "append"
    """"append": representatives are added to a mini-batch of new samples; "proportional": of a
    fixed number of samples the newest task gets its share of all that came so far."""
    samples_per_step: int | None = None
    """Of a proportional step, new and past ones, of all ranks together; None:
    ``global_batch_size + global_num_representatives``."""
    first_share: float | None = None
    """Proportional: the share of the new samples in a task's first step, from where it falls
    linearly to that at the task's end; None: as at the end."""
    share_floor: float = 0.0
    """Proportional: the least share of the new samples."""
    soft_targets: float = 0.0
    """Rehearsal: weight of the distance to what the model said of a representative when the last
    task had ended; 0: nothing of that is stored."""
    soft_temperature: float = 2.0
    """What logits are divided by for it."""
    generated_share: float = 0.0
    """Rehearsal: the share of the past samples that are generated instead of drawn; 0: none."""
    averaged: float = 0.0
    """The decay of a running average of the weights, which is tested beside them; 0: there is
    none. See ``models.network``."""

    # The buffer.
    capacity: int | float = 500
    """Representatives in the whole buffer; below 1: a fraction of the training samples."""
    global_num_representatives: int = 64
    """``N * r``. In a proportional step 0 leaves the number of samples as in incremental
    training."""
    global_num_candidates: int | None = None
    """``N * c``; None: every sample is a candidate."""
    capacity_bytes: int | None = None
    """Bytes of the whole buffer, over all ranks, that bound it beside ``capacity``; None: no bound,
    and where files are stored, what ``capacity`` files take."""
    stores: str = "pixels"
    """What the buffer stores of images: "pixels"; "files", what they are decoded from, of data
    sets that are folders of images; or "features", what the frozen layers make of them: these are
    the samples then, and all images pass the frozen layers once."""
    features_dtype: str = "float32"
    """How features are stored: "float32" or "float16"."""
    remembers: str = "stream"
    """"stream": candidates come from every mini-batch; "last-epoch": from those of a task's last
    epoch alone, so that what came before it stays whole until then; else how a task's exemplars
    are chosen at its end: see ``exemplars.CHOICES``."""
    selection: str = "class-balanced"
    fixed_shares: bool = False
    """Equal shares for all classes that will ever come, instead of those so far; of selection
    policies with class shares, and of exemplars."""
    sampling: str = "uniform"
    draws: str = "global"
    """Where a rank draws from: "global" (all shards) or "local" (its own)."""
    logits_dtype: str = "float32"
    """How logits are stored: "float32" or "float16"."""

    # The generator, where past samples are generated. See ``models.generator``.
    prior: str = "gaussian"
    """Of its latents: "gaussian" or "dirichlet"."""
    prior_concentration: float = 3.0
    """Of a Dirichlet prior."""
    latents: int = 100
    generator_units: int = 400
    """Of the two hidden layers of either half."""
    generator_learning_rate: float = 0.001
    """Of its own Adam, which goes on from task to task."""
    conditional: bool = True
    """Whether it is told the class, and asked for each class so far equally often. What it makes
    has the label that the model gave it when the last task had ended; with
    scenario="task-incremental" the class that was asked for."""
    distillation: float = 0.0
    """Weight of the distance of what is generated to the logits of the model as it was then."""

    # The machine.
    scales_with_ranks: bool = False
    """Whether sizes and learning rate are those of one rank: sizes are multiplied by the number
    of ranks, the learning rate by at most ``MAX_RATE_SCALE``."""
    device: str = "auto"
    """"auto": one GPU per rank if there are any, else the CPU."""
    num_workers: int = 0
    """Loader processes per rank."""
    seed: int = 0

    # What is measured on the way.
    probe_every: int = 0
    """Steps from one probe of the test samples to the next; 0: there are none. See
    ``training.probe``."""

    published: Published | None = None
    tuned_on: str | None = None
    """What the settings were chosen by, such as "the test samples"; None: not written down."""

    @classmethod
    def from_results(cls, config: Mapping[str, Any]) -> Recipe:
        """The recipe that the results of a run hold, as JSON gives it back.

        Raises:
            ValueError: it has settings that this version does not know.
        """
        unknown = sorted(set(config) - {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(
                f"the results have settings of another version of Ritornello: {', '.join(unknown)}"
            )
        read: dict[str, Any] = {name: _as_tuples(value) for name, value in config.items()}
        if read.get("published") is not None:
            read["published"] = Published(**read["published"])
        return cls(**read)

    def on(self, num_ranks: int) -> Recipe:
        """The recipe with sizes of all ranks together, for recipes that scale with the ranks."""
        if not self.scales_with_ranks:
            return self
        candidates = self.global_num_candidates
        return replace(
            self,
            scales_with_ranks=False,
            global_batch_size=self.global_batch_size * num_ranks,
            global_num_representatives=self.global_num_representatives * num_ranks,
            global_num_candidates=None if candidates is None else candidates * num_ranks,
            samples_per_step=(
                None if self.samples_per_step is None else self.samples_per_step * num_ranks
            ),
            learning_rate=self.learning_rate * min(num_ranks, MAX_RATE_SCALE),
        )

    @property
    def predicts_tensors(self) -> bool:
        """Whether targets are tensors, so that models are measured by errors; else classes."""
        return self.loss != "cross-entropy"

    @property
    def is_proportional(self) -> bool:
        """Whether steps are composed in proportion."""
        return self.composition == "proportional"

    @property
    def has_adapters(self) -> bool:
        """Whether adapters and the last layer are all that learns."""
        return self.strategy in WITH_ADAPTERS

    @property
    def freezes_trunk(self) -> bool:
        """Whether the model is split into a trunk, which is frozen, and a rest, which learns."""
        return self.has_adapters or self.backbone_rate == 0

    @property
    def num_last_stages(self) -> int:
        """Of the rest; 0: the last layer alone."""
        return self.adapted_stages if self.has_adapters else self.tuned_stages

    @property
    def offers_stream(self) -> bool:
        """Whether candidates come from mini-batches, of all epochs or of the last one."""
        return self.remembers in ("stream", "last-epoch")

    def own_candidates(self, num_ranks: int, is_in_last_epoch: bool = True) -> int | None:
        """The candidates of each rank and step, expected; None: all samples.

        Exemplars were chosen already; of a stream, every c-th may do.
        """
        if self.remembers == "last-epoch" and not is_in_last_epoch:
            return 0
        if self.global_num_candidates is None or not self.offers_stream:
            return None
        return self.global_num_candidates // num_ranks

    @property
    def composed_samples(self) -> int:
        """The samples of a proportional step, of all ranks together."""
        if self.samples_per_step is None:
            return self.global_batch_size + self.global_num_representatives
        return self.samples_per_step

    @property
    def global_num_generated(self) -> int:
        """Of the past samples of a step, those that are generated, on all ranks together."""
        share = 1.0 if self.strategy == "generative" else self.generated_share
        return round(share * self.global_num_representatives)

    def num_stored(self, num_train_samples: int) -> int:
        """The capacity in representatives."""
        if self.capacity < 1:
            return max(1, round(self.capacity * num_train_samples))
        return int(self.capacity)

    def check(self) -> None:
        """Checks what can be checked before anything is loaded, on any number of ranks.

        Raises:
            ValueError: names the setting, its value and the rule.
        """
        for name, allowed in (
            ("amp", AMP_MODES),
            ("optimiser", OPTIMISERS),
            ("loss", LOSSES),
            ("pixels", ("standardised", "unit")),
            ("loss_weights", ("by-sample", "by-task")),
            ("logits_dtype", ("float32", "float16")),
            ("stores", ("pixels", "files", "features")),
            ("features_dtype", ("float32", "float16")),
            ("composition", tuple(COMPOSITIONS)),
            ("distance", DISTANCES),
            ("prior", PRIORS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: there are {', '.join(allowed)}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value}: it must be a finite number")
        counts = ["epochs", "iterations", "global_batch_size", "latents", "generator_units"]
        if not self.is_proportional:
            counts.append("global_num_representatives")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        if not (0 < self.capacity < 1 or self.capacity == int(self.capacity) >= 1):
            raise ValueError(
                f"capacity={self.capacity}: it must be at least 1, or a fraction of the training "
                "samples between 0 and 1"
            )
        above_zero = ("learning_rate", "generator_learning_rate", "prior_concentration")
        for name in (*above_zero, "ridge_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: it must be above 0")
        weights = ("alpha", "beta", "si_strength", "soft_targets", "distillation")
        for name in (*weights, "weight_decay", "seed", "num_workers", "global_num_representatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: it must not be negative")
        if not 0 <= self.blur < 1:
            raise ValueError(f"blur={self.blur}: it must be from 0 to below 1")
        self._check_composition()
        self._check_soft_targets()
        for name in ("momentum", "averaged", "holdout", "generated_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: it must be from 0 (off) to below 1"
                )
        if self.probe_every < 0:
            raise ValueError(f"probe_every={self.probe_every}: it must be 0 (off) or more steps")

    def _check_composition(self) -> None:
        if self.first_share is not None and not 0 < self.first_share <= 1:
            raise ValueError(f"first_share={self.first_share}: it must be above 0 and at most 1")
        if not 0 <= self.share_floor <= 1:
            raise ValueError(f"share_floor={self.share_floor}: it must be from 0 to 1")
        if self.is_proportional and self.loss_weights != "by-sample":
            raise ValueError(
                f"loss_weights={self.loss_weights!r} with composition='proportional': the "
                "composition gives each task its weight; use loss_weights='by-sample'"
            )

    def _check_soft_targets(self) -> None:
        if not self.soft_temperature > 0:
            raise ValueError(f"soft_temperature={self.soft_temperature}: it must be above 0")
        if self.soft_targets and self.scenario == "task-incremental":
            raise ValueError(
                f"soft_targets={self.soft_targets} with scenario='task-incremental': soft targets "
                "compare the classes of all tasks; leave them out"
            )

    def learning_rate_factor(self, epoch: float, step_epochs: float = 0.0) -> float:
        """What the learning rate is multiplied by in a step.

        Args:
            epoch: the time within the task at which the step begins.
            step_epochs: how long the step takes; the first one shall not have the rate 0.
        """
        if epoch < self.warmup_epochs:
            return min(1.0, (epoch + step_epochs) / self.warmup_epochs)
        passed = [factor for start, factor in sorted(self.milestones) if epoch >= start]
        return passed[-1] if passed else 1.0


def with_changes(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with some settings changed, and those that follow from them if they are not given.

    The published figure goes where a change makes the run another one than it was published for.
    """
    composition = changes.get("composition", recipe.composition)
    if composition != recipe.composition:
        changes = COMPOSITIONS.get(composition, {}) | changes
    if changes.get("composition") == "append":
        changes = {"samples_per_step": None, "first_share": None} | changes
    if recipe.stretches_schedule and changes.get("epochs") is not None:
        stretch = changes["epochs"] / recipe.epochs
        stretched = {
            "warmup_epochs": recipe.warmup_epochs * stretch,
            "milestones": tuple((epoch * stretch, each) for epoch, each in recipe.milestones),
        }
        changes = stretched | changes
    changed = replace(recipe, **changes)
    may_differ = {
        name: getattr(recipe, name) for name in ("seed", *OBSERVATIONS, *MACHINE_SETTINGS)
    }
    if replace(changed, **may_differ) != recipe:
        return replace(changed, published=None)
    return changed


def _as_tuples(value: Any) -> Any:
    """Lists, which JSON knows alone, as the tuples that they were."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
