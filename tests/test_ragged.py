"""Samples of unequal length, through the whole buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from ritornello import RehearsalBuffer, RoundError, UniformSampling, evenly, rehearse
from ritornello.policies.contents import HAS_MOVED, Contents
from ritornello.rounds import planner
from ritornello.testing import (
    check_consistent,
    chi_square_p_value,
    connect_collective,
    connect_shared_memory,
    run_ranks,
)
from ritornello.transports import LocalTransport, SharedMemoryTransport, Transport

NUM_CLASSES = 3


def jagged(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.nested_tensor(samples, layout=torch.jagged)


FORMS: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "list": list,
    "tuple": tuple,
    "jagged": jagged,
    "list of bytes": lambda samples: [each.numpy().tobytes() for each in samples],
    "tuple of bytes": lambda samples: tuple(each.numpy().tobytes() for each in samples),
}


def sample(number: int, length: int) -> torch.Tensor:
    """Bags of vectors: what is in it says which it is."""
    return (torch.arange(2 * length).view(length, 2) + number).to(torch.int16)


def mini_batch(step: int, rank: int = 0, form: str = "list", size: int = 5) -> dict[str, Any]:
    dice = np.random.default_rng([step, rank])
    lengths = dice.integers(0, 60, size)
    numbers = 1000 * rank + 10 * step + np.arange(size)
    bags = [sample(n, length) for n, length in zip(numbers.tolist(), lengths.tolist(), strict=True)]
    if "bytes" in form:
        bags = [each.view(torch.uint8).flatten() for each in bags]
    texts = [
        torch.full((int(length) % 7,), 1.5 * n) for n, length in zip(numbers, lengths, strict=True)
    ]
    return {
        "bag": FORMS[form](bags),
        "label": torch.from_numpy(numbers % NUM_CLASSES),
        "length": torch.from_numpy(lengths),
        "number": torch.from_numpy(numbers),
        "text": texts,
    }


def parts_of(leaf: Any) -> list[Any]:
    return list(leaf.unbind()) if isinstance(leaf, torch.Tensor) else list(leaf)


def check(batch: dict[str, Any], form: str) -> None:
    """Each sample is whole, and its leaves belong together."""
    bags = parts_of(batch["bag"])
    assert len(bags) == len(batch["text"]) == len(batch["label"])
    for bag, text, length, number in zip(
        bags, batch["text"], batch["length"].tolist(), batch["number"].tolist(), strict=True
    ):
        expected = sample(number, length)
        if "bytes" in form:
            assert bag == expected.numpy().tobytes()
        else:
            assert bag.dtype == torch.int16
            assert torch.equal(bag, expected)
        assert torch.equal(text, torch.full((length % 7,), 1.5 * number))


def make_buffer(transport: str | Transport = "auto", **arguments: Any) -> RehearsalBuffer:
    given: dict[str, Any] = {"num_representatives": 4, "capacity_bytes": 9000, "label": "label"}
    return RehearsalBuffer(60, transport=transport, **(given | arguments))


@pytest.mark.parametrize("form", FORMS)
def test_it_comes_back_as_it_went_in(form: str) -> None:
    with make_buffer(identity="number") as buffer:
        for step in range(40):
            batch = mini_batch(step, form=form)
            augmented = buffer.update(batch)
            assert type(augmented["bag"]) is type(batch["bag"])
            check(augmented, form)
            assert len(augmented["label"]) == 5 + buffer.num_past
        assert buffer.num_past == 4
        assert int(buffer.past_mask.sum()) == 4
        held = list(buffer.representatives(7))
        for each in held:
            check(each, form)
        assert sum(len(each["label"]) for each in held) == len(buffer) == buffer.stats().num_held
        check_consistent(buffer)
        drawn = buffer.draw()
        assert drawn is not None
        check(drawn, form)
        assert type(drawn["bag"]) is type(batch["bag"])


def test_new_samples_stay_the_caller_s_own_and_past_ones_are_copies() -> None:
    with make_buffer() as buffer:
        first = mini_batch(0)
        kept = [each.clone() for each in first["bag"]]
        assert buffer.update(first) is first
        for each in first["bag"]:
            each.zero_()
        augmented = buffer.update(mini_batch(1))
        check(augmented, "list")  # what was offered is what it was then
        for each in augmented["bag"][5:]:
            each.zero_()
        check(next(buffer.representatives()), "list")
        assert any(each.any() for each in kept)


def play(transport: Transport | str, asynchronous: bool, **arguments: Any) -> list[Any]:
    """What a rank gets in some steps, as texts; all of it is checked."""
    rank = transport.rank if isinstance(transport, Transport) else 0
    seen = []
    with make_buffer(transport, asynchronous=asynchronous, **arguments) as buffer:
        for step in range(25):
            batch = buffer.update(mini_batch(step, rank, size=(5, 0, 9, 3)[step % 4]))
            check(batch, "list")
            seen.append(batch["number"].tolist())
        check_consistent(buffer)
        seen.append(buffer.stats().held_per_rank)
        assert seen[-1][rank] > 0
        assert len(buffer) < 60
    return seen


def hosts(*host_of_rank: int) -> Callable[[int], list[Any]]:
    def connect(num_ranks: int) -> list[Any]:
        inner = connect_collective(num_ranks)
        made = run_ranks(inner, lambda end: SharedMemoryTransport(end, hosts=host_of_rank))
        return list(made)

    return connect


@pytest.mark.parametrize("num_draws", [1, 2])
def test_every_transport_gives_the_same(num_draws: int) -> None:
    reference = run_ranks(
        LocalTransport.connect(3), lambda end: play(end, True, num_draws=num_draws)
    )
    assert any(len(each) > 9 for each in reference[0][:-1])
    for connect, asynchronous in (
        (LocalTransport.connect, False),
        (connect_collective, True),
        (connect_shared_memory, True),
        (connect_shared_memory, False),
        (hosts(0, 0, 1), True),
    ):
        found = run_ranks(
            connect(3), lambda end, how=asynchronous: play(end, how, num_draws=num_draws)
        )
        assert found == reference


@pytest.mark.parametrize("storage", ["cpu", "shared", "file"])
def test_every_storage_gives_the_same(storage: str, tmp_path: Any) -> None:
    where = f"file:{tmp_path}" if storage == "file" else storage
    assert play("local", True, storage=where) == play("local", False)


@pytest.mark.parametrize(
    "selection", ["class-balanced", "class-balanced-reservoir", "reservoir", "fifo"]
)
def test_policies(selection: str) -> None:
    play("local", True, selection=selection)


def test_rounds_are_planned_ahead_as_long_as_sizes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    num_planned = list[int]()
    plans_of_draws = planner.plans_of_draws

    def counted(draws: np.ndarray, *others: Any) -> Any:
        num_planned.append(len(draws))
        return plans_of_draws(draws, *others)

    def played() -> list[Any]:
        with make_buffer(asynchronous=False) as buffer:
            seen = []
            for step in range(60):
                buffer.num_candidates = 0 if 8 <= step < 40 else None
                seen.append(buffer.update(mini_batch(step))["number"].tolist())
            return seen

    monkeypatch.setattr(planner, "plans_of_draws", counted)
    ahead = played()
    assert num_planned[:3] == [1, 1, 1]
    assert max(num_planned) == 16
    monkeypatch.setattr(planner, "ROUNDS_AHEAD", 1)
    num_planned.clear()
    assert played() == ahead
    assert num_planned == [1] * 60


def test_samples_cost_what_they_have() -> None:
    """Bags of 371 to 6,275 rows, a tenth of their size: padding takes 2.4 times the data."""
    lengths = np.random.default_rng(0).permutation(np.linspace(371, 6275, 24).astype(int)[:20])
    data = int(lengths.sum()) * 4 * 8
    with RehearsalBuffer(
        30, num_representatives=1, capacity_bytes=2 * data, selection="fifo", label=None
    ) as buffer:
        for first in range(0, 20, 5):
            buffer.update([torch.ones(n // 10, 80) for n in lengths[first : first + 5]])
        stats = buffer.stats()
    assert stats.num_held == 20
    assert data * 0.99 < stats.used_bytes < 1.1 * data


def test_draws_are_uniform_whatever_the_lengths() -> None:
    counts = np.zeros(40)
    with make_buffer(capacity_bytes=100_000, selection="reservoir", label=None) as buffer:
        lengths = [1 + 59 * (number % 2) for number in range(40)]
        buffer.update([torch.full((n, 2), float(i)) for i, n in enumerate(lengths)])
        for _ in range(500):
            drawn = buffer.draw()
            assert drawn is not None
            for each in drawn:
                counts[int(each[0, 0])] += 1
            buffer.offer([torch.zeros(0, 2)] * 0)
    assert counts.sum() == 2000
    assert chi_square_p_value(counts, counts.mean()) > 1e-4


@pytest.mark.parametrize("selection", ["class-balanced", "fifo"])
@pytest.mark.parametrize("sampling", ["class-balanced", "grasp", "earlier-tasks"])
def test_every_rank_knows_who_left_and_who_moved(
    sampling: str, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_moved = list[int]()
    change = Contents.change

    def counted(contents: Contents, rank: int, changes: np.ndarray) -> Any:
        num_moved.append(int((changes[:, 1] >= HAS_MOVED).sum()))
        return change(contents, rank, changes)

    def rank_main(transport: Transport) -> None:
        with make_buffer(transport, sampling=sampling, selection=selection) as buffer:
            for step in range(40):
                if step % 10 == 0:
                    buffer.begin_task(str(step))
                    if sampling == "grasp":
                        buffer.measure_distances(lambda batch: batch["length"][:, None] + 1.0)
                batch = buffer.update(mini_batch(step, transport.rank))
                check(batch, "list")
                check_consistent(buffer)
                if sampling == "earlier-tasks":  # and none is taken for one by having moved
                    past = batch["number"][5:] % 1000 // 10
                    if selection == "class-balanced":
                        assert len(past) == (4 if step > 10 else 0)
                    assert (past < step // 10 * 10).all()

    monkeypatch.setattr(Contents, "change", counted)
    run_ranks(LocalTransport.connect(2), rank_main)
    assert sum(num_moved) > 20


def test_all_of_earlier_tasks_are_drawn_alike_whatever_has_moved() -> None:
    counts = dict[int, int]()
    with make_buffer(sampling="earlier-tasks", selection="reservoir") as buffer:
        buffer.begin_task("first")
        for step in range(20):
            buffer.update(mini_batch(step))
        buffer.begin_task("second")
        for step in range(20, 26):  # these push some of the first ones out
            buffer.update(mini_batch(step))
        held = [n for batch in buffer.representatives() for n in batch["number"].tolist()]
        earlier = [number for number in held if number < 200]
        assert 0 < len(earlier) < len(held)
        buffer.num_candidates = 0
        for _ in range(600):
            for number in buffer.update(mini_batch(0))["number"][5:].tolist():
                counts[number] = counts.get(number, 0) + 1
    assert set(counts) - set(earlier) <= set(range(200))  # the first draw was before
    observed = np.array([counts[number] for number in earlier])
    assert chi_square_p_value(observed, observed.mean()) > 1e-4


class Remembering(UniformSampling):
    """A policy of one's own that is not told of moves otherwise than of others that came."""

    needs_places = True

    def bind(self, capacity: int) -> None:
        self.places = set[int]()

    def overwritten(self, places: np.ndarray) -> None:
        self.places |= set(places.tolist())


def test_a_policy_that_does_not_look_at_moves_takes_them_for_others() -> None:
    policy = Remembering()
    policy.bind(9)
    policy.moved(np.array([7, 8]), np.array([1, 2]))
    assert policy.places == {1, 2, 7, 8}
    with make_buffer(sampling=Remembering()) as buffer:
        for step in range(20):
            check(buffer.update(mini_batch(step)), "list")


def test_what_is_stored_favours_no_length() -> None:
    long = 0
    held = 0
    for seed in range(40):
        with make_buffer(
            capacity_bytes=8000, selection="reservoir", label=None, seed=seed, asynchronous=False
        ) as buffer:
            for step in range(30):  # long ones first, then short ones
                lengths = [20] * 7 + [2] * 3 if step < 15 else [20] * 3 + [2] * 7
                buffer.update([torch.zeros(length, 2) for length in lengths])
            for batch in buffer.representatives():
                long += sum(len(each) > 2 for each in batch)
                held += len(batch)
    assert held > 1000
    assert abs(long / held - 0.5) < 4 * (0.25 / held) ** 0.5 + 0.01


def test_a_sample_that_does_not_fit_is_refused_and_the_buffer_goes_on() -> None:
    with make_buffer() as buffer:
        buffer.update(mini_batch(0))
        batch = mini_batch(1)
        batch["bag"][3] = torch.zeros(5000, 2, dtype=torch.int16)
        message = (
            r"batch\['bag'\]\[3\] has the length 5,000 and .* 20,0.. bytes, but with "
            r"capacity_bytes=9,000 on 1 rank\(s\) at most .* bytes of a sample can be stored: cut it"
        )
        with pytest.raises(ValueError, match=message):
            buffer.update(batch)
        check(buffer.update(mini_batch(1)), "list")


def test_the_bound_holds_for_samples_of_one_size_too() -> None:
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((5, 6), float(step)), torch.arange(5) % 2

    with RehearsalBuffer(1000, num_representatives=2, capacity_bytes=32 * 11) as buffer:
        for step in range(6):
            buffer.update(batch(step))
        stats = buffer.stats()
        assert (stats.capacity, stats.num_held, stats.shard_bytes) == (11, 11, 352)
        check_consistent(buffer)
    with (
        RehearsalBuffer(1000, num_representatives=2, capacity_bytes=31) as buffer,
        pytest.raises(ValueError, match="capacity_bytes=31: a representative takes 32 bytes"),
    ):
        buffer.update(batch(0))
    with pytest.raises(TypeError, match="capacity_bytes='1 GB': it must be an integer"):
        RehearsalBuffer(10, num_representatives=2, capacity_bytes="1 GB")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"capacity_bytes": None},
            r"\['bag'\] holds samples of unequal length.*Give capacity_bytes=",
        ),
        ({"capacity_bytes": 2900}, "capacity_bytes=2900: what has a fixed size takes .* no room"),
        ({"selection": "grasp"}, "selection: GraspEviction does not say who gives way"),
    ],
)
def test_what_cannot_be_kept_is_refused(arguments: dict[str, Any], message: str) -> None:
    with make_buffer(**arguments) as buffer, pytest.raises(ValueError, match=message):
        buffer.update(mini_batch(0))


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (torch.zeros(5, 2).short(), TypeError, r"batch\['bag'\] is a Tensor, but in the first"),
        ([torch.zeros(2, 2)] * 5, ValueError, r"\['bag'\]\[0\] is torch.float32 .2, 2., but"),
        ([torch.zeros(2, 3).short()] * 5, ValueError, r"hold torch.int16 \[length, 2\] there"),
        (
            [torch.zeros(2, 2).short()] * 4,
            ValueError,
            r"'label'\] has 5 samples, but .*'bag'\] has 4",
        ),
        ([[1, 2]] * 5, TypeError, "is a list, but in the first mini-batch it held samples of"),
    ],
)
def test_other_leaves_are_refused(leaf: Any, error: type[Exception], message: str) -> None:
    with make_buffer() as buffer:
        buffer.update(mini_batch(0))
        with pytest.raises(error, match=message):
            buffer.update({**mini_batch(1), "bag": leaf})


@pytest.mark.parametrize(
    "batch",
    [
        ([torch.zeros(5), torch.zeros(5)], torch.zeros(2)),  # as long by chance
        {"ids": [torch.zeros(3), torch.zeros(4)], "mask": [torch.zeros(4), torch.zeros(4)]},
        (jagged([torch.zeros(2), torch.zeros(2)]), torch.zeros(2)),
        [b"ab", b"c"],
        ([torch.zeros(7)], torch.zeros(1)),
        [torch.zeros(1), torch.zeros(2), torch.zeros(0)],
    ],
)
def test_what_is_taken_for_samples(batch: Any) -> None:
    with RehearsalBuffer(
        4, num_representatives=1, capacity_bytes=4000, selection="fifo", label=None
    ) as buffer:
        buffer.update(batch)
        assert buffer._steps.begun is not None
        assert buffer._steps.begun.layout.ragged
        assert type(buffer.update(batch)) is type(batch)


def test_ranks_of_which_one_has_samples_that_are_as_long_by_chance() -> None:
    def rank_main(end: Transport) -> None:
        lengths = [(3, 4), (7, 7)][end.rank]
        arguments: dict[str, Any] = {"selection": "reservoir", "label": None}
        with (
            make_buffer(end, **arguments) as buffer,
            pytest.raises(RoundError, match=r"another layout .* by chance .* give jagged"),
        ):
            for _ in range(2):
                buffer.update([torch.zeros(length) for length in lengths])

    run_ranks(LocalTransport.connect(2), rank_main)


def test_a_first_mini_batch_of_no_jagged_samples_says_what_they_are() -> None:
    def nothing(leaf: torch.Tensor) -> torch.Tensor:
        if not leaf.is_nested:
            return leaf[:0]
        offsets = torch.zeros(1, dtype=torch.int64)
        return torch.nested.nested_tensor_from_jagged(leaf.values()[:0], offsets)

    def rank_main(end: Transport) -> None:
        with make_buffer(end) as buffer:
            for step in range(4):
                batch = mini_batch(step, end.rank, "jagged")
                batch["text"] = jagged(batch["text"])
                if step == 0 and end.rank == 1:
                    batch = {key: nothing(leaf) for key, leaf in batch.items()}
                augmented = buffer.update(batch)
                check(augmented | {"text": augmented["text"].unbind()}, "jagged")
            check_consistent(buffer)

    run_ranks(LocalTransport.connect(2), rank_main)
    with (
        make_buffer(capacity_bytes=None) as buffer,
        pytest.raises(ValueError, match=r"Give capacity_bytes=, over all ranks$"),
    ):
        buffer.update({"bag": nothing(jagged([torch.zeros(2)])), "label": torch.arange(0)})


@pytest.mark.parametrize("nothing", [[], ()])
def test_a_first_mini_batch_of_no_samples_in_a_list(nothing: Any) -> None:
    with RehearsalBuffer(60, num_representatives=4, capacity_bytes=9000) as buffer:
        labels = torch.arange(3)
        with pytest.raises(ValueError, match=rf"batch\[0\] is an empty {type(nothing).__name__}"):
            buffer.update((nothing, labels[:0]))
        samples = [torch.zeros(length) for length in (1, 2, 3)]
        for _ in range(2):
            buffer.update((samples, labels))
        assert len(buffer.update((nothing, labels[:0]))[0]) == 4


def test_an_empty_list_beside_samples_holds_no_fields() -> None:
    """Also where `evenly` gives a rank without any mini-batches empty ones."""

    def rank_main(end: Transport) -> None:
        loader = [{"label": torch.arange(3), "more": []}] * (3 * end.rank)
        with RehearsalBuffer(60, num_representatives=4, label="label", transport=end) as buffer:
            for batch in evenly(loader, buffer):
                assert buffer.update(batch)["more"] == []
            assert len(buffer) == 9

    run_ranks(LocalTransport.connect(2), rank_main)


@pytest.mark.parametrize("is_first", [True, False])
def test_jagged_in_another_dimension_is_refused(is_first: bool) -> None:
    values, offsets = torch.zeros(2, 6), torch.tensor([0, 3, 6])
    turned = torch.nested.nested_tensor_from_jagged(values.T, offsets).transpose(1, 2)
    with make_buffer(label=None, selection="reservoir") as buffer:
        if not is_first:
            buffer.update(jagged([torch.zeros(3, 2), torch.zeros(3, 2)]))
        with pytest.raises(TypeError, match="jagged in the first dimension of samples"):
            buffer.update(turned)


def test_rehearse_and_fields_made_anew() -> None:
    def loader() -> Iterator[dict[str, Any]]:
        for step in range(30):
            yield mini_batch(step)

    with make_buffer() as buffer:
        for batch in rehearse(loader(), buffer):
            check(batch, "list")
        assert buffer.num_past == 4
        buffer.rewrite(lambda batch: batch["length"] + 1, fields="length")
        for batch in buffer.representatives():
            for bag, length in zip(batch["bag"], batch["length"].tolist(), strict=True):
                assert len(bag) == length - 1
        with pytest.raises(ValueError, match="fields='bag' differs in length"):
            buffer.rewrite(lambda batch: batch["bag"], fields="bag")


def test_distinct_samples_are_told_apart_by_what_is_in_pages() -> None:
    with make_buffer(capacity_bytes=90_000, selection="fifo", label=None) as buffer:
        for number in (1, 2, 1):
            buffer.update([torch.full((3,), number), torch.full((9,), number)])
        assert (len(buffer), buffer.stats(distinct=True).num_distinct) == (6, 4)


@pytest.mark.parametrize("how", ["fill", "evenly"])
def test_ranks_with_unequally_many_mini_batches_end_together(how: str) -> None:
    """Also one without any, which must be told what samples of no mini-batch are like."""

    def go_through(buffer: RehearsalBuffer, loader: list[Any], form: str) -> None:
        if how == "fill":
            assert buffer.fill(loader) == 30
            return
        for batch in evenly(loader, buffer):
            assert type(batch["bag"]) is type(mini_batch(0, form=form)["bag"])
            check(buffer.update(batch), form)

    def rank_main(end: Transport, form: str) -> None:
        loader = [mini_batch(step, end.rank, form) for step in range((4, 0, 2)[end.rank])]
        with make_buffer(end) as buffer:
            go_through(buffer, loader, form)
            assert buffer.stats().held_per_rank[1] == 0 < buffer.stats().held_per_rank[2]
            for step in range(9, 12):
                batch = buffer.update(mini_batch(step, end.rank, form))
                assert buffer.num_past == 4
                check(batch, form)
            check_consistent(buffer)

    for form in FORMS:
        run_ranks(LocalTransport.connect(3), partial(rank_main, form=form))


def test_evenly_is_told_by_an_example() -> None:
    with make_buffer() as buffer:
        ranks = evenly([], buffer, like=mini_batch(0, form="list of bytes"))
        empty = ranks.empty()
        assert (empty["bag"], empty["text"], len(empty["label"])) == ([], [], 0)
        buffer.update(empty)
        for step in range(3):
            check(buffer.update(mini_batch(step, form="list of bytes")), "list of bytes")
        check(buffer.update(ranks.empty()), "list of bytes")
        assert buffer.num_past == 4


def test_some_candidates_and_none_for_a_while() -> None:
    with make_buffer(num_candidates=2, capacity_bytes=90_000) as buffer:
        for step in range(10):
            check(buffer.update(mini_batch(step)), "list")
        num_held = buffer.stats().num_held
        assert 10 < num_held < 30  # of 50
        buffer.num_candidates = 0
        for step in range(10, 20):
            check(buffer.update(mini_batch(step)), "list")
        assert buffer.num_past == 4
        assert buffer.stats().num_held == num_held
        buffer.num_candidates = None
        buffer.update(mini_batch(20))
        assert buffer.stats().num_held == num_held + 5
        for batch in buffer.representatives():
            check(batch, "list")


NEW = 10_000
"""Numbers of new samples are from here on."""


def numbers_in(buffer: RehearsalBuffer) -> list[int]:
    return [number for batch in buffer.representatives() for number in batch["number"].tolist()]


def test_what_is_protected_stays_and_has_its_part_of_the_bytes(tmp_path: Any) -> None:
    def begin(end: Transport) -> tuple[int, list[int], list[int]]:
        with make_buffer(end) as buffer:
            buffer.fill(mini_batch(step, end.rank) for step in range(20))
            full = numbers_in(buffer)
            num_protected = buffer.protect(0.5)
            num_all = sum(buffer.stats().held_per_rank)
            assert 0.3 * num_all < num_protected < 0.7 * num_all
            buffer.update(mini_batch(NEW // 10, end.rank))
            buffer.save(tmp_path)  # some of what is not protected is still there
            return num_protected, full, go_on(buffer, end.rank)

    def go_on(buffer: RehearsalBuffer, rank: int) -> list[int]:
        for step in range(NEW // 10 + 1, NEW // 10 + 60):
            check(buffer.update(mini_batch(step, rank)), "list")
        check_consistent(buffer)
        return numbers_in(buffer)

    def again(end: Transport) -> list[int]:
        with make_buffer(end) as buffer:
            buffer.load(tmp_path)
            check_consistent(buffer)
            return go_on(buffer, end.rank)

    everyone = run_ranks(LocalTransport.connect(2), begin)
    old = set[int]()
    for _, full, left in everyone:
        assert max(left) >= NEW
        old |= {number for number in left if number < NEW}
        assert {number for number in left if number < NEW} <= set(full)
    assert len(old) == everyone[0][0]
    assert run_ranks(LocalTransport.connect(2), again) == [left for *_, left in everyone]
    (alone,) = run_ranks(LocalTransport.connect(1), again)
    assert {number for number in alone if number < NEW} == old


def test_gradients_flow_through_new_samples() -> None:
    with RehearsalBuffer(
        9, num_representatives=2, capacity_bytes=9000, selection="fifo", label=None
    ) as buffer:
        for _ in range(2):
            parts = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
            joined = buffer.update({"x": parts})["x"]
        torch.cat(joined).sum().backward()
        assert [each.requires_grad for each in joined] == [True, True, False, False]
        assert parts[1].grad is not None
