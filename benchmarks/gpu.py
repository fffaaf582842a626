"""The path over an accelerator: its tests, and what it costs beside a real training step.

    python benchmarks/gpu.py                        # on a machine with a GPU: a quarter of an hour
    python benchmarks/gpu.py --device cpu --tiny    # the same code with small sizes, anywhere

First all tests marked ``accelerator`` run. Then a ResNet-50 and a small network train in mixed
precision, with and without rehearsal, and a table shows the time of a step, also in a JSON file.
Ends with 1 if a test failed, with 2 if there is no accelerator.

Needs no network. Beside PyTorch and NumPy: rich, timm; for the tests pytest, pytest-timeout, and
for whole runs what else the extra ``experiments`` holds.

How to read it:

- "exposed" is a step's time less that of the same step on ``b + r`` samples that lie in pinned
  memory, without a buffer: what rehearsal costs beside having more samples to train on; "slower" is
  its share. It can be below zero, as ``rehearse`` copies mini-batches to the device ahead of time;
  the plain loop does not.
- "call" is how long ``update``, or the next mini-batch of ``rehearse``, keeps the trainer's thread.
- "waited" is how long of it the thread waited for rounds, "round" how long these took.
- The cases of a table take turns, block by block; medians over the blocks, of the slowest rank.
- Two ranks on one device share its time; no gradients travel between them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ritornello import RehearsalBuffer, __version__, rehearse
from ritornello.experiments.models import build as models
from ritornello.records import accelerators
from ritornello.testing import spawn_ranks
from ritornello.transports import CollectiveTransport
from ritornello.transports.collective import backends_for

CHECKOUT = Path(__file__).resolve().parents[1]
TESTS = [
    CHECKOUT / "tests" / each
    for each in (
        "accelerator",
        "records/test_accelerators.py",
        "experiments/models/test_augmentation.py",
        "experiments/strategies/test_finite_logits.py",
    )
]
NUM_BATCHES = 4
TIMEOUT_SECONDS = 120.0
RANKS_SECONDS = 600.0


@dataclass(frozen=True)
class Sizes:
    """Of the model and the buffer, per rank."""

    model: str
    image: tuple[int, int, int]
    num_classes: int
    batch_size: int
    num_candidates: int
    num_representatives: int
    num_rows: int
    num_steps: int
    """In a block."""
    num_blocks: int


FULL = Sizes("resnet50", (3, 224, 224), 1000, 56, 14, 7, 2000, 50, 5)
SMALL = Sizes("small-cnn", (3, 32, 32), 10, 56, 14, 7, 2000, 500, 5)
TINY = Sizes("small-cnn", (3, 16, 16), 10, 8, 4, 2, 40, 2, 2)


@dataclass(frozen=True)
class Setting:
    """A model, its precision, and the dtypes of its images."""

    sizes: Sizes
    precision: str
    dtypes: tuple[str, ...]


SETTINGS = (
    Setting(FULL, "float16", ("uint8", "float32")),
    Setting(FULL, "bfloat16", ("uint8",)),
    Setting(SMALL, "float16", ("uint8",)),
)
TINY_SETTINGS = (Setting(TINY, "bfloat16", ("uint8", "float32")),)


@dataclass
class Row:
    """One line of the table, times in milliseconds per step."""

    case: str
    model: str
    precision: str
    dtype: str
    num_ranks: int
    num_samples: int
    step: float
    exposed: float
    slower: float
    """The same as a share of the step without a buffer."""
    call: float
    waited: float
    round: float

    @property
    def group(self) -> tuple[str, str, str, int]:
        """What is compared has this in common."""
        return self.model, self.precision, self.dtype, self.num_ranks


@dataclass
class Case:
    """One way to train; ``step`` trains on one mini-batch."""

    name: str
    num_samples: int
    step: Callable[[], None]
    buffer: RehearsalBuffer | None = None
    seconds_in_calls: float = 0.0

    def called(self, call: Callable[[], Any]) -> Any:
        """Calls the buffer, and notes how long that keeps the trainer's thread."""
        began = time.perf_counter()
        result = call()
        self.seconds_in_calls += time.perf_counter() - began
        return result


class Training:
    """A model that learns from random images in mixed precision.

    Args:
        sizes: what to build.
        precision: "float16" or "bfloat16".
        device: where.
    """

    def __init__(self, sizes: Sizes, precision: str, device: torch.device) -> None:
        self.sizes, self.precision, self.device = sizes, precision, device
        model = models.build(sizes.model, sizes.num_classes, sizes.image)
        self._model = model.to(device, memory_format=torch.channels_last)
        self._optimiser = torch.optim.SGD(self._model.parameters(), lr=1e-3, momentum=0.9)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Forward, backward, step."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = images.contiguous(memory_format=torch.channels_last)
        self._optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, getattr(torch, self.precision)):
            logits = self._model(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimiser)
        self._scaler.update()

    def batches(self, dtype: str, num_samples: int) -> list[tuple[Tensor, Tensor]]:
        """Mini-batches in CPU memory, pinned if the device has streams."""
        generator = torch.Generator().manual_seed(0)
        shape = (num_samples, *self.sizes.image)
        found = []
        for _ in range(NUM_BATCHES):
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            if dtype == "float32":
                images = images / 255
            labels = torch.randint(self.sizes.num_classes, (num_samples,), generator=generator)
            pin = accelerators.has_streams(self.device)
            found.append((images.pin_memory(), labels.pin_memory()) if pin else (images, labels))
        return found

    def synchronise(self) -> None:
        """Waits for the device."""
        accelerators.synchronize(self.device)


def without_buffer(training: Training, dtype: str, num_samples: int, name: str) -> Case:
    """The plain loop."""
    loader = cycle(training.batches(dtype, num_samples))

    def step() -> None:
        images, labels = (each.to(training.device, non_blocking=True) for each in next(loader))
        training.step(images, labels)

    return Case(name, num_samples, step)


@contextmanager
def rehearsal(
    training: Training, dtype: str, name: str, num_ranks: int = 1, ahead: bool = True, **where: Any
) -> Iterator[Case]:
    """A full buffer beside the training.

    Args:
        training: the model.
        dtype: of the images.
        name: of the case.
        num_ranks: that share the buffer.
        ahead: whether ``rehearse`` prepares mini-batches, or ``update`` is called in the loop.
        where: ``storage`` and ``transport``.
    """
    sizes = training.sizes
    batches = training.batches(dtype, sizes.batch_size)
    with RehearsalBuffer(
        sizes.num_rows * num_ranks,
        num_representatives=sizes.num_representatives,
        num_candidates=sizes.num_candidates,
        timeout_seconds=TIMEOUT_SECONDS,
        **where,
    ) as buffer:
        placed = [tuple(leaf.to(training.device) for leaf in batch) for batch in batches]
        filling = cycle(placed)
        while len(buffer) < sizes.num_rows * num_ranks:
            buffer.update(next(filling))
        del placed, filling
        num_samples = sizes.batch_size + sizes.num_representatives
        if not ahead:
            loader = cycle(batches)

            def update() -> None:
                batch = [leaf.to(training.device, non_blocking=True) for leaf in next(loader)]
                training.step(*case.called(lambda: buffer.update(batch)))

            case = Case(name, num_samples, update, buffer)
            yield case
            return
        augmented = rehearse(cycle(batches), buffer, training.device)

        def step() -> None:
            training.step(*case.called(lambda: next(augmented)))

        case = Case(name, num_samples, step, buffer)
        try:
            yield case
        finally:
            augmented.close()  # type: ignore[attr-defined]


def measure(training: Training, dtype: str, num_ranks: int, cases: list[Case]) -> list[Row]:
    """The cases in turn; the first block of each is not counted."""
    sizes = training.sizes
    seconds: list[list[float]] = [[] for _ in cases]
    before = []
    for block in range(sizes.num_blocks + 1):
        if block == 1:
            before = [case.buffer and case.buffer.stats(per_class=False) for case in cases]
            for case in cases:
                case.seconds_in_calls = 0.0
        for case, of_case in zip(cases, seconds, strict=True):
            training.synchronise()
            if num_ranks > 1:
                dist.barrier()
            began = time.perf_counter()
            for _ in range(sizes.num_steps):
                case.step()
            training.synchronise()
            if block:
                of_case.append((time.perf_counter() - began) / sizes.num_steps)
    rows = []
    for case, of_case, then in zip(cases, seconds, before, strict=True):
        waited = of_rounds = 0.0
        num_steps = sizes.num_steps * sizes.num_blocks
        if case.buffer is not None and then is not None:
            now = case.buffer.stats(per_class=False)
            spent = sum(now.seconds_per_stage.values()) - sum(then.seconds_per_stage.values())
            of_rounds = spent / (now.num_rounds - then.num_rounds)
            waited = (now.seconds_waited - then.seconds_waited) / num_steps
        step = statistics.median(of_case)
        call = case.seconds_in_calls / num_steps
        about = case.name, sizes.model, training.precision, dtype, num_ranks, case.num_samples
        rows.append(Row(*about, step, 0.0, 0.0, call, waited, of_rounds))
    return rows


def baselines(training: Training, dtype: str) -> list[Case]:
    """Training on ``b`` and on ``b + r`` samples; the last one is what others are compared with."""
    sizes = training.sizes
    augmented = sizes.batch_size + sizes.num_representatives
    return [
        without_buffer(training, dtype, sizes.batch_size, "no buffer, b samples"),
        without_buffer(training, dtype, augmented, "no buffer, b + r samples"),
    ]


def one_rank(setting: Setting, device: torch.device, folder: str) -> list[Row]:
    """All kinds of storage in one process, and the collective transport with one rank."""
    training, rows = Training(setting.sizes, setting.precision, device), []
    on_device = device.type != "cpu"
    storages = ("cpu", "pinned", "shared", device.type) if on_device else ("cpu", "shared")
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(
        backends_for(device) if on_device else "gloo",
        store=dist.FileStore(f"{folder}/store", 1),
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        for dtype in setting.dtypes:
            with ExitStack() as stack:
                cases = baselines(training, dtype)
                for storage in storages:
                    where = {"storage": storage}
                    name = f"rehearse, shard in {storage!r}"
                    cases.append(stack.enter_context(rehearsal(training, dtype, name, **where)))
                cases.append(
                    stack.enter_context(
                        rehearsal(training, dtype, "update in the loop", ahead=False)
                    )
                )
                transport = CollectiveTransport.beside(None, TIMEOUT_SECONDS, device)
                where = {"transport": transport, "storage": device}
                name = f"rehearse, {backend} with one rank"
                cases.append(stack.enter_context(rehearsal(training, dtype, name, **where)))
                rows += measure(training, dtype, 1, cases)
    finally:
        dist.destroy_process_group()
    return rows


def two_ranks(rank: int, setting: Setting, device: str) -> list[Row]:
    """Both transports that two ranks on one device can use."""
    training, rows = Training(setting.sizes, setting.precision, torch.device(device)), []
    for dtype in setting.dtypes:
        with ExitStack() as stack:
            cases = baselines(training, dtype)
            for transport, storage in (("shared_memory", "shared"), ("collective", "cpu")):
                name = f"rehearse over {transport}"
                where = {"transport": transport, "storage": storage}
                cases.append(stack.enter_context(rehearsal(training, dtype, name, 2, **where)))
            rows += measure(training, dtype, 2, cases)
    return rows


def slowest(of_ranks: list[Any]) -> list[Row]:
    """Each row's largest times over the ranks.

    Raises:
        RuntimeError: a rank failed.
    """
    for rank, outcome in enumerate(of_ranks):
        if not isinstance(outcome, list):
            cause = outcome if isinstance(outcome, BaseException) else None
            raise RuntimeError(f"rank {rank} of two on one device failed: {outcome}") from cause
    rows = []
    for same in zip(*of_ranks, strict=True):
        row = Row(**asdict(same[0]))
        for figure in ("step", "call", "waited", "round"):
            setattr(row, figure, max(getattr(each, figure) for each in same))
        rows.append(row)
    return rows


def in_milliseconds(rows: list[Row]) -> list[Row]:
    """The rows with their exposed times, all in milliseconds."""
    plain = {each.group: each.step for each in rows if each.case == "no buffer, b + r samples"}
    for row in rows:
        if "no buffer" not in row.case:
            row.exposed = row.step - plain[row.group]
            row.slower = round(row.exposed / plain[row.group], 4)
        for figure in ("step", "exposed", "call", "waited", "round"):
            setattr(row, figure, round(1e3 * getattr(row, figure), 3))
    return rows


def run_tests(paths: list[Path]) -> dict[str, int]:
    """Runs the tests marked ``accelerator``; how many there were, were skipped and failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "accelerator"]
        command += ["--continue-on-collection-errors", f"--junitxml={report}"]
        subprocess.run([*command, *map(str, paths)], cwd=CHECKOUT, check=False)
        if not report.exists():
            return {"tests": 0, "skipped": 0, "failed": 1}
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        counts = dict.fromkeys(("tests", "skipped", "failures", "errors"), 0)
        for suite in suites:
            for name in counts:
                counts[name] += int(suite.get(name, "0"))
    failed = counts.pop("failures") + counts.pop("errors")
    return {**counts, "failed": failed}


def table_of(rows: list[Row], title: str) -> Table:
    """For the terminal."""
    table = Table(title=title, title_justify="left")
    for name in ("", "model", "precision", "images", "ranks", "samples"):
        table.add_column(name, justify="right" if name in ("ranks", "samples") else "left")
    for name in ("step [ms]", "exposed [ms]", "slower", "call [µs]", "waited [µs]", "round [ms]"):
        table.add_column(name, justify="right")
    last = None
    for row in rows:
        if last not in (None, row.group):
            table.add_section()
        last = row.group
        figures = [f"{row.exposed:.2f}", f"{row.slower:.1%}", f"{1e3 * row.call:.0f}"]
        figures += [f"{1e3 * row.waited:.0f}", f"{row.round:.2f}"]
        about = row.case, row.model, row.precision, row.dtype, row.num_ranks, row.num_samples
        has_buffer = "no buffer" not in row.case
        table.add_row(*map(str, about), f"{row.step:.2f}", *(figures if has_buffer else ()))
    return table


def machine_of(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    on_cuda = device.type == "cuda"
    name = accelerators.name_of(device)
    return {
        "device": f"CPU, {platform.machine()}" if device.type == "cpu" else name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_cuda else None,
        "ritornello": __version__,
        "threads": torch.get_num_threads(),
    }


def device_for(name: str) -> torch.device | None:
    """The device with that name, the machine's accelerator for "auto"; None: it has none."""
    if name == "cpu":
        return torch.device(name)
    if not accelerators.is_available():
        return None
    return accelerators.current_device() if name == "auto" else torch.device(name)


def main() -> int:
    """Tests, measures, prints and writes; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, or an accelerator's name")
    parser.add_argument("--tiny", action="store_true", help="small sizes: to see that it works")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where figures go")
    parser.add_argument("--tests", type=Path, nargs="*", default=TESTS, help="none: only measure")
    arguments = parser.parse_args()
    device = device_for(arguments.device)
    if device is None:
        print(
            "benchmarks/gpu.py: PyTorch finds no accelerator here; --device cpu --tiny shows that "
            "the script itself works",
            file=sys.stderr,
        )
        return 2
    settings = TINY_SETTINGS if arguments.tiny else SETTINGS
    tests = run_tests(arguments.tests) if arguments.tests else None
    rows = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            rows += one_rank(setting, device, folder)
        ranks = spawn_ranks(2, two_ranks, setting, str(device), seconds=RANKS_SECONDS)
        rows += slowest(ranks)
    rows = in_milliseconds(rows)
    machine = machine_of(device)
    console = Console(width=150)
    title = f"Training in mixed precision, {machine['device']}, PyTorch {machine['torch']}"
    console.print(table_of(rows, title))
    if tests is not None:
        console.print(
            "tests marked accelerator: {tests}, skipped {skipped}, failed {failed}".format_map(
                tests
            )
        )
    figures = {
        "machine": machine,
        "settings": [asdict(each) for each in settings],
        "tests": tests,
        "rows": [asdict(row) for row in rows],
    }
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"figures: {arguments.json}")
    return 1 if tests is not None and tests["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
