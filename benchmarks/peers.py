"""What a round of this buffer takes, and one of others, on the same work in the same run.

    python benchmarks/peers.py --json peers.json

A round offers c candidates out of a mini-batch of b samples to a full buffer, draws r
representatives and joins them to the mini-batch (``torch.cat``). Rounds follow one another with
no training in between, so nothing is hidden behind it; torch has one thread. The first run makes
an environment with PyTorch, the other libraries and this checkout (minutes, some gigabytes);
the Python that starts it needs none of them. Repetitions take turns, and each is measured in ten
blocks; the table shows the median over all blocks, and their middle half.

How to read it:

- "x ours" is a round's time divided by ours, by default, with as many processes: below 1 is faster.
- "x floor" is the same for the plain copies: what is stored, drawn and joined is copied once, in
  the quickest way known here, on memory of each process's own, and there is nothing else.
- "ours, auto" is with ``asynchronous="auto"``. With the thread, which is for hiding rounds behind
  training, there is nothing to hide behind here.
- The policies differ. Ours balances classes, and draws without repetition over all ranks. TorchRL
  overwrites the oldest, plain tensors and copies overwrite at random. Avalanche's are named.
- Each does what is fastest for it. Avalanche stores references into a data set that stays in
  memory, and is read by index, as its ``ReplayDataLoader`` takes longer to start than to read.
  "draws only" is what it costs if the buffer is only updated between tasks.
- On 2 ranks, both do the whole work in every round, on a buffer of twice the size, and the slower
  one counts.
- Mammoth's buffer is a file of its repository, not on PyPI (as mammoth-cl): not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# What is measured is imported where it is used: a library that is missing or broken does not keep
# the others from being measured.
if TYPE_CHECKING:
    from torch import Tensor

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("avalanche-lib", "torchrl")
NUM_BLOCKS = 10
WAIT_SECONDS = 240.0


@dataclass(frozen=True)
class Workload:
    """Sizes per rank; samples are uint8."""

    name: str
    shape: tuple[int, ...]
    batch_size: int
    num_candidates: int
    num_representatives: int
    num_rows: int

    def samples(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Random images ``[n, ...]`` and labels ``[n]`` of ten classes."""
        import torch

        images = torch.randint(256, (num_samples, *self.shape), dtype=torch.uint8)
        return images, torch.arange(num_samples) % 10

    def candidates(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """The first c samples: for those who do not choose them."""
        return [leaf[: self.num_candidates] for leaf in batch]


WORKLOADS = (
    Workload("ImageNet-like", (3, 224, 224), 56, 14, 7, 2000),
    Workload("CIFAR-like", (3, 32, 32), 128, 16, 16, 10_000),
    Workload("MNIST-like", (1, 28, 28), 128, 32, 32, 10_000),
)


class Place(NamedTuple):
    """Which rank of how many, and a folder that they share."""

    rank: int
    num_ranks: int
    folder: str


class Rounds(NamedTuple):
    """A full buffer: one round, and what waits until the last one is over."""

    step: Callable[..., object]
    finish: Callable[[], object] = lambda: None


def join(batch: tuple[Tensor, ...], past: Any) -> list[Tensor]:
    """A mini-batch and representatives."""
    import torch

    return [torch.cat(pair) for pair in zip(batch, past, strict=True)]


@contextmanager
def ours(work: Workload, place: Place, **options: Any) -> Iterator[Rounds]:
    """The rehearsal buffer of this checkout, as it is by default, or with options."""
    from ritornello import RehearsalBuffer

    capacity = work.num_rows * place.num_ranks
    options |= {
        "num_representatives": work.num_representatives,
        "num_candidates": work.num_candidates,
    }
    with RehearsalBuffer(capacity, **options) as buffer:
        batch = work.samples(work.batch_size)
        while len(buffer) < capacity:
            buffer.update(batch)
        yield Rounds(lambda *batch: buffer.update(batch), lambda: len(buffer))


@contextmanager
def join_alone(work: Workload, place: Place) -> Iterator[Rounds]:
    """No buffer: what joining alone costs everybody."""
    past = work.samples(work.num_representatives)
    yield Rounds(lambda *batch: join(batch, past))


@contextmanager
def plain_tensors(work: Workload, place: Place) -> Iterator[Rounds]:
    """A few lines that anybody would write; overwrites at random."""
    import torch

    stored = work.samples(work.num_rows)

    def step(*batch: Tensor) -> object:
        written = torch.randint(work.num_rows, (work.num_candidates,))
        for leaf, candidates in zip(stored, work.candidates(batch), strict=True):
            leaf[written] = candidates
        read = torch.randint(work.num_rows, (work.num_representatives,))
        return join(batch, [leaf[read] for leaf in stored])

    yield Rounds(step)


@contextmanager
def plain_copies(work: Workload, place: Place) -> Iterator[Rounds]:
    """The floor: rows as 64-bit words, each copied once, into memory that is kept."""
    import numpy as np

    def words(leaf: Tensor) -> Any:
        return leaf.numpy().reshape(len(leaf), -1).view(np.int64)

    stored = [words(leaf) for leaf in work.samples(work.num_rows)]
    num_joined = work.batch_size + work.num_representatives
    joined = [words(leaf) for leaf in work.samples(num_joined)]
    random = np.random.default_rng(place.rank)

    def step(*batch: Tensor) -> object:
        written = random.integers(work.num_rows, size=work.num_candidates)
        read = random.integers(work.num_rows, size=work.num_representatives)
        for leaf, rows, out in zip(batch, stored, joined, strict=True):
            new = words(leaf)
            rows[written] = new[: work.num_candidates]
            out[: len(new)] = new
            np.take(rows, read, axis=0, out=out[len(new) :], mode="clip")
        return joined

    yield Rounds(step)


@contextmanager
def avalanche(work: Workload, place: Place, policy: str, update: bool = True) -> Iterator[Rounds]:
    """A storage policy of Avalanche, whose samples stay where the data set has them."""
    import torch
    from avalanche.benchmarks import utils
    from avalanche.training import storage_policy
    from torch.utils.data import TensorDataset

    data = TensorDataset(*work.samples(work.num_rows))
    data.targets = data.tensors[1].tolist()
    stream = utils.AvalancheDataset([data])  # fastest without attributes, if these are not needed
    if policy == "ClassBalancedBuffer":
        labelled = utils.as_classification_dataset(data)
        stream = utils.as_taskaware_classification_dataset(labelled)
    buffer = getattr(storage_policy, policy)(work.num_rows)
    buffer.update_from_dataset(stream)
    num_offered = 0

    def step(*batch: Tensor) -> object:
        nonlocal num_offered
        if update:
            offered = range(num_offered, num_offered + work.num_candidates)
            num_offered += work.num_candidates
            buffer.update_from_dataset(stream.subset([row % work.num_rows for row in offered]))
        held = buffer.buffer
        read = torch.randint(len(held), (work.num_representatives,)).tolist()
        return join(batch, held.collate_fn([held[row] for row in read]))

    yield Rounds(step)


@cache
def torchrl_buffer(work: Workload, capacity: int, kind: str, storage: str, sampler: str) -> Any:
    """A full buffer of TorchRL; the same one again for the same arguments, as ranks share it."""
    from tensordict import TensorDict
    from torchrl import data
    from torchrl.data import replay_buffers

    buffer = getattr(data, kind)(
        storage=getattr(replay_buffers, storage)(capacity),
        sampler=getattr(replay_buffers, sampler)(),
        batch_size=work.num_representatives,
    )
    images, labels = work.samples(work.batch_size)
    while len(buffer) < capacity:
        buffer.extend(TensorDict({"images": images, "labels": labels}, [len(labels)]))
    return buffer


@contextmanager
def torchrl(
    work: Workload, place: Place, kind: str, storage: str, sampler: str, num_trainers: int = 1
) -> Iterator[Rounds | None]:
    """TorchRL's buffer, in one process or remote: rank 0 has it, the last ranks train."""
    import torch.distributed as dist
    from tensordict import TensorDict
    from torch.distributed import rpc
    from torchrl.data import RemoteTensorDictReplayBuffer as Remote

    rank, num_ranks, folder = place
    if num_ranks > 1:
        options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{folder}/rpc")
        rpc.init_rpc(f"rank-{rank}", rank=rank, world_size=num_ranks, rpc_backend_options=options)
    arguments = (work, work.num_rows * num_trainers, kind, storage, sampler)
    here = torchrl_buffer(*arguments) if rank == 0 else None
    if num_ranks > 1:
        dist.barrier()
    remote = None if rank == 0 else rpc.remote("rank-0", torchrl_buffer, args=arguments)

    def step(*batch: Tensor) -> object:
        images, labels = work.candidates(batch)
        offered = TensorDict({"images": images, "labels": labels}, [len(labels)])
        if here is not None:
            here.extend(offered)
            past = here.sample()
        else:
            extending = rpc.rpc_async("rank-0", Remote.extend, args=(remote, offered))
            sampling = rpc.rpc_async("rank-0", Remote.sample, args=(remote,))
            extending.wait()
            past = sampling.wait()
        return join(batch, (past["images"], past["labels"]))

    yield Rounds(step) if rank >= num_ranks - num_trainers else None
    remote = None
    if num_ranks > 1:
        dist.barrier()
        rpc.shutdown()


IN_MEMORY = ("LazyTensorStorage", "RandomSampler")
NO_REPETITION = ("LazyTensorStorage", "SamplerWithoutReplacement")
ON_DISK = ("LazyMemmapStorage", "RandomSampler")
REMOTE = ("RemoteTensorDictReplayBuffer", *IN_MEMORY)
BUFFERS: dict[str, tuple[Any, ...]] = {
    "ours": (1, ours),
    "ours, auto": (1, partial(ours, asynchronous="auto")),
    "(torch.cat alone)": (1, join_alone),
    "(plain copies)": (1, plain_copies),
    "(plain tensors)": (1, plain_tensors),
    "Avalanche reservoir": (1, avalanche, "ReservoirSamplingBuffer"),
    "Avalanche class-balanced": (1, avalanche, "ClassBalancedBuffer"),
    "Avalanche reservoir, draws only": (1, avalanche, "ReservoirSamplingBuffer", False),
    "TorchRL in memory": (1, torchrl, "ReplayBuffer", *IN_MEMORY),
    "TorchRL in memory, no repetition": (1, torchrl, "ReplayBuffer", *NO_REPETITION),
    "TorchRL memory-mapped": (1, torchrl, "ReplayBuffer", *ON_DISK),
    "ours, 2 ranks": (2, ours),
    "(plain copies), 2 at once": (2, plain_copies),
    "TorchRL remote, server + 1 rank": (2, torchrl, *REMOTE, 1),
    "TorchRL remote, 2 ranks": (2, torchrl, *REMOTE, 2),
}
"""The number of processes, what makes and fills the buffer (None on a rank that only serves),
and its options."""

BASES = {1: ("ours", "(plain copies)"), 2: ("ours, 2 ranks", "(plain copies), 2 at once")}
"""By the number of processes: what figures are multiples of."""


def seconds_per_round(
    rank: int, name: str, work: Workload, seconds: float, folder: str
) -> list[float]:
    """One rank's, for each block, joining included; zeros if it only serves."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    num_ranks, make, *settings = BUFFERS[name]
    batches = [work.samples(work.batch_size) for _ in range(4)]

    def block(rounds: Rounds | None, num_rounds: int) -> float:
        """Seconds per round; ranks begin it together."""
        if num_ranks > 1:
            dist.barrier()
        if rounds is None:
            return 0.0
        began = time.perf_counter()
        for number in range(num_rounds):
            rounds.step(*batches[number % len(batches)])
        rounds.finish()
        return (time.perf_counter() - began) / num_rounds

    with make(work, Place(rank, num_ranks, folder), *settings) as rounds:
        block(rounds, 3)
        num_rounds = torch.tensor(1 + int(seconds / NUM_BLOCKS / (block(rounds, 5) or math.inf)))
        if num_ranks > 1:  # the last rank always trains
            dist.broadcast(num_rounds, num_ranks - 1)
        return [block(rounds, int(num_rounds)) for _ in range(NUM_BLOCKS)]


def measure(name: str, seconds: float) -> None:
    """Measures one buffer on all workloads, and prints a line for each."""
    from ritornello.testing import spawn_ranks

    for work in WORKLOADS:
        result: dict[str, object] = {"workload": work.name}
        try:
            with tempfile.TemporaryDirectory() as folder:
                arguments = (name, work, seconds, folder)
                if BUFFERS[name][0] == 1:
                    found: list[Any] = [seconds_per_round(0, *arguments)]
                else:
                    found = spawn_ranks(BUFFERS[name][0], seconds_per_round, *arguments)
            for each in found:
                if not isinstance(each, list):
                    raise each if isinstance(each, Exception) else RuntimeError(f"exit code {each}")
            # The slowest rank's: a step needs them all.
            result["seconds_per_round"] = list(map(max, *found)) if found[1:] else found[0]
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[-1]
        print("RESULT " + json.dumps(result), flush=True)


def make_environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """Makes it unless it is there; its Python, and why packages could not be installed."""
    python, done = folder / "bin" / "python", folder / "peers.json"
    wanted = [str(CHECKOUT), *PACKAGES]
    if done.exists() and (found := json.loads(done.read_text()))["wanted"] == wanted:
        return python, found["failed"]
    print(f"making the environment {folder} (minutes)", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*install, "torch", "-e", str(CHECKOUT)], check=True)
    # No other package may change the PyTorch that all are measured with.
    torch = f"torch=={versions(python)['torch']}"
    failed = {}
    for package in PACKAGES:
        outcome = subprocess.run([*install, torch, package], capture_output=True, text=True)
        if outcome.returncode:
            failed[package] = (outcome.stderr.strip().splitlines() or ["pip failed"])[-1]
    done.write_text(json.dumps({"wanted": wanted, "failed": failed}))
    return python, failed


def versions(python: Path) -> dict[str, str]:
    """Of the packages of interest in an environment."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "list", "--format=json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    names = ("torch", "numpy", "ritornello", "tensordict", *PACKAGES)
    return {each["name"]: each["version"] for each in listed if each["name"] in names}


def run(python: Path, name: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Measures one buffer in a process of its own; the result on each workload."""
    command = [str(python), __file__, "--measure", name, "--seconds", str(seconds)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    try:
        outcome = subprocess.run(
            command, env=settings, capture_output=True, text=True, timeout=WAIT_SECONDS
        )
        lines, errors = outcome.stdout.splitlines(), outcome.stderr.strip().splitlines()
        failure = errors[-1] if errors else f"exit code {outcome.returncode}"
    except subprocess.TimeoutExpired:
        lines, failure = [], f"not done within {WAIT_SECONDS:g} s"
    results = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
    missing: dict[str, dict[str, Any]] = {work.name: {"error": failure} for work in WORKLOADS}
    return missing | {result["workload"]: result for result in results}


def table(work: Workload, seconds: dict[str, list[float]], errors: dict[str, str]) -> str:
    """One workload's medians, what they are to ours and to the floor, and their middle half."""
    sizes = f"b={work.batch_size}, c={work.num_candidates}, r={work.num_representatives}"
    shape = "x".join(map(str, work.shape))
    lines = [
        f"\n{work.name}, uint8 {shape}: {sizes}, {work.num_rows} rows per rank",
        f"  {'microseconds per round':<34}{'median':>9}{'x ours':>8}{'x floor':>8}  middle half",
    ]
    medians = {name: statistics.median(values) for name, values in seconds.items() if values}
    for name, (num_processes, *_) in BUFFERS.items():
        if name in medians:
            base, floor = (medians.get(each, math.nan) for each in BASES[num_processes])
            low, _, high = (1e6 * each for each in statistics.quantiles(seconds[name], n=4))
            lines.append(
                f"  {name:<34}{1e6 * medians[name]:>9.0f}{medians[name] / base:>8.2f}"
                f"{medians[name] / floor:>8.2f}  {low:.0f}..{high:.0f}"
            )
        if name in errors:
            lines.append(f"  {name:<34}failed: {errors[name]}")
    return "\n".join(lines)


def main() -> None:
    """Makes the environment, measures everything in it, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--venv", type=Path, default=caches / "ritornello-peers")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--measure", choices=BUFFERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.seconds)
        return
    python, failed = make_environment(options.venv.absolute())
    seconds: dict[str, dict[str, list[float]]] = {
        work.name: {name: [] for name in BUFFERS} for work in WORKLOADS
    }
    errors: dict[str, dict[str, str]] = {work.name: {} for work in WORKLOADS}
    for repetition in range(options.repetitions):
        for name in BUFFERS:
            print(f"repetition {repetition + 1}: {name}", file=sys.stderr, flush=True)
            for work, result in run(python, name, options.seconds).items():
                if "error" in result:
                    errors[work][name] = result["error"]
                else:
                    seconds[work][name] += result["seconds_per_round"]
    about = {
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "versions": versions(python),
        "not_installed": failed | {"Mammoth": "not found on PyPI (tried as mammoth-cl)"},
        "repetitions": options.repetitions,
        "seconds": options.seconds,
    }
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    for work in WORKLOADS:
        print(table(work, seconds[work.name], errors[work.name]))
    if options.json:
        written = about | {"seconds_per_round": seconds, "errors": errors}
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
