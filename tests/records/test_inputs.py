"""What a sample can be: containers of other libraries, and what is refused with which advice."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from ritornello import RehearsalBuffer, rehearse
from ritornello.records.nesting import leaves_of

NUM_CLASSES = 3


@dataclasses.dataclass
class Sample:
    """A dataclass that is registered with pytree."""

    image: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor | None = None


class Parts:
    """A type that is registered with pytree by numbered parts, and has a name beside them."""

    def __init__(self, parts: list[torch.Tensor], name: Any = "parts") -> None:
        self.parts, self.name = parts, name


pytree.register_dataclass(Sample)
pytree.register_pytree_node(
    Parts, lambda each: (each.parts, each.name), lambda parts, name: Parts(list(parts), name)
)


def tensors(step: int, num_samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """As many features as samples: nothing may take the one for the other."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (num_samples, 4), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator)


def make_buffer(label: Any = "label", **options: Any) -> RehearsalBuffer:
    return RehearsalBuffer(20, num_representatives=3, label=label, **options)


class Marked(torch.Tensor):
    """A subclass of tensors, as those of torchvision."""


def test_subclasses_of_tensors_come_back_plain_from_the_first_step_on() -> None:
    def marked(step: int) -> dict[str, torch.Tensor]:
        images, labels = tensors(step)
        parameter = torch.nn.Parameter(images.float())
        return {
            "image": images.as_subclass(Marked),
            "label": labels.as_subclass(Marked),
            "plain": labels,
            "parameter": parameter,
        }

    with make_buffer() as buffer, make_buffer() as rehearsed:
        ahead = rehearse([marked(step) for step in range(3)], rehearsed)
        for step, other in enumerate(ahead):
            augmented = buffer.update(marked(step))
            assert len(augmented["image"]) == 4 + 3 * (step > 0)
            for batch in (augmented, other):
                assert {type(each) for each in batch.values()} == {torch.Tensor}
                assert torch.equal(batch["image"][:4], tensors(step)[0])
                assert batch["parameter"].requires_grad
        kept = [*buffer.representatives(), buffer.draw()]
        assert {type(each) for batch in kept for each in batch.values()} == {torch.Tensor}
        plain = {name: each.as_subclass(torch.Tensor) for name, each in marked(5).items()}
        buffer.offer(plain)  # they are samples of the same kind


def test_a_mini_batch_of_plain_tensors_is_the_very_same_while_the_buffer_is_empty() -> None:
    with make_buffer() as buffer:
        batch = dict(zip(("image", "label"), tensors(0), strict=True))
        assert buffer.update(batch) is batch


class Elsewhere(torch.Tensor):
    """Only looks like a tensor: what it stands for has the values."""

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(cls, inside.shape)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, kinds: Any, values: Any = (), names: Any = None
    ) -> Any:
        raise NotImplementedError


def test_what_has_its_values_elsewhere_is_refused() -> None:
    images, labels = torch.zeros(4, 4), tensors(0)[1]
    with make_buffer() as buffer:
        with pytest.raises(TypeError, match="is a Elsewhere, which has no values of its own; give"):
            buffer.update({"image": Elsewhere(images), "label": labels})
        buffer.update({"image": images, "label": labels})


CONTAINERS: dict[str, tuple[Callable[..., Any], type, type]] = {
    # What makes one of images and labels, what comes back, and what after a load.
    "dataclass": (lambda images, labels: Sample(images, labels), Sample, dict),
    "numbered parts": (lambda images, labels: Parts([images, labels]), Parts, list),
    "ordered dict": (lambda x, y: OrderedDict(image=x, label=y), OrderedDict, dict),
    "other mapping": (lambda images, labels: UserDict(image=images, label=labels), dict, dict),
    "deque": (lambda images, labels: deque((images, labels)), deque, list),
}


def leaves(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(batch, Sample):
        return batch.image, batch.label
    if isinstance(batch, Parts):
        return batch.parts[0], batch.parts[1]
    first, second = batch.values() if isinstance(batch, dict) else batch
    return first, second


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_come_back_as_they_went_in(name: str, tmp_path: Path) -> None:
    contain, expected, after_load = CONTAINERS[name]
    numbered = name in ("numbered parts", "deque")
    with make_buffer(1 if numbered else "label") as buffer, make_buffer(1) as reference:
        for step in range(5):
            augmented = buffer.update(contain(*tensors(step)))
            images, labels = reference.update(tensors(step))
            if step:
                assert type(augmented) is expected
            found = augmented if step else augmented.data if name == "other mapping" else augmented
            for ours, theirs in zip(leaves(found), (images, labels), strict=True):
                assert torch.equal(ours, theirs)
        buffer.save(tmp_path)
        kept = leaves(buffer.draw())
        buffer.offer(contain(*tensors(5)))
        then = leaves(buffer.update(contain(*tensors(6))))
    with make_buffer(1 if numbered else "label") as buffer:
        buffer.load(tmp_path)
        drawn = buffer.draw()
        assert type(drawn) is after_load  # the file names no types, and executes nothing
        assert all(torch.equal(*pair) for pair in zip(leaves(drawn), kept, strict=True))
        buffer.offer(contain(*tensors(5)))
        augmented = buffer.update(contain(*tensors(6)))
        assert type(augmented) is expected
        assert all(torch.equal(*pair) for pair in zip(leaves(augmented), then, strict=True))


def test_a_loaded_buffer_meets_keys_in_another_order(tmp_path: Path) -> None:
    def batch(step: int, turned: bool) -> dict[str, torch.Tensor]:
        images, labels = tensors(step)
        inside = {"image": images.double(), "label": labels}
        return dict(reversed(inside.items())) if turned else inside

    with make_buffer() as buffer:
        for step in range(5):
            buffer.update(batch(step, turned=False))
        buffer.save(tmp_path)
        expected = [buffer.update(batch(step, turned=False)) for step in range(5, 8)]
    with make_buffer() as buffer:
        buffer.load(tmp_path)
        for step, each in enumerate(expected, start=5):
            augmented = buffer.update(batch(step, turned=True))
            assert all(torch.equal(augmented[key], each[key]) for key in each)


def test_what_lies_beside_the_tensors_must_not_change() -> None:
    with make_buffer(1) as buffer:
        buffer.update(Parts(list(tensors(0))))
        with pytest.raises(ValueError, match="this Parts holds other things beside its tensors"):
            buffer.update(Parts(list(tensors(1)), name="other"))
        with pytest.raises(ValueError, match="batch has 1 parts, but .* have 2"):
            buffer.update(Parts([tensors(1)[0]]))
        with pytest.raises(ValueError, match="batch has int parts, but .* have 2"):
            buffer.update(3)
        assert buffer.update(list(tensors(1))).parts[0].shape == (7, 4)
    cannot_be_compared = Parts(list(tensors(0)), name=torch.zeros(2))
    with make_buffer(1) as buffer, pytest.raises(ValueError, match="this Parts holds other things"):
        buffer.update(cannot_be_compared)


def test_another_field_of_a_dataclass() -> None:
    with make_buffer() as buffer:
        buffer.update(Sample(*tensors(0)))
        with pytest.raises(ValueError, match=r"batch has \['image', 'label', 'weight'\], but"):
            buffer.update(Sample(*tensors(1), weight=torch.ones(4)))
        with pytest.raises(ValueError, match=r"batch has tuple, but .* \['image', 'label'\]"):
            buffer.update(tensors(1))


def test_a_loader_a_step_ahead_keeps_the_container() -> None:
    loader = [Sample(*tensors(step)) for step in range(4)]
    with make_buffer() as buffer, make_buffer(1) as reference:
        plain = [reference.update(tensors(step)) for step in range(4)]
        for augmented, expected in zip(rehearse(loader, buffer, "cpu"), plain, strict=True):
            assert type(augmented) is Sample
            assert torch.equal(augmented.image, expected[0])


# TensorDict.


def tensor_dict(step: int, num_samples: int = 4, **others: Any) -> Any:
    images, labels = tensors(step, num_samples)
    inside = {"image": images, "target": {"label": labels}, "inner": {"x": images.double()}}
    return pytest.importorskip("tensordict").TensorDict({**inside, **others}, [num_samples])


def test_tensor_dicts(tmp_path: Path) -> None:
    label = ("target", "label")
    with make_buffer(label) as buffer, make_buffer(label) as reference:
        for step in range(5):
            augmented = buffer.update(tensor_dict(step))
            plain = reference.update(tensor_dict(step).to_dict())
        assert type(augmented) is type(tensor_dict(0))
        assert augmented.batch_size == augmented["target"].batch_size == torch.Size([7])
        assert augmented["inner"].batch_size == torch.Size([7])  # not [7, 4]: 4 are features
        assert torch.equal(augmented["image"], plain["image"])
        assert torch.equal(augmented["target", "label"], plain["target"]["label"])
        buffer.save(tmp_path)
        assert buffer.draw().batch_size == torch.Size([3])
        buffer.offer(tensor_dict(5))
        expected = buffer.update(tensor_dict(6))
    with make_buffer(label) as buffer:
        buffer.load(tmp_path)
        assert type(buffer.draw()) is dict  # until a mini-batch has come
        buffer.offer(tensor_dict(5).select("inner", "target", "image"))
        augmented = buffer.update(tensor_dict(6))
        assert type(augmented) is type(expected)
        assert augmented.batch_size == expected.batch_size
        assert (augmented == expected).all()


def test_tensor_dicts_of_other_kinds() -> None:
    tensordict = pytest.importorskip("tensordict")

    @tensordict.tensorclass
    class Image:
        image: torch.Tensor
        label: torch.Tensor
        name: str | None = None

    with make_buffer() as buffer:
        for step in range(3):
            augmented = buffer.update(Image(*tensors(step), batch_size=[4]))
        assert type(augmented) is Image
        assert augmented.batch_size == torch.Size([7])
        with pytest.raises(
            ValueError, match=r"batch has \[.*'name'.*\], but .* \['image', 'label'\]"
        ):
            buffer.update(Image(*tensors(0), name="cat", batch_size=[4]))
    with make_buffer() as buffer:  # stacked only when it is looked at: comes back as a dict
        for step in range(3):
            images, labels = tensors(step)
            each = [
                tensordict.TensorDict({"image": image, "label": label})
                for image, label in zip(images, labels, strict=True)
            ]
            augmented = buffer.update(tensordict.lazy_stack(each))
        assert type(augmented) is dict
        assert torch.equal(augmented["image"][:4], images)


@pytest.mark.parametrize("text", ["one", ["a", "b", "c", "d"]], ids=["for all", "for each"])
def test_tensor_dicts_with_text(text: Any) -> None:
    with make_buffer(("target", "label")) as buffer:
        with pytest.raises(
            TypeError, match=r"batch\['text'\] is a NonTensor.*leave out what is no"
        ):
            buffer.update(tensor_dict(0, text=text))
        buffer.update(tensor_dict(0))
        with pytest.raises(ValueError, match=r"'text'\], but the buffer's samples have the keys"):
            buffer.update(tensor_dict(1, text=text))


# Hugging Face's datasets.


@pytest.fixture
def images_and_text(monkeypatch: pytest.MonkeyPatch) -> Any:
    pillow = pytest.importorskip("PIL.Image")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # no thread for its progress bars
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (32, 5, 5, 3), dtype=np.uint8)
    return datasets.Dataset.from_dict(
        {
            "image": [pillow.fromarray(each) for each in pixels],
            "label": generator.integers(0, NUM_CLASSES, 32),
            "text": [f"sample {number}" for number in range(32)],
            "input_ids": [list(range(1 + number % 4)) for number in range(32)],
        },
        features=datasets.Features(
            image=datasets.Image(),
            label=datasets.ClassLabel(num_classes=NUM_CLASSES),
            text=datasets.Value("string"),
            input_ids=datasets.List(datasets.Value("int64")),
        ),
    )


def test_hugging_face_data_sets(images_and_text: Any) -> None:
    from datasets.distributed import split_dataset_by_node

    data = images_and_text.select_columns(["image", "label"])
    stream = data.to_iterable_dataset(num_shards=2)
    for each in (data, split_dataset_by_node(stream, rank=1, world_size=2)):
        with make_buffer() as buffer:
            for batch in DataLoader(each.with_format("torch"), batch_size=4):
                augmented = buffer.update(batch)
        assert augmented["image"].dtype == torch.uint8
        assert augmented["image"].shape == (7, 3, 5, 5)
        assert augmented["label"].shape == (7,)


def test_hugging_face_columns_that_are_no_tensors(images_and_text: Any) -> None:
    with make_buffer() as buffer:
        with pytest.raises(TypeError, match=r"batch\['text'\]\[0\] is a str; .*leave text out"):
            buffer.update(images_and_text.select_columns(["text", "label"])[:4])
        with pytest.raises(TypeError, match=r"\['image'\]\[0\] is a Png.*pil_to_tensor converts"):
            buffer.update(images_and_text.select_columns(["image", "label"])[:4])
        tokens = images_and_text.select_columns(["input_ids", "label"]).with_format("torch")
        with pytest.raises(ValueError, match=r"_ids'\] holds samples of unequal .*capacity_bytes="):
            buffer.update(tokens[:4])


def test_tokens_that_are_padded_anew_in_every_batch() -> None:
    def batch(length: int) -> dict[str, torch.Tensor]:
        ids = torch.ones(4, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids, "label": torch.zeros(4).long()}

    with make_buffer() as buffer:
        buffer.update(batch(12))
        with pytest.raises(ValueError, match=r"\['input_ids'\] is torch.int64 \[9\] .*Pad, crop"):
            buffer.update(batch(9))
        assert buffer.update(batch(12))["input_ids"].shape == (7, 12)


# Mini-batches that would be taken for what they are not.


def graphs(package: str) -> Any:
    """A batch of graphs, of a package that need not be there."""
    return type("DataBatch", (), {"__module__": f"{package}.data.batch"})()


Target = namedtuple("Target", ["boxes", "batch_idx"])


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        ({"image": torch.zeros(4, 3), "batch_idx": torch.arange(4.0)}, r"batch\['batch_idx'\]"),
        ((torch.zeros(4, 3), {"batch_index": torch.zeros(4)}), r"batch\[1\]\['batch_index'\]"),
        ((torch.zeros(2, 3), Target(torch.zeros(2, 4), torch.zeros(2))), r"batch\[1\]\[1\]"),
        ({"x": torch.zeros(5, 3), "batch": torch.tensor([0, 0, 1, 1, 2])}, r"batch\['batch'\]"),
        ({"x": torch.zeros(2, 3), "x_batch": torch.tensor([0, 1])}, r"batch\['x_batch'\]"),
        ({"x": torch.zeros(2, 3), "edge_index": torch.zeros(2, 5).long()}, "edge_index"),
    ],
)
def test_fields_that_count_places_in_the_mini_batch(batch: Any, path: str) -> None:
    message = rf"{path}.* counts places in its mini-batch.* make it anew behind update"
    with (
        RehearsalBuffer(10, num_representatives=2, selection="fifo", label=None) as buffer,
        pytest.raises(ValueError, match=message),
    ):
        buffer.update(batch)


@pytest.mark.parametrize("package", ["torch_geometric", "dgl"])
def test_batches_of_graphs(package: str) -> None:
    message = r"batch\['graph'\] is a DataBatch; .*numbers its nodes through.* padded to one size"
    with make_buffer() as buffer, pytest.raises(TypeError, match=message):
        buffer.update({"graph": graphs(package), "label": torch.arange(3)})


def image(height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.zeros(3, height, width)


@pytest.mark.parametrize(
    "batch",
    [
        ([image(), image(), image()], torch.arange(3)),
        ((image(), image(), image()), torch.arange(3)),
        ([image(8, 9), image(7, 7), image(6, 5)], torch.arange(3)),
        {"images": [image(), image(), image()], "label": torch.arange(3)},
        [image(), image(), image()],
        [torch.zeros(4, 8, 8)] * 4,
        (torch.zeros(2, 5), [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(2).long()}] * 2),
        ([torch.zeros(2).long(), torch.zeros(2).long()], torch.arange(2)),
    ],
)
def test_lists_that_may_be_samples(batch: Any) -> None:
    message = r"it cannot be told whether they are . samples or . fields.*torch.stack.* as a dict"
    with (
        RehearsalBuffer(10, num_representatives=2, selection="fifo", label=None) as buffer,
        pytest.raises(ValueError, match=message),
    ):
        buffer.update(batch)


@pytest.mark.parametrize(
    "batch",
    [
        [torch.zeros(2, 3), torch.arange(2)],  # what loaders make of pairs
        [torch.zeros(2, 3), torch.ones(2, 3)],
        [torch.zeros(3, 3, 8, 8), torch.zeros(3, 3, 8, 8), torch.zeros(3, 3, 8, 8)],
        ([torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8)], torch.arange(4)),  # two views
        ([torch.zeros(2, 3), torch.zeros(2, 4)], torch.arange(2)),
        {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)},
        ({"views": {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}}, torch.arange(2)),
        {"x": torch.zeros(4), "batch": torch.tensor([7, 7, 8, 9])},  # of a data set
        {"x": torch.zeros(4), "batch": torch.zeros(4).long()},
        {"x": torch.zeros(4), "batch": torch.rand(4)},
        {"index": torch.arange(4)},
        ([torch.zeros(1, 8, 8)], torch.arange(1)),
        [[], torch.zeros(2)],
    ],
)
def test_what_is_not_misread(batch: Any) -> None:
    with RehearsalBuffer(10, num_representatives=1, selection="fifo", label=None) as buffer:
        for _ in range(2):
            augmented = buffer.update(batch)
        assert all(
            len(ours) == len(theirs) + 1
            for (_, ours), (_, theirs) in zip(leaves_of(augmented), leaves_of(batch), strict=True)
        )


@dataclasses.dataclass
class Unregistered:
    image: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Unregistered(torch.zeros(2)), "batch is a Unregistered.*register_dataclass makes"),
        ({"text": "a", "label": torch.zeros(2)}, r"batch\['text'\] is a str; .*leave text out"),
        (None, "batch is a NoneType; .*leave out what is no tensor"),
        ({"image": np.zeros(2)}, r"batch\['image'\] is a ndarray; .*torch.as_tensor converts"),
        (UserDict(), "batch is a UserDict; .*torch.as_tensor converts"),
    ],
)
def test_what_is_no_container_of_tensors(batch: Any, message: str) -> None:
    with make_buffer() as buffer, pytest.raises(TypeError, match=message):
        buffer.update(batch)


def strange(kind: str) -> torch.Tensor:
    """Four samples, in a tensor whose values are not all there in memory of its own."""
    plain = torch.zeros(4, 2)
    if kind == "meta":
        return plain.to("meta")
    if kind == "fake":
        from torch._subclasses.fake_tensor import FakeTensorMode

        return FakeTensorMode().from_tensor(plain)
    if kind == "sparse":
        return plain.to_sparse()
    if kind == "quantised":
        return torch.quantize_per_tensor(plain, 0.1, 0, torch.quint8)
    if kind == "masked":
        return torch.masked.masked_tensor(plain, plain == 0)
    parts = [torch.zeros(number + 1) for number in range(4)]
    return torch.nested.nested_tensor(parts, layout=getattr(torch, kind))


@pytest.mark.filterwarnings("ignore")  # prototypes, and what is deprecated
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("meta", r"is without values; the buffer holds dense tensors only \(it only tells a sha"),
        ("fake", r"is without values; .*it only tells a shape"),
        ("sparse", r"is torch.sparse_coo; .*to_dense\(\) makes it one"),
        ("quantised", r"is quantised, torch.quint8; .*int_repr\(\) or dequantize"),
        ("masked", r"is a masked tensor; .*its mask as two leaves"),
        ("strided", r"is a nested tensor; .*torch.nested.to_padded_tensor pads it"),
    ],
)
def test_tensors_whose_values_are_elsewhere(kind: str, message: str) -> None:
    leaf, labels = strange(kind), torch.arange(4)
    for begins in (False, True):
        with make_buffer(1) as buffer:
            if begins:
                buffer.update((torch.zeros(4, 2), labels))
            with pytest.raises(TypeError, match=r"batch\[0\] " + message):
                buffer.update((leaf, labels))
            assert len(buffer.update((torch.zeros(4, 2), labels))[1]) == (7 if begins else 4)


@pytest.mark.parametrize(
    ("image", "logits", "advice"),
    [
        (torch.zeros(4, 3, 5, 5), torch.zeros(4, 2), r"Convert it, with to\(torch.uint8\), before"),
        (torch.zeros(3, 5, 5).byte(), torch.zeros(2), r"Give a single sample .* unsqueeze\(0\)"),
        (torch.zeros(4, 5, 5).byte(), torch.zeros(4, 2), "Give all samples 3 dimensions"),
        (torch.zeros(4, 3, 6, 5).byte(), torch.zeros(4, 2), "Pad, crop or resize all samples"),
        (
            torch.zeros(4, 3, 5, 5).byte(),
            torch.zeros(4, 3),
            "Where .* as logits .* load it with convert=",
        ),
    ],
)
def test_advice_for_another_form(image: torch.Tensor, logits: torch.Tensor, advice: str) -> None:
    with make_buffer(1) as buffer:
        buffer.update((torch.zeros(4, 3, 5, 5).byte(), torch.arange(4), torch.zeros(4, 2)))
        with pytest.raises(ValueError, match=f"fixed by the first mini-batch. {advice}"):
            buffer.update((image, torch.arange(4), logits))


def test_advice_for_another_form_after_a_load(tmp_path: Path) -> None:
    with make_buffer(1) as buffer:
        buffer.update(tensors(0))
        buffer.save(tmp_path)
    with make_buffer(1) as buffer:
        buffer.load(tmp_path)
        for other in (tensors(1)[0][:, :3], tensors(1)[0].long()):
            with pytest.raises(ValueError, match=r"The buffer was loaded: load with convert= giv"):
                buffer.update((other, tensors(1)[1]))
        buffer.update(tensors(1))
        with pytest.raises(ValueError, match=r"resize all samples to one shape$"):
            buffer.update((tensors(1)[0][:, :3], tensors(1)[1]))


@pytest.mark.parametrize(
    ("labels", "advice"),
    [
        (torch.zeros(4, 1).long(), r"flatten\(\) makes it one number per sample"),
        (torch.zeros(4, 5).long(), "Samples of several classes, .* selection='reservoir', label=N"),
        (torch.zeros(4, 5), "Samples of several classes, and targets that are no class, need a po"),
        (torch.zeros(4), r"Convert class numbers with long\(\); other targets need a policy with"),
        (torch.zeros(4).bool(), r"Convert it with to\(torch.uint8\)"),
    ],
)
def test_advice_for_labels(labels: torch.Tensor, advice: str) -> None:
    with make_buffer(1) as buffer, pytest.raises(ValueError, match=f"which leaf it is. {advice}"):
        buffer.update((torch.zeros(4, 2), labels))
    with RehearsalBuffer(
        20, num_representatives=3, selection="reservoir", label=None
    ) as without_labels:
        without_labels.update((torch.zeros(4, 2), labels))


def test_more_representatives_than_fit_into_memory() -> None:
    many = 10**11
    for options, message in (
        ({"num_representatives": many}, r"^num_representatives=100000000000: a step's"),
        ({"num_representatives": 1, "most_representatives": many}, r"^most_representatives=1000"),
        ({"num_representatives": 1, "num_draws": many}, r"num_representatives=1, num_draws=10000"),
    ):
        with (
            RehearsalBuffer(many, **options) as buffer,
            pytest.raises(MemoryError, match=message + r".* of 16 bytes need 3\d+.\d+ GB .* free$"),
        ):
            buffer.update((torch.zeros(4, 2), torch.arange(4)))


@pytest.mark.parametrize("is_ragged", [False, True])
def test_one_element_out_of_a_tensor_has_any_stride(is_ragged: bool) -> None:
    """Such as the last mini-batch of every eighth sample."""
    labels, values = torch.arange(40)[::8], torch.arange(40.0).view(40, 1).expand(40, 3)[::8, ::3]
    bound = {"capacity_bytes": 4000} if is_ragged else {}
    with RehearsalBuffer(9, num_representatives=2, **bound) as buffer:
        for part in (slice(0, 2), slice(2, 3), slice(3, 5), slice(4, 5)):
            given = values[part]
            lists = [each.expand(1 + int(each == 0)) for each in given]
            found, found_labels = buffer.update((lists if is_ragged else given, labels[part]))
            for value, label in zip(found, found_labels, strict=True):
                assert set(value.tolist()) == {float(label)}
