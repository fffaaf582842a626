from __future__ import annotations

import gc

import torch

from ritornello.records.layout import Layout
from ritornello.rounds.joining import NUM_KEPT, Joiner

LARGE = torch.arange(100_000.0).view(100, 1000)


def join(outputs: Joiner, leaf: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    layout = Layout.of((leaf,))
    records = torch.zeros(len(past), layout.record_bytes, dtype=torch.uint8)
    layout.pack([past], None, records)
    return joined(outputs, layout, leaf, records)


def joined(
    outputs: Joiner, layout: Layout, leaf: torch.Tensor, records: torch.Tensor
) -> torch.Tensor:
    samples, columns = layout.values_of([leaf]), layout.columns(records)
    [tensor] = outputs.join(layout, [leaf], samples, records, columns)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def test_a_joined_tensor_is_what_cat_gives() -> None:
    outputs = Joiner()
    for leaf in (LARGE, LARGE.half(), LARGE.t(), LARGE[::2], torch.zeros(3, 2), LARGE[:0]):
        past = leaf[:5] if len(leaf) else torch.ones(400, *leaf.shape[1:])
        assert torch.equal(join(outputs, leaf, past), torch.cat((leaf, past)))


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    outputs = Joiner()
    lent = join(outputs, LARGE, LARGE)
    first = lent.data_ptr()
    del lent
    assert join(outputs, LARGE, LARGE).data_ptr() == first


def test_what_is_held_in_any_way_is_never_overwritten() -> None:
    outputs = Joiner()
    weight = torch.ones(1000, requires_grad=True)

    def kept(number: int) -> object:
        joined = join(outputs, torch.full((100, 1000), float(number)), LARGE[:1])
        return (
            joined,  # itself
            joined[3:5, :7],  # a view
            joined.detach().t(),
            joined.numpy()[2],  # an array
            (joined * weight).sum(),  # autograd's saved tensor
        )[number % 5]

    for number, held in enumerate([kept(number) for number in range(20)]):
        gc.collect()
        if isinstance(held, torch.Tensor) and held.requires_grad:
            weight.grad = None
            held.backward()
            assert torch.equal(weight.grad[1:], (100.0 * number + LARGE[0])[1:])
        else:
            values = torch.as_tensor(held)
            # The part of the batch holds the number, the joined row counts up.
            assert number in values
            assert set(values[:2].flatten().tolist()) <= {float(number), *LARGE[0].tolist()}


def test_a_hoarder_gets_memory_of_its_own() -> None:
    outputs = Joiner()
    hoard = [join(outputs, LARGE, LARGE[:1]) for _ in range(3 * NUM_KEPT)]
    assert len({joined.data_ptr() for joined in hoard}) == len(hoard)


def test_gradients_flow_through_a_batch_that_needs_them() -> None:
    leaf = LARGE.clone().requires_grad_()
    join(Joiner(), leaf, LARGE).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_tensors_on_other_devices_take_the_usual_way() -> None:
    layout = Layout.of((torch.zeros(2, 3),))
    records = torch.zeros(1, layout.record_bytes, dtype=torch.uint8)
    on_meta = torch.zeros(2, 3, device="meta")
    assert joined(Joiner(), layout, on_meta, records).shape == (3, 3)
