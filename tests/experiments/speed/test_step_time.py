from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ritornello.experiments.speed.bench import RoundTimes
from ritornello.experiments.speed.step_time import (
    A100,
    MACHINES,
    MachineChanges,
    RoundLoad,
    StepTime,
    benched_machine,
    predict,
)


def load(num_ranks: int = 64, **changes: float) -> RoundLoad:
    each = RoundLoad(
        num_ranks=num_ranks,
        admit_seconds=1e-4,
        plan_seconds=1e-4,
        busiest_rank_served=14.0,
        busiest_rank_messages=20.0,
        busiest_node_records=40.0,
    )
    return replace(each, **changes)


def predicted(each: RoundLoad, *, num_representatives: int = 7, **changes: Any) -> StepTime:
    return predict(
        replace(A100, **changes),
        each,
        batch_size=56,
        num_representatives=num_representatives,
        num_candidates=14,
        record_bytes=150_544,
        growth=2.5,
    )


def test_a_hidden_round_costs_only_what_the_trainer_does() -> None:
    times = predicted(load())
    assert times.round_seconds < times.incremental_seconds
    assert times.incremental_seconds == pytest.approx(56 / 2470)
    trainer = times.rehearsal_seconds - 63 / 2470
    assert times.exposed_seconds == pytest.approx(trainer)
    assert trainer == pytest.approx(120e-6 + 77 * 150_544 / 500e9)
    assert times.from_scratch_seconds == 2.5 * times.incremental_seconds


@pytest.mark.parametrize(
    "slower",
    [
        {"message_seconds": 0.01},
        {"network_bytes_per_second": 1e7},
        {"memory_bytes_per_second": 1e7},
        {"device_bytes_per_second": 1e7},
    ],
)
def test_a_round_longer_than_the_step_is_exposed(slower: dict[str, float]) -> None:
    # Without gradients to reduce, so that only the round feels the slower part.
    hidden = predicted(load(), gradient_bytes=0.0, overlap=1.0)
    late = predicted(load(), gradient_bytes=0.0, overlap=100.0, **slower)
    assert late.incremental_seconds == hidden.incremental_seconds
    beyond = late.round_seconds - 63 / 2470
    assert beyond > 0
    assert late.exposed_seconds == pytest.approx(beyond + hidden.exposed_seconds)


@pytest.mark.parametrize(
    "more",
    [
        {"plan_seconds": 1e-2},
        {"admit_seconds": 1e-2},
        {"busiest_rank_served": 100.0},
        {"busiest_rank_messages": 100.0},
        {"busiest_node_records": 400.0},
    ],
)
def test_more_to_do_never_makes_a_round_shorter(more: dict[str, float]) -> None:
    assert predicted(load(**more)).round_seconds > predicted(load()).round_seconds
    assert predicted(load(**more)).rehearsal_seconds >= predicted(load()).rehearsal_seconds


def test_latency_counts_once_in_a_round_and_for_each_doubling_in_a_reduction() -> None:
    near, far = (predicted(load(64), latency_seconds=seconds) for seconds in (0.0, 1.0))
    assert far.exchange_seconds - near.exchange_seconds == pytest.approx(1.0)
    assert far.all_reduce_seconds - near.all_reduce_seconds == pytest.approx(4.0)
    alone = predicted(load(4), latency_seconds=1.0)
    assert alone.exchange_seconds == predicted(load(4), latency_seconds=0.0).exchange_seconds


def test_more_representatives_take_longer() -> None:
    times = [predicted(load(), num_representatives=r).rehearsal_seconds for r in (1, 7, 56)]
    assert times[0] < times[1] < times[2]
    assert times[2] == pytest.approx(2 * 56 / 2470, rel=0.01)


def test_gradients_cost_nothing_on_one_node_and_more_on_more_nodes() -> None:
    reduced = [predicted(load(n)).all_reduce_seconds for n in (1, 4, 8, 64, 4096)]
    assert reduced[0] == reduced[1] == 0
    assert 0 < reduced[2] < reduced[3] < reduced[4]
    assert reduced[3] == pytest.approx(2 * 15 / 16 * 25.6e6 * 4 / 25e9 + 4 * 5e-6)


def test_gradients_that_training_cannot_hide() -> None:
    slow = predicted(load(), network_bytes_per_second=1e9, overlap=0.5)
    assert slow.incremental_seconds == pytest.approx(0.5 * 56 / 2470 + slow.all_reduce_seconds)


def test_gradients_and_records_share_the_network() -> None:
    times = predicted(load(), network_bytes_per_second=1e9, overlap=100.0)
    records = 40 * 150_544 / 1e9
    assert times.round_seconds < times.all_reduce_seconds
    assert times.rehearsal_seconds > times.all_reduce_seconds + records


def test_throughput_counts_new_samples() -> None:
    times = predicted(load(128))
    assert times.incremental_throughput == pytest.approx(128 * 2470)
    assert times.rehearsal_throughput == pytest.approx(128 * 56 / times.rehearsal_seconds)
    assert times.from_scratch_throughput == pytest.approx(128 * 2470 / 2.5)


def test_machines_and_their_changes() -> None:
    assert set(MACHINES) == {"a100-200gbps", "this-machine"}
    assert MachineChanges().applied_to("a100-200gbps") == A100
    changed = MachineChanges(ranks_per_node=8, latency_seconds=0.0).applied_to("a100-200gbps")
    assert (changed.ranks_per_node, changed.latency_seconds) == (8, 0.0)
    assert changed.gradient_bytes == A100.gradient_bytes
    assert changed.description == f"{A100.description} (changed)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks_per_node": 0}, "ranks_per_node=0: it must be above 0"),
        ({"latency_seconds": -1.0}, "latency_seconds=-1.0: it must be at least 0"),
        ({"network_bytes_per_second": float("nan")}, "network_bytes_per_second=nan"),
    ],
)
def test_figures_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MachineChanges(**changes).applied_to("this-machine")


def test_a_machine_that_was_benched(tmp_path: Path) -> None:
    def rounds(workload: str, transport: str, record_bytes: int, exchange: float) -> RoundTimes:
        stages = {"admit": 1e-4, "plan": 1e-5, "exchange": exchange, "stage": 1e-5}
        return RoundTimes(
            workload, transport, 2, 10, stages, sum(stages.values()), 1e-5, 2e-3, 1e-3,
            record_bytes, 21, 1.0,
        )  # fmt: skip

    measured = [
        rounds("mnist", "shared_memory", 800, 5e-5),
        rounds("mnist", "collective", 800, 45e-5),
        rounds("imagenet-uint8", "shared_memory", 150_000, 3e-4),
    ]
    saved = [asdict(each) for each in measured]
    for each in saved[1:]:  # as by an earlier version
        del each["round_middle_half"], each["plain_middle_half"]
    (tmp_path / "bench.json").write_text(json.dumps({"rounds": saved}))
    machine = benched_machine(tmp_path)
    assert machine.ranks_per_node == 2
    assert machine.message_seconds == pytest.approx(4e-4)
    assert machine.memory_bytes_per_second == pytest.approx(21 * 150_000 / 1e-5)
    assert machine.join_bytes_per_second == pytest.approx((56 + 21) * 150_000 / 2e-3)
    assert machine.interpreter_seconds == pytest.approx(16e-5)
    assert MachineChanges(overlap=0.0).applied_to(machine).overlap == 0.0
    (tmp_path / "bench.json").write_text('{"rounds": []}')
    with pytest.raises(ValueError, match="is no result of ritornello bench"):
        benched_machine(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no bench.json: give the output"):
        benched_machine(tmp_path / "nothing")
