"""Adapters that grow beside a frozen network, against the equations that were published."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ritornello.experiments.models.adapters import (
    Adapted,
    ContinualAdapter,
    adapt,
    adapters_of,
    close_outputs,
    grow,
    new_directions,
    open_outputs,
    orthogonal_loss,
)
from ritornello.experiments.models.build import build
from ritornello.experiments.models.stages import split


def convolutional() -> nn.Module:
    """Its fourth stage halves maps and has more channels than the third."""
    torch.manual_seed(0)
    return build("test_efficientnet", 7, (3, 32, 32)).eval()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=7
    )
    model.pretrained_cfg = {"classifier": "head"}
    return model.eval()


KINDS = pytest.mark.parametrize("make", [convolutional, transformer])


def images_of(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def adapted(make: Callable[[], nn.Module], num_tasks: int = 0, width: int = 4) -> nn.Module:
    """A model with adapters of tasks that have all been learnt, as it were."""
    model = make()
    adapt(model, 2, width, 0.1, images_of(1))
    for _ in range(num_tasks):
        grow([model], seed=5)
        learn(model)
    return model


@torch.no_grad()
def learn(model: nn.Module) -> None:
    """Changes all that is learnt, and nothing else."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(0.1 * torch.randn_like(weight))


# What an adapter computes.


def test_tokens_by_hand() -> None:
    """``CAL(S&S(h)) = ReLU((a h + b) W_dp) W_up``, with the weights of all tasks in one matrix."""
    adapter = ContinualAdapter(5, 3, width=2)
    for seed in range(3):
        adapter.grow(torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)))
    for weight in adapter.parameters():
        nn.init.normal_(weight)
    h = torch.randn(4, 6, 5)
    w_dp = torch.cat([down.T for down in adapter.down], dim=1)  # D x (t d)
    w_up = torch.cat([up.T for up in adapter.up])  # (t d) x D'
    expected = ((adapter.scale * h + adapter.shift) @ w_dp).relu() @ w_up
    torch.testing.assert_close(adapter(h), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_maps_are_seen_as_the_vectors_at_their_positions(stride: int) -> None:
    adapter = ContinualAdapter(5, 3, width=2, stride=stride)
    tokens = ContinualAdapter(5, 3, width=2)
    for each in (adapter, tokens):
        for _ in range(2):
            each.grow(torch.randn(2, 5))
    for weight in adapter.parameters():
        nn.init.normal_(weight)
    tokens.load_state_dict(adapter.state_dict())
    maps = torch.randn(2, 5, 7, 8)
    seen = maps[:, :, ::stride, ::stride]
    torch.testing.assert_close(adapter(maps), tokens(seen.movedim(1, -1)).movedim(-1, 1))


def test_a_transformers_block_by_hand() -> None:
    """``x' = x + MHSA(LN(x)) + lambda CAL_1``, ``x' + MLP(LN(x')) + lambda CAL_2``."""
    model = adapted(transformer, num_tasks=2)
    block = model.get_submodule("blocks.2")
    attention, perceptron = block.attn, block.mlp
    x = torch.randn(2, 17, 24)
    with torch.no_grad():
        first = block.norm1(x)
        between = x + attention.body(first) + 0.1 * attention.adapter(first)
        second = block.norm2(between)
        expected = between + perceptron.body(second) + 0.1 * perceptron.adapter(second)
        torch.testing.assert_close(block(x), expected)
    assert not any(isinstance(each, Adapted) for each in model.get_submodule("blocks.0").modules())


def test_the_orthogonal_loss_is_the_published_one() -> None:
    adapter = ContinualAdapter(6, 5, width=2)
    assert adapter.orthogonal_loss() == 0
    for _ in range(3):
        adapter.grow(torch.randn(2, 6))
        assert adapter.orthogonal_loss() == 0 or adapter.num_tasks > 1
    for weight in adapter.parameters():
        nn.init.normal_(weight)
    downs = [down.detach().double().numpy().T for down in adapter.down]  # D x d
    ups = [up.detach().double().numpy().T for up in adapter.up]  # d x D
    expected = np.linalg.norm(downs[2].T @ np.hstack(downs[:2])) ** 2  # |W_dp^t' W_dp^(1..t-1)|_F^2
    expected += np.linalg.norm(ups[2] @ np.vstack(ups[:2]).T) ** 2
    assert adapter.orthogonal_loss().item() == pytest.approx(expected, rel=1e-5)


def test_orthogonal_blocks_lose_nothing_and_others_are_pushed_away_from_old_ones() -> None:
    adapter = ContinualAdapter(4, 4, width=1)
    axes = torch.eye(4)
    adapter.grow(axes[:1])
    adapter.grow(axes[1:2])
    with torch.no_grad():
        adapter.up[0].copy_(axes[:, 2:3])
        adapter.up[1].copy_(axes[:, 3:])
    assert adapter.orthogonal_loss() == 0
    with torch.no_grad():
        adapter.down[1].copy_(torch.tensor([[0.5, 1.0, 0.0, 0.0]]))
    loss = adapter.orthogonal_loss()
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    assert adapter.down[1].grad.tolist() == [[1.0, 0.0, 0.0, 0.0]]  # what it shares with the old
    assert adapter.down[0].grad is None


# What grows.


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_new_block_the_outputs_are_what_they_were(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(images_of())

    model = adapted(make)
    assert torch.equal(logits(model), logits(make()))
    for _ in range(3):
        before = logits(model)
        grow([model], seed=5)
        assert torch.equal(logits(model), before)
        learn(model)
        assert not torch.equal(logits(model), before)


@KINDS
def test_only_the_newest_adapters_and_the_last_layer_learn(make: Callable[[], nn.Module]) -> None:
    model = adapted(make)
    for number in range(3):
        grow([model], seed=5)
        before = copy.deepcopy(model.state_dict())
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(images_of(6)), torch.arange(6))
        (loss + orthogonal_loss(model)).backward()
        learnt = {name for name, each in model.named_parameters() if each.grad is not None}
        ends = {name.rpartition("adapter.")[2] for name in learnt if "adapter." in name}
        own = {f"down.{number}", f"up.{number}"}
        assert ends == (own if number else own | {"scale", "shift"})
        assert len([name for name in learnt if "adapter." not in name]) == 2
        learn(model)
        now = model.state_dict()
        assert {name for name, each in before.items() if not each.equal(now[name])} == learnt


def test_new_directions_are_orthogonal_to_each_other_and_to_old_ones() -> None:
    generator = np.random.default_rng(3)
    old = [torch.randn(4, 20), torch.randn(6, 20)]
    new = new_directions(old, 20, 7, generator)
    torch.testing.assert_close(new @ new.T, torch.eye(7), atol=1e-6, rtol=0)
    assert (new @ torch.cat(old).T).abs().max() < 1e-5
    again = new_directions(old, 20, 7, np.random.default_rng(3))
    assert torch.equal(new, again)
    assert not torch.equal(new, new_directions(old, 20, 7, generator))


@pytest.mark.parametrize(("num_old", "num_free"), [(15, 5), (20, 0), (31, 0)])
def test_where_there_is_no_room_the_last_directions_are_orthogonal_to_each_other_alone(
    num_old: int, num_free: int
) -> None:
    old = [torch.randn(num_old, 20)]
    new = new_directions(old, 20, 7, np.random.default_rng(3))
    torch.testing.assert_close(new @ new.T, torch.eye(7), atol=1e-6, rtol=0)
    overlaps = (new @ old[0].T).abs().amax(dim=1)
    assert (overlaps < 1e-5).tolist() == [True] * num_free + [False] * (7 - num_free)


def test_where_there_is_no_room_somebody_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(transformer, num_tasks=3, width=8)  # of 24 dimensions
    assert not caplog.records
    grow([model], seed=5)
    [record] = caplog.records
    assert record.getMessage().startswith(
        "adapter_width=8: 3 tasks have taken 24 of the 24 directions that the narrowest adapted "
        "layer sees. From now on adapters cannot be orthogonal to all before them"
    )
    grow([model], seed=5)
    assert len(caplog.records) == 1


def test_models_that_grow_together_have_the_same_blocks() -> None:
    models = [adapted(transformer, num_tasks=1) for _ in range(2)]
    with torch.no_grad():
        for weight in models[1].parameters():
            weight.mul_(0.5)
    grow(models, seed=5)
    pairs = zip(*map(adapters_of, models), strict=True)
    assert all(torch.equal(one.down[1], other.down[1]) for one, other in pairs)
    # Each adapter, task and seed has directions of its own.
    other = adapted(transformer, num_tasks=1)
    grow([other], seed=6)
    new = [each.down[1] for model in (models[0], other) for each in adapters_of(model)]
    assert len({each.sum().item() for each in new}) == 8


def test_classes_that_have_not_come_are_never_predicted() -> None:
    model, images = transformer(), images_of()
    close_outputs(model)
    for classes in ((4, 1), (1, 5)):
        open_outputs(model, classes)
        with torch.no_grad():
            logits = model(images)
            assert logits[:, classes].max() < 1.0
            assert set(logits.argmax(dim=1).tolist()) <= {1, 4, 5}
            model.get_submodule("head").bias[1] = -0.5  # as if it were learnt
    assert logits[:, 1].tolist() == [-0.5] * 3
    assert logits[:, [4, 5]].abs().max() == 0
    with torch.autocast("cpu", torch.float16):
        assert (model(images).argmax(dim=1) == 4).all()


def test_a_last_layer_without_a_bias_cannot_be_closed() -> None:
    model = transformer()
    model.get_submodule("head").register_parameter("bias", None)
    with pytest.raises(ValueError, match="strategy='adapter': .* last layer, 'head', has no bias"):
        close_outputs(model)


# Where adapters stand.


@pytest.mark.parametrize(
    ("make", "num_stages", "layers"),
    [
        (transformer, 1, ["blocks.2.attn", "blocks.2.mlp"]),
        (convolutional, 2, ["blocks.3.0", "blocks.4.0"]),
        (lambda: build("resnet18", 7, (3, 32, 32)), 1, ["layer4.0", "layer4.1"]),
        (
            lambda: build("test_convnext", 7, (3, 32, 32)),
            1,
            ["stages.3.blocks.0", "stages.3.blocks.1"],
        ),
        (lambda: build("regnetx_002", 7, (3, 32, 32)), 2, ["s3", "s4"]),
    ],
)
def test_where_adapters_stand(
    make: Callable[[], nn.Module], num_stages: int, layers: list[str]
) -> None:
    model = make()
    adapt(model, num_stages, 4, 0.1, images_of(1))
    assert [name for name, each in model.named_modules() if isinstance(each, Adapted)] == layers
    grow([model], seed=0)
    assert model(images_of()).shape == (3, 7)


@KINDS
def test_the_rest_of_a_split_model_can_be_adapted(make: Callable[[], nn.Module]) -> None:
    model, images = make(), images_of()
    trunk, rest = split(model, 2, images)
    with torch.no_grad():
        features = trunk(images)
        adapt(rest, 2, 4, 0.1, features)
        grow([rest], seed=5)
        learn(rest)
        whole = adapted(make)
        grow([whole], seed=5)
        whole.load_state_dict(rest.state_dict(), strict=False)
        assert torch.equal(rest(features), whole(images))


@pytest.mark.parametrize(
    ("make", "num_stages", "width", "message"),
    [
        (
            transformer,
            4,
            4,
            r"4 of its last stages: it must be from 1 to the number of the model's stages \(3\)",
        ),
        (transformer, 0, 4, "0 of its last stages: it must be from 1"),
        (
            transformer,
            1,
            25,
            "adapter_width=25: the layer 'blocks.2.attn' sees vectors of 24 numbers, so that at most",
        ),
        (lambda: build("small-cnn", 7, (3, 32, 32)), 1, 4, "Sequential cannot be split: it has no"),
    ],
)
def test_what_cannot_be_adapted(
    make: Callable[[], nn.Module], num_stages: int, width: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(make(), num_stages, width, 0.1, images_of(1))


class Halves(nn.Module):
    """Blocks that no adapter fits beside."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self.head = nn.Linear(4, 2)
        self.pretrained_cfg = {"classifier": "head"}

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.blocks[0](tokens)
        logits: Tensor = self.head(seen if isinstance(seen, Tensor) else seen[0])
        return logits


class EverySecond(nn.Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens[:, ::2])


@pytest.mark.parametrize(
    ("block", "given"),
    [(EverySecond(4, 4), r"\[1, 3, 4\]"), (nn.LSTM(4, 4), "no single tensor")],
)
def test_a_layer_that_no_adapter_fits_beside(block: nn.Module, given: str) -> None:
    with pytest.raises(
        ValueError, match=rf"beside the layer 'blocks.0', which maps \[1, 6, 4\] to {given}: take"
    ):
        adapt(Halves(block), 1, 2, 0.1, torch.zeros(1, 6, 4))


def test_a_model_without_adapters_has_no_orthogonal_loss() -> None:
    with pytest.raises(ValueError, match="the model has no adapters: let `adapt` put them in"):
        orthogonal_loss(transformer())
