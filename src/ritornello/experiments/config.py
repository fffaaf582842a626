"""The configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass

AMP_MODES = ("off", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but the number of ranks.

    Sizes are those of all ranks together, so that 1, 2 or 128 ranks are comparable.
    """

    name: str
    description: str
    data: str
    """See ``data.load``."""
    data_path: str | None = None
    image_size: int | None = None
    """Of data="folder"."""
    num_tasks: int = 5
    class_order: tuple[int, ...] | None = None
    """The classes as they arrive; None: ascending."""
    model: str = "mlp"
    """See ``models.build``."""
    strategy: str = "rehearsal"
    """See ``strategies``."""
    epochs: int = 1
    """Per task."""
    global_batch_size: int = 64
    """``N * b``."""
    learning_rate: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    """Over which the learning rate rises linearly, at the beginning of each task."""
    milestones: tuple[tuple[float, float], ...] = ()
    """(epoch, factor): from that epoch of a task on, the learning rate is multiplied by it."""
    capacity: int = 500
    """Representatives in the whole buffer."""
    global_num_representatives: int = 64
    """``N * r``."""
    global_num_candidates: int | None = None
    """``N * c``; None: every sample is a candidate."""
    selection: str = "class-balanced"
    amp: str = "off"
    """Mixed precision: "off", "bfloat16" or "float16"."""
    device: str = "auto"
    """"auto": one GPU per rank if there are any, else the CPU."""
    num_workers: int = 0
    """Loader processes per rank."""
    seed: int = 0

    def check(self, num_ranks: int) -> None:
        """Checks what can be checked before anything is loaded.

        Raises:
            ValueError: names the setting, its value and the rule.
        """
        if self.amp not in AMP_MODES:
            raise ValueError(f"amp={self.amp!r}: there are {', '.join(AMP_MODES)}")
        for name in ("epochs", "global_batch_size", "capacity", "global_num_representatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: it must be above 0")
        for name in ("global_batch_size", "global_num_representatives", "global_num_candidates"):
            value = getattr(self, name)
            if value is not None and value % num_ranks:
                below = value // num_ranks * num_ranks
                near = [each for each in (below, below + num_ranks) if each > 0]
                raise ValueError(
                    f"{name}={value} does not divide evenly over {num_ranks} ranks; "
                    f"take {' or '.join(map(str, near))}, or another number of ranks"
                )

    def learning_rate_factor(self, epoch: float) -> float:
        """What the learning rate is multiplied by at a time within a task."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        passed = [factor for start, factor in sorted(self.milestones) if epoch >= start]
        return passed[-1] if passed else 1.0
