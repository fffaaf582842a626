"""A model of the time per step: incremental training, rehearsal, from scratch.

Incremental training computes on ``b`` samples, rehearsal on ``b + r``; both all-reduce their
gradients, mostly behind the backward pass. A round of the buffer (admit, plan, exchange, stage)
runs beside the step, and what it takes longer than the step is exposed; so is what the
trainer's own thread does for the buffer. From scratch passes over all data so far at every
task: its time is given per step *of new data*, averaged over the tasks.

The model knows no stragglers, no loading of data and no other traffic on the network.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from ritornello.experiments.speed.bench import RoundTimes
from ritornello.experiments.speed.workloads import WORKLOADS


@dataclass(frozen=True)
class Machine:
    """A cluster's figures. Ranks on one node share memory; nodes are linked by a network."""

    name: str
    description: str
    seconds_per_sample: float
    """What training on it takes, on one rank."""
    gradient_bytes: float
    """All-reduced in each step."""
    overlap: float
    """The part of a step's computation during which gradients can be reduced."""
    ranks_per_node: int
    latency_seconds: float
    """One way, between nodes."""
    message_seconds: float
    """That a rank spends on each message, beside the latency."""
    network_bytes_per_second: float
    """In and out of a node, each way; its ranks share it."""
    memory_bytes_per_second: float
    """One thread copying records."""
    device_bytes_per_second: float
    """From the worker to where the model trains."""
    join_bytes_per_second: float
    """The trainer's copies: candidates, and the augmented mini-batch."""
    interpreter_seconds: float
    """That a round takes from the trainer's thread, as both run Python."""


A100 = Machine(
    name="a100-200gbps",
    description="4 A100 and 200 Gb/s per node, ResNet-50 in mixed precision",
    # One A100 80 GB trains ResNet-50 v1.5 on 2470 images/s in mixed precision: NVIDIA,
    # DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5, container 21.03.
    seconds_per_sample=1 / 2470,
    gradient_bytes=25.6e6 * 4,  # float32
    overlap=0.5,  # assumed: the backward pass is two thirds of a step, its first part too early
    ranks_per_node=4,
    latency_seconds=5e-6,  # assumed: a few microseconds, as such networks have
    message_seconds=20e-6,  # assumed
    network_bytes_per_second=25e9,  # 200 Gb/s, the line's rate
    memory_bytes_per_second=10e9,  # one thread, measured on another machine
    device_bytes_per_second=25e9,  # assumed: PCIe 4.0 x16, four fifths of its rate
    join_bytes_per_second=500e9,  # assumed: a third of the A100's memory bandwidth
    interpreter_seconds=120e-6,  # measured on another machine
)
THIS_MACHINE = Machine(
    name="this-machine",
    description="2 ranks on 2 cores per node, linked as by loopback TCP, a small CNN",
    # Measured on a machine with two cores and no GPU; 'ritornello bench' measures yours.
    seconds_per_sample=0.028 / 56,
    gradient_bytes=4e6,
    overlap=0.5,  # assumed
    ranks_per_node=2,
    latency_seconds=4e-6,
    message_seconds=130e-6,
    network_bytes_per_second=1.1e9,
    memory_bytes_per_second=9.8e9,
    device_bytes_per_second=9.8e9,
    join_bytes_per_second=9.8e9,
    interpreter_seconds=120e-6,
)
MACHINES = {each.name: each for each in (A100, THIS_MACHINE)}


@dataclass(frozen=True)
class MachineChanges:
    """Figures of the machine to change; what is not given is as in the machine."""

    seconds_per_sample: float | None = None
    """Of training, on one rank."""
    gradient_bytes: float | None = None
    """All-reduced in each step."""
    overlap: float | None = None
    """The part of a step's computation during which gradients can be reduced."""
    ranks_per_node: int | None = None
    """They share memory: what they exchange is no message."""
    latency_seconds: float | None = None
    """One way, between nodes."""
    message_seconds: float | None = None
    """That a rank spends on each message, beside the latency."""
    network_bytes_per_second: float | None = None
    """In and out of a node, each way."""
    memory_bytes_per_second: float | None = None
    """One thread copying records."""
    device_bytes_per_second: float | None = None
    """From the worker to where the model trains."""
    join_bytes_per_second: float | None = None
    """The trainer's copies."""
    interpreter_seconds: float | None = None
    """That a round takes from the trainer's thread."""

    def applied_to(self, name: str | Machine) -> Machine:
        """The machine, given or by its name, with these changes.

        Raises:
            ValueError: no machine has that name, or a figure is out of range.
        """
        if not isinstance(name, Machine) and name not in MACHINES:
            raise ValueError(f"machine={name!r}: there are {', '.join(map(repr, MACHINES))}")
        machine = name if isinstance(name, Machine) else MACHINES[name]
        given = {field: value for field, value in vars(self).items() if value is not None}
        for field, value in given.items():
            may_be_zero = field.endswith("_seconds") or field in ("overlap", "gradient_bytes")
            if value < 0 or (value == 0 and not may_be_zero) or not math.isfinite(value):
                rule = "at least 0" if may_be_zero else "above 0"
                raise ValueError(f"{field}={value}: it must be {rule}")
        if given:
            given["description"] = f"{machine.description} (changed)"
        return replace(machine, **given)


def benched_machine(folder: Path) -> Machine:
    """``this-machine`` with what ``ritornello bench`` has measured.

    Copies are those of the workload with the largest records, fixed costs those of the one with
    the smallest. What a message costs is known if the collective transport was measured too.

    Raises:
        FileNotFoundError: the folder holds no bench.json.
        ValueError: it is no such file.
    """
    path = folder / "bench.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no bench.json: give the output of ritornello bench"
        )
    try:
        measured = [RoundTimes(**each) for each in json.loads(path.read_text())["rounds"]]
        largest = max(measured, key=lambda each: each.record_bytes)
        smallest = min(measured, key=lambda each: each.record_bytes)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no result of ritornello bench: {error}") from error
    sample_bytes = largest.rows_per_round * largest.record_bytes
    copied = WORKLOADS[largest.workload].batch_size + largest.rows_per_round
    exchanges = {
        each.transport: each.stage_seconds["exchange"]
        for each in measured
        if each.workload == smallest.workload
    }
    machine = replace(
        THIS_MACHINE,
        description=f"{largest.num_ranks} ranks per node, as measured by ritornello bench",
        ranks_per_node=largest.num_ranks,
        memory_bytes_per_second=sample_bytes / largest.plain_seconds,
        device_bytes_per_second=sample_bytes / largest.plain_seconds,
        join_bytes_per_second=copied * largest.record_bytes / largest.update_seconds,
        interpreter_seconds=max(0.0, smallest.round_seconds - smallest.plain_seconds),
    )
    if {"shared_memory", "collective"} <= exchanges.keys():
        more = exchanges["collective"] - exchanges["shared_memory"]
        machine = replace(machine, message_seconds=max(0.0, more))
    return machine


@dataclass(frozen=True)
class RoundLoad:
    """What a round has to do at one number of ranks; times as measured."""

    num_ranks: int
    admit_seconds: float
    """The selection policy's."""
    plan_seconds: float
    busiest_rank_served: float
    """Records that the busiest owner gathers."""
    busiest_rank_messages: float
    busiest_node_records: float
    """See ``draw_statistics.Traffic``."""


@dataclass(frozen=True)
class StepTime:
    """Predicted times of a step at one number of ranks, in seconds."""

    num_ranks: int
    incremental_seconds: float
    rehearsal_seconds: float
    from_scratch_seconds: float
    """Per step of new data, averaged over the tasks."""
    exposed_seconds: float
    """What rehearsal takes longer than training on ``b + r`` samples alone."""
    all_reduce_seconds: float
    admit_seconds: float
    plan_seconds: float
    exchange_seconds: float
    stage_seconds: float
    incremental_throughput: float
    rehearsal_throughput: float
    from_scratch_throughput: float
    """New samples per second, all ranks together."""

    @property
    def round_seconds(self) -> float:
        """The time of the whole round."""
        return self.admit_seconds + self.plan_seconds + self.exchange_seconds + self.stage_seconds


def predict(
    machine: Machine,
    load: RoundLoad,
    *,
    batch_size: int,
    num_representatives: int,
    num_candidates: int,
    record_bytes: int,
    growth: float,
) -> StepTime:
    """Predicts the time of a step.

    Args:
        machine: the cluster.
        load: of a round.
        batch_size: ``b``.
        num_representatives: ``r``.
        num_candidates: ``c``.
        record_bytes: of a representative.
        growth: samples that training from scratch passes over, per sample of new data.
    """
    num_nodes = -(-load.num_ranks // machine.ranks_per_node)
    # A ring over the nodes; inside a node it is free.
    all_reduce = 2 * (num_nodes - 1) / num_nodes * machine.gradient_bytes
    all_reduce = all_reduce / machine.network_bytes_per_second
    all_reduce += machine.latency_seconds * math.log2(num_nodes)

    def train(num_samples: int) -> float:
        compute = num_samples * machine.seconds_per_sample
        return compute + max(0.0, all_reduce - machine.overlap * compute)

    def copy(num_records: float, bytes_per_second: float) -> float:
        return num_records * record_bytes / bytes_per_second

    admit = load.admit_seconds + copy(num_candidates, machine.memory_bytes_per_second)
    # The busiest rank and node make the others wait. An owner gathers what it serves; all
    # messages of a rank are under way together, so the latency counts once.
    network = copy(load.busiest_node_records, machine.network_bytes_per_second)
    exchange = (
        copy(load.busiest_rank_served, machine.memory_bytes_per_second)
        + machine.message_seconds * load.busiest_rank_messages
        + (machine.latency_seconds if num_nodes > 1 else 0.0)
        + network
    )
    stage = copy(num_representatives, machine.device_bytes_per_second)
    trainer = machine.interpreter_seconds + copy(
        num_candidates + batch_size + num_representatives, machine.join_bytes_per_second
    )
    augmented = train(batch_size + num_representatives)
    # Gradients and records share the network: a step takes at least as long as both.
    hidden_behind = max(augmented, admit + load.plan_seconds + exchange + stage)
    rehearsal = max(hidden_behind, all_reduce + network) + trainer
    new_samples = load.num_ranks * batch_size
    incremental = train(batch_size)
    return StepTime(
        num_ranks=load.num_ranks,
        incremental_seconds=incremental,
        rehearsal_seconds=rehearsal,
        from_scratch_seconds=growth * incremental,
        exposed_seconds=rehearsal - augmented,
        all_reduce_seconds=all_reduce,
        admit_seconds=admit,
        plan_seconds=load.plan_seconds,
        exchange_seconds=exchange,
        stage_seconds=stage,
        incremental_throughput=new_samples / incremental,
        rehearsal_throughput=new_samples / rehearsal,
        from_scratch_throughput=new_samples / (growth * incremental),
    )
