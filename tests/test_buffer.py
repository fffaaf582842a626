from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import threading
import time
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritornello import (
    Assignment,
    BufferClosedError,
    ClassBalanced,
    Fifo,
    RehearsalBuffer,
    RoundError,
    SelectionPolicy,
)
from ritornello.transports import LocalTransport

DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
]  # fmt: skip


def batch_of(step: int, num_samples: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples that can be recognised: image and label both tell (step, row)."""
    numbers = step * 1000 + torch.arange(num_samples)
    return numbers[:, None].repeat(1, 5), numbers % 10


@pytest.mark.parametrize("asynchronous", [True, False])
def test_update_appends_representatives_of_earlier_steps(asynchronous: bool) -> None:
    with RehearsalBuffer(40, num_representatives=6, asynchronous=asynchronous) as buffer:
        seen: set[int] = set()
        for step in range(12):
            batch = batch_of(step)
            images, labels = buffer.update(batch)
            expected = min(6, len(seen))
            assert images.shape == (8 + expected, 5)
            assert torch.equal(images[:8], batch[0])
            past = images[8:, 0]
            assert torch.equal(labels, images[:, 0] % 10)
            assert len(set(past.tolist())) == expected
            assert set(past.tolist()) <= seen
            seen |= set(batch[0][:, 0].tolist())
        assert len(buffer) == 40


def test_the_lag_is_one_step() -> None:
    with RehearsalBuffer(4, num_representatives=4, selection="fifo") as buffer:
        buffer.update(batch_of(0, 4))
        for step in range(1, 5):
            images, _ = buffer.update(batch_of(step, 4))
            assert set((images[4:, 0] // 1000).tolist()) == {step - 1}


def test_the_trainer_trains_while_a_round_runs() -> None:
    goes_on = threading.Event()

    class Slow(Fifo):
        def admit(self, labels: Any, generator: Any) -> Any:
            assert goes_on.wait(30), "update has waited for its own round"
            return super().admit(labels, generator)

    with RehearsalBuffer(8, num_representatives=4, selection=Slow()) as buffer:
        buffer.update(batch_of(0))  # comes back, and its round is held up
        assert buffer._steps.rounds.num_rounds == 0
        waking = threading.Timer(0.2, goes_on.set)
        waking.start()
        images, _ = buffer.update(batch_of(1))  # needs what that round draws
        assert len(images) == 8 + 4
        waking.join()
        assert buffer.stats().seconds_waited > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_comes_back_unchanged(dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (6, 2, 3)).to(dtype)
    batch = {"x": values, "more": [values[:, 0, 0], torch.arange(6)], "y": torch.arange(6)}
    with RehearsalBuffer(6, num_representatives=6, label="y") as buffer:
        buffer.update(batch)
        augmented = buffer.update(batch)
        order = augmented["y"][6:]
        assert sorted(order.tolist()) == list(range(6))
        assert augmented["x"].dtype == dtype
        assert torch.equal(augmented["x"][6:], values[order])
        assert torch.equal(augmented["more"][0][6:], values[order, 0, 0])
        assert torch.equal(augmented["more"][1][6:], order)


def test_batches_of_any_length() -> None:
    with RehearsalBuffer(30, num_representatives=3) as buffer:
        buffer.update(batch_of(0, 0))
        for step, size in enumerate([0, 5, 1, 0, 17, 64, 0], start=1):
            images, _ = buffer.update(batch_of(step, size))
            assert len(images) == size + (3 if step > 2 else 0)


def test_what_happens_to_a_batch_afterwards_is_not_stored() -> None:
    with RehearsalBuffer(50, num_representatives=20) as buffer:
        images, labels = torch.empty(5, 3), torch.arange(5)
        for step in range(30):
            images.fill_(step)
            augmented, _ = buffer.update((images, labels))
            assert set(augmented.flatten().tolist()) <= set(range(step + 1))
            augmented.fill_(-1.0)
            images.fill_(-2.0)


def test_draw_and_offer_are_the_two_halves_of_update() -> None:
    def stream_of(buffer: RehearsalBuffer, halves: bool) -> list[torch.Tensor]:
        out = []
        for step in range(20):
            batch = batch_of(step)
            if halves:
                past = buffer.draw()
                buffer.offer(batch)
                out.append(batch[0] if past is None else torch.cat((batch[0], past[0])))
            else:
                out.append(buffer.update(batch)[0])
        return out

    with (
        RehearsalBuffer(30, num_representatives=5, num_candidates=3, seed=4) as first,
        RehearsalBuffer(30, num_representatives=5, num_candidates=3, seed=4) as second,
    ):
        joined, halves = stream_of(first, halves=False), stream_of(second, halves=True)
    assert all(torch.equal(a, b) for a, b in zip(joined, halves, strict=True))


def test_what_draw_returns_is_the_callers_own() -> None:
    with RehearsalBuffer(5, num_representatives=5) as buffer:
        assert buffer.draw() is None
        buffer.offer(batch_of(0, 5))
        images, _ = buffer.draw()
        assert images.is_contiguous()
        kept = images.clone()
        buffer.offer(batch_of(1, 5))
        buffer.draw()
        assert torch.equal(images, kept)
        images.zero_()
        buffer.offer(batch_of(2, 0))
        assert 0 not in buffer.draw()[0][1:]


def test_draw_and_offer_alternate() -> None:
    with RehearsalBuffer(20, num_representatives=1) as buffer:
        buffer.offer(batch_of(0))
        with pytest.raises(RuntimeError, match="offer: .*draw and offer alternate"):
            buffer.offer(batch_of(0))
        buffer.draw()
        buffer.offer(batch_of(1))  # nothing was lost


def test_the_expected_number_of_candidates() -> None:
    class Counting(SelectionPolicy):
        offered = 0

        def admit(self, labels: np.ndarray, generator: np.random.Generator) -> Assignment:
            self.offered += len(labels)
            return Assignment(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    policy = Counting()
    with RehearsalBuffer(9, num_representatives=1, num_candidates=14, selection=policy) as buffer:
        for step in range(400):
            buffer.update(batch_of(step, 56))
        buffer.update(batch_of(400, 10))  # smaller than c: every sample is a candidate
    # Binomial(400 * 56, 1/4): 5600 with a deviation of 65.
    assert abs(policy.offered - 10 - 5600) < 4 * 65


def test_what_is_offered_in_the_last_epoch_alone() -> None:
    """Until then what came before stays whole, and is drawn from."""
    with RehearsalBuffer(12, num_representatives=4, num_candidates=3) as buffer:
        for step in range(30):
            buffer.update(batch_of(step))
        held = torch.cat([images[:, 0] for images, _ in buffer.representatives()])
        buffer.num_candidates = 0
        for step in range(30, 60):
            images, _ = buffer.update(batch_of(step))
            assert set(images[8:, 0].tolist()) <= set(held.tolist())
        assert buffer.num_candidates == 0
        still = torch.cat([images[:, 0] for images, _ in buffer.representatives()])
        assert torch.equal(still, held)
        buffer.num_candidates = None
        buffer.update(batch_of(60, num_samples=40))
        now = {int(each) for images, _ in buffer.representatives() for each in images[:, 0]}
        assert max(now) >= 60_000


def test_a_buffer_can_begin_with_nothing_offered() -> None:
    with RehearsalBuffer(12, num_representatives=4) as buffer:
        buffer.num_candidates = 0
        for step in range(3):
            images, _ = buffer.update(batch_of(step))
            assert len(images) == 8
        assert len(buffer) == 0
        buffer.num_candidates = None
        buffer.update(batch_of(3))
        assert len(buffer.update(batch_of(4))[0]) == 12


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (-1, ValueError, "num_candidates=-1: it must be at least 0"),
        (0.5, TypeError, "num_candidates=0.5: it must be an integer"),
        (True, TypeError, "num_candidates=True: it must be an integer"),
    ],
)
def test_candidates_that_cannot_be_set(number: Any, error: type[Exception], message: str) -> None:
    with RehearsalBuffer(12, num_representatives=4, num_candidates=3) as buffer:
        with pytest.raises(error, match=f"^{message}"):
            buffer.num_candidates = number
        assert buffer.num_candidates == 3


def test_stats() -> None:
    with RehearsalBuffer(30, num_representatives=5) as buffer:
        assert buffer.stats().record_bytes == 0
        assert buffer
        for step in range(10):
            buffer.update(batch_of(step))
        stats = buffer.stats()
        assert stats.num_held == 30 == sum(stats.held_per_class.values())
        assert set(stats.held_per_class.values()) == {3, 4}  # of 8 labels
        assert stats.held_per_rank == [30]
        assert stats.record_bytes == 48
        assert stats.shard_bytes == 30 * 48
        assert stats.num_rounds == 10
        assert set(stats.seconds_per_stage) == {"admit", "plan", "exchange", "stage"}
        assert min(stats.seconds_per_stage.values()) > 0.0
        assert stats.bytes_sent == stats.bytes_received == 0
    assert buffer.stats().num_held == 30


def test_policies_without_labels() -> None:
    with RehearsalBuffer(8, num_representatives=2, selection="reservoir", label=None) as buffer:
        for _ in range(5):
            out = buffer.update(torch.rand(6, 3))
        assert out.shape == (8, 3)
        assert buffer.stats().held_per_class == {}


def test_leaves_that_require_gradients() -> None:
    logits = torch.rand(4, 3, requires_grad=True)
    with RehearsalBuffer(8, num_representatives=2, label=1) as buffer:
        buffer.offer((logits * 2, torch.arange(4)))
        past, _ = buffer.draw()
        assert not past.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity=0: it must be at least 1"),
        ({"capacity": 2.5}, TypeError, "capacity=2.5: it must be an integer"),
        ({"num_representatives": -1}, ValueError, "num_representatives=-1: it must be a finite"),
        ({"num_representatives": float("nan")}, ValueError, "num_representatives=nan: it must be"),
        ({"num_representatives": float("inf")}, ValueError, "=inf: it must be a finite number of"),
        ({"num_representatives": True}, TypeError, "num_representatives=True: it must be a number"),
        ({"num_representatives": "7"}, TypeError, "num_representatives='7': it must be a number"),
        ({"num_representatives": 10.5}, ValueError, r"num_representatives=10.5: .* capacity \(10"),
        ({"most_representatives": 0}, ValueError, "most_representatives=0: it must be at least 1"),
        ({"most_representatives": 2.5}, TypeError, "most_representatives=2.5: it must be an int"),
        ({"most_representatives": 11}, ValueError, r"most_representatives=11: .* capacity \(10\)"),
        (
            {"num_representatives": 2.5, "most_representatives": 2},
            ValueError,
            r"num_representatives=2.5: it must be at most most_representatives \(2\), for which",
        ),
        ({"num_representatives": 11}, ValueError, r"num_representatives=11: .* capacity \(10\)"),
        ({"num_candidates": 0}, ValueError, "num_candidates=0: it must be at least 1"),
        ({"seed": -1}, ValueError, "seed=-1: it must be at least 0"),
        ({"seed": 2**64}, ValueError, r"it must be below 2\*\*64"),
        ({"selection": "best"}, ValueError, "selection='best': there are"),
        ({"sampling": "best"}, ValueError, "sampling='best': there are 'uniform'"),
        ({"transport": "best"}, ValueError, "transport='best': there are"),
        ({"storage": "tape"}, ValueError, "storage='tape': it must be 'auto', 'cpu'"),
        ({"storage": "file:/no/folder"}, ValueError, "/no/folder must be a folder that can be"),
        ({"timeout_seconds": 0}, ValueError, "timeout_seconds=0: it must be above 0"),
        ({"timeout_seconds": math.inf}, ValueError, "=inf: .*and at most 31,622,400"),
        ({"timeout_seconds": 1e300}, ValueError, "=1e.300: .*and at most 31,622,400"),
        ({"timeout_seconds": math.nan}, ValueError, "timeout_seconds=nan: it must be above 0"),
        ({"timeout_seconds": "5"}, TypeError, "timeout_seconds='5': it must be a number of s"),
        ({"timeout_seconds": True}, TypeError, "timeout_seconds=True: it must be a number of"),
        ({"asynchronous": "no"}, TypeError, "asynchronous='no': it must be True, False or 'auto'"),
        ({"label": None}, ValueError, "label=None: the policy class-balanced needs the class"),
    ],
)
def test_arguments_out_of_range(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RehearsalBuffer(**{"capacity": 10, "num_representatives": 1, **arguments})


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        (4.25, ValueError, r"=4.25: it must be at most most_representatives \(4\), for which the"),
        (-0.5, ValueError, "num_representatives=-0.5: it must be a finite number of at least 0"),
        (float("nan"), ValueError, "num_representatives=nan: it must be a finite number"),
        (False, TypeError, "num_representatives=False: it must be a number"),
        ("2", TypeError, "num_representatives='2': it must be a number"),
        (None, TypeError, "num_representatives=None: it must be a number"),
    ],
)
def test_rates_that_cannot_be_set(rate: Any, error: type[Exception], message: str) -> None:
    with RehearsalBuffer(10, num_representatives=1.5, most_representatives=4) as buffer:
        with pytest.raises(error, match=message):
            buffer.num_representatives = rate
        assert buffer.num_representatives == 1.5
        buffer.num_representatives = np.float64(-0.0)
        assert repr(buffer.num_representatives) == "0"
    with pytest.raises(BufferClosedError, match="num_representatives after close"):
        buffer.num_representatives = 1


def test_numbers_of_numpy(tmp_path: Path) -> None:
    plain, numpys = (
        RehearsalBuffer(
            integer(20),
            num_representatives=number(2.5),
            most_representatives=integer(4),
            num_candidates=integer(2),
            num_draws=integer(1),
            seed=integer(7),
            label=integer(1),
            timeout_seconds=number(60.0),
        )
        for integer, number in ((int, float), (np.int64, np.float32))
    )
    with plain, numpys:
        for step in range(3):
            assert torch.equal(plain.update(batch_of(step))[0], numpys.update(batch_of(step))[0])
        numpys.save(tmp_path)
        plain.load(tmp_path)
        assert torch.equal(plain.update(batch_of(3))[0], numpys.update(batch_of(3))[0])
        read = [list(each.representatives(np.int64(3))) for each in (plain, numpys)]
        assert torch.equal(read[0][0][0], read[1][0][0])
        for batch_size in (2.5, True, "3"):
            with pytest.raises(TypeError, match="batch_size=.*: it must be an integer"):
                plain.representatives(batch_size)


def test_a_rate_that_is_fixed() -> None:
    with RehearsalBuffer(10, num_representatives=1.5) as buffer:
        with pytest.raises(ValueError, match=r"=2: it is 1.5 once and for all, .* most_repres"):
            buffer.num_representatives = 2
        assert buffer.num_representatives == 1.5


def test_how_many_samples_are_past() -> None:
    with RehearsalBuffer(40, num_representatives=3, num_draws=2) as buffer:
        assert buffer.num_past == 0
        assert buffer.draw() is None
        buffer.offer(batch_of(0, 2))
        assert buffer.num_past == 0
        buffer.draw()
        assert buffer.num_past == 4  # all there are, twice
        buffer.offer(batch_of(1))
        assert buffer.num_past == 4
        buffer.update(batch_of(2))
        assert buffer.num_past == 6
        with pytest.raises(ValueError, match="the nesting is fixed"):
            buffer.update((torch.zeros(2),))
        assert buffer.num_past == 6
        assert len(buffer.update(batch_of(3, 1))[1]) == 1 + buffer.num_past


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_storage_without_cuda() -> None:
    with pytest.raises(ValueError, match="this machine has no CUDA device"):
        RehearsalBuffer(10, num_representatives=1, storage="cuda")


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.zeros(2, 5), torch.zeros(2)), ValueError, r"label batch\[1\]: torch.float32 \[\]"),
        ((torch.zeros(2, 5), torch.zeros(2, 1).long()), ValueError, r"one integer per sample"),
        ((torch.zeros(2, 5), torch.zeros(2).bool()), ValueError, r"one integer per sample"),
        ((torch.zeros(2, 5),), ValueError, "label=1 names no leaf of the samples; there are batch"),
        ({"x": torch.zeros(2)}, ValueError, "label=1 names no leaf"),
        ((torch.zeros(2, 5), torch.tensor([3, -1])), ValueError, "label -1 is out of range"),
        ((torch.zeros(2, 5), [1, 2]), TypeError, r"batch\[1\]\[0\] is a int"),
        ((torch.zeros(2, 5), torch.zeros(3).long()), ValueError, r"batch\[1\] has 3 samples"),
    ],
)
def test_bad_first_batches_change_nothing(batch: Any, error: type[Exception], message: str) -> None:
    with RehearsalBuffer(10, num_representatives=1) as buffer:
        with pytest.raises(error, match=message):
            buffer.update(batch)
        assert len(buffer) == 0


def test_bad_later_batches_change_nothing() -> None:
    with RehearsalBuffer(10, num_representatives=2, selection=ClassBalanced(num_classes=10)) as b:
        b.update(batch_of(0))
        for bad, message in [
            ((batch_of(1)[0][:, :4], batch_of(1)[1]), r"batch\[0\] is torch.int64 \[4\]"),
            ((batch_of(1)[0], batch_of(1)[1].int()), r"batch\[1\] is torch.int32"),
            ((batch_of(1)[0], batch_of(1)[1] + 5), "labels must be from 0 to 9"),
        ]:
            with pytest.raises(ValueError, match=message):
                b.update(bad)
        images, _ = b.update(batch_of(1))
        assert set((images[8:, 0] // 1000).tolist()) == {0}
        assert b.stats().num_rounds == 2


def test_use_after_close() -> None:
    buffer = RehearsalBuffer(10, num_representatives=1)
    buffer.update(batch_of(0))
    buffer.close()
    buffer.close()
    for call in (
        lambda: buffer.update(batch_of(1)),
        buffer.draw,
        lambda: buffer.offer(batch_of(1)),
    ):
        with pytest.raises(BufferClosedError, match=r"after close\(\): the buffer is closed"):
            call()


def test_it_cannot_be_pickled_or_copied() -> None:
    with RehearsalBuffer(10, num_representatives=1) as buffer:
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled or copied: .* DataLoader's"):
                attempt(buffer)


def test_a_forked_process_cannot_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with RehearsalBuffer(10, num_representatives=1) as buffer:
        parent = os.getpid()
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: parent + 1)
            with pytest.raises(RuntimeError, match="update in a forked process"):
                buffer.update(batch_of(0))
            # The worker, which would end the round, is the parent's.
            with pytest.raises(RuntimeError, match="len in a forked process"):
                len(buffer)
            with pytest.raises(RuntimeError, match="stats in a forked process"):
                buffer.stats()
            buffer.close()  # what the child ends is not the parent's
        buffer.update(batch_of(0))


def test_two_threads_cannot_use_it_at_once() -> None:
    may_end = threading.Event()

    class Slow(Fifo):
        def admit(self, labels: np.ndarray, generator: np.random.Generator) -> Assignment:
            assert may_end.wait(30.0)
            return super().admit(labels, generator)

    with RehearsalBuffer(10, num_representatives=1, selection=Slow()) as buffer:
        buffer.update(batch_of(0))
        other = threading.Thread(target=lambda: buffer.update(batch_of(1)))
        other.start()  # and waits for the round
        deadline = time.monotonic() + 30.0
        while buffer._user is None and time.monotonic() < deadline:
            time.sleep(0.001)
        calls = {
            "update": lambda: buffer.update(batch_of(2)),
            "draw": buffer.draw,
            "offer": lambda: buffer.offer(batch_of(2)),
            "save": lambda: buffer.save("nowhere"),
        }
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=f"{name}: another thread is using the buffer"):
                call()
        may_end.set()
        other.join()
        buffer.update(batch_of(2))  # one after the other, they may
        assert buffer.stats().num_rounds == 3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_in_a_round_reaches_the_trainer_as_the_cause(asynchronous: bool) -> None:
    class Broken(SelectionPolicy):
        def admit(self, labels: np.ndarray, generator: np.random.Generator) -> Assignment:
            raise ArithmeticError("no luck")

    with RehearsalBuffer(
        10, num_representatives=1, selection=Broken(), asynchronous=asynchronous
    ) as buffer:
        buffer.update(batch_of(0))
        for _ in range(2):
            with pytest.raises(RoundError, match=r"round 0 \(admit\) failed: no luck") as caught:
                buffer.update(batch_of(1))
            assert isinstance(caught.value.__cause__, ArithmeticError)


def test_a_policy_cannot_be_shared() -> None:
    policy = ClassBalanced()
    with (
        RehearsalBuffer(10, num_representatives=1, selection=policy),
        pytest.raises(ValueError, match="already belongs to a buffer"),
    ):
        RehearsalBuffer(10, num_representatives=1, selection=policy)


def test_a_shard_that_does_not_fit() -> None:
    with RehearsalBuffer(2**40, num_representatives=1, num_candidates=1) as buffer:
        buffer.update((torch.zeros(2, 2**16), torch.arange(2)))
        with pytest.raises(
            RoundError, match=r"needs .* GB of memory on this host, but .* lower the"
        ):
            buffer.update((torch.zeros(2, 2**16), torch.arange(2)))


def test_a_buffer_that_is_forgotten_ends_its_thread_and_frees_its_memory() -> None:
    buffer = RehearsalBuffer(10, num_representatives=1)
    buffer.update(batch_of(0))
    name = "ritornello-rank-0"
    assert any(thread.name == name for thread in threading.enumerate())
    reference = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert reference() is None
    assert not any(thread.name == name for thread in threading.enumerate())


def test_no_batch_stays_alive_between_rounds() -> None:
    with RehearsalBuffer(10, num_representatives=1) as buffer:
        batch = batch_of(0)
        references = [weakref.ref(leaf) for leaf in batch]
        buffer.update(batch)
        len(buffer)
        del batch
        gc.collect()
        assert [reference() for reference in references] == [None, None]


def test_nothing_grows_once_the_buffer_is_full() -> None:
    with RehearsalBuffer(64, num_representatives=4, num_candidates=8) as buffer:

        def some_steps(num_steps: int) -> None:
            for step in range(num_steps):
                buffer.update(batch_of(step % 7, 16))

        some_steps(300)
        tracemalloc.start()
        try:
            some_steps(1000)  # NumPy keeps some small objects for reuse
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            some_steps(2000)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 20_000  # 10 bytes a round
        assert buffer.stats().shard_bytes == 64 * 48


def test_an_interrupted_offer_leaves_no_half_written_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with RehearsalBuffer(40, num_representatives=2) as buffer:
        buffer.update(batch_of(0, 4))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("ritornello.records.layout.Layout.pack_values", interrupted)
            buffer.update(batch_of(1, 4))
        buffer.update(batch_of(2, 4))
        assert len(buffer) == 8


def test_what_ends_late_closes_its_transport() -> None:
    class Slow(LocalTransport):
        closed = False

        def exchange(self, *arguments: Any) -> None:
            time.sleep(0.3)
            super().exchange(*arguments)

        def close(self) -> None:
            self.closed = True

    transport = Slow()
    buffer = RehearsalBuffer(40, num_representatives=2, transport=transport)
    with pytest.raises(OSError, match="the step failed"), buffer:
        buffer.update(batch_of(0, 4))
        raise OSError("the step failed")
    deadline = time.monotonic() + 5.0
    while not transport.closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert transport.closed
