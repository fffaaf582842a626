"""The training loop: build, train task by task, evaluate, write down.

Every rank calls ``run``; with a default process group the model is trained data-parallel.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import ritornello
from ritornello.experiments import metrics, models
from ritornello.experiments.config import Recipe
from ritornello.experiments.data import Batch, DataSet, LabelledImages, load
from ritornello.experiments.progress import ProgressBar
from ritornello.experiments.scenarios import class_incremental
from ritornello.experiments.strategies import Strategy, strategy_named

Results = dict[str, Any]

EVALUATION_BATCH_SIZE = 500


def compare(recipe: Recipe, strategies: Sequence[str], output: str | None) -> dict[str, Results]:
    """Runs a recipe with several strategies, one after another, on the same data.

    Returns:
        Strategy to results; the main rank also writes ``comparison.json``.
    """
    for strategy in strategies:
        strategy_named(strategy)
    recipe.check(_num_ranks())
    data = load(recipe.data, recipe.data_path, recipe.image_size)
    comparison = {}
    for strategy in strategies:
        folder = None if output is None else f"{output}/{strategy}"
        comparison[strategy] = run(replace(recipe, strategy=strategy), folder, data)
    if output is not None and _rank() == 0:
        _write_json(Path(output) / "comparison.json", comparison)
    return comparison


def run(recipe: Recipe, output: str | None = None, data: DataSet | None = None) -> Results:
    """Runs a recipe.

    Args:
        recipe: what to run.
        output: where the main rank writes ``results.json`` and ``model.pt``; None: nowhere.
        data: the data set, if it is loaded already.

    Returns:
        The results, the same on every rank but for times and the buffer's statistics.
    """
    recipe.check(_num_ranks())
    data = data or load(recipe.data, recipe.data_path, recipe.image_size)
    device = _device(recipe.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trainer = Trainer(recipe, data, device)
        try:
            # As JSON would give it back: what is returned is what is written.
            results: Results = json.loads(json.dumps(trainer.train()))
        finally:
            trainer.close()
    if output is not None and _rank() == 0:
        Path(output).mkdir(parents=True, exist_ok=True)
        torch.save(trainer.model.state_dict(), Path(output) / "model.pt")
        _write_json(Path(output) / "results.json", results)
    return results


@dataclass
class StepSeconds:
    """Where the time of the steps went, in seconds altogether."""

    load: float = 0.0
    """Waiting for the loader."""
    wait: float = 0.0
    """In the strategy: the exposed time of rehearsal."""
    train: float = 0.0
    """Forward, backward, all-reduce, optimiser."""
    num_steps: int = 0

    def means(self) -> dict[str, float]:
        """Per step."""
        steps = max(1, self.num_steps)
        return {"load": self.load / steps, "wait": self.wait / steps, "train": self.train / steps}


@dataclass
class TaskLog:
    """What is written down task by task."""

    top1: list[list[float]] = field(default_factory=list)
    top5: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


class Trainer:
    """One run on one rank.

    Args:
        recipe: what to run.
        data: its data set.
        device: of this rank.
    """

    def __init__(self, recipe: Recipe, data: DataSet, device: torch.device) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        self.rank, self.num_ranks = _rank(), _num_ranks()
        self.tasks = class_incremental(data, recipe.num_tasks, recipe.class_order)
        self.strategy: Strategy = strategy_named(recipe.strategy)(recipe, self.num_ranks)
        self.step_seconds = StepSeconds()
        self.log = TaskLog()
        self.mean, self.std = (
            torch.tensor(values, device=device).view(-1, 1, 1) * 255
            for values in (data.mean, data.std)
        )
        self.start_afresh()

    def train(self) -> Results:
        """Trains on all tasks, one after another."""
        at_start = self.evaluate()
        num_steps = sum(
            self.recipe.epochs * self.steps_per_epoch(self.training_indices(number))
            for number in range(len(self.tasks))
        )
        with ProgressBar(self.recipe.strategy, num_steps, visible=self.rank == 0) as bar:
            for number, task in enumerate(self.tasks):
                bar.describe(f"task {number + 1} of {len(self.tasks)}: {task.name}")
                if self.strategy.restarts:
                    self.start_afresh()
                began, steps_before = time.perf_counter(), self.step_seconds.num_steps
                self.train_task(number, bar)
                self.log.seconds.append(time.perf_counter() - began)
                self.log.steps.append(self.step_seconds.num_steps - steps_before)
                bar.describe("evaluating")
                for rows, row in zip((self.log.top1, self.log.top5), self.evaluate(), strict=True):
                    rows.append(row)
        return self.results(*at_start)

    def start_afresh(self) -> None:
        """Makes the untrained model, the same on every rank."""
        torch.manual_seed(self.recipe.seed)
        self.model = models.build(
            self.recipe.model, self.data.num_classes, self.data.image_shape
        ).to(self.device)
        self.parallel = (
            DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None
            )
            if self.num_ranks > 1
            else self.model
        )

    def train_task(self, number: int, bar: ProgressBar) -> None:
        """Trains on one task, for all its epochs."""
        recipe = self.recipe
        indices = self.training_indices(number)
        optimiser = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        steps_per_epoch = self.steps_per_epoch(indices)
        scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "float16")
        self.parallel.train()
        for epoch in range(recipe.epochs):
            batches = self.batches(indices, number, epoch)
            for step in range(steps_per_epoch):
                factor = recipe.learning_rate_factor(epoch + (step + 1) / steps_per_epoch)
                for group in optimiser.param_groups:
                    group["lr"] = recipe.learning_rate * factor
                began = time.perf_counter()
                batch = next(batches)
                images, labels = (leaf.to(self.device, non_blocking=True) for leaf in batch)
                loaded = time.perf_counter()
                images, labels = self.strategy.augment(images, labels)
                augmented = time.perf_counter()
                optimiser.zero_grad(set_to_none=True)
                with self.autocast():
                    loss = nn.functional.cross_entropy(self.parallel(self.normal(images)), labels)
                scaler.scale(loss).backward()
                scaler.step(optimiser)
                scaler.update()
                self.step_seconds.load += loaded - began
                self.step_seconds.wait += augmented - loaded
                self.step_seconds.train += time.perf_counter() - augmented
                self.step_seconds.num_steps += 1
                bar.advance()

    def evaluate(self) -> tuple[list[float], list[float]]:
        """Top-1 and top-5 accuracy on every task, each sample counted once over all ranks."""
        correct = torch.zeros(len(self.tasks), 2, dtype=torch.int64)
        self.parallel.eval()
        with torch.no_grad(), self.autocast():
            for number, task in enumerate(self.tasks):
                mine = task.test_indices[self.rank :: self.num_ranks]
                batches = np.array_split(mine, -(-len(mine) // EVALUATION_BATCH_SIZE) or 1)
                for batch in self.loader(self.data.test, [b for b in batches if len(b)]):
                    images, labels = (leaf.to(self.device) for leaf in batch)
                    logits = self.model(self.normal(images))
                    correct[number] += metrics.top_k_correct(logits, labels, (1, 5)).cpu()
        if self.num_ranks > 1:
            dist.all_reduce(correct)
        sizes = torch.tensor([[max(1, len(task.test_indices))] for task in self.tasks])
        top1, top5 = (correct / sizes).T.tolist()
        return top1, top5

    def training_indices(self, number: int) -> NDArray[np.int64]:
        """The samples that the strategy trains on in a task."""
        tasks = self.strategy.training_tasks(self.tasks[: number + 1])
        return np.concatenate([task.train_indices for task in tasks])

    def steps_per_epoch(self, indices: NDArray[np.int64]) -> int:
        """Full global mini-batches; what is left over comes another epoch.

        Raises:
            ValueError: not even one.
        """
        if len(indices) < self.recipe.global_batch_size:
            raise ValueError(
                f"a task has {len(indices)} training samples, fewer than "
                f"global_batch_size={self.recipe.global_batch_size}: take a smaller one"
            )
        return len(indices) // self.recipe.global_batch_size

    def batches(self, indices: NDArray[np.int64], task: int, epoch: int) -> Iterator[Batch]:
        """This rank's mini-batches of one epoch.

        The global mini-batches do not depend on the number of ranks.
        """
        order = np.random.default_rng([self.recipe.seed, task, epoch]).permutation(indices)
        shape = (self.steps_per_epoch(indices), self.num_ranks, -1)
        size = self.recipe.global_batch_size
        mine = order[: shape[0] * size].reshape(shape)[:, self.rank]
        return iter(self.loader(self.data.train, list(mine)))

    def loader(self, images: LabelledImages, batches: list[NDArray[np.int64]]) -> DataLoader[Batch]:
        """A loader of given mini-batches."""
        return DataLoader(
            images,
            batch_sampler=[batch.tolist() for batch in batches],
            collate_fn=_as_it_is,
            num_workers=self.recipe.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def normal(self, images: Tensor) -> Tensor:
        """uint8 images to normalised floats."""
        return (images.float() - self.mean) / self.std

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision, if the recipe asks for it."""
        if self.recipe.amp == "off":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.recipe.amp))

    def results(self, top1_at_start: list[float], top5_at_start: list[float]) -> Results:
        """Everything that ``results.json`` holds."""
        top1, top5 = np.array(self.log.top1), np.array(self.log.top5)
        return {
            "format": 1,
            "recipe": self.recipe.name,
            "strategy": self.recipe.strategy,
            "seed": self.recipe.seed,
            "world_size": self.num_ranks,
            "config": asdict(self.recipe),
            "versions": {
                "ritornello": ritornello.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "device": torch.cuda.get_device_name(self.device)
                if self.device.type == "cuda"
                else "CPU",
            },
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "tasks": [
                {
                    "name": task.name,
                    "classes": list(task.classes),
                    "train_samples": len(task.train_indices),
                    "test_samples": len(task.test_indices),
                }
                for task in self.tasks
            ],
            "top1": self.log.top1,
            "top5": self.log.top5,
            "top1_at_start": top1_at_start,
            "top5_at_start": top5_at_start,
            "average_top1": metrics.average_accuracy(top1),
            "average_top5": metrics.average_accuracy(top5),
            "forgetting": metrics.forgetting(top1),
            "backward_transfer": metrics.backward_transfer(top1),
            "forward_transfer": metrics.forward_transfer(top1, np.array(top1_at_start)),
            "seconds": sum(self.log.seconds),
            "seconds_per_task": self.log.seconds,
            "steps_per_task": self.log.steps,
            "step_seconds": self.step_seconds.means(),
            "buffer": self.strategy.stats(),
            "weights_sha256": weights_digest(self.model),
        }

    def close(self) -> None:
        """Gives back what the strategy holds."""
        self.strategy.close()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights: equal only if the models are bit-identical."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_it_is(batch: Any) -> Any:
    """The data sets give whole mini-batches: nothing is left to collate."""
    return batch


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device={name!r}: this machine has no CUDA device; use 'cpu'")
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def _write_json(path: Path, content: Any) -> None:
    """Writes beside, then renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1))
    beside.replace(path)
