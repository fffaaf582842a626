"""``ritornello simulate``: fairness, traffic and cost of the buffer on thousands of ranks.

The ranks are virtual, in one process: the real selection policies admit streams of labels, and
the real planner draws from what they hold. No sample is stored and nothing is sent; what would
be is counted, and a model of the step's time (``step_time``) says what it costs on a cluster.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import ritornello
from ritornello.experiments.speed.draw_statistics import (
    FALSE_ALARM_RATE,
    Fairness,
    FairnessCount,
    Traffic,
    TrafficCount,
    check_plans,
    draw_blocks,
    plan_seconds,
)
from ritornello.experiments.speed.label_streams import LabelStream, fill
from ritornello.experiments.speed.step_time import Machine, RoundLoad, StepTime, predict
from ritornello.policies.sampling import SamplingPolicy, UniformSampling
from ritornello.records.shard import rows_per_rank

PREDICTED_RANKS = 4096
"""Up to which number of ranks the step's time is predicted, at least."""
SHORT_STEPS = 50
"""Draws that tell the load of a number of ranks that is predicted but not simulated."""


@dataclass(frozen=True)
class Simulation:
    """What is simulated. The defaults are the paper's ImageNet-1K in four tasks."""

    ranks: tuple[int, ...] = (8, 64, 1024)
    """Numbers of ranks to simulate."""
    num_representatives: int = 7
    """Past samples added per rank and step."""
    num_candidates: int | None = 14
    """Samples offered to the buffer per rank and step, expected; None: all."""
    batch_size: int = 56
    """New samples per rank and step."""
    capacity: int = 128_000
    """Representatives in the whole buffer."""
    record_bytes: int = 150_544
    """Of a representative: 3x224x224 uint8 and its label."""
    selection: str = "class-balanced"
    """class-balanced, per-class-random, reservoir or fifo."""
    classes: int = 1000
    """In the whole stream, in a random order."""
    samples_per_class: int = 1281
    """Of the largest class."""
    tasks: int = 4
    """How many the classes are split into."""
    epochs: int = 1
    """Per task."""
    imbalance: float = 1.0
    """The largest class has as many times the samples of the smallest."""
    skew: float | None = None
    """Concentration of a Dirichlet distribution that splits each class over the ranks; small:
    very unequal ranks. None: samples are dealt out evenly."""
    draws_per_record: float = 50.0
    """How often each representative is drawn, expected."""
    seed: int = 0
    """Of everything random."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: names the setting, its value and the rule.
        """
        if not self.ranks:
            raise ValueError("ranks: give one or more numbers of ranks")
        counts = {f"ranks[{place}]": each for place, each in enumerate(self.ranks)} | {
            "num_representatives": self.num_representatives,
            "num_candidates": self.num_candidates,
            "batch_size": self.batch_size,
            "record_bytes": self.record_bytes,
            "samples_per_class": self.samples_per_class,
            "tasks": self.tasks,
            "epochs": self.epochs,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: it must be from 0 to 2**64 - 1")
        if self.classes < self.tasks:
            raise ValueError(
                f"classes={self.classes}: it must be at least the number of tasks ({self.tasks})"
            )
        if not self.imbalance >= 1:
            raise ValueError(f"imbalance={self.imbalance}: it must be at least 1")
        if self.skew is not None and not self.skew > 0:
            raise ValueError(f"skew={self.skew}: it must be above 0")
        if not self.draws_per_record >= 5:
            raise ValueError(
                f"draws_per_record={self.draws_per_record}: it must be at least 5, as the test "
                "of fairness needs it"
            )
        self.check_held("capacity", self.capacity, max(self.ranks))

    def check_held(self, name: str, num_held: int, num_ranks: int) -> None:
        """Checks that a joint draw without repetition is possible.

        Raises:
            ValueError: it is not.
        """
        needed = num_ranks * self.num_representatives
        if num_held < needed:
            raise ValueError(
                f"{name}={num_held}: it must be at least ranks * num_representatives ({needed} "
                f"at {num_ranks} ranks), as one step's draws hold no representative twice; "
                "give a larger capacity, more samples, or fewer ranks"
            )

    def stream(self) -> LabelStream:
        """The stream that all ranks together see."""
        return LabelStream(
            classes=self.classes,
            samples_per_class=self.samples_per_class,
            tasks=self.tasks,
            epochs=self.epochs,
            imbalance=self.imbalance,
            skew=self.skew,
            seed=self.seed,
        )


@dataclass(frozen=True)
class SimulatedRanks:
    """What was found at one number of ranks."""

    num_ranks: int
    num_held: int
    smallest_shard: int
    largest_shard: int
    classes_held: int
    smallest_class: int
    largest_class: int
    """Representatives of a class in the whole buffer."""
    num_rounds: int
    num_gathering_rounds: int
    """Rounds of the stream; and those of them in which sizes were all-gathered."""
    fairness: Fairness
    traffic: Traffic
    bytes_drawn: int
    """Per rank and step, wherever they lie: r records, at any number of ranks."""
    bytes_received: float
    """Per rank and step, from other ranks; as many are sent."""
    network_bytes_received: float
    """The same, from other nodes."""
    plans_checked: int
    """Plans of single ranks that were found to be their part of the joint draw."""
    plan_seconds: float
    plan_seconds_p99: float
    admit_seconds: float

    def load(self) -> RoundLoad:
        """What the model of the step's time needs."""
        return _load(self.num_ranks, self.admit_seconds, self.plan_seconds, self.traffic)


@dataclass(frozen=True)
class SimulationResults:
    """Everything that a simulation found."""

    simulation: Simulation
    machine: Machine
    growth: float
    """Samples that training from scratch passes over, per sample of new data."""
    simulated: list[SimulatedRanks]
    step_times: list[StepTime]

    def write(self, folder: Path) -> None:
        """Writes ``simulate.json`` and ``simulate.png`` into a folder, made if need be."""
        from ritornello.experiments.speed.step_time_figure import draw_step_times

        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "format": 1,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "ritornello": ritornello.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
            },
            "measured_on": {
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
            },
            "false_alarm_rate": FALSE_ALARM_RATE,
            **asdict(self),
        }
        (folder / "simulate.json").write_text(json.dumps(content, indent=1) + "\n")
        figure = draw_step_times(
            self.step_times,
            f"{self.machine.description}, b={self.simulation.batch_size}, "
            f"r={self.simulation.num_representatives}",
            self.simulation.tasks,
        )
        figure.savefig(folder / "simulate.png", dpi=150)


def simulate(
    simulation: Simulation,
    machine: Machine,
    sampling: SamplingPolicy | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> SimulationResults:
    """Simulates each number of ranks, and predicts the time of a step for all powers of two.

    Args:
        simulation: what to simulate.
        machine: whose step's time to predict.
        sampling: what is drawn; None: uniformly.
        report: told what is under way.

    Raises:
        ValueError: a setting breaks its rule, or the stream is too short for the draws.
    """
    simulation.check()
    policy = sampling or UniformSampling()
    simulated = []
    for num_ranks in simulation.ranks:
        report(f"{num_ranks:,} ranks")
        simulated.append(simulate_ranks(simulation, num_ranks, machine.ranks_per_node, policy))
    report("step time")
    growth = simulation.stream().growth()
    num_candidates = simulation.num_candidates or simulation.batch_size
    step_times = [
        predict(
            machine,
            load,
            batch_size=simulation.batch_size,
            num_representatives=simulation.num_representatives,
            num_candidates=num_candidates,
            record_bytes=simulation.record_bytes,
            growth=growth,
        )
        for load in _loads(simulation, machine.ranks_per_node, policy, simulated)
    ]
    return SimulationResults(simulation, machine, growth, simulated, step_times)


def simulate_ranks(
    simulation: Simulation, num_ranks: int, ranks_per_node: int, policy: SamplingPolicy
) -> SimulatedRanks:
    """Fills the shards of virtual ranks, draws for many steps, and counts.

    Raises:
        ValueError: the stream is too short for the draws.
    """
    filled = fill(
        simulation.stream(),
        num_ranks,
        capacity=simulation.capacity,
        batch_size=simulation.batch_size,
        num_candidates=simulation.num_candidates,
        selection=simulation.selection,
        seed=simulation.seed,
    )
    num_held, r = len(filled.labels), simulation.num_representatives
    simulation.check_held("representatives held after the stream", num_held, num_ranks)
    num_steps = max(SHORT_STEPS, -int(-simulation.draws_per_record * num_held // (num_ranks * r)))
    # The draws that a buffer would make in the rounds after the stream.
    steps = range(filled.num_rounds, filled.num_rounds + num_steps)
    fairness = FairnessCount(filled.sizes, filled.labels)
    traffic = TrafficCount(filled.sizes, ranks_per_node)
    for block in draw_blocks(filled.sizes, r, policy, simulation.seed, steps):
        fairness.add(block)
        traffic.add(block)
    moved = traffic.result()
    some_ranks = range(0, num_ranks, -(-num_ranks // 8))
    seconds = plan_seconds(filled.sizes, r, policy, simulation.seed)
    per_class = np.bincount(filled.labels)
    per_class = per_class[per_class > 0]
    return SimulatedRanks(
        num_ranks=num_ranks,
        num_held=num_held,
        smallest_shard=int(filled.sizes.min()),
        largest_shard=int(filled.sizes.max()),
        classes_held=len(per_class),
        smallest_class=int(per_class.min()),
        largest_class=int(per_class.max()),
        num_rounds=filled.num_rounds,
        num_gathering_rounds=filled.num_gathering_rounds,
        fairness=fairness.result(),
        traffic=moved,
        bytes_drawn=r * simulation.record_bytes,
        bytes_received=moved.records * simulation.record_bytes,
        network_bytes_received=moved.network_records * simulation.record_bytes,
        plans_checked=check_plans(filled.sizes, r, policy, simulation.seed, steps[:3], some_ranks),
        plan_seconds=float(np.median(seconds)),
        plan_seconds_p99=float(np.quantile(seconds, 0.99)),
        admit_seconds=filled.admit_seconds,
    )


def _loads(
    simulation: Simulation,
    ranks_per_node: int,
    policy: SamplingPolicy,
    simulated: Sequence[SimulatedRanks],
) -> list[RoundLoad]:
    """The load at the simulated numbers of ranks, and at the powers of two between and above."""
    loads = {each.num_ranks: each.load() for each in simulated}
    admit_seconds = float(np.mean([each.admit_seconds for each in simulated]))
    num_ranks = 1 << (min(loads) - 1).bit_length()
    r = simulation.num_representatives
    while num_ranks <= max(PREDICTED_RANKS, *loads) and simulation.capacity >= num_ranks * r:
        if num_ranks not in loads:
            sizes = rows_per_rank(simulation.capacity, num_ranks)
            traffic = TrafficCount(sizes, ranks_per_node)
            for block in draw_blocks(sizes, r, policy, simulation.seed, range(SHORT_STEPS)):
                traffic.add(block)
            seconds = float(np.median(plan_seconds(sizes, r, policy, simulation.seed, 100)))
            loads[num_ranks] = _load(num_ranks, admit_seconds, seconds, traffic.result())
        num_ranks *= 2
    return [loads[each] for each in sorted(loads)]


def _load(num_ranks: int, admit_seconds: float, seconds: float, traffic: Traffic) -> RoundLoad:
    return RoundLoad(
        num_ranks=num_ranks,
        admit_seconds=admit_seconds,
        plan_seconds=seconds,
        busiest_rank_served=traffic.busiest_rank_served,
        busiest_rank_messages=traffic.busiest_rank_messages,
        busiest_node_records=traffic.busiest_node_records,
    )
